"""Losing nothing: checkpoints to resume from, saved models, and the record that every run leaves behind.

Every file is written all or nothing: to a temporary file beside it, flushed to the disk, then renamed. Checkpoints and
models hold tensors and plain Python values only and are read with `weights_only=True`, so that no file, whoever made
it, can run code.
"""

import hashlib
import inspect
import io
import json
import os
import pickle
import platform
import subprocess
import uuid
import warnings
import zipfile
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

FORMAT = 1  # of checkpoints and saved models; raised when an older reader would misread a newer file
LAST, PREVIOUS = "last.pt", "previous.pt"


class CheckpointError(RuntimeError):
    """A checkpoint or saved model that cannot be used, or a folder that cannot hold one; the message says why."""


# -- files ---------------------------------------------------------------------------------------------------------


def write_file(path, content, keep_as=None):
    """Write bytes to `path` all or nothing; what was there before is kept under the name `keep_as`."""
    # A name of its own, since another process may be writing to the same folder, from another machine even.
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(part, path)
    except OSError as error:
        error.add_note(f"'{path}' was not written: make room there, or name another folder, and try again")
        part.unlink(missing_ok=True)
        raise


def _serialise(kind, content):
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "kind": kind, **content}, buffer)
    return buffer.getvalue()


class _Damaged(CheckpointError):
    """A file that was read but does not hold what it should."""


def _read(path, kind):
    """Read what `_serialise` made, running none of its code.

    Raises _Damaged when the content is not whole or not of this kind, and CheckpointError when the file cannot be
    read at all, which may pass, or is of a newer version of the project.
    """
    try:
        content = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"'{path}' cannot be read now ({error}): try again") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:  # torch.save writes a zip file with checksums ...
            wrong = file.testzip()
        state = None if wrong else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Damaged(f"'{path}' holds more than tensors and plain values: refused, and nothing was run") from error
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        raise _Damaged(f"'{path}' is damaged ({type(error).__name__})") from error
    if wrong:  # ... which torch.load ignores
        raise _Damaged(f"'{path}' is damaged: the checksum of its part '{wrong}' is wrong")
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise _Damaged(f"'{path}' is not of this project")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"'{path}' has format {state['format']}, and this version of the project reads up to {FORMAT}: "
            "update the project"
        )
    if state.get("kind") != kind:
        raise _Damaged(f"'{path}' is no {kind}")
    return state


# -- checkpoints ---------------------------------------------------------------------------------------------------


def capture(model, optimizer, scaler):
    """The state of everything PyTorch that decides how training goes on, random states included."""
    device = next(model.parameters()).device
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],  # its settings follow from the recipe and the device
        "scaler": scaler.state_dict(),
        "random": {name: get() for name, (get, _) in _random_states(device).items()},
    }


def restore(state, model, optimizer, scaler):
    """Bring all of it back to what `capture` saw, as far as this device has it."""
    device = next(model.parameters()).device
    model.load_state_dict(state["model"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]})
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    for name, (_, put) in _random_states(device).items():
        if name in state["random"]:
            put(state["random"][name])


def _random_states(device):
    states = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    if device.type == "cuda":  # that of the GPU in use, not of the first
        states["cuda"] = partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state, torch.mps.set_rng_state
    return states


def save_checkpoint(folder, state):
    """Write `state` (tensors and plain values only) as the last checkpoint of `folder`, keeping the one before.

    Whatever interrupts it, a whole checkpoint is left: the new one, or the one before. Raises OSError when it cannot
    be written.
    """
    folder = Path(folder)
    write_file(folder / LAST, _serialise("checkpoint", state), keep_as=folder / PREVIOUS)


def load_checkpoint(folder, identity=None):
    """Read the newest whole checkpoint of `folder`: the dict that `save_checkpoint` got, or None if there is none.

    A damaged last one costs one step back, with a warning, and is put aside as `damaged.pt`. identity: what
    `identify_run` says of the run that wants to go on. Raises CheckpointError when the folder cannot be made or
    written, when a checkpoint cannot be read at present, when none is whole, or when the newest is of a newer version
    of the project or of another run, naming what differs.
    """
    folder = Path(folder)
    _check_folder(folder)
    damaged = []
    for path in filter(Path.exists, (folder / LAST, folder / PREVIOUS)):
        try:
            state = _read(path, "checkpoint")
        except _Damaged as error:
            damaged.append(str(error))
            continue
        if identity is not None and state.get("identity") != identity:
            different = _differences(state.get("identity") or {"config": {}}, identity)
            raise CheckpointError(f"'{path}' is of another run: {different}. Name another folder, or undo the change")
        if damaged:
            warnings.warn(f"{damaged[0]}; the one before it is taken", stacklevel=2)
            with suppress(OSError):  # lest the next save keep it in place of the good one
                os.replace(folder / LAST, folder / "damaged.pt")
        return {name: value for name, value in state.items() if name not in ("format", "kind")}
    if damaged:
        raise CheckpointError(f"no checkpoint in '{folder}' is whole: {'; '.join(damaged)}. Delete them to begin anew")
    return None


def _check_folder(folder):
    """Make the folder, try to write to it, and remove what killed processes left half-written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)
        write_file(folder / "probe", b"written")
        (folder / "probe").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"no checkpoints can be written to '{folder}' ({error}): name another folder") from error


def _differences(then, now):
    """Name what differs between two identities."""
    flat = [{**identity["config"], **{k: v for k, v in identity.items() if k != "config"}} for identity in (then, now)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name} was {flat[0].get(name)!r} and is {flat[1].get(name)!r}" for name in names)


# -- what a run is -------------------------------------------------------------------------------------------------


def identify_run(model, train_split, test_split, config, device, normalisation, code):
    """What decides a run's result: a dict of plain values, equal for equal runs.

    The configuration and the batch size it comes to on the device, the network (its class, its layers, the code of its
    classes and of the files they stand in), the data (a SHA-256 of images and labels, in their order), the
    normalisation (as text), and the code of the schedule and of the functions and modules in `code`: those that augment
    and batch images, make the optimizer, normalise and take a step. Code is what it was when first asked for.
    """
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "config": asdict(config),
        "batch size on the device": config.batch_size_on(torch.device(device)),
        "network": f"{type(model).__name__}, {parameters:,} parameters, layers {_hash(f'{model!r} {shapes}')}",
        "network's code": _hash(_network_source(model)),
        "data": data_fingerprint(train_split, test_split),
        "normalisation": normalisation,
        "schedule's code": _hash(_source(type(config).lr_at)),
        **{f"code of {thing.__name__}": _hash(_source(thing)) for thing in code},
    }


@cache  # a file that was changed since says what a restart would run, and not what runs now
def _source(thing):
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # defined where no file holds its text
        return ""


@cache  # as above; the module anew for each class, since one that is loaded again stays the same object
def _class_source(cls):
    """The text of the file that a class stands in, and its own."""
    # A class made in a notebook's cell has a text only method by method.
    own = _source(cls) or "".join(map(_source, filter(inspect.isfunction, vars(cls).values())))
    return _source.__wrapped__(inspect.getmodule(cls)), own


def _network_source(model):
    """The text of the network's classes and of the files they stand in, PyTorch's own left out."""
    classes = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    return "".join(sorted({text for cls in classes for text in _class_source(cls)}))


def _hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def data_fingerprint(train_split, test_split):
    """The first 16 digits of a SHA-256 of both splits' images and labels."""
    digest = hashlib.sha256()
    for array in (train_split.images, train_split.labels, test_split.images, test_split.labels):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.data if array.flags.c_contiguous else array.tobytes())
    return digest.hexdigest()[:16]


def short_hash(identity):
    """Eight digits that name a run."""
    return _hash(json.dumps(identity, sort_keys=True))


def package_versions():
    """Versions of Python and of the packages that shape the numbers."""
    packages = ("torch", "torchvision", "albumentations", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


# -- saved models --------------------------------------------------------------------------------------------------


def save_model(path, model, config, metrics, classes):
    """Write weights for use without training, with the configuration (a Config), metrics (a dict of numbers, such as
    {"test_accuracy": 88.5}) and class names. Raises OSError when it cannot be written."""
    metrics = {name: float(value) for name, value in metrics.items()}
    about = {"network": type(model).__name__, "config": asdict(config), "metrics": metrics, "classes": list(classes)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, _serialise("model", {**about, "model": model.state_dict()}))


def load_model(path, model):
    """Load what `save_model` wrote into `model`, in place, and set it to evaluation mode.

    Returns the rest: a dict with `network`, `config`, `metrics` and `classes`. Raises FileNotFoundError, and
    CheckpointError when the file is damaged, of a newer version of the project, or of another network; the model is
    then left as it was.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no saved model at '{path}': train, or name another file")
    content = _read(path, "model")
    weights = content.pop("model")
    there, here = ({k: tuple(v.shape) for k, v in state.items()} for state in (weights, model.state_dict()))
    if there != here:
        name = next(name for name in {**there, **here} if there.get(name) != here.get(name))
        raise CheckpointError(
            f"'{path}' holds a {content['network']} and does not fit this {type(model).__name__}: '{name}' has shape "
            f"{there.get(name)} there and {here.get(name)} here"
        )
    model.load_state_dict(weights)
    model.eval()
    return {name: value for name, value in content.items() if name not in ("format", "kind")}


# -- records -------------------------------------------------------------------------------------------------------


def count_macs(model):
    """Multiply-accumulates of one forward pass on one (3, 32, 32) image: convolutions and matrix products."""
    # A copy on the CPU in evaluation mode: the count must move neither batch-norm statistics nor random states.
    copy = deepcopy(model).cpu().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def device_name(device):
    """What the device is called: the GPU's name, or the processor's with the number of threads PyTorch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {'GPU (MPS)' if device.type == 'mps' else f'{torch.get_num_threads()} threads'}"


def write_record(path, model, train_split, test_split, config, history, device):
    """Write the record of one run as JSON, all or nothing, and return it as a dict.

    A record of the same history, times included, is left as it is: that run is only shown again. Device, versions and
    commit are those of the moment it is written.

    Its fields: `model` (class name), `width`, `parameters` and `macs` (of one image) of the network; `data` (the
    source, which says so if it is synthetic), `data_fingerprint`, `n_train`, `n_test`; `config` (every number of the
    recipe) and the `batch_size` it came to; `history` (what `fit` returned: accuracies in percent, seconds an epoch);
    `device` (its name); `versions` (of Python and the packages that shape the numbers); `commit` (of the project,
    "-dirty" if files had changed; null outside git); `seconds` (of the whole training, tests included); `finished`
    (UTC).
    """
    record = {
        "model": type(model).__name__,
        "width": getattr(model, "width", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(model),
        "data": test_split.source,
        "data_fingerprint": data_fingerprint(train_split, test_split),
        "n_train": len(train_split),
        "n_test": len(test_split),
        "config": asdict(config),
        "batch_size": config.batch_size_on(torch.device(device)),
        "history": history,
        "device": device_name(device),
        "versions": package_versions(),
        "commit": project_commit(),
        "seconds": round(sum(history["seconds"]), 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON has no words for NaN and infinity: they become null.
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with suppress(OSError, ValueError, KeyError):  # there is none yet, or it is not whole
        if (written := json.loads(path.read_text()))["history"] == record["history"]:
            return written  # the run is only shown again: its record says when and where it ran
    write_file(path, json.dumps(record, indent=1).encode())
    return record


def describe_record(record):
    """One line that sums up a record: epochs, device, time, and the last epoch's accuracies."""
    history = record["history"]
    last = [f"{history[name][-1]:.2f} %" if history[name] else "none" for name in ("train_accuracy", "test_accuracy")]
    return (
        f"{len(history['seconds'])} of {record['config']['epochs']} epochs on {record['data']}, "
        f"{record['device']}, in {record['seconds'] / 60:.1f} minutes: train {last[0]}, test {last[1]}"
    )


def project_commit():
    """The project's commit, with "-dirty" behind it if files have changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        folder = Path(__file__).resolve().parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return None
