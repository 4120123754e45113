"""Functions that the tests run in processes of their own, in order to kill them.

The processes are forked from a server that has imported the modules: they start quickly and share no threads with the
tests.
"""

import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from model_AC import AdvancedCNN
from session8 import data, trainer, training
from session8.checkpoint import save_checkpoint
from session8.config import Config

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


RECIPE = Config.named("one_cycle", epochs=6, batch_size=25, lr=0.02)


def small_training(folder, before_saving=lambda: None):
    """Train on the stand-in with a checkpoint after every step; write the result to folder/result.pt."""
    torch.set_num_threads(1)
    training.REFRESH_SECONDS = 0
    torch.manual_seed(0)
    model = AdvancedCNN(width=0.5)
    history = trainer.fit(
        model, *data.synthetic_cifar10(300, 100), RECIPE, "cpu", checkpoint_dir=folder, checkpoint_seconds=0
    )
    before_saving()
    torch.save({"model": model.state_dict(), "history": history}, Path(folder) / "result.pt")


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
    """Train; from the end of the second epoch on, limit the size of files to 10 kB, as on a full disk."""
    sys.stdout = io.StringIO()  # the log of the tests is a file too
    train_epoch = trainer.Trainer.train_epoch

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def limited(trainer, *arguments, **keywords):
        train_epoch(trainer, *arguments, **keywords)
        if trainer.epoch == 2:
            limit(10_000)

    trainer.Trainer.train_epoch = limited
    small_training(folder, before_saving=lambda: limit(resource.RLIM_INFINITY))


def download(url, folder, md5):
    data.MIRRORS, data.TIMEOUT, data.ARCHIVE_MD5 = (url,), 60, md5
    data.download_archive(folder)
