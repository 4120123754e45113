"""What a run leaves behind: its identity, which names its folder, and its record."""

import hashlib
import inspect
import json
import math
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from session8.checkpoint import write_file
from session8.config import Config
from session8.console import plural
from session8.data import Split
from session8.device import arithmetic, device_name
from session8.network import count_macs, count_parameters, training_pflop

PACKAGE = Path(__file__).resolve().parent
# Source files whose hashes are stored with a run, besides the network's.
SHAPING = ("config", "device", "augment", "loaders", "optim", "state", "training", "evaluation", "distributed")
SOURCES = [PACKAGE / f"{name}.py" for name in SHAPING]
# Read at import: a file that is edited later is not the code that runs.
AS_IMPORTED = {path: path.read_bytes() for path in (PACKAGE.parent / "model_AC.py", *SOURCES) if path.is_file()}
EDITED = "edited since the import"  # stands for the hash of a file that differs from the one that was imported


# -- identity ------------------------------------------------------------------------------------------------------


def run_identity(
    model: nn.Module,
    train_split: Split,
    test_split: Split,
    config: Config,
    device: torch.device,
    optimizer: torch.optim.Optimizer,
    transform,
) -> dict:
    """Return what defines a run, as a dict of plain values, besides the weights that it starts from.

    Source code is not part of it: see `source_hashes`.
    """
    shapes = {name: list(value.shape) for name, value in model.state_dict().items() if torch.is_tensor(value)}
    return {
        "config": asdict(config),
        "batch size on the device": config.batch_size_on(device),
        "network": f"{type(model).__name__} with {count_parameters(model):,} parameters, shapes {short_hash(shapes)}",
        "optimizer": type(optimizer).__name__,
        "data": data_fingerprint(train_split, test_split),
        "augmentation": " ".join(repr(transform).split()),
    }


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash, of eight hexadecimal digits, of the norms of all weights and buffers.

    Norms are rounded to four digits, because the last bits of initial weights depend on the processor.
    """
    norms = {}
    for name, value in model.state_dict().items():
        if torch.is_tensor(value):  # others cannot be saved: `check_savable` says so
            wide = value.detach().cpu().to(torch.complex128 if value.is_complex() else torch.float64)
            norms[name] = f"{torch.linalg.vector_norm(wide).item():.4g}"
    return short_hash(norms)


def was_trained(model: nn.Module) -> bool:
    """Return whether batch norm has counted batches. A network without batch norm counts as not trained."""
    return any(int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked"))


def short_hash(value) -> str:
    """Return eight hexadecimal digits of a SHA-256 of a plain value, such as an identity."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def data_fingerprint(train_split: Split, test_split: Split) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 of the images and labels of both splits, in order."""
    digest = hashlib.sha256()
    for array in (train_split.images, train_split.labels, test_split.images, test_split.labels):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.data if array.flags.c_contiguous else array.tobytes())
    return digest.hexdigest()[:16]


# -- environment ---------------------------------------------------------------------------------------------------


def environment(model: nn.Module, config: Config, device: torch.device | str) -> dict:
    """Return where a run trains: device, arithmetic, versions, commit, source hashes and the time."""
    return {
        "device": device_name(device),
        "arithmetic": arithmetic(config.precision, device),
        "versions": package_versions(),
        "commit": project_commit(),
        "sources": source_hashes(model),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def source_hashes(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of each source file that shapes the result: {file name: hexadecimal digits}.

    The hash is EDITED if a file has changed since it was imported: a restart is needed to know which code runs. The
    network's file is one of them; for a network that is defined in a notebook, it is the source of its methods. The
    layers have an entry too, the hash of the model as `print` shows it.
    """
    network = type(model)
    file = getattr(sys.modules.get(network.__module__), "__file__", None)
    hashes = {f"layers of {network.__name__}": _sha256(repr(model).encode())}
    if file is None:
        methods = [method for method in vars(network).values() if inspect.isfunction(method)]
        with suppress(OSError):  # code that was never in a cell
            hashes[f"{network.__name__} in a notebook"] = _sha256("".join(map(inspect.getsource, methods)).encode())
    files = {f"session8/{path.name}": path for path in SOURCES}
    for name, path in {**({Path(file).name: Path(file).resolve()} if file else {}), **files}.items():
        on_disk = path.read_bytes() if path.is_file() else b""
        hashes[name] = _sha256(on_disk) if AS_IMPORTED.setdefault(path, on_disk) == on_disk else EDITED
    return hashes


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def changes(then: dict, now: dict) -> list[str]:
    """Return the names of versions, source files and settings in which two environments differ."""

    def facts(one):
        settings = {name: one.get(name) for name in ("device", "arithmetic", "augmentation", "world_size")}
        return {**one["versions"], **one["sources"], **settings}

    then, now = facts(then), facts(now)
    return sorted(name for name in {**then, **now} if then.get(name) != now.get(name))


@cache
def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape the result: {name: version}."""
    packages = ("torch", "torchvision", "albumentations", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


@cache  # a later `git checkout` does not change the code that runs
def project_commit() -> str | None:
    """Return the project's commit, with "-dirty" appended if files have changed; None outside git.

    In a repository that does not track the project, such as one that a copy lies in, it is None as well.
    """

    def git(*arguments):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


# -- the record ----------------------------------------------------------------------------------------------------


def write_record(
    path: Path | str,
    model: nn.Module,
    train_split: Split,
    test_split: Split,
    config: Config,
    history: dict,
    device: torch.device | str,
    views: dict[int, float] | None = None,
) -> dict:
    """Write the record of a run as JSON, atomically, and return it as a dict.

    views: the test accuracy with several views of each image, from `accuracy_by_views`.

    Fields:
        model, width, parameters, macs: class name and size of the network; MACs are per image of 32 by 32 pixels.
        pflop: the operations of training, from `training_pflop`. It and macs are None if they cannot be counted.
        data, data_fingerprint, n_train, n_test: the source of the images, which says if they are synthetic.
        config, batch_size: the recipe, and the batch size on the device.
        history: lists with a number per epoch, as returned by `fit`; accuracies in percent, seconds per epoch.
        views: test accuracy in percent by number of views of each image, such as {"2": 90.0, "6": 90.3}.
        seconds: of the whole training, with the tests of one view.
        resumed: how often the run was resumed; 0 for a run from start to end.
        initial_weights, trained_before: of the model that training started from.
        transform: the caller's augmentation as text; None if it was the recipe's.
        device, arithmetic, augmentation, versions, commit, sources, started, world_size, devices: of the last start.
            devices has one entry per process.
        first_start: the same of the first start.
    """
    device = torch.device(device)
    run = history.get("run") or {"resumed": 0, "first_start": (now := environment(model, config, device)), **now}
    macs = count_macs(model)
    pflop = training_pflop(model, config, len(train_split), len(history["seconds"]), device)
    record = {
        "model": type(model).__name__,
        "width": getattr(model, "width", None),
        "parameters": count_parameters(model),
        "macs": None if math.isnan(macs) else macs,  # JSON has no NaN
        "pflop": None if math.isnan(pflop) else round(pflop, 6),
        "data": test_split.source,
        "data_fingerprint": data_fingerprint(train_split, test_split),
        "n_train": len(train_split),
        "n_test": len(test_split),
        "config": asdict(config),
        "batch_size": config.batch_size_on(device),
        "history": {name: values for name, values in history.items() if name != "run"},
        "views": {str(number): accuracy for number, accuracy in (views or {}).items()},
        "seconds": round(sum(history["seconds"]), 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **run,
    }
    write_file(path, json.dumps(record, indent=1).encode())
    return record


def final_metrics(record: dict) -> dict[str, float]:
    """Return the numbers of a record's last epoch by name, and the test accuracies with several views."""
    last = {name: values[-1] for name, values in record["history"].items() if values}
    return last | {views_metric(views): accuracy for views, accuracy in record["views"].items()}


def views_metric(views: int | str) -> str:
    """Return the name of the test accuracy with so many views, in the metadata of saved weights."""
    return "test_accuracy" if views == 1 else f"test_accuracy_{views}_views"


def describe_record(record: dict) -> str:
    """Return a one-line summary of a record: epochs, data, device, time and the last epoch's accuracies."""
    history = record["history"]
    train, test = (
        f"{history[name][-1]:.2f} %" if history[name] else "none" for name in ("train_accuracy", "test_accuracy")
    )
    processes = record.get("world_size", 1)
    device = record["device"] if processes == 1 else f"{plural(processes, 'process')}, {record['device']}"
    return (
        f"{len(history['seconds'])} of {plural(record['config']['epochs'], 'epoch')} on {record['data']}, {device}, "
        f"in {record['seconds'] / 60:.1f} minutes: train {train}, test {test}"
    )
