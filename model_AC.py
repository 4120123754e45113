"""AdvancedCNN: a small convolutional network for 32 by 32 images."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# Standard deviation of the response of each unscaled filter of the stem to the normalised training images of CIFAR-10:
# one row per colour direction, one column per spatial pattern (see `_whitening_filters`).
STEM_STD = [
    [3.1705, 0.6279, 0.5754, 0.2351],
    [0.9112, 0.1296, 0.1193, 0.0407],
    [0.4304, 0.0706, 0.0670, 0.0250],
]


class AdvancedCNN(nn.Module):
    """A residual CNN with a fixed whitening stem and three stages. At width 1: 1.05 M parameters, 39.5 M MACs.

    ======== =========== =============== ======
    layer    output      receptive field M MACs
    ======== =========== =============== ======
    stem     24 x 31 x 31              2    0.3
    block 1  32 x 15 x 15             13   10.8
    block 2  96 x 7 x 7               35   14.3
    block 3  192 x 3 x 3              79   14.1
    head     10              whole image    0.0
    ======== =========== =============== ======

    - The stem is a 2 by 2 convolution without padding. Its filters are fixed: they whiten each patch, so that the
      following layers receive decorrelated inputs of equal variance. Its 31 by 31 output halves to 15, 7 and 3.
    - Each block is a `ResidualBlock`. Max pooling follows the first convolution directly, so that the rest of the
      block works on a quarter of the positions.
    - Convolutions start as the identity on their input channels (Dirac initialisation).
    - Batch norm replaces the biases of the blocks' convolutions. Global average pooling keeps the head small.
    - Dropout acts before the head, and on whole channels after each block (Tompson et al. 2015, arXiv:1411.4280).

    Whitening, identity initialisation and the layout of the blocks follow Jordan (2024, arXiv:2404.00498); the
    whitening basis, the sizes and the head differ.

    dropout: probability of dropping a feature before the head, in [0, 1); blocks drop channels with half of it. width:
    factor on the number of channels of the blocks. Raises ValueError if an argument is out of range.

    Shape: float (B, 3, 32, 32), normalised per channel, to log-probabilities, float (B, num_classes).
    """

    def __init__(self, num_classes=10, dropout=0.1, width=1.0):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; expected at least 2")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected 0 <= dropout < 1, for instance 0.1")
        if not width > 0:
            raise ValueError(f"width is {width}; expected a positive number, for instance 1.0")
        self.width = width
        self.arguments = {"num_classes": num_classes, "dropout": dropout, "width": width}
        channels = [24, *(max(24, round(width * n / 8) * 8) for n in (32, 96, 192))]
        self.stem = nn.Sequential(nn.Conv2d(3, 24, kernel_size=2), nn.GELU())
        self.stem[0].weight = nn.Parameter(_whitening_filters(), requires_grad=False)
        self.blocks = nn.Sequential(*(ResidualBlock(i, o, dropout / 2) for i, o in pairwise(channels)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = x.mean(dim=(2, 3))  # global average pooling
        return F.log_softmax(self.head(self.dropout(x)), dim=1)


class ResidualBlock(nn.Module):
    """Convolution, max pooling, batch norm and GELU, then two convolutions with a shortcut (arXiv:1512.03385).

    Shape: (B, in_channels, H, W) to (B, out_channels, H // 2, W // 2).
    """

    def __init__(self, in_channels, out_channels, dropout):
        super().__init__()
        self.downsample = nn.Sequential(
            _conv3x3(in_channels, out_channels),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(out_channels),
            nn.GELU(),
        )
        self.residual = nn.Sequential(
            _conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
            nn.GELU(),
            _conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x):
        x = self.downsample(x)
        return self.dropout(F.gelu(x + self.residual(x)))


def _conv3x3(in_channels, out_channels):
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:in_channels])  # the remaining output channels keep their random weights
    return conv


def _whitening_filters():
    """Return the stem's filters, float (24, 3, 2, 2): 12 whitening filters and their negatives.

    The filters are products of three colour directions (brightness, red minus blue, green minus both) and four
    spatial patterns (constant, two edges, checkerboard). On natural images their responses are nearly uncorrelated,
    so dividing by the standard deviation whitens them. The constant added to the variances limits noise.
    """
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    colours /= colours.norm(dim=1, keepdim=True)
    patterns = torch.tensor([[[1.0, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 2
    basis = torch.einsum("mc,phw->mpchw", colours, patterns)
    filters = (basis / (torch.tensor(STEM_STD).square() + 5e-4).sqrt()[:, :, None, None, None]).flatten(0, 1)
    return torch.cat([filters, -filters])
