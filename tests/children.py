"""What the tests run in processes of their own, to kill them.

The processes are forked from a server that has imported the modules already: they start in a moment, and share no
threads with the tests.
"""

import io
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

from model_AC import AdvancedCNN
from session8 import data as cifar10
from session8 import training as utils
from session8.checkpoint import save_checkpoint

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["children"])


def start(function, *arguments):
    # The server does not take sys.path over from the tests by itself. It starts with the first process.
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
    """Run to the end; the exit code tells whether it raised."""
    process = start(function, *arguments)
    process.join(120)
    assert process.exitcode == 0


RECIPE = utils.Config.one_cycle(epochs=6, batch_size=25, lr=0.02)


def small_training(folder, before_saving=lambda: None):
    """Train on the stand-in, a checkpoint every step, and leave weights and history beside the checkpoints."""
    torch.set_num_threads(1)
    utils.REFRESH_SECONDS = 0
    torch.manual_seed(0)
    model = AdvancedCNN(width=0.5)
    splits = cifar10.synthetic_cifar10(300, 100)
    history = utils.fit(model, *splits, RECIPE, "cpu", folder, checkpoint_minutes=1e-9)
    before_saving()
    torch.save({"model": model.state_dict(), "history": history}, Path(folder) / "result.pt")


def write_checkpoints(folder, number=0):
    """Write checkpoint after checkpoint, each marked through and through by its number, until killed."""
    while True:
        number += 1
        save_checkpoint(folder, {"number": number, "weights": torch.full((500_000,), number)})


def write_checkpoints_and_die(folder, function, call):
    """Write two checkpoints, and be killed when the given call of a function of `os` begins for the third."""
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
    """Train; from the end of the second epoch on no file may grow beyond 10 kB, as if the disk were full."""
    sys.stdout = io.StringIO()  # the tests' own log is a file too
    train_epoch = utils.Run.train_epoch

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def limited(run, *arguments):
        train_epoch(run, *arguments)
        if run.epoch == 2:
            limit(10_000)

    utils.Run.train_epoch = limited
    small_training(folder, before_saving=lambda: limit(resource.RLIM_INFINITY))


def download(url, folder, md5):
    cifar10.MIRRORS, cifar10.SILENCE_SECONDS, cifar10.ARCHIVE_MD5 = (url,), 60, md5
    cifar10.download_archive(folder)
