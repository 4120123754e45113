"""Before training: the learning rate range test, and an estimate of the time that training takes."""

import math
import time
from copy import deepcopy
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from session8.augment import normalize
from session8.checkpoint import load_checkpoint
from session8.device import autocast, backend_flags, fork_rng, get_device, synchronize
from session8.trainer import Trainer
from session8.training import averaged_tensors, set_lr, train_step


def estimate_seconds(model, train_split, test_split, config, device=None, checkpoint_dir=None):
    """Estimate how many seconds `fit` will take, from a few steps on a copy of the model.

    The batches are loaded in this process. Model and random states (CPU and CUDA) are unchanged.

    checkpoint_dir: as in `fit`; completed epochs do not count. Returns 0.0 for a finished run, or for a network that
    cannot be copied. Raises CheckpointError
    if the folder cannot be used.
    """
    device = get_device(device)
    state = None if checkpoint_dir is None else load_checkpoint(checkpoint_dir)
    sizes = [config.image_size(epoch) for epoch in range(state["epoch"] if state else 0, config.epochs)]
    if not sizes:
        return 0.0
    if (copy := _copy(model, "time estimate")) is None:
        return 0.0
    trainer = Trainer(copy, train_split, test_split, config, device, num_workers=0)

    def seconds_per_pass(loader, step, steps, warmup_steps):
        batches = islice(loader, steps)
        timed = min(steps, len(loader))
        warmup_steps = min(warmup_steps, timed - 1)
        for done, (images, labels) in enumerate(batches):
            if done == warmup_steps:  # the first steps allocate memory and select kernels
                synchronize(device)
                started = time.perf_counter()
            step(images, labels)
        synchronize(device)
        return len(loader) * (time.perf_counter() - started) / (timed - warmup_steps)

    averaged = None
    if trainer.average is not None:
        averaged = averaged_tensors(trainer.average), averaged_tensors(trainer.model)

    def train_one(size):
        def step(images, labels):
            train_step(trainer.model, images, labels, trainer.optimizer, trainer.scaler, config, device, size=size)
            if averaged:
                get_ema_multi_avg_fn(config.ema_decay)(*averaged, None)

        return step

    def test_one(images, _):
        with torch.no_grad(), autocast(config.precision, device):
            trainer.model(normalize(images, device))

    with fork_rng(device), backend_flags(config):
        trainer.model.train()
        seconds = {
            size: seconds_per_pass(trainer.train_loader, train_one(size), steps=25, warmup_steps=5)
            for size in set(sizes)
        }
        trainer.model.eval()
        test_seconds = seconds_per_pass(trainer.test_loader, test_one, steps=4, warmup_steps=1)
    return sum(seconds[size] + test_seconds for size in sizes)


class LRRange(NamedTuple):
    """Result of `lr_range_test`.

    lr: the learning rates tried, increasing. loss: the smoothed training loss after each. suggestion: a constant
    learning rate, or None if the loss never fell. diverged: whether the loss ended the test.
    """

    lr: list[float]
    loss: list[float]
    suggestion: float | None
    diverged: bool


def lr_range_test(model, train_split, config, device=None, start=1e-4, end=10.0, steps=200, smoothing=0.95):
    """Train while the learning rate grows exponentially from `start` to `end` (Smith 2015, arXiv:1506.01186).

    The loss is an exponential moving average with weight `smoothing` on the past, corrected for its start at zero. The
    test ends early if it is not finite, or more than four times its minimum. The suggestion is the middle of the
    longest valley of the curve, as in fastai's `valley` (Howard and Gugger 2020, arXiv:2002.04688).

    A copy of the model is trained; model and random states (CPU and CUDA) are unchanged.

    Returns an LRRange, an empty one for a network that cannot be copied. Raises ValueError if an argument is out of
    range, or if the first loss is not finite.
    """
    if not 0 < start < end < math.inf:
        raise ValueError(f"start is {start} and end is {end}; expected 0 < start < end, for instance 1e-4 and 10")
    if steps < 2:
        raise ValueError(f"steps is {steps}; expected at least 2, for instance 200")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; expected 0 <= smoothing < 1, for instance 0.95")
    device = get_device(device)
    if (copy := _copy(model, "range test")) is None:
        return LRRange([], [], None, False)
    trainer = Trainer(copy, train_split, train_split, config, device, num_workers=0)
    trainer.model.train()
    rates, losses, average, diverged = [], [], 0.0, False
    with fork_rng(device), backend_flags(config):
        torch.manual_seed(config.seed)
        for step, (images, labels) in enumerate(islice(_endless(trainer.train_loader), steps)):
            lr = start * (end / start) ** (step / (steps - 1))
            set_lr(trainer.optimizer, lr)
            loss, _ = train_step(trainer.model, images, labels, trainer.optimizer, trainer.scaler, config, device)
            average = smoothing * average + (1 - smoothing) * loss.item()
            smoothed = average / (1 - smoothing ** (step + 1))
            if not math.isfinite(smoothed) or smoothed > 4 * min(losses, default=math.inf):
                diverged = True
                break
            rates.append(lr)
            losses.append(smoothed)
    if not rates:
        raise ValueError(f"the first loss is {smoothed}, before any step: the weights or the images are not finite")
    suggestion = rates[_valley(losses)] if min(losses) < losses[0] else None
    return LRRange(rates, losses, suggestion, diverged)


def _copy(model, purpose):
    """Return a copy of a model; None, with a printed reason, if it has none, as with torch.nn.utils.weight_norm."""
    try:
        return deepcopy(model)
    except Exception as error:  # a network may raise any
        print(f"No {purpose}: {type(model).__name__} cannot be copied ({type(error).__name__}: {error}).")
        return None


def _valley(losses):
    """Return the index in the middle of the longest decreasing subsequence of the losses.

    Of several subsequences of this length, the one at the smallest rates is taken.
    """
    losses = np.array(losses)
    length = np.ones(len(losses), int)  # of the longest decreasing subsequence that ends at each index
    before = np.full(len(losses), -1)  # the index that precedes each in it
    for i in range(1, len(losses)):
        lengths = np.where(losses[:i] > losses[i], length[:i], 0)
        if lengths.max() > 0:
            before[i] = lengths.argmax()
            length[i] += lengths.max()
    index = length.argmax()
    for _ in range(length.max() // 2):
        index = before[index]
    return int(index)


def _endless(loader):
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader
