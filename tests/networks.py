"""Small networks for the tests, one of them simple enough to compute by hand."""

import signal

import numpy as np
import torch
from torch import nn

from model_AC import AdvancedCNN
from session8.config import Config
from session8.data import MEAN, STD

CPU = torch.device("cpu")
EXACT = Config(epochs=1, batch_size=32, precision="float32")
# Of 300 images 12 steps per epoch: with momentum and dropout only, and with all that the recipes have.
RECIPES = {
    "default": Config.named("default", epochs=3, batch_size=25),
    "fast": Config.named("fast", epochs=4, batch_size=25, lr=0.02, ema_decay=0.9, cutout=8),
}


class Linear(nn.Module):
    """A linear classifier: no batch norm and no dropout, so that its results can be computed by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3072, 10)

    def forward(self, x):
        return self.head(x.flatten(1)).log_softmax(1)

    def by_hand(self, images):
        """Return the log-probabilities of uint8 (N, 32, 32, 3), computed in NumPy and double precision."""
        x = ((images / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2).reshape(len(images), -1)
        weight, bias = (p.detach().double().numpy() for p in self.head.parameters())
        scores = x @ weight.T + bias
        return scores - np.log(np.exp(scores).sum(1, keepdims=True))


class Logits(Linear):
    """The same classifier with logits as outputs."""

    def forward(self, x):
        return 3 + self.head(x.flatten(1))


class TinyNetwork(nn.Sequential):
    """A fast network with batch norm and dropout, which calls functions of (network, images) before each forward pass.

    `passes` counts those in training, `tests` the others. The trial before training, of two images, is left out.
    """

    def __init__(self, *before, seed=0):
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, 8, 5, stride=2), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout2d(0.1),
            nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.GELU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10),
        )  # fmt: skip
        self.before, self.passes, self.tests = before, 0, 0

    def forward(self, x):
        if len(x) > 2:
            self.passes += self.training
            self.tests += not self.training
            for function in self.before:
                function(self, x)
        return super().forward(x)


def in_step(step, action):
    """Return what TinyNetwork calls `before` a pass: an action in a step of training, counted from 1."""
    return lambda network, images: action(network) if network.training and network.passes == step else None


def in_test(number, action):
    """The same in a test."""
    return lambda network, images: None if network.training or network.tests != number else action(network)


def interrupt(network=None):
    """Do what Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


def small_network(seed=0):
    torch.manual_seed(seed)
    return AdvancedCNN(width=0.5)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
