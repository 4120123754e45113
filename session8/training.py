"""What the notebook works with: training and testing; and, passed on, data, transforms, loaders and plots.

An image's way: uint8 in the split -> a batch of indices with the batch's own seed -> albumentations, image by image
-> a uint8 batch -> on the device: float, normalised, channels_last -> CNN -> log-probabilities -> NLL -> SGD.
"""

import math
import sys
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from session8 import loaders
from session8.checkpoint import (
    CheckpointError,
    capture,
    count_macs,
    describe_record,
    device_name,
    identify_run,
    load_checkpoint,
    load_model,
    package_versions,
    restore,
    save_checkpoint,
    save_model,
    short_hash,
    write_record,
)
from session8.config import RECIPES, Config, autocast, get_device, kernels, memory_format, mixed_precision
from session8.data import CLASSES, MEAN, STD, load_cifar10, validation_split
from session8.loaders import augment, make_loader, test_transforms, train_transforms
from session8.plots import (
    plot_accuracy,
    plot_augmentations,
    plot_calibration,
    plot_class_accuracy,
    plot_confusion,
    plot_grad_cam,
    plot_loss,
    plot_lr_range,
    plot_misclassified,
    plot_predictions,
    plot_samples,
    plot_schedule,
    plot_training,
)

REFRESH_SECONDS = 0.5  # how often the progress bar is refreshed, and the device read


def normalize(images, device):
    """The fused step on the device: uint8 (B, 32, 32, 3) to float32 (B, 3, 32, 32), normalised, in `memory_format`.

    Mean and standard deviation are applied here and nowhere else.
    """
    scale, offset = _scale_and_offset(device)
    # Only CUDA's copy out of pinned memory, which the loader uses there, is safe to leave behind: on MPS, what was
    # copied from may be gone before the copy is made (PyTorch's issue 189690).
    images = images.to(device, non_blocking=images.is_pinned()).float()
    # Seen as NCHW, a contiguous NHWC batch is in channels_last already: there, nothing is moved.
    images = torch.addcmul(offset, images, scale).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=memory_format(device))


@cache
def _scale_and_offset(device):
    # Kept on the device: a copy from the host each step would make a GPU wait. As large as an image: a CPU then
    # computes along whole images, where three values at a time would take three times as long.
    scale, offset = [1 / (255 * std) for std in STD], [-mean / std for mean, std in zip(MEAN, STD, strict=True)]
    return tuple(torch.tensor(values, device=device).expand(32, 32, 3).contiguous() for values in (scale, offset))


def make_optimizer(model, config):
    """SGD as the recipe asks; weight decay applies to weights (two dimensions and more) only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # Unfused, SGD makes the GPU wait in every step that scales the loss for float16.
    fused = next(model.parameters()).is_cuda
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if fused and config.momentum:
        # The fused kernel leaves the momentum of a first step that overflows in float16 as the memory was.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def train_step(model, images, labels, optimizer, scaler, config, device):
    """One step of SGD on images uint8 (B, 32, 32, 3) and labels int64 (B,).

    The label smoothing of `config` is in what is minimised, not in what is reported. Returns the batch's mean NLL and
    number of correct predictions, both on the device.
    """
    labels = labels.to(device, non_blocking=labels.is_pinned())
    with autocast(config, device):
        outputs = model(normalize(images, device))
    # Leaves log-probabilities as they are, and makes them of the scores in which other networks end.
    log_probs = F.log_softmax(outputs.float(), dim=1)
    nll = F.nll_loss(log_probs, labels)
    loss = (1 - config.label_smoothing) * nll - config.label_smoothing * log_probs.mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return nll.detach(), (log_probs.detach().argmax(1) == labels).sum()


def make_scaler(config, device):
    """What keeps gradients in float16 from vanishing; it does nothing in the other types."""
    return torch.amp.GradScaler(device.type, enabled=mixed_precision(config, device) is torch.float16)


class TrainingDiverged(RuntimeError):
    """The loss or a weight is no longer a finite number; the message names the step, the rate and the remedy."""

    def __init__(self, what, epoch, batch_id, lr):
        super().__init__(
            f"{what} in epoch {epoch + 1}, Batch_id={batch_id}, at a learning rate of {lr:.4g}: train with a smaller "
            "lr, or with schedule='one_cycle', which begins with a small one. Earlier checkpoints, if any, are kept."
        )


@dataclass
class Progress:
    """How far an epoch of training has come, in plain numbers."""

    batches: int = 0
    images: int = 0
    loss_sum: float = 0.0  # of the images' NLL
    correct: int = 0
    last_loss: float = 0.0  # mean NLL of the last batch
    seconds: float = 0.0  # spent on it up to the last refresh
    bar: str = ""  # the bar's text, once the epoch's last batch is done

    @property
    def description(self):
        accuracy = 100 * self.correct / self.images
        return f"Train: Loss={self.last_loss:.4f} Batch_id={self.batches - 1} Accuracy={accuracy:.2f}"


def train(model, loader, optimizer, config, device, epoch=0, scaler=None, progress=None, on_refresh=None):
    """Train for one epoch, showing one progress bar.

    The bar's loss is the last batch's mean NLL, its accuracy the epoch's so far. What each step yields stays on the
    device until the bar is refreshed, every REFRESH_SECONDS: a `.item()` every step would make a GPU wait. progress:
    how much of the epoch was done before (the loader must start there); it is brought up to date at each refresh,
    and then on_refresh() is called.

    Returns (loss, accuracy): mean NLL over the images, without label smoothing, and percent correct, both as the
    images came by, augmented and with dropout. Raises TrainingDiverged when a loss is NaN or infinite.
    """
    device = get_device(device)
    scaler = scaler or make_scaler(config, device)
    progress = Progress() if progress is None else progress
    model.train()
    pending, refreshed = [], time.monotonic()
    with tqdm(total=len(loader), initial=progress.batches, file=sys.stdout, mininterval=0, miniters=1) as bar:
        for batch_id, (images, labels) in enumerate(loader, start=progress.batches):
            lr = config.lr_at((epoch + batch_id / len(loader)) / config.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            nll, hits = train_step(model, images, labels, optimizer, scaler, config, device)
            pending.append((nll, hits, lr, len(labels)))
            if time.monotonic() - refreshed > REFRESH_SECONDS or batch_id == len(loader) - 1:
                _settle(progress, pending, epoch)
                bar.set_description(progress.description, refresh=False)
                bar.update(progress.batches - bar.n)
                if on_refresh:
                    on_refresh()
                pending, refreshed = [], time.monotonic()
        bar.set_description(progress.description)
        progress.bar = str(bar)
    return progress.loss_sum / progress.images, 100 * progress.correct / progress.images


def _settle(progress, pending, epoch):
    """Read from the device what the steps since the last refresh left there, and add it to `progress`."""
    losses, hits, rates, sizes = zip(*pending, strict=True)
    for loss, correct, lr, n in zip(
        torch.stack(losses).tolist(), torch.stack(hits).tolist(), rates, sizes, strict=True
    ):
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss became {loss}", epoch, progress.batches, lr)
        progress.batches += 1
        progress.images += n
        progress.loss_sum += loss * n
        progress.correct += correct
        progress.last_loss = loss


@torch.no_grad()
def test(model, loader, config, device):
    """Test in one pass and print the result. Returns (loss, accuracy): mean NLL over the images, percent correct."""
    device = get_device(device)
    model.eval()
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in loader:
        labels = labels.to(device, non_blocking=labels.is_pinned())
        with autocast(config, device):
            outputs = model(normalize(images, device))
        log_probs = F.log_softmax(outputs.float(), dim=1)
        loss_sum += F.nll_loss(log_probs, labels, reduction="sum")
        correct += (log_probs.argmax(1) == labels).sum()
    n = len(loader.dataset)
    loss, accuracy = loss_sum.item() / n, 100 * correct.item() / n
    print(_test_line(loss, accuracy, n), flush=True)
    return loss, accuracy


def _test_line(loss, accuracy, n):
    return f"Test set: Average loss: {loss:.4f}, Accuracy: {round(accuracy * n / 100)}/{n} ({accuracy:.2f}%)\n"


class Run:
    """What training needs and changes as it goes, made from the recipe; its state can be saved and restored."""

    def __init__(self, model, train_split, test_split, config, device, num_workers=None):
        model.to(device, memory_format=memory_format(device))
        self.model, self.config, self.device = model, config, device
        batch_size, transform = config.batch_size_on(device), train_transforms(config.cutout)
        self.train_loader = make_loader(train_split, batch_size, True, config.seed, num_workers, transform, device)
        self.test_loader = make_loader(test_split, 500, train=False, device=device)
        self.optimizer = make_optimizer(model, config)
        self.scaler = make_scaler(config, device)
        self.epoch, self.progress, self.bars = 0, Progress(), []
        names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds")
        self.history = {name: [] for name in names}

    def state(self):
        """Everything that decides how training goes on, in tensors and plain values. (The schedule has no state: it
        is a function of the position.)"""
        position = {"epoch": self.epoch, "progress": asdict(self.progress), "history": self.history, "bars": self.bars}
        return {"versions": self.versions(), **position, **capture(self.model, self.optimizer, self.scaler)}

    def versions(self):
        """What may change the last digits of a result when it changes between two parts of a run."""
        precision = str(mixed_precision(self.config, self.device) or torch.float32).removeprefix("torch.")
        arithmetic = f"{precision} on {self.device.type}"
        return {**package_versions(), "arithmetic": arithmetic, "device": device_name(self.device)}

    def restore(self, state):
        self.epoch, self.progress = state["epoch"], Progress(**state["progress"])
        self.history, self.bars = state["history"], state["bars"]
        restore(state, self.model, self.optimizer, self.scaler)

    def train_epoch(self, on_refresh=None):
        """Train and test one epoch, or what is left of it, and enter it in the history."""
        started = time.perf_counter() - self.progress.seconds

        def refresh():
            self.progress.seconds = time.perf_counter() - started
            if on_refresh:
                on_refresh()

        print(f"Epoch {self.epoch + 1}", flush=True)
        self.train_loader.set_epoch(self.epoch, self.progress.batches)
        trained = train(self.model, self.train_loader, self.optimizer, self.config, self.device, self.epoch,
                        self.scaler, self.progress, refresh)  # fmt: skip
        tested = test(self.model, self.test_loader, self.config, self.device)
        self.check()
        last_step = (len(self.train_loader) - 1) / len(self.train_loader)
        lr, seconds = self.config.lr_at((self.epoch + last_step) / self.config.epochs), time.perf_counter() - started
        if not math.isfinite(tested[0]):
            raise TrainingDiverged(f"the test loss became {tested[0]}", self.epoch, self.progress.batches - 1, lr)
        for values, value in zip(self.history.values(), (*trained, *tested, lr, seconds), strict=True):
            values.append(value)
        self.bars.append(self.progress.bar)
        self.epoch, self.progress = self.epoch + 1, Progress()

    def end_workers(self):
        """End the training loader's workers after one of them died."""
        # Else PyTorch's signal handler raises its error again when the others end, wherever the program is then.
        with suppress(RuntimeError, AttributeError):
            self.train_loader._iterator._shutdown_workers()
        self.train_loader._iterator = None

    def check(self):
        """Raise TrainingDiverged unless every weight, every statistic and all that the optimizer keeps is finite."""
        kept = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [*self.model.state_dict().values(), *filter(torch.is_tensor, kept)]
        if not all(tensor.isfinite().all() for tensor in tensors):
            lr = self.optimizer.param_groups[0]["lr"]
            raise TrainingDiverged("a weight became NaN or infinite", self.epoch, self.progress.batches - 1, lr)

    def print_log(self):
        """Print the lines of the epochs done, from the history."""
        n = len(self.test_loader.dataset)
        for epoch, bar in enumerate(self.bars):
            loss, accuracy = self.history["test_loss"][epoch], self.history["test_accuracy"][epoch]
            print(f"Epoch {epoch + 1}\n{bar}\n{_test_line(loss, accuracy, n)}", flush=True)


def run_folder(model, train_split, test_split, config, device=None, base="runs"):
    """Where a run's files go: a folder in `base` named after a short hash of configuration, network and data.

    So a changed constant begins a new run beside the old one, and an unchanged one goes on with it.
    """
    return Path(base) / short_hash(_identity(model, train_split, test_split, config, get_device(device)))


def _identity(model, train_split, test_split, config, device):
    return identify_run(
        model,
        train_split,
        test_split,
        config,
        device,
        normalisation=f"by mean {MEAN} and standard deviation {STD}",
        code=(loaders, make_optimizer, train_step, normalize),
    )


def fit(
    model, train_split, test_split, config, device=None, checkpoint_dir=None, checkpoint_minutes=5, num_workers=None
):
    """Train `model` in place as `config` says, testing after every epoch.

    The test accuracy is shown and chooses nothing: there is no early stopping and no best epoch. Ctrl-C ends training
    with history and weights as they were after the last whole epoch (in the first of this call: with the weights of
    the moment). The seed also sets PyTorch's global random state, which dropout draws from.

    checkpoint_dir: a folder for checkpoints, one after each epoch and one every checkpoint_minutes within it. Where
    it holds some already, training goes on from the last good one, and a finished run is only shown again; on one
    CPU the result is the same to the bit as without the interruption. num_workers: of the training loader, see
    `make_loader`; the result does not depend on it.

    Returns the history, lists of plain numbers with one entry an epoch: `train_loss` and `test_loss` (mean NLL),
    `train_accuracy` and `test_accuracy` (percent), `lr` (of the epoch's last step), `seconds` (tests included).

    Raises ValueError for a device that is not there, checkpoint_minutes that are not more than 0, and a negative number
    of workers; CheckpointError, before training, when the folder cannot be
    written, holds no whole checkpoint, or one of another configuration, network or data; TrainingDiverged when loss
    or weights are no longer finite; RuntimeError when a worker process dies. A checkpoint that cannot be written
    later (the disk is full, say) is reported, and training goes on.
    """
    device = get_device(device)
    if checkpoint_minutes <= 0:
        raise ValueError(f"checkpoint_minutes is {checkpoint_minutes}; expected more than 0, for instance 5")
    run = Run(model, train_split, test_split, config, device, num_workers)
    sizes = f"{len(train_split):,} images, {len(test_split):,} for testing"
    print(f"Training on {train_split.source}: {sizes}; {config.epochs} epochs, {run.versions()['arithmetic']}")
    torch.manual_seed(config.seed)
    if checkpoint_dir is not None:
        identity = _identity(model, train_split, test_split, config, device)
        state = load_checkpoint(checkpoint_dir, identity)
        if state:
            run.restore(state)
            print(_resumed(run, checkpoint_dir, state))
    print()
    run.print_log()
    saved = time.monotonic()
    whole = None  # the weights after the last whole epoch

    def save():
        nonlocal saved
        run.check()
        written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        try:
            save_checkpoint(checkpoint_dir, {"identity": identity, "written": written, **run.state()})
        except OSError as error:
            print(f"\nNo checkpoint could be written ({error}). Training goes on; the last good one is kept.")
        saved = time.monotonic()

    def save_if_due():
        if checkpoint_dir is not None and time.monotonic() - saved > 60 * checkpoint_minutes:
            save()

    try:
        with kernels(config):
            while run.epoch < config.epochs:
                run.train_epoch(save_if_due)
                whole = deepcopy(model.state_dict())
                if checkpoint_dir is not None:
                    save()
    except KeyboardInterrupt:
        if whole:
            model.load_state_dict(whole)
        print(f"\nInterrupted in epoch {run.epoch + 1}: the history holds the {run.epoch} before it, the weights are "
              f"those {'after them' if whole else 'of this moment'}.", flush=True)  # fmt: skip
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # what a transform raises in a worker is another's fault
            raise
        run.end_workers()
        raise RuntimeError(
            f"a worker process that loads images died in epoch {run.epoch + 1} ({error}). Was memory short? "
            "Run again, with num_workers=0 if it happens twice; with a checkpoint_dir, it goes on from the last one."
        ) from error
    model.eval()
    return run.history


def _resumed(run, folder, state):
    if run.epoch >= run.config.epochs:
        return f"This run is finished: its log is shown again from '{folder}', without training."
    batch, batches = run.progress.batches, len(run.train_loader)
    text = f"Going on from '{folder}', written {state['written']}: epoch {run.epoch + 1}, batch {batch} of {batches}."
    now = run.versions()
    if changed := [f"{name} {then}" for name, then in state["versions"].items() if now.get(name) != then]:
        text += f" The part before was made with {', '.join(changed)}: the result may differ in the last digits."
    return text
