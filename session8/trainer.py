"""A whole run: `fit` trains a recipe from start to end, in one process or several, and resumes it."""

import math
import time
import uuid
import warnings
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from session8 import distributed
from session8.augment import train_transforms
from session8.checkpoint import CheckpointError, Checkpoints, check_writable, differences, rng_state, set_rng_state
from session8.console import plural
from session8.device import arithmetic, computes_in_bfloat16, device_name, get_device, memory_format
from session8.loaders import make_loader
from session8.records import (
    changes,
    edited_sources,
    environment,
    epoch_line,
    print_history,
    run_identity,
    short_hash,
    utc_now,
    weights_fingerprint,
)
from session8.training import (
    TEST_BATCH_SIZE,
    Progress,
    TrainingDiverged,
    add_momentum,
    check_network,
    copy_counters,
    make_optimizer,
    make_scaler,
    test,
    train,
)

METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds")  # per epoch, in the history


class Trainer:
    """The state of a run: model, optimizer, position and history, with its loaders.

    rank, world_size: of the processes that train together. `connect` must then be called before training; it wraps
    `self.model` for the exchange of gradients, as `self.replica`. On CUDA, `self.model` is then a copy of the caller's
    model, with synchronised batch norm.
    """

    def __init__(self, model, train_split, test_split, config, device, num_workers=None, rank=0, world_size=1):
        self.config, self.device = config, get_device(device)
        self.rank, self.world_size = rank, world_size
        if config.precision == "bfloat16" and not computes_in_bfloat16(self.device):
            warnings.warn(
                f"{self.device.type} has no bfloat16 instructions: precision='auto' may be faster", stacklevel=3
            )
        batch_size = config.batch_size_on(self.device)
        model = model.to(self.device, memory_format=memory_format(self.device))
        counters = [int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
        # A network without batch norm is told apart by the fingerprint alone.
        self.start = {"initial_weights": weights_fingerprint(model), "trained_before": any(counters)}
        last = len(train_split) % batch_size or min(batch_size, len(train_split))
        share = last if self.device.type == "cuda" else max(1, last // world_size)  # CUDA: batch norm is synchronised
        check_network(model, config, self.device, share)
        if world_size > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(model))  # a copy, since it changes its argument
        self.model = self.replica = model  # the replica is what takes training steps
        shared = {"device": self.device, "rank": rank, "world_size": world_size}
        self.train_loader = make_loader(
            train_split,
            batch_size,
            seed=config.seed,
            num_workers=num_workers,
            transform=train_transforms(config.cutout, config.flip),
            padding=config.padding,
            crop_padding=config.crop_padding,
            flip=config.flip,
            **shared,
        )
        self.test_loader = make_loader(test_split, TEST_BATCH_SIZE, train=False, **shared)
        self.average = None  # of the weights, which then is what is tested and what `fit` leaves in the model
        if config.ema_decay:
            try:
                self.average = deepcopy(self.model)
            except Exception as error:  # a network may raise any
                raise ValueError(
                    f"ema_decay is {config.ema_decay}, but {type(self.model).__name__} cannot be copied "
                    f"({type(error).__name__}: {error}): set ema_decay=0, or change the network"
                ) from error
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = make_scaler(config, self.device)
        self.epoch, self.progress = 0, Progress()
        self.history = {name: [] for name in (*METRICS, "parts")}
        self.devices = [f"{device_name(self.device)}, {arithmetic(config.precision, self.device)}"]

    def seed(self):
        """Seed PyTorch's global random state, which dropout uses, as a function of the position and the rank."""
        seed = self.config.seed
        if self.world_size > 1 or self.epochs_done > 0:
            position = (seed, self.epoch, self.progress.batches, self.rank)
            seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
        torch.manual_seed(seed)

    def connect(self):
        """Connect the ranks: their gradients are averaged, and they start with the weights of rank 0."""
        if self.world_size > 1:
            self.devices = distributed.gather(self.devices[0])
            self.replica = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def share_statistics(self):
        """Bring the average's counters up to date, and give every rank the batch norm statistics of rank 0."""
        if self.average is not None:
            copy_counters(self.average, self.model)
        if self.world_size > 1:
            distributed.broadcast_buffers(self.model)
            if self.average is not None:
                distributed.broadcast_buffers(self.average)

    @property
    def result(self):
        """The model to test and to keep."""
        return self.model if self.average is None else self.average

    @property
    def epochs_done(self):
        """Epochs done, with the fraction of the current one."""
        return self.epoch + self.progress.batches / len(self.train_loader)

    def state_dict(self):
        """Return everything that determines how training continues, as tensors and plain values.

        Of several processes, all must call it.
        """
        self.share_statistics()
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],  # its settings follow from the recipe and the device
            "scaler": self.scaler.state_dict(),
            "rng": distributed.gather(rng_state(self.device)) if self.world_size > 1 else [rng_state(self.device)],
            "epoch": self.epoch,
            "progress": asdict(self.progress),
            "history": self.history,
        }

    def load_state_dict(self, state):
        """Restore what `state_dict` returned, possibly on another device or with another number of processes."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            average = state["average"]
            if "n_averaged" in average:  # of an AveragedModel, in checkpoints of earlier versions
                average = {name.removeprefix("module."): average[name] for name in average if name != "n_averaged"}
            self.average.load_state_dict(average)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]})
        for parameter, entry in self.optimizer.state.items():
            for name, value in entry.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    entry[name] = torch.empty_like(parameter).copy_(value)  # fused SGD needs the parameter's strides
        add_momentum(self.optimizer)  # the checkpoint may be from before the first step
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.progress = state["epoch"], Progress(**state["progress"])
        self.history = deepcopy(state["history"])
        if self.history["parts"]:
            self.start = {name: self.history["parts"][0].get(name) for name in self.start}
        if len(state["rng"]) == self.world_size:
            set_rng_state(state["rng"][self.rank], self.device)
        else:
            self.seed()

    def environment(self):
        """Return `records.environment`, with the kind of augmentation and every rank's device and arithmetic."""
        part = environment(self.model, self.config, self.device)
        more = {"augmentation": self.train_loader.augmentation, "world_size": self.world_size, "devices": self.devices}
        return {**part, **more}

    def begin_part(self):
        """Note in the history where, and with which versions and code, training continues from here."""
        self.history["parts"].append({"epochs": [self.epochs_done] * 2, **self.start, **self.environment()})
        self.snapshot = deepcopy(self.state_dict())

    def train_epoch(self, on_refresh=None):
        """Train and test the rest of the current epoch and append the result to the history."""
        started = time.perf_counter() - self.progress.seconds

        def refresh():
            self.progress.seconds = time.perf_counter() - started
            self.history["parts"][-1]["epochs"][1] = self.epochs_done
            self.history["parts"][-1]["finished"] = utc_now()
            if on_refresh:
                on_refresh()

        print(epoch_line(self.config, self.epoch), flush=True)
        self.train_loader.set_epoch(self.epoch, self.progress.batches)
        trained = train(
            self.replica, self.train_loader, self.optimizer, self.config, self.device, self.epoch, self.scaler,
            self.progress, refresh, self.average,
        )  # fmt: skip
        self.share_statistics()
        tested = test(self.result, self.test_loader, self.config, self.device)
        lr = self.config.lr_at(self.config.progress(self.epoch + 1 - 0.5 / len(self.train_loader)))  # of the last step
        if not math.isfinite(tested[0]):
            raise TrainingDiverged(f"the test loss became {tested[0]}", self.epoch, self.progress.batches - 1, lr)
        self.check_finite()
        for name, value in zip(METRICS, (*trained, *tested, lr, time.perf_counter() - started), strict=True):
            self.history[name].append(value)
        self.epoch, self.progress = self.epoch + 1, Progress()
        # Replaced in one assignment, so that Ctrl-C never finds weights and history that do not match.
        self.snapshot = deepcopy(self.state_dict())

    def check_finite(self):
        """Raise TrainingDiverged unless all weights, statistics and optimizer states are finite."""
        buffers = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [*self.model.state_dict().values(), *filter(torch.is_tensor, buffers)]
        # One tensor, which is read once: each read waits for the device.
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            lr = self.optimizer.param_groups[0]["lr"]
            raise TrainingDiverged("a weight became NaN or infinite", self.epoch, self.progress.batches - 1, lr)


def run_folder(model, train_split, test_split, config, device=None, base="runs"):
    """Return the folder of a run: `base` and a hash of configuration, network, augmentation, optimizer and data.

    A changed recipe therefore starts a new run, and an unchanged one resumes. model: with the weights that training
    starts from, which are a part of the hash.
    """
    identity = _identity(model, train_split, test_split, config, get_device(device))
    return Path(base) / short_hash({**identity, "initial weights": weights_fingerprint(model)})


def _identity(model, train_split, test_split, config, device):
    optimizer, transform = make_optimizer(model, config), train_transforms(config.cutout, config.flip)
    return run_identity(model, train_split, test_split, config, device, optimizer, transform)


def fit(
    model, train_split, test_split, config, device=None, checkpoint_dir=None, checkpoint_seconds=None, num_workers=None
):
    """Train a model in place with a recipe, and test it after every epoch.

    The test accuracy is only shown: there is no early stopping and no selection of the best epoch. Ctrl-C ends
    training and restores history and weights of the end of the last epoch, or of the start of this call. With
    `config.ema_decay`, the moving average of the weights is tested, and left in the model.

    Under torchrun, or with a process group of the caller's, the processes share each batch (PyTorch's
    DistributedDataParallel) and the test images. All must make the same call. Rank 0 prints and writes checkpoints.
    Each parameter must then take part in each step. On CUDA the model is updated at the end only.

    Args:
        model: any module from float (B, 3, 32, 32) to log-probabilities or logits (B, C).
        train_split, test_split: two Splits.
        config: the recipe. Its seed also sets PyTorch's global random state, which dropout uses.
        device: as in `get_device`; of several processes, each on CUDA uses the GPU of its LOCAL_RANK.
        checkpoint_dir: folder of checkpoints, shared by all processes. If it holds some of the same run, training
            resumes, with any number of processes; a finished run is not trained again. With one process on one CPU the
            result is bitwise equal to an uninterrupted run. The weights of the model are then replaced.
        checkpoint_seconds: least interval between checkpoints, which are written when the progress bar is refreshed
            (0: every time), at the end of training and on Ctrl-C. None: 30, or 300 on Google Drive in Colab.
        num_workers: of the training loader; the result does not depend on it.

    Returns the history, a dict of lists with one number per epoch: `train_loss`, `test_loss` (mean NLL),
    `train_accuracy`, `test_accuracy` (percent), `lr` (of the last step), `seconds` (with the test); and `parts`, the
    uninterrupted parts of the run, each with its range of `epochs` and its `Trainer.environment`.

    Raises ValueError for a device that is not available, a negative checkpoint_seconds or number of workers, and for a
    network that cannot be saved, cannot take the smallest batch, or has not one output per class;
    CheckpointError, before training, if the folder cannot be written or belongs to another run; TrainingDiverged if
    the loss or a weight is not finite; RuntimeError if a worker process dies. With several processes, all ranks raise
    RankError if one of them fails before training, or if their arguments differ.
    """
    with distributed.process_group(device) as device:
        rank, world_size = distributed.rank(), distributed.world_size()
        with distributed.raise_together():
            if checkpoint_seconds is not None and checkpoint_seconds < 0:
                raise ValueError(f"checkpoint_seconds is {checkpoint_seconds}; expected 0 or more, for instance 30")
            trainer = Trainer(model, train_split, test_split, config, device, num_workers, rank, world_size)
            identity = None
            if checkpoint_dir is not None or world_size > 1:
                identity = _identity(model, train_split, test_split, config, trainer.device)
        _check_that_ranks_agree(
            {
                "checkpoint_dir given": checkpoint_dir is not None,
                "device type": trainer.device.type,
                "arithmetic": arithmetic(config.precision, trainer.device),
                "kind of augmentation": trainer.train_loader.augmentation,
                **(identity or {}),
            }
        )
        print(_header(trainer, train_split, test_split))
        trainer.seed()
        trainer.connect()
        checkpoints, state = _load_checkpoints(checkpoint_dir, identity, checkpoint_seconds)
        if state:
            given = trainer.start["initial_weights"]
            trainer.load_state_dict(state)
            print(_resume_message(trainer, checkpoint_dir, state, given))
        else:
            print(_start_message(trainer))
        print()
        print_history(trainer.history, config, len(test_split))
        if trainer.epoch < config.epochs:
            if checkpoint_dir is not None and world_size == 1:  # of several processes, rank 0 has written to it
                check_writable(checkpoint_dir)
            _train_to_the_end(trainer, checkpoints, checkpoint_dir)
        if trainer.result is not model:
            model.load_state_dict(trainer.result.state_dict())
        model.eval()
        return trainer.history


def _train_to_the_end(trainer, checkpoints, folder):
    trainer.begin_part()

    def save_if_due():
        if distributed.broadcast(checkpoints.due()):  # rank 0 decides: each rank has a clock of its own
            state = trainer.state_dict()
            trainer.check_finite()
            checkpoints.save(state)

    try:
        while trainer.epoch < trainer.config.epochs:
            trainer.train_epoch(on_refresh=save_if_due)
            save_if_due()
    except KeyboardInterrupt:
        trainer.load_state_dict(trainer.snapshot)
        print(
            f"\nInterrupted: history and weights are those after {plural(trainer.epochs_done, 'epoch', '.4g')}.",
            flush=True,
        )
    except RuntimeError as error:
        if trainer.world_size > 1:
            error.add_note(
                f"Rank {trainer.rank} of {trainer.world_size}. If another rank ended first, see its message."
            )
        if folder is not None and not isinstance(error, TrainingDiverged):  # which would diverge again
            error.add_note(f"The same call resumes from the last checkpoint in '{folder}'.")
        raise
    checkpoints.save(trainer.snapshot)  # of the last epoch's end; after Ctrl-C, only if no newer checkpoint exists


def _check_that_ranks_agree(settings):
    for rank, other in enumerate(distributed.gather(settings)):
        if rank == 0:
            first = other
        elif other != first:
            raise distributed.RankError(f"rank {rank} differs from rank 0: {differences(first, other)}")


def _load_checkpoints(folder, identity, seconds):
    """Return (checkpoints, state): where rank 0 saves, nowhere on other ranks; and what to resume from, or None."""
    checkpoints = Checkpoints(folder, identity, seconds)
    if folder is None or distributed.world_size() == 1:
        return checkpoints, checkpoints.load()
    rank, mark = distributed.rank(), Path(folder) / f"shared-{distributed.broadcast(uuid.uuid4().hex[:8])}"

    def load():
        if rank > 0 and not mark.exists():
            raise CheckpointError(f"'{folder}' is not the folder of rank 0: use one that all processes share")
        state = checkpoints.load()
        if rank == 0:
            check_writable(folder)
            mark.touch()
        return state

    try:
        state = distributed.rank_0_first(load)  # since loading renames a damaged file
    finally:
        if rank == 0:
            with suppress(OSError):
                mark.unlink(missing_ok=True)
    _check_that_ranks_agree({"checkpoint": state and [state["saved"], state["epoch"], state["progress"]["batches"]]})
    return checkpoints if rank == 0 else Checkpoints(None, identity, seconds), state


def _header(trainer, train_split, test_split):
    sizes = f"{plural(len(train_split), 'image')}, {plural(len(test_split), 'test image')}"
    computed = f"{arithmetic(trainer.config.precision, trainer.device)} on {trainer.device.type}"
    header = (
        f"Training on {train_split.source}: {sizes}; {plural(trainer.config.epochs, 'epoch')}, {computed}, "
        f"augmentation {trainer.train_loader.augmentation}"
    )
    if edited := edited_sources(trainer.model):
        header += (
            f"\nEdited since the import: {', '.join(edited)}. The code in memory trains; restart to use the files."
        )
    if trainer.world_size > 1:
        on_cuda = "Batch norm is synchronised"
        on_cpu = "Batch norm uses each process's share; the running statistics are rank 0's"
        header += (
            f"\n{trainer.world_size} processes share each batch of {trainer.config.batch_size_on(trainer.device)}. "
            f"{on_cuda if trainer.device.type == 'cuda' else on_cpu}."
        )
    return header


def _start_message(trainer):
    message = f"Initial weights: {trainer.start['initial_weights']}"
    return message + ", of a network that was in training mode before" * trainer.start["trained_before"]


def _resume_message(trainer, folder, state, given):
    epochs, changed = trainer.config.epochs, changes(trainer.history["parts"], trainer.environment())
    done = f"{trainer.epochs_done:.4g} of {plural(epochs, 'epoch')}"
    message = f"Resuming from '{folder}', saved {state['saved']}: {done} done."
    if trainer.epoch == epochs:
        message = f"This run is finished, saved {state['saved']} in '{folder}'; its log follows."
    elif len(state["rng"]) != trainer.world_size:
        message += f" It was saved with world size {len(state['rng'])}: dropout draws other numbers from here on."
    started = trainer.start["initial_weights"]
    if started not in (given, None):
        message += f" The run started from the weights {started}, not from those of the network passed, {given}."
    if changed:
        message += f" Changed since: {', '.join(changed)}. To start over instead, delete the folder."
    return message
