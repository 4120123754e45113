"""Small networks for the tests, one of them simple enough to compute by hand."""

import numpy as np
import torch
from torch import nn

from model_AC import AdvancedCNN
from session8.config import Config
from session8.data import MEAN, STD

CPU = torch.device("cpu")
EXACT = Config(epochs=1, batch_size=32, precision="float32")


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


def small_network(seed=0):
    torch.manual_seed(seed)
    return AdvancedCNN(width=0.5)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
