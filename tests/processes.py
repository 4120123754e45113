"""Functions that the tests run in processes of their own, in order to kill them.

The processes are forked from a server that has imported the modules: they start quickly and share no threads with the
tests.
"""

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from networks import RECIPES, TinyNetwork

from session8 import data, training
from session8.checkpoint import load_checkpoint, save_checkpoint

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["processes"])


def start(function, *arguments):
    # The server, which starts with the first process, does not inherit sys.path.
    with pytest.MonkeyPatch.context() as patch:
        for folder in (Path(__file__).parent, Path(__file__).parent.parent):
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        process = context.Process(target=function, args=arguments, daemon=True)
        process.start()
    return process


def kill(process):
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def run(function, *arguments):
    """Run a function to its end; fails if it raised."""
    process = start(function, *arguments)
    process.join(120)
    assert process.exitcode == 0


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def modified(folder):
    """Return when the last checkpoint was written; 0 if there is none."""
    try:
        return (folder / "last.pt").stat().st_mtime_ns
    except FileNotFoundError:  # not yet, or being replaced
        return 0


def small_training(folder, recipe, refresh_steps=training.REFRESH_STEPS_ON_CPU, on_epoch=None):
    """Train on the stand-in with a checkpoint at every refresh; write result and log to folder/result.pt."""
    torch.set_num_threads(1)
    training.REFRESH_STEPS_ON_CPU = refresh_steps
    model, splits, log = TinyNetwork(), data.synthetic_cifar10(300, 100), io.StringIO()
    with contextlib.redirect_stdout(log):
        history = training.fit(model, *splits, RECIPES[recipe], "cpu", folder, checkpoint_seconds=0, on_epoch=on_epoch)
    result = {"model": model.state_dict(), "history": history, "log": log.getvalue()}
    torch.save(result, Path(folder) / "result.pt")


def write_checkpoints(folder, number=0):
    """Write checkpoint after checkpoint, each filled with its number, until killed."""
    while True:
        number += 1
        save_checkpoint(folder, {"number": number, "weights": torch.full((500_000,), number)})


def write_checkpoints_and_die(folder, function, call):
    """Write two checkpoints; during the third, die at the given call of a function of `os`."""
    calls, original = 0, getattr(os, function)

    def deadly(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    for number in (1, 2):
        save_checkpoint(folder, {"number": number, "weights": torch.full((500_000,), number)})
    setattr(os, function, deadly)
    save_checkpoint(folder, {"number": 3, "weights": torch.full((500_000,), 3)})


def training_on_a_full_disk(folder):
    """Train; in the second epoch no file may exceed 1 kB, as on a full disk. The log names the checkpoint after it."""

    def limit(history):
        print(f"Kept: step {load_checkpoint(folder)['step']}")
        size = 1000 if len(history["seconds"]) == 1 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    small_training(folder, "default", on_epoch=limit)


def download(url, folder, md5):
    data.MIRRORS, data.TIMEOUT, data.ARCHIVE_MD5 = (url,), 60, md5
    data.download_archive(folder)
