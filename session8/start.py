"""Before the first step: check the arguments, build loaders and state, load the newest checkpoint, print a summary."""

import warnings
from pathlib import Path

import torch
from torch import nn

from session8 import distributed
from session8.augment import train_transforms
from session8.checkpoint import CheckpointWriter, check_writable, differences, load_checkpoint
from session8.config import Config
from session8.console import plural
from session8.data import Split
from session8.device import arithmetic, computes_in_bfloat16, device_name, get_device, to_device
from session8.evaluation import TEST_BATCH_SIZE, test_line
from session8.loaders import make_loader
from session8.network import check_network
from session8.optim import make_optimizer
from session8.records import EDITED, changes, environment, run_identity, short_hash, was_trained, weights_fingerprint
from session8.state import TrainingState


def prepare(model, train_split, test_split, config, device, checkpoint_dir, checkpoint_seconds, transform, num_workers):
    """Check the arguments, build loaders and state, load the newest checkpoint, and print a summary.

    An error of one rank is raised on all. Returns (TrainingState, training loader, test loader, CheckpointWriter).
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    with distributed.raise_together():
        if checkpoint_seconds is not None and checkpoint_seconds < 0:
            raise ValueError(f"checkpoint_seconds is {checkpoint_seconds}; expected 0 or more, for instance 30")
        if config.precision == "bfloat16" and not computes_in_bfloat16(device):
            warnings.warn(f"{device.type} has no bfloat16 instructions: precision='auto' may be faster", stacklevel=3)
        to_device(model, device)
        share = {"device": device, "rank": rank, "world_size": world_size}
        train_loader = make_loader(
            train_split, config.batch_size_on(device), True, config.seed, num_workers, transform, config=config, **share
        )
        test_loader = make_loader(test_split, TEST_BATCH_SIZE, train=False, **share)
        last = train_loader.batch_size_at(len(train_loader) - 1)
        # On CUDA batch norm is synchronised; elsewhere it has a rank's share of the batch.
        check_network(model, config, device, last if device.type == "cuda" else max(1, last // world_size))
        state = TrainingState(model, config, device)
        identity = _identity(model, train_split, test_split, config, device, transform)
        saved = None
        if rank == 0 and checkpoint_dir is not None:
            saved = load_checkpoint(checkpoint_dir, identity)
            if saved is None or saved["step"] < config.epochs * len(train_loader):
                check_writable(checkpoint_dir)
    now = {
        **environment(model, config, device),
        "augmentation": train_loader.augmentation,
        "world_size": world_size,
        "devices": distributed.gather(f"{device_name(device)}, {arithmetic(config.precision, device)}"),
    }
    settings = {
        "device type": device.type,
        "arithmetic": now["arithmetic"],
        "kind of augmentation": now["augmentation"],
    }
    first, *others = distributed.gather({**settings, **identity})
    for index, other in enumerate(others, start=1):
        if different := differences(first, other):
            raise distributed.RankError(f"rank {index} differs from rank 0: {different}")
    saved = distributed.from_rank_0(saved)

    print(_header(train_split, test_split, config, device, now))
    weights, trained_before = weights_fingerprint(model), was_trained(model)
    if saved is None:
        print(f"Initial weights: {weights}{', of a network that was in training mode before' * trained_before}")
        own = None if transform is None else identity["augmentation"]
        initial = {"initial_weights": weights, "trained_before": trained_before, "transform": own}
        state.history["run"] = {"resumed": 0, **initial, "first_start": now, **now}
    else:
        state.load_state_dict(saved)
        run = state.history["run"]
        print(_resume_message(saved, config, len(train_loader), checkpoint_dir, weights, changes(run, now)))
        if state.step < config.epochs * len(train_loader):
            state.history["run"] = {**run, "resumed": run["resumed"] + 1, **now}
    print()
    for epoch in range(len(state.history["seconds"])):
        _print_epoch(state.history, config, epoch, len(test_split))
    newest = -1 if saved is None else saved["step"]
    folder = checkpoint_dir if rank == 0 else None
    return state, train_loader, test_loader, CheckpointWriter(folder, identity, checkpoint_seconds, newest)


def run_folder(
    model: nn.Module,
    train_split: Split,
    test_split: Split,
    config: Config,
    device: torch.device | str | None = None,
    base: Path | str = "runs",
    transform=None,
) -> Path:
    """Return the folder of a run: `base` and a hash of configuration, network, augmentation, optimizer and data.

    A changed recipe therefore starts a new run, and an unchanged one resumes. model: with the weights that training
    starts from, which are a part of the hash. transform: as in `fit`.
    """
    identity = _identity(model, train_split, test_split, config, get_device(device), transform)
    return Path(base) / short_hash({**identity, "initial weights": weights_fingerprint(model)})


def _identity(model, train_split, test_split, config, device, transform):
    transform = transform or train_transforms(config)
    return run_identity(model, train_split, test_split, config, device, make_optimizer(model, config), transform)


# -- what is printed ------------------------------------------------------------------------------------------------


def _header(train_split, test_split, config, device, now):
    sizes = f"{plural(len(train_split), 'image')}, {plural(len(test_split), 'test image')}"
    lines = [
        f"Training on {train_split.source}: {sizes}; {plural(config.epochs, 'epoch')}, {now['arithmetic']} on "
        f"{device.type}, augmentation {now['augmentation']}"
    ]
    if edited := [name for name, value in now["sources"].items() if value == EDITED]:
        lines.append(f"Edited since the import: {', '.join(edited)}. Restart to be sure that the new code runs.")
    if now["world_size"] > 1:
        on_cuda = "Batch norm is synchronised"
        on_cpu = "Batch norm uses each process's share; the running statistics are those of rank 0"
        lines.append(
            f"{now['world_size']} processes share each batch of {config.batch_size_on(device)}. "
            f"{on_cuda if device.type == 'cuda' else on_cpu}."
        )
    return "\n".join(lines)


def _resume_message(saved, config, steps_per_epoch, folder, weights, changed):
    done = f"{epochs_done(saved['step'], steps_per_epoch)} of {config.epochs} done"
    message = f"Resuming from '{folder}', saved {saved['saved']}: {done}."
    if saved["step"] == config.epochs * steps_per_epoch:
        message = f"This run is finished, saved {saved['saved']} in '{folder}'; its log follows."
    started = saved["history"]["run"]["initial_weights"]
    if started != weights:
        message += f" The run started from the weights {started}, not from those of the network passed, {weights}."
    if changed:
        message += f" Changed since: {', '.join(changed)}. To start over instead, delete the folder."
    return message


def epochs_done(step, steps_per_epoch):
    """Return how far training is, in words: "1.5 epochs"."""
    return plural(step / steps_per_epoch, "epoch", ".4g")


def epoch_line(config, epoch, fraction=0.0, seconds=()):
    """Return the log's first line of an epoch, with an estimate of the time left.

    fraction: of the epoch, that is done. seconds: of each epoch before; if there is none, there is no estimate.
    """
    line = f"Epoch {epoch + 1}"
    if config.low_res_epochs:
        line += f" ({config.image_size(epoch)} by {config.image_size(epoch)} pixels)"
    if seconds:  # progress counts pixels: epochs of small images are shorter
        speed = (config.progress(epoch) - config.progress(epoch - 1)) / seconds[-1]
        left = (1 - config.progress(epoch + fraction)) / speed
        line += f", about {plural(round(left / 60), 'minute') if left >= 90 else plural(round(left), 'second')} left"
    return line


def _print_epoch(history, config, epoch, n_test):
    """Print the results of an epoch that was trained before."""
    loss, accuracy, seconds = (history[name][epoch] for name in ("train_loss", "train_accuracy", "seconds"))
    print(epoch_line(config, epoch))
    print(f"Train set: Average loss: {loss:.4f}, Accuracy: {accuracy:.2f}%, {seconds:.0f} s")
    print(test_line(history["test_loss"][epoch], history["test_accuracy"][epoch], n_test), flush=True)
