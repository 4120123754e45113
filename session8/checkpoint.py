"""Checkpoints to resume from, and saved weights.

Every file is written atomically: to a temporary file, flushed to disk, then renamed. Checkpoints are read with
`weights_only=True` and weights are safetensors files, so no file can run code.
"""

import hashlib
import io
import json
import os
import pickle
import tempfile
import time
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import nn

from session8.config import Config

FORMAT = 4  # of checkpoints; raised when older code would misread newer files
LAST, PREVIOUS = "last.pt", "previous.pt"
INTERVAL, INTERVAL_ON_DRIVE = 30, 300  # seconds; Google Drive keeps every file that is replaced in its trash
DRIVE = Path("/content/drive")  # where Google Colab mounts Google Drive
ABANDONED = 600  # seconds after which a temporary file that nobody writes to belongs to a process that was killed


class CheckpointError(RuntimeError):
    """A checkpoint or saved model cannot be used, or a folder cannot hold one. The message says why."""


class _Damaged(CheckpointError):
    """A file was read, but its content is not valid."""


# -- atomic files ---------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path | str, keep_as: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary binary file beside `path`; at the end of the block it is flushed to disk and renamed to `path`.

    After an exception or Ctrl-C in the block, the temporary file is deleted and `path` is unchanged. What a killed
    process leaves is deleted by a later write. keep_as: new name of the file that was there before.
    """
    path = Path(path)
    with suppress(OSError):  # read-only, or deleted by another process
        for part in path.parent.glob(f"{path.name}.*.part"):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")  # other processes may write the same file
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


def write_file(path: Path | str, content: bytes, keep_as: Path | None = None) -> None:
    """Write bytes to `path` atomically, as `atomic_write` does. Creates the folder if necessary."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, keep_as) as file:
        file.write(content)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path | str, state: dict) -> None:
    """Write `state`, a dict of tensors and plain values, as the last checkpoint of `folder`.

    The previous one is kept. If writing is interrupted at any point, one of the two is intact. Raises OSError if the
    checkpoint cannot be written.
    """
    folder, buffer = Path(folder), io.BytesIO()
    saved = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    torch.save({"format": FORMAT, "saved": saved, **state}, buffer)
    write_file(folder / LAST, buffer.getvalue(), keep_as=folder / PREVIOUS)


class CheckpointWriter:
    """Writes the checkpoints of a run to a folder, or nowhere if it is None. A failure is printed, not raised.

    identity: of the run, from `records.run_identity`. seconds: minimum interval between checkpoints; None: 30, or 300
    on Google Drive in Colab. step: of the newest checkpoint in the folder, -1 if there is none; states of earlier steps
    are not written.
    """

    def __init__(self, folder: Path | str | None, identity: dict, seconds: float | None = None, step: int = -1):
        if seconds is None:
            on_drive = folder is not None and Path(folder).resolve().is_relative_to(DRIVE)
            seconds = INTERVAL_ON_DRIVE if on_drive else INTERVAL
        self.folder, self.identity, self.seconds, self.step = folder, identity, seconds, step
        self.written = time.monotonic()

    def due(self) -> bool:
        """Return whether the interval has passed since the last checkpoint."""
        return self.folder is not None and time.monotonic() - self.written >= self.seconds

    def save(self, state: dict) -> None:
        """Save a state, unless the newest checkpoint is of the same or a later step."""
        if self.folder is None or state["step"] <= self.step:
            return
        try:
            save_checkpoint(self.folder, {"identity": self.identity, **state})
            self.step = state["step"]
        except OSError as error:
            remedy = "free some space, or delete old runs. The previous checkpoint, if any, is unchanged"
            print(f"\nCheckpoint not written to '{self.folder}' ({error}): {remedy}.", flush=True)
        self.written = time.monotonic()


def load_checkpoint(folder: Path | str, identity: dict | None = None) -> dict | None:
    """Read the newest intact checkpoint of `folder`: the dict that was saved, or None if there is none.

    If the last checkpoint is damaged, the previous one takes its place, with a warning.

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
            with suppress(OSError):  # so that the next save does not keep the damaged one in place of the intact one
                os.replace(path, folder / LAST)
        return state
    if damaged:
        raise CheckpointError(f"'{folder}' has no intact checkpoint: {'; '.join(damaged)}. Delete them to start over")
    return None


def check_writable(folder: Path | str) -> None:
    """Raise CheckpointError unless checkpoints can be written to `folder`, which is created if necessary."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
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


def differences(then: dict, now: dict) -> str:
    """Name the entries in which two identities differ, with both values."""
    then, now = ({**identity.get("config", {}), **identity, "config": None} for identity in (then, now))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in names)


# -- saved weights --------------------------------------------------------------------------------------------------


def save_model(path: Path | str, model: nn.Module, config: Config, metrics: dict, classes) -> None:
    """Write a model's weights as a safetensors file, for use without training.

    Its metadata hold the network's class, its constructor arguments (the attribute `arguments`, if it has one), the
    Config, metrics (numbers by name), the class names, and a SHA-256 of the tensors. Raises OSError if the file cannot
    be written, ValueError if the network is the result of torch.compile.
    """
    metrics = {name: float(value) for name, value in metrics.items()}
    about = {"config": asdict(config), "metrics": metrics, "classes": list(classes)}
    write_file(path, _serialize(model, about))


def _serialize(model, about):
    if any(name.startswith("_orig_mod.") for name in model.state_dict()):
        raise ValueError(
            f"{type(model).__name__} is the result of torch.compile, and its weights cannot be loaded into the network "
            "itself: pass the network, which its method compile() compiles in place"
        )
    # Copies: safetensors refuses tensors that share memory, such as tied weights.
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    network = {"network": type(model).__name__, "arguments": getattr(model, "arguments", {})}
    about = {**network, **about, "sha256": _sha256(weights)}
    return safetensors.torch.save(weights, {name: json.dumps(value) for name, value in about.items()})


def check_savable(model: nn.Module) -> None:
    """Raise ValueError unless a model's weights can be saved and loaded again, in a checkpoint and by `save_model`."""
    try:
        _serialize(model, {})
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:  # safetensors, json and torch raise many kinds
        raise ValueError(
            f"{type(model).__name__} cannot be saved ({type(error).__name__}: {error}): its state_dict must hold plain "
            "tensors only, and its attribute `arguments`, if it has one, plain numbers and strings"
        ) from error


def load_model(path: Path | str, model: nn.Module | None = None) -> tuple[nn.Module, dict]:
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
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
