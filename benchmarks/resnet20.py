"""ResNet-20 for CIFAR-10, the small network that papers compare with (He et al. 2015, arXiv:1512.03385, 4.2)."""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn


class ResNet20(nn.Module):
    """A 3 by 3 convolution, then three stages of three blocks of two, 16, 32 and 64 channels wide.

    Float (B, 3, 32, 32) in, normalised per channel; log-probabilities, float (B, num_classes), out. 0.27 M
    parameters, 40.6 M multiply-accumulates. The weights begin as in He et al. 2015, arXiv:1502.01852.
    """

    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, 16), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(_Block(i, o) for i, o in pairwise(widths)))
        self.dense = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.blocks(self.stem(x)).mean(dim=(2, 3))
        return F.log_softmax(self.dense(x), dim=1)


class _Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (the paper's option A)."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.stride = 1 if channels_in == channels_out else 2
        self.new = channels_out - channels_in
        self.convolutions = nn.Sequential(
            _convolution(channels_in, channels_out, self.stride),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            _convolution(channels_out, channels_out),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x):
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))  # channels of zeros
        return F.relu(self.convolutions(x) + shortcut)


def _convolution(channels_in, channels_out, stride=1):
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return convolution
