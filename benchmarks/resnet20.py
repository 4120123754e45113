"""ResNet-20 for CIFAR-10 (He et al. 2015, arXiv:1512.03385, section 4.2), for comparison."""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn


class ResNet20(nn.Module):
    """A 3 by 3 convolution and three stages of three blocks, 16, 32 and 64 channels wide.

    0.27 M parameters, 40.6 M MACs. Weights are initialised as in He et al. (2015, arXiv:1502.01852).

    Shape: float (B, 3, 32, 32), normalised per channel, to log-probabilities, float (B, num_classes).
    """

    def __init__(self, num_classes=10):
        super().__init__()
        self.arguments = {"num_classes": num_classes}
        self.stem = nn.Sequential(_conv3x3(3, 16), nn.BatchNorm2d(16), nn.ReLU())
        channels = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(BasicBlock(i, o) for i, o in pairwise(channels)))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.blocks(self.stem(x)).mean(dim=(2, 3))
        return F.log_softmax(self.head(x), dim=1)


class BasicBlock(nn.Module):
    """Two convolutions with a parameter-free shortcut (option A of the paper)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.added = out_channels - in_channels
        self.residual = nn.Sequential(
            _conv3x3(in_channels, out_channels, self.stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            _conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x):
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))  # zero channels
        return F.relu(self.residual(x) + shortcut)


def _conv3x3(in_channels, out_channels, stride=1):
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv
