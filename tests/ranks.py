"""What the tests run in several processes: under torchrun (this file is the program), or in a group without a port."""

import contextlib
import io
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from networks import Linear
from session8.trainer import fit

from model_AC import AdvancedCNN
from session8 import checkpoint, data, device, distributed, trainer, training
from session8.config import Config
from session8.data import Split
from session8.loaders import make_loader

# Of 130 images: five batches of 25, and one of 5. With all that a recipe can ask for.
RECIPE = Config(
    epochs=3, batch_size=25, lr=0.02, seed=3, padding="reflect", flip="alternate", low_res_epochs=1, ema_decay=0.9,
    bias_lr_scale=2.0,
)  # fmt: skip
PLAIN = replace(RECIPE, low_res_epochs=0)  # for linear networks
UNEVEN = Config(epochs=1, batch_size=5, lr=0.02, label_smoothing=0.2, precision="float32")  # of 13 images: 5, 5, 3
RESUMED = Config(epochs=3, batch_size=25, lr=0.002, label_smoothing=0.1, precision="float32")
TEST_SIZES = (100, 7, 2)


def splits(n_train=130, n_test=100):
    return data.synthetic_cifar10(n_train, n_test)


class _FailsAt:
    """Calls `what()` in the given training step of this process."""

    def __init__(self, at=0, what=None, seed=0, **sizes):
        torch.manual_seed(seed)
        super().__init__(**sizes)
        self.at, self.what, self.steps = at, what, 0

    def forward(self, x):
        self.steps += self.training
        if self.training and self.steps == self.at:
            self.what()
        return super().forward(x)


class Fails(_FailsAt, Linear):
    pass


class FailingNetwork(_FailsAt, AdvancedCNN):
    """With batch norm and dropout."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, width=0.5, **keywords)


def stop():
    raise RuntimeError("stopped")


def result(model, history):
    return {"weights": model.state_dict(), "history": history}


def train_uneven():
    model = Linear()
    return result(model, fit(model, *splits(13, 20), UNEVEN, "cpu"))


def train_with_the_mean_of_rank_means():
    step, training.train_step = training.train_step, lambda *arguments: step(*arguments[:7])  # without the weight
    try:
        return train_uneven()
    finally:
        training.train_step = step


def test_sizes(**share):
    """Test on splits of several sizes. Returns [(loss, accuracy)]."""
    test_split, results = splits()[1], []
    for n in TEST_SIZES:
        split = Split(test_split.images[:n], test_split.labels[:n], "some")
        loader = make_loader(split, 4, train=False, **share)
        results.append(training.test(Linear(), loader, UNEVEN, torch.device("cpu")))
    return results


def outcome(function, *arguments, **keywords):
    """Return the type and the message of what a call raises, or its result."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        return [type(error).__name__, str(error), list(getattr(error, "__notes__", []))]


# -- in a group of processes ---------------------------------------------------------------------------------------


def join(function, rank, world_size, folder):
    """Call function(rank, world_size, folder) in a group that meets in a file, and save what it returns."""
    torch.set_num_threads(1)
    training.REFRESH_BATCHES = 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/group-{world_size}", rank=rank, world_size=world_size)
    try:
        found = function(rank, world_size, Path(folder))
    finally:
        dist.destroy_process_group()
    torch.save(found, Path(folder) / f"{world_size}-{rank}.pt")


def checks(rank, world_size, folder):
    """Everything that one group can do, one after the other."""
    share = {"rank": rank, "world_size": world_size}
    found = {"uneven": train_uneven(), "mistake": train_with_the_mean_of_rank_means(), "tests": test_sizes(**share)}
    found["gathered"], found["sent"] = distributed.gather(rank * 10), distributed.broadcast(rank + 5)
    found["sum"] = distributed.sum_over_ranks(torch.tensor([1.0, rank])).tolist()

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        model = FailingNetwork(seed=rank)  # rank 0's weights are used
        found["unbroken"] = result(model, fit(model, *splits(), RECIPE, "cpu", folder / f"unbroken-{world_size}"))
    found["printed"], found["random"] = printed.getvalue(), torch.rand(4)

    # Resuming with the same number of processes, and with another.
    every = {"checkpoint_seconds": 0}
    for at in (4, 9):
        outcome(fit, FailingNetwork(at, stop), *splits(), RECIPE, "cpu", folder / f"broken-{world_size}", **every)
    model = FailingNetwork(seed=9)
    found["resumed"] = result(model, fit(model, *splits(), RECIPE, "cpu", folder / f"broken-{world_size}"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model = Fails(10 if world_size == 2 else 0, stop)
        found["passed on"] = outcome(fit, model, *splits(), RESUMED, "cpu", folder / "passed on", **every)
    found["passed on, log"], found["passed on, weights"] = printed.getvalue(), model.state_dict()

    # One rank goes wrong.
    def nan():
        model.head.weight.data[0, 0] = float("nan")

    model = Fails(4 if rank == 1 else 0, nan)
    found["nan"] = outcome(fit, model, *splits(), PLAIN, "cpu", folder / f"nan-{world_size}", **every)
    found["nan, saved"] = checkpoint.load_checkpoint(folder / f"nan-{world_size}")["model"]

    save = checkpoint.save_checkpoint

    def full(*_):
        raise OSError(28, "No space left on device")

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        checkpoint.save_checkpoint = full
        found["full"] = outcome(fit, Linear(), *splits(), PLAIN, "cpu", folder / f"full-{world_size}", **every)
        checkpoint.save_checkpoint = save
    found["full, log"] = printed.getvalue()

    # Bad input on one rank, or on all.
    started = time.monotonic()
    last = rank == world_size - 1
    recipe = replace(PLAIN, lr=0.03) if last else PLAIN
    found["configuration"] = outcome(fit, Linear(), *splits(), recipe, "cpu")
    found["data"] = outcome(fit, Linear(), *splits(130 + last), PLAIN, "cpu")
    found["folder"] = outcome(fit, Linear(), *splits(), PLAIN, "cpu", folder / f"own-{world_size}-{last}")
    found["folder or none"] = outcome(fit, Linear(), *splits(), PLAIN, "cpu", None if last else folder / "x")
    (folder / "a file").touch()
    found["file"] = outcome(fit, Linear(), *splits(), PLAIN, "cpu", folder / "a file" if last else folder / "x")
    found["too many"] = outcome(fit, Linear(), *splits(126), PLAIN, "cpu")  # the last batch has one image
    trainer.arithmetic = lambda *_: "bfloat16" if last else "float32"  # as with GPUs of two generations
    found["arithmetic"] = outcome(fit, Linear(), *splits(), PLAIN, "cpu")
    trainer.arithmetic = device.arithmetic
    load = checkpoint.load_checkpoint
    checkpoint.load_checkpoint = lambda *arguments: {**load(*arguments), "epoch": int(last)}
    model = FailingNetwork()
    found["checkpoint"] = outcome(fit, model, *splits(), RECIPE, "cpu", folder / f"unbroken-{world_size}")
    checkpoint.load_checkpoint = load
    found["device"] = outcome(fit, Linear(), *splits(), PLAIN, "cuda:7" if last else "cpu")
    found["seconds"] = time.monotonic() - started
    found["left"] = sorted(path.name for path in folder.glob("*/shared-*"))
    return found


def continue_alone(folder):
    """Continue, in one process, what two have begun, and stop in the second epoch."""
    model = Fails(3, stop)
    return outcome(fit, model, *splits(), RESUMED, "cpu", Path(folder) / "passed on", checkpoint_seconds=0)


# -- under torchrun ------------------------------------------------------------------------------------------------


def under_torchrun(what, folder):
    folder, rank = Path(folder), int(os.environ["RANK"])
    (folder / f"pid-{os.getpid()}").touch()
    torch.set_num_threads(1)
    training.REFRESH_BATCHES = 1
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def note_the_time():
        (folder / "failed").write_text(str(time.time()))

    def kill():
        note_the_time()
        os.kill(os.getpid(), signal.SIGKILL)

    def fail():
        note_the_time()
        raise ArithmeticError("this rank cannot go on")

    action = {"killed": kill, "raises": fail}.get(what)
    model = FailingNetwork(9 if action and first and rank == 1 else 0, action)  # in the second epoch
    if what == "gpus":
        torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = (lambda: True), (lambda: 1), id
        init = dist.init_process_group
        dist.init_process_group = lambda _, **options: init("gloo", **options)
        note_the_time()
    assert not dist.is_initialized()
    asked = "cuda" if what == "gpus" else "cpu"
    history = fit(model, *splits(), RECIPE, asked, folder / "run", checkpoint_seconds=0)
    assert not dist.is_initialized()
    if rank == 1:
        time.sleep(1)  # a second call must not meet the group that has ended
    fit(model, *splits(), RECIPE, "cpu", folder / "run")
    torch.save(result(model, history), folder / f"result-{rank}.pt")


if __name__ == "__main__":
    under_torchrun(*sys.argv[1:])
