"""Learning rate range test: what constant learning rate suits a network?"""

import math
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import torch
from torch import nn

from session8.config import Config
from session8.data import Split
from session8.device import backend_flags, fork_rng, get_device, to_device
from session8.loaders import make_loader
from session8.optim import make_optimizer, make_scaler, set_lr
from session8.training import train_step


@dataclass
class LRRange:
    """Result of `lr_range_test`."""

    lr: list[float] = field(default_factory=list)
    """The learning rates tried, increasing."""
    loss: list[float] = field(default_factory=list)
    """The smoothed training loss after each."""
    suggestion: float | None = None
    """A constant learning rate, or None if the loss never fell."""
    diverged: bool = False
    """Whether the loss ended the test."""


def lr_range_test(
    model: nn.Module,
    train_split: Split,
    config: Config,
    device: torch.device | str | None = None,
    start: float = 1e-4,
    end: float = 10.0,
    steps: int | None = None,
    smoothing: float | None = None,
    transform=None,
) -> LRRange:
    """Train while the learning rate grows exponentially from `start` to `end` (Smith 2015, arXiv:1506.01186).

    The loss is an exponential moving average with weight `smoothing` on the past, corrected for its start at zero. The
    test ends early if it is not finite, or more than four times its minimum. The suggestion is the middle of the
    longest valley of the curve, as in fastai's `valley` (Howard and Gugger 2020, arXiv:2002.04688).

    steps: by default 200, with batches of more than 128 images as many as 25,600 images give, but at least 50.
    smoothing: by default 0.95 with 200 steps, less with fewer, so that it spans the same range of learning rates.

    A copy of the model is trained; model and random states (CPU and CUDA) are unchanged. transform: as in `fit`.

    Returns an LRRange, an empty one for a network that cannot be copied. Raises ValueError if an argument is out of
    range, or if the first loss is not finite.
    """
    if not 0 < start < end < math.inf:
        raise ValueError(f"start is {start} and end is {end}; expected 0 < start < end, for instance 1e-4 and 10")
    device = get_device(device)
    batch_size = config.batch_size_on(device)
    steps = min(200, max(50, 25_600 // batch_size)) if steps is None else steps
    if steps < 2:
        raise ValueError(f"steps is {steps}; expected at least 2, for instance 200")
    smoothing = 0.95 ** (200 / steps) if smoothing is None else smoothing
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; expected 0 <= smoothing < 1, for instance 0.95")
    try:
        copy = deepcopy(model)
    except Exception as error:  # a network may raise any, for instance with torch.nn.utils.weight_norm
        print(f"No range test: {type(model).__name__} cannot be copied ({type(error).__name__}: {error}).")
        return LRRange()
    to_device(copy, device).train()
    optimizer, scaler = make_optimizer(copy, config), make_scaler(config, device)
    loader = make_loader(train_split, batch_size, True, config.seed, 0, transform, device, config)
    result, average = LRRange(), 0.0
    with fork_rng(device), backend_flags(config):
        torch.manual_seed(config.seed)
        for step, (images, labels) in enumerate(islice(_endless(loader), steps)):
            lr = start * (end / start) ** (step / (steps - 1))
            set_lr(optimizer, lr)
            loss, _ = train_step(copy, images, labels, optimizer, scaler, config, device)
            average = smoothing * average + (1 - smoothing) * loss.item()
            smoothed = average / (1 - smoothing ** (step + 1))
            if not math.isfinite(smoothed) or smoothed > 4 * min(result.loss, default=math.inf):
                result.diverged = True
                break
            result.lr.append(lr)
            result.loss.append(smoothed)
    if not result.lr:
        raise ValueError(f"the first loss is {smoothed}, before any step: the weights or the images are not finite")
    if min(result.loss) < result.loss[0]:
        result.suggestion = result.lr[_valley(result.loss)]
    return result


def _endless(loader):
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


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
