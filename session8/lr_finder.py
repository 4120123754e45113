"""Dry runs: what a few steps on a copy of the network tell before it is trained: how long, and at which rate."""

import math
import time
from copy import deepcopy
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from session8.training import Run, autocast, get_device, kernels, normalize, train_step


def estimate_seconds(model, train_split, test_split, config, device=None):
    """Estimate how many seconds `fit` will take, by timing a few steps on a copy of the model.

    Leaves the model and PyTorch's random states on the CPU and CUDA as they were.
    """
    device = get_device(device)
    run = Run(deepcopy(model), train_split, test_split, config, device)

    def seconds(loader, step, steps):
        times = [time.perf_counter()]
        for (images, labels), _ in zip(loader, range(steps), strict=False):
            step(images, labels).item()  # waits for the device
            times.append(time.perf_counter())
        # The first step allocates memory and chooses kernels: it counts only where there is no other.
        gaps = np.diff(times)
        return len(loader) * float(np.median(gaps[1:] if len(gaps) > 1 else gaps))

    def train_one(images, labels):
        return train_step(run.model, images, labels, run.optimizer, run.scaler, config, device)[0]

    def test_one(images, _):
        with torch.no_grad(), autocast(config, device):
            return run.model(normalize(images, device)).sum()

    with torch.random.fork_rng(range(torch.cuda.device_count())), kernels(config):
        run.model.train()
        train_seconds = seconds(run.train_loader, train_one, steps=30)
        run.model.eval()
        test_seconds = seconds(run.test_loader, test_one, steps=5)
    return config.epochs * (train_seconds + test_seconds)


class LRRange(NamedTuple):
    """What `lr_range_test` measured.

    lr: the rates tried, rising. loss: the smoothed training loss after each, of the same length. suggestion: a peak
    for the "one_cycle" schedule. diverged: whether the test ended because the loss grew, and not for want of steps.
    """

    lr: list[float]
    loss: list[float]
    suggestion: float
    diverged: bool


def lr_range_test(model, train_split, config, device=None, start=1e-4, end=10.0, steps=200, smoothing=0.95):
    """Try how large a learning rate may be: train while it grows from step to step (Smith 2015, arXiv:1506.01186).

    The rate grows exponentially from `start` to `end` in so many steps, one batch each; all else is as `config` says.
    The loss is an exponential moving average with weight `smoothing` on the past, corrected for its start at zero.
    The test stops when it is NaN, infinite, or four times its lowest. Suggested is the rate by which the loss has
    made 95 % of its fall to its first lasting low (see `_suggest`): there "the accuracy slows", in Smith's words.

    A copy of the model is trained, with an optimizer of its own: the model, its optimizer and PyTorch's random states
    on the CPU and CUDA are left as they were. Returns an LRRange. Raises ValueError for a range or number of steps
    that makes no sense, for a network whose first loss is not finite, and when the loss never falls.
    """
    if not 0 < start < end < math.inf:
        raise ValueError(f"start is {start} and end is {end}; expected 0 < start < end, for instance 1e-4 and 10")
    if steps < 2:
        raise ValueError(f"steps is {steps}; expected at least 2, for instance 200")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; expected a number from 0 to below 1, for instance 0.95")
    device = get_device(device)
    run = Run(deepcopy(model), train_split, train_split, config, device)
    run.model.train()
    rates, losses, average = [], [], 0.0
    with torch.random.fork_rng(range(torch.cuda.device_count())), kernels(config):
        torch.manual_seed(config.seed)
        for step, (images, labels) in zip(range(steps), _endlessly(run.train_loader), strict=False):
            lr = start * (end / start) ** (step / (steps - 1))
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            loss, _ = train_step(run.model, images, labels, run.optimizer, run.scaler, config, device)
            average = smoothing * average + (1 - smoothing) * loss.item()
            smoothed = average / (1 - smoothing ** (step + 1))
            diverged = not math.isfinite(smoothed) or smoothed > 4 * min(losses, default=math.inf)
            if diverged:
                break
            rates.append(lr)
            losses.append(smoothed)
    if not rates:
        raise ValueError(f"the first loss is {smoothed}, before any step: the weights or what comes in are not finite")
    if min(losses) == losses[0]:
        raise ValueError(f"the loss never fell below that at start, {start:g}: begin with a smaller rate")
    return LRRange(rates, losses, _suggest(rates, losses), diverged)


def _suggest(rates, losses):
    """The rate by which the loss has made 95 % of its fall to its first lasting low.

    That is a loss which no rate up to three times as large betters, after at least half of the whole fall. Not the
    lowest of all: the loss wavers at large rates, and may dip once more just before training breaks down.
    """
    rates, losses = np.array(rates), np.array(losses)
    ahead = (rates >= rates[:, None]) & (rates <= 3 * rates[:, None])  # a row for each rate
    lasting = losses <= np.where(ahead, losses, np.inf).min(1)
    deep = losses <= (losses[0] + losses.min()) / 2
    low = losses[lasting & deep][0]
    return float(rates[losses <= 0.95 * low + 0.05 * losses[0]][0])


def _endlessly(loader):
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader
