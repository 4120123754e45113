"""The identity of a run, which names its folder, and its record."""

import hashlib
import inspect
import json
import platform
import subprocess
import sys
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.utils.flop_counter import FlopCounterMode

from session8.checkpoint import write_file
from session8.config import RECIPES, Config
from session8.device import arithmetic, device_name

# The files of the package that shape the result of a run; the network's file is added for each model.
SOURCES = ("config.py", "augment.py", "loaders.py", "training.py", "trainer.py", "distributed.py")


# -- identity ------------------------------------------------------------------------------------------------------


def run_identity(model, train_split, test_split, config, device, optimizer, transform):
    """Return what defines a run, as a dict of plain values, besides the weights that it starts from.

    Source code is not part of it: see `source_hashes`.
    """
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    return {
        "config": asdict(config),
        "batch size on the device": config.batch_size_on(device),
        "network": f"{type(model).__name__} with {count_parameters(model):,} parameters, shapes {short_hash(shapes)}",
        "optimizer": type(optimizer).__name__,
        "data": data_fingerprint(train_split, test_split),
        "augmentation": " ".join(repr(transform).split()),
    }


def weights_fingerprint(model):
    """Return eight hexadecimal digits that tell the weights and buffers of a model from others.

    They are of the norm of each tensor, to four digits: the last bits of initial weights depend on the processor.
    """
    norms = {}
    for name, value in model.state_dict().items():
        if not torch.is_tensor(value):  # which cannot be saved: `check_savable` says so
            continue
        wide = value.detach().cpu().to(torch.complex128 if value.is_complex() else torch.float64)
        norms[name] = f"{torch.linalg.vector_norm(wide).item():.4g}"
    return short_hash(norms)


def short_hash(value):
    """Return eight hexadecimal digits of a SHA-256 of a plain value, such as an identity."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def data_fingerprint(train_split, test_split):
    """Return the first 16 hexadecimal digits of a SHA-256 of the images and labels of both splits, in order."""
    digest = hashlib.sha256()
    for array in (train_split.images, train_split.labels, test_split.images, test_split.labels):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.data if array.flags.c_contiguous else array.tobytes())
    return digest.hexdigest()[:16]


# -- environment ---------------------------------------------------------------------------------------------------


def environment(model, config, device):
    """Return the training environment: device, arithmetic, versions, commit, source hashes and the time."""
    return {
        "device": device_name(device),
        "arithmetic": arithmetic(config.precision, device),
        "versions": package_versions(),
        "commit": project_commit(),
        "sources": source_hashes(model),
        "finished": utc_now(),
    }


def utc_now():
    """Return the time in UTC, in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def source_hashes(model):
    """Return the SHA-256 of each source file that shapes the result: {file name: hexadecimal digits}."""
    files = [Path(__file__).with_name(name) for name in SOURCES]
    with suppress(OSError, TypeError):  # a class defined in a notebook cell has no file
        files.insert(0, Path(inspect.getfile(type(model))))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def changes(parts, now):
    """Return the names of versions, source files and settings in which any part of a run differs from `now`."""

    def facts(part):
        settings = {name: part[name] for name in ("device", "arithmetic", "augmentation")}
        return {**part["versions"], **part["sources"], **settings, "processes": part.get("world_size", 1)}

    then, now = [facts(part) for part in parts], facts(now)
    return sorted({name for part in then for name in {**part, **now} if part.get(name) != now.get(name)})


@cache
def package_versions():
    """Return the versions of Python and of the packages that shape the result: {name: version}."""
    packages = ("torch", "torchvision", "albumentations", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def project_commit():
    """Return the project's commit, with "-dirty" appended if files have changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        folder = Path(__file__).resolve().parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# -- the record ----------------------------------------------------------------------------------------------------


def print_history(history, config, n_test):
    """Print the result of each epoch in a history."""
    for epoch, seconds in enumerate(history["seconds"]):
        loss, accuracy = history["train_loss"][epoch], history["train_accuracy"][epoch]
        print(epoch_line(config, epoch))
        print(f"Train set: Average loss: {loss:.4f}, Accuracy: {accuracy:.2f}%, {seconds:.0f} s")
        print(test_line(history["test_loss"][epoch], history["test_accuracy"][epoch], n_test), flush=True)


def epoch_line(config, epoch):
    """Return the log's first line of an epoch: its number and, if the recipe has small images, their size."""
    size = config.image_size(epoch)
    return f"Epoch {epoch + 1}" + (f" ({size} by {size} pixels)" if config.low_res_epochs else "")


def test_line(loss, accuracy, n, views=1):
    """Return the log's line for a test with n images."""
    name = "Test set" if views == 1 else f"Test set, {views} views"
    return f"{name}: Average loss: {loss:.4f}, Accuracy: {round(accuracy * n / 100)}/{n} ({accuracy:.2f}%)\n"


def count_parameters(model):
    """Return the number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model, size=32):
    """Return the multiply-accumulates (MACs) of a forward pass on one (3, size, size) image.

    Counts convolutions and matrix products. The model and the random states are unchanged.
    """
    copy = deepcopy(model).cpu().eval()  # in training mode the pass would update batch norm's statistics
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def training_pflop(model, config, n_train, epochs):
    """Return the floating-point operations of so many epochs in 10^15: 6 per multiply-accumulate and image.

    Two are of the forward pass and four of the backward pass. Each epoch counts at the size of its images; tests do not
    count.
    """
    sizes = [config.image_size(epoch) for epoch in range(epochs)]
    macs = {size: count_macs(model, size) for size in set(sizes)}
    return 6 * n_train * sum(macs[size] for size in sizes) / 1e15


def write_record(path, model, train_split, test_split, config, history, device, views=None):
    """Write the record of a run as JSON, atomically, and return it as a dict.

    views: the test accuracy with several views of each image, from `training.accuracy_by_views`.

    Fields:
        model, width, parameters, macs: class name and size of the network; MACs are per image of 32 by 32 pixels.
        pflop: the operations of training, from `training_pflop`.
        data, data_fingerprint, n_train, n_test: the source of the images, which says if they are synthetic.
        config, batch_size: the recipe, and the batch size on the device.
        history: as returned by `fit`; accuracies in percent, seconds per epoch.
        views: test accuracy in percent by number of views of each image, such as {"2": 90.0, "6": 90.3}.
        seconds: of the whole training, with the tests of one view.
        parts: the uninterrupted parts of the run, each with its range of epochs and its `environment`. A run from start
            to end has one.
        device, arithmetic, versions, commit, sources, finished, world_size, devices: those of the last part. devices
            has one entry per process.
    """
    parts = history.get("parts") or [environment(model, config, device)]
    record = {
        "model": type(model).__name__,
        "width": getattr(model, "width", None),
        "parameters": count_parameters(model),
        "macs": count_macs(model),
        "pflop": round(training_pflop(model, config, len(train_split), len(history["seconds"])), 6),
        "data": test_split.source,
        "data_fingerprint": data_fingerprint(train_split, test_split),
        "n_train": len(train_split),
        "n_test": len(test_split),
        "config": asdict(config),
        "batch_size": config.batch_size_on(device),
        "history": {name: values for name, values in history.items() if name != "parts"},
        "views": {str(number): accuracy for number, accuracy in (views or {}).items()},
        "seconds": round(sum(history["seconds"]), 1),
        **{name: value for name, value in parts[-1].items() if name != "epochs"},
        "parts": parts,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(record, indent=1).encode())
    return record


def final_metrics(record):
    """Return the numbers of a record's last epoch by name, and the test accuracies with several views."""
    last = {name: values[-1] for name, values in record["history"].items() if values}
    return last | {views_metric(views): accuracy for views, accuracy in record["views"].items()}


def views_metric(views):
    """Return the name of the test accuracy with so many views, in the metadata of saved weights."""
    return "test_accuracy" if views == 1 else f"test_accuracy_{views}_views"


def describe_record(record):
    """Return a one-line summary of a record: epochs, data, device, time and the last epoch's accuracies."""
    history = record["history"]
    train, test = (
        f"{history[name][-1]:.2f} %" if history[name] else "none" for name in ("train_accuracy", "test_accuracy")
    )
    processes = record.get("world_size", 1)
    device = record["device"] if processes == 1 else f"{processes} processes, {record['device']}"
    return (
        f"{len(history['seconds'])} of {record['config']['epochs']} epochs on {record['data']}, {device}, "
        f"in {record['seconds'] / 60:.1f} minutes: train {train}, test {test}"
    )


# -- runs side by side ---------------------------------------------------------------------------------------------


def read_runs(base="runs"):
    """Read the records of all runs in a folder, sorted so that runs of one kind are next to each other.

    Each is a record as `write_record` makes it, with four more entries: `folder`, its name; `code`, a hash of source
    files and package versions, empty unless runs with the same settings differ in it; `group`, equal for runs that
    differ in the seed only; `label`: its recipe, and what distinguishes it from this recipe and from other runs of it.
    A damaged or foreign record is skipped, and its path is printed.
    """
    runs, settings, codes = [], [], {}
    for path in sorted(Path(base).glob("*/record.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            facts = _facts(record)
            history, seed = record["history"], record["config"]["seed"]
            numbers = [*history["test_accuracy"], *history["seconds"], record["seconds"], seed]
            texts = record["data"], record["device"]
            if not all(isinstance(value, int | float) for value in numbers):
                raise TypeError("a number is missing")
            if not all(isinstance(value, str) for value in texts):
                raise TypeError("the source of the data or the device is missing")
            same = short_hash([{**facts, "seed": None}, record["data_fingerprint"]])
            code = short_hash([record.get("sources"), record.get("versions")])
            group = short_hash([same, code, record["device"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"'{path}' is skipped: not a record of this project ({type(error).__name__}: {error})")
            continue
        settings.append(same)
        codes.setdefault(same, set()).add(code)
        runs.append({**record, "folder": path.parent.name, "code": code, "group": group})
    for run, same in zip(runs, settings, strict=True):
        if len(codes[same]) == 1:
            run["code"] = ""
    varying = _varying(runs)
    for run in runs:
        run["label"] = _label(run, runs, varying) or run["folder"]
    return sorted(runs, key=lambda run: (run["data"], run["group"], run["config"]["seed"], run["folder"]))


def _recipe(config):
    """Return the name of the recipe that is nearest to a record's config, and the recipe with its number of epochs."""

    def distance(item):
        return sum(config.get(field, value) != value for field, value in item[1].items())

    recipes = {name: asdict(Config.named(name, epochs=config["epochs"])) for name in RECIPES}
    config = {**asdict(Config()), **config}
    return min(recipes.items(), key=distance)


def _facts(record):
    """Return what may differ between runs, apart from their results and devices."""
    names = ("model", "width", "parameters", "arithmetic", "batch_size", "data", "code")
    facts = {name: record.get(name) for name in names}
    facts["processes"] = record.get("world_size", 1)
    done, epochs = len(record["history"]["test_accuracy"]), record["config"]["epochs"]
    facts["epochs done"] = done if done == epochs else f"{done} of {epochs}"
    # A field newer than the record had its default.
    return {"recipe": _recipe(record["config"])[0], **asdict(Config()), **record["config"], **facts}


def _varying(runs):
    """Return the names of the facts in which runs differ, the seed last, without those that the recipe's name implies.

    A recipe's name implies a setting if every run has its recipe's value of it.
    """
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for each in facts for name in each)
    recipes = [_recipe(run["config"])[1] for run in runs]
    as_named = [name for name in names if all(r.get(name) == f.get(name) for r, f in zip(recipes, facts, strict=True))]
    varying = [name for name in names if len({repr(each.get(name)) for each in facts}) > 1 and name not in as_named]
    return sorted(varying, key=lambda name: name == "seed")


def _label(run, runs, varying):
    """Return the label of a run: of the varying facts, those that its recipe does not imply."""
    facts, (name, recipe) = _facts(run), _recipe(run["config"])
    peers = [_facts(other) for other in runs if _recipe(other["config"])[0] == name]

    def implied(fact):
        if fact in recipe and fact != "seed":
            return facts[fact] == recipe[fact]
        return fact != "recipe" and all(peer.get(fact) == facts.get(fact) for peer in peers)

    shown = [fact for fact in varying if facts.get(fact) not in (None, "") and not implied(fact)]
    return ", ".join(f"{fact} {facts[fact]}" for fact in shown)


def runs_table(runs):
    """Return runs as an aligned table, a string: what differs first, then the results.

    runs: from `read_runs`. The mean and the sample standard deviation of the last test accuracy are over the runs of a
    group; a group has one kind of data.
    """
    varying = _varying(runs)
    rows = [[*varying, "test accuracy", "mean ± sd (n)", "seconds", "device", "run"]]
    for run in runs:
        facts, accuracy = _facts(run), run["history"]["test_accuracy"]
        last = [r["history"]["test_accuracy"][-1:] for r in runs if r["group"] == run["group"]]
        group = [value for values in last for value in values]
        spread = f"{mean(group):.2f} ± {stdev(group):.2f} ({len(group)})" if len(group) > 1 else ""
        results = [f"{accuracy[-1]:.2f} %" if accuracy else "none", spread, f"{run['seconds']:,.0f}"]
        rows.append([*(str(facts.get(name)) for name in varying), *results, run["device"], run["folder"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) if runs else "There are no finished runs yet."


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    if len(sys.argv) > 1 and not folder.is_dir():
        sys.exit(f"'{folder}' is not a folder; give one that holds the folders of runs, for instance runs")
    print(runs_table(read_runs(folder)))
