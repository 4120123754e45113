"""Checkpoints to resume from, and saved weights.

Every file is written atomically: to a temporary file, flushed to disk, then renamed. Checkpoints are read with
`weights_only=True` and weights are safetensors files, so no file can run code.
"""

import hashlib
import io
import json
import os
import pickle
import re
import socket
import time
import uuid
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import psutil
import safetensors
import safetensors.torch
import torch

FORMAT = 3  # of checkpoints; raised when older code would misread newer files
LAST, PREVIOUS = "last.pt", "previous.pt"
SECONDS, SECONDS_ON_DRIVE = 30, 300  # between checkpoints; Google Drive keeps every file that is replaced in its trash
DRIVE = Path("/content/drive")  # where Google Colab mounts Google Drive
DAY = 86_400  # seconds: no write takes longer


class CheckpointError(RuntimeError):
    """A checkpoint or saved model cannot be used, or a folder cannot hold one. The message says why."""


class CompiledNetwork(ValueError):
    """The network is the result of torch.compile(model), whose weights have other names than the model's."""


class _Damaged(CheckpointError):
    """A file was read, but its content is not valid."""


@contextmanager
def atomic_write(path, keep_as=None):
    """Open a temporary binary file beside `path`; at the end of the block it is flushed to disk and renamed to `path`.

    After an exception or Ctrl-C in the block, the temporary file is deleted and `path` is unchanged. A killed process
    leaves its temporary file; the next write of `path` on this machine deletes it. keep_as: new name of the file that
    was there before.
    """
    path = Path(path)
    part = _part(path)
    _remove_leftovers(path)
    try:
        with open(part, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(part, path)
    except OSError as error:
        error.add_note(f"'{path}' was not written: free some space or choose another folder, and try again")
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _part(path):
    """Return a unique name for a temporary file of `path`, which tells the machine and the process."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def _remove_leftovers(path):
    """Delete the temporary files of `path` that killed processes have left."""
    pattern = re.compile(re.escape(path.name) + r"\.(?:(?P<host>.+)-(?P<pid>\d+)-)?[0-9a-f]{8}\.part")
    for part in path.parent.glob("*.part"):
        if match := pattern.fullmatch(part.name):
            pid = int(match["pid"] or 0)
            ended = match["host"] == socket.gethostname() and (pid == os.getpid() or not psutil.pid_exists(pid))
            with suppress(OSError):  # read-only, or deleted by another process
                if ended or time.time() - part.stat().st_mtime > DAY:  # of another host, or of an earlier version
                    part.unlink()


def write_file(path, content, keep_as=None):
    """Write bytes to `path` atomically, as `atomic_write` does."""
    with atomic_write(path, keep_as) as file:
        file.write(content)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def save_checkpoint(folder, state):
    """Write `state`, a dict of tensors and plain values, as the last checkpoint of `folder`.

    The previous one is kept. If writing is interrupted at any point, one of the two is intact. Raises OSError if the
    checkpoint cannot be written.
    """
    folder, buffer = Path(folder), io.BytesIO()
    saved = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    torch.save({"format": FORMAT, "saved": saved, **state}, buffer)
    write_file(folder / LAST, buffer.getvalue(), keep_as=folder / PREVIOUS)


def load_checkpoint(folder, identity=None):
    """Read the newest intact checkpoint of `folder`: the dict that was saved, or None if there is none.

    If the last checkpoint is damaged, it is renamed to `damaged.pt` and the previous one is used, with a warning.

    identity: if given, the checkpoint must have been saved with an equal "identity" (see `records.run_identity`).

    Raises CheckpointError if no checkpoint in the folder is intact, or if the newest is of another version of the
    project or belongs to a different run; the message names what differs.
    """
    folder = Path(folder)
    damaged = []
    for path in filter(os.path.exists, (folder / LAST, folder / PREVIOUS)):
        try:
            state = _read_checkpoint(path)
        except _Damaged as error:
            damaged.append(str(error))
            continue
        if identity is not None and (different := differences(state.get("identity") or {}, identity)):
            raise CheckpointError(
                f"'{path}' belongs to a different run: {different}. Use another folder, or undo the change"
            )
        if damaged:
            warnings.warn(f"{damaged[0]}; using the previous one", stacklevel=2)
            with suppress(OSError):  # so that the next save does not keep it in place of the intact one
                os.replace(folder / LAST, folder / "damaged.pt")
        return state
    if damaged:
        raise CheckpointError(f"'{folder}' has no intact checkpoint: {'; '.join(damaged)}. Delete them to start over")
    return None


class Checkpoints:
    """The checkpoints of a run: loads the last one, and saves new ones at intervals.

    folder: where they are, or None to disable them. identity: of the run, from `records.run_identity`. seconds: minimum
    interval between saves; None: SECONDS, or SECONDS_ON_DRIVE for a folder on Google Drive in Colab.
    """

    def __init__(self, folder, identity, seconds=None):
        if seconds is None:
            on_drive = folder is not None and Path(folder).resolve().is_relative_to(DRIVE)
            seconds = SECONDS_ON_DRIVE if on_drive else SECONDS
        self.folder, self.identity, self.seconds = folder, identity, seconds
        self.newest = (-1, 0)  # position of the newest checkpoint: epochs, and batches of the current one
        self.written = time.monotonic()

    def load(self):
        """Return the state to resume from, or None."""
        state = None if self.folder is None else load_checkpoint(self.folder, self.identity)
        if state:
            self.newest = _position(state)
        return state

    def due(self):
        """Return whether the interval has passed since the last checkpoint."""
        return self.folder is not None and time.monotonic() - self.written >= self.seconds

    def save(self, state):
        """Save a state if it is newer than the newest checkpoint. A failure is printed, and training can continue."""
        if self.folder is None or _position(state) <= self.newest:
            return
        try:
            save_checkpoint(self.folder, {"identity": self.identity, **state})
            self.newest = _position(state)
        except OSError as error:
            print(f"\nCheckpoint not written ({error}). Training continues; the last good one is kept.", flush=True)
        self.written = time.monotonic()


def _position(state):
    return state["epoch"], state["progress"]["batches"]


def check_writable(folder):
    """Raise CheckpointError unless checkpoints can be written to `folder`, which is created if necessary."""
    folder = Path(folder)
    part = _part(folder / LAST)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(part, "wb"):
            pass
        part.unlink()
    except OSError as error:
        raise CheckpointError(f"'{folder}' cannot be written ({error}): choose another folder") from error


def _read_checkpoint(path):
    """Read a checkpoint without running code. Raises _Damaged if its content is not valid."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}): try again, or allow reading it") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            if wrong := file.testzip():  # torch.load ignores the checksums
                raise zipfile.BadZipFile(f"'{wrong}' in it has a wrong checksum")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Damaged(f"'{path}' holds more than tensors and plain values: refused, without running it") from error
    except MemoryError:
        raise
    except Exception as error:  # zipfile and torch raise many kinds
        raise _Damaged(f"'{path}' is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise _Damaged(f"'{path}' is not a checkpoint of this project")
    if state["format"] != FORMAT:
        remedy = "update the project" if state["format"] > FORMAT else "use another folder, or delete it"
        raise CheckpointError(f"'{path}' has format {state['format']}, but this code reads format {FORMAT}: {remedy}")
    return state


def differences(then, now):
    """Name the entries in which two identities differ."""
    flat = [{**identity.get("config", {}), **{k: v for k, v in identity.items() if k != "config"}}
            for identity in (then, now)]  # fmt: skip
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name} was {flat[0].get(name)!r} and is {flat[1].get(name)!r}" for name in names)


def rng_state(device):
    """Return the states of PyTorch's random number generators on the CPU and on `device`: {name: tensor}."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_rng_state(states, device):
    """Restore what `rng_state` returned, as far as this device has the generators."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


# -- saved weights -------------------------------------------------------------------------------------------------


def save_model(path, model, config, metrics, classes):
    """Write a model's weights as a safetensors file, for use without training.

    Its metadata hold the network's class, its constructor arguments (the attribute `arguments`, if it has one), the
    Config, metrics (numbers by name), the class names, and a SHA-256 of the tensors. Raises OSError if the file cannot
    be written.
    """
    about = {
        "config": asdict(config),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "classes": list(classes),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, _serialize(model, about))


def _serialize(model, about):
    if any(name.startswith("_orig_mod.") for name in model.state_dict()):
        raise CompiledNetwork(
            "the network is the result of torch.compile, and its weights cannot be loaded into the network itself: "
            "pass the network, which its method compile() compiles in place"
        )
    # Copies: safetensors refuses tensors that share memory, such as tied weights.
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    network = {"network": type(model).__name__, "arguments": getattr(model, "arguments", {})}
    about = {**network, **about, "sha256": _sha256(weights)}
    return safetensors.torch.save(weights, {name: json.dumps(value) for name, value in about.items()})


def check_savable(model):
    """Raise ValueError unless a model's weights can be saved and loaded again, in a checkpoint and by `save_model`."""
    name = type(model).__name__
    try:
        _serialize(model, {})
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except CompiledNetwork:
        raise
    except Exception as error:  # safetensors, json and torch raise many kinds
        raise ValueError(
            f"{name} cannot be saved ({type(error).__name__}: {error}): its state_dict must hold plain tensors only, "
            "and its attribute `arguments`, if it has one, plain numbers and strings"
        ) from error


def load_model(path, model=None):
    """Load what `save_model` wrote. Returns (model, metadata), the model in evaluation mode.

    model: the network to load the weights into; if None, the AdvancedCNN that the metadata describe is created. The
    metadata are a dict with `network`, `arguments`, `config`, `metrics`, `classes` and `sha256`. Raises
    FileNotFoundError, or CheckpointError if the file is damaged or of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist: train a model, or name another file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a safetensors file, or is damaged ({error})") from error
    if about.get("sha256") != _sha256(weights):
        raise CheckpointError(f"'{path}' is damaged or not of this project: the checksum of its tensors is wrong")
    if model is None:
        if about["network"] != "AdvancedCNN":
            raise CheckpointError(f"'{path}' holds a {about['network']}: pass one as `model`")
        from model_AC import AdvancedCNN  # the only import of the root; every other network is passed in

        model = AdvancedCNN(**about["arguments"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"'{path}' holds a {about['network']} that does not fit this model: {error}") from error
    return model.eval(), about


def _sha256(weights):
    """Hash names, dtypes, shapes and values of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
