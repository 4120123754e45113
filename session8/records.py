"""The identity of a run, which names its folder, and its record."""

import argparse
import hashlib
import inspect
import json
import math
import platform
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from copy import deepcopy
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from types import CodeType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from session8.checkpoint import write_file
from session8.config import RECIPES, Config
from session8.console import command_line, plural
from session8.device import arithmetic, device_name

PACKAGE = Path(__file__).resolve().parent
# The files that shape the result of a run; for another network, its file replaces model_AC.py.
NETWORK = PACKAGE.parent / "model_AC.py"
SOURCES = ("config.py", "augment.py", "loaders.py", "training.py", "trainer.py", "distributed.py")
# Read at import: a file that is edited later is not the code that runs.
AS_IMPORTED = {path: path.read_bytes() for path in (NETWORK, *map(PACKAGE.joinpath, SOURCES)) if path.is_file()}
CHANGED = "changed since it was imported"  # stands in for the hash of a file whose code is not the code that runs


# -- identity ------------------------------------------------------------------------------------------------------


def run_identity(model, train_split, test_split, config, device, optimizer, transform):
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
    """Return the SHA-256 of each source file that shapes the result: {file name: hexadecimal digits}.

    The files are those that were imported. The value is CHANGED if a file was reloaded, or if the functions of the
    network's file differ from those in memory. Constants and default values that were edited before the first call are
    not noticed. A network that is defined in a notebook has an entry of its own, the hash of its methods' source. The
    layers have one too: the hash of the model as `print` shows it.
    """
    hashes, path = {}, _network_file(type(model))
    if path is not None:
        versions = [AS_IMPORTED[path]] if path in AS_IMPORTED else []
        versions += [_first_seen(type(model))]  # of a network, a reloaded file is what runs
        names = {**vars(sys.modules[type(model).__module__]), type(model).__name__: type(model)}
        name = path.name if path.name not in SOURCES else f"{path.name} of the network"
        hashes[name] = _hash_of_running(names, path, versions)
    else:
        with suppress(OSError):  # code that never was in a cell
            hashes[f"{type(model).__name__} in a notebook"] = _sha256(_source_of_methods(model))
    # What nn.Sequential and other classes of libraries are made of is in no file of the project.
    hashes[f"layers of {type(model).__name__}"] = _sha256(repr(model).encode())
    for path in map(PACKAGE.joinpath, SOURCES):
        module = sys.modules.get(f"session8.{path.stem}")
        hashes[path.name] = _hash_of_running(vars(module) if module else {}, path, [AS_IMPORTED[path]])
    return hashes


def edited_sources(model):
    """Return the names of the source files that differ on disk from the code that runs."""
    hashes = set(source_hashes(model).values())
    paths = [path for path in (_network_file(type(model)), *map(PACKAGE.joinpath, SOURCES)) if path and path.is_file()]
    return [path.name for path in paths if _sha256(path.read_bytes()) not in hashes]


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _network_file(network):
    """Return the path of the file that defines a class; None for a notebook."""
    file = getattr(sys.modules.get(network.__module__), "__file__", None)
    return file and Path(file).resolve()


@cache
def _first_seen(network):
    """Return the content of a class's file at the first call: a reloaded class is another one."""
    path = _network_file(network)
    return path.read_bytes() if path.is_file() else b""


def _source_of_methods(model):
    """Return the source of all methods of a model's classes that are defined in its class's notebook, as bytes."""
    classes = {type(module) for module in model.modules() if type(module).__module__ == type(model).__module__}
    methods = [f for c in sorted(classes, key=lambda c: c.__name__) for f in vars(c).values() if inspect.isfunction(f)]
    return "".join(map(inspect.getsource, methods)).encode()


def _hash_of_running(names, path, versions):
    """Return the SHA-256 of the first of `versions` whose functions equal those in `names`, or CHANGED if none does.

    names: {name: object} of a module in memory. versions: contents of its file.
    """
    functions, methods, module = [], set(), names.get("__name__")
    for value in names.values():
        if inspect.isclass(value) and value.__module__ == module:
            methods.update(f"{value.__qualname__}.{name}" for name in vars(value))
            functions += [part for member in vars(value).values() for part in _functions(member)]
        functions += _functions(value)
    here = [f.__code__ for f in functions if f.__module__ == module]
    running = [code for code in here if Path(code.co_filename).name == path.name]  # without a dataclass's methods
    classes = {name.rpartition(".")[0] for name in methods}
    methods.update(code.co_qualname for code in running)  # names that begin with __ are others in the class
    for version_of_file in versions:
        compiled = {}  # several code objects of one name: a property's getter and setter
        with suppress(SyntaxError, ValueError):  # a file that is being edited
            _collect(compile(version_of_file, path, "exec", dont_inherit=True), compiled)
        added = {name for name in compiled if name.rpartition(".")[0] in classes and "<" not in name} - methods
        if not added and all(code in compiled.get(code.co_qualname, ()) for code in running):
            return _sha256(version_of_file)
    return CHANGED


def _functions(value):
    """Return the Python functions in a member of a module or class: of a method, a property, a decorated function."""
    parts = [value.fget, value.fset, value.fdel] if isinstance(value, property) else [value]
    unwrapped = [inspect.unwrap(getattr(part, "__func__", part)) for part in parts]
    return [function for function in unwrapped if inspect.isfunction(function)]


def _collect(code, found):
    """Add the code objects within a code object to {qualified name: [code object]}."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found.setdefault(constant.co_qualname, []).append(constant)
            _collect(constant, found)


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


@cache  # a later `git checkout` does not change the code that runs
def project_commit():
    """Return the project's commit, with "-dirty" appended if files have changed; None outside git.

    In a repository that does not track the project, such as one that a copy lies in, it is None as well.
    """
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(*arguments):
    command = ["git", *arguments]
    return subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.strip()


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
    """Return the multiply-accumulates (MACs) of a forward pass on one (3, size, size) image; NaN if it fails.

    Counts convolutions and matrix products. The model and the random states are unchanged.
    """
    mkldnn = torch.backends.mkldnn.enabled
    try:
        copy = deepcopy(model).cpu().eval()  # in training mode the pass would update batch norm's statistics
        # Fused kernels, such as oneDNN's LSTM, are not counted. With gradients, attention has none.
        torch.backends.mkldnn.enabled = False
        counter = FlopCounterMode(display=False)
        with torch.random.fork_rng([]), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            copy(torch.zeros(1, 3, size, size))
    except Exception:  # a network may raise any
        return math.nan
    finally:
        torch.backends.mkldnn.enabled = mkldnn
    return counter.get_total_flops() // 2


def print_summary(model, size=32):
    """Print a table of the layers for a (3, size, size) image, and the multiply-accumulates (MACs) of one.

    For a network that torchsummary cannot show, print why not, and the number of parameters. The model and the random
    states are unchanged.
    """
    table = StringIO()
    try:
        from torchsummary import summary  # needed here only

        with torch.random.fork_rng([]), redirect_stdout(table):
            summary(deepcopy(model).cpu(), (3, size, size), device="cpu")
        print(table.getvalue(), end="")
    except Exception as error:  # a network may raise any
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"torchsummary cannot show {type(model).__name__} ({reason}).\nParameters: {count_parameters(model):,}")
    macs = count_macs(model, size)
    counted = "cannot be counted" if math.isnan(macs) else f"{macs / 1e6:.3g} million per image"
    print(f"Multiply-accumulates (MACs): {counted}")


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
        pflop: the operations of training, from `training_pflop`. It and macs are None if they cannot be counted.
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
    macs, pflop = count_macs(model), training_pflop(model, config, len(train_split), len(history["seconds"]))
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
    device = record["device"] if processes == 1 else f"{plural(processes, 'process')}, {record['device']}"
    return (
        f"{len(history['seconds'])} of {plural(record['config']['epochs'], 'epoch')} on {record['data']}, {device}, "
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
    facts["trained before"] = record.get("trained_before") or False
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


def main(arguments=None):
    """Print the runs in a folder as a table."""
    parser = argparse.ArgumentParser(prog="python -m session8.records", description="Show runs side by side.")
    parser.add_argument("folder", nargs="?", help="folder of the runs' folders; runs if omitted")
    with command_line():
        folder = parser.parse_args(arguments).folder
        if folder and not Path(folder).is_dir():
            sys.exit(f"'{folder}' is not a folder; give one that holds the folders of runs, for instance runs")
        print(runs_table(read_runs(folder or "runs")))


if __name__ == "__main__":
    main()
