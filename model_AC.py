"""The network: a small CNN for 32 by 32 images."""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn


class AdvancedCNN(nn.Module):
    """A CNN that looks at the fine grid briefly and thinks on the coarse one.

    Float (B, 3, 32, 32) in, normalised per channel; log-probabilities, float (B, num_classes), out. At width 1 it
    has 0.63 M parameters and takes 40.5 M multiply-accumulates an image.

        part     output             receptive field  M multiply-accumulates
        stem     24 x 31 x 31               2                0.3
        block 1  40 x 15 x 15               9               11.5
        block 2  128 x 7 x 7               23               17.6
        block 3  160 x 3 x 3               51               11.1
        head     10                    the image             0.0

    Why so:
    - The stem is a 2 by 2 convolution without padding: it mixes each pixel with its neighbours for next to nothing,
      and its 31 by 31 output halves to 15, 7 and 3 with little work on padding.
    - Each block is convolution, max-pooling, batch norm, GELU, and again convolution, batch norm, GELU. The pooling
      comes straight after the first convolution, so that everything behind it sees a quarter of the pixels; the
      second convolution mixes what the pooling kept. (The shape of the network of github.com/KellerJordan/
      cifar10-airbench; sizes, stem, head and training are others.)
    - Width grows where pixels are few: a weight in block 3 is used on a twentieth of the positions of one in block 1.
      A 3 by 3 grid is left, of which each position sees (nearly) the whole image.
    - Batch norm takes the place of the convolutions' biases, and keeps the scale of what each layer receives.
    - Global average pooling makes the head small and indifferent to position.
    - Dropout before the dense layer, and of whole channels after each block (Tompson et al. 2015, arXiv:1411.4280),
      keeps 40 epochs at a constant learning rate from learning the training images by heart.

    num_classes: how many outputs. dropout: the share of features dropped before the dense layer, from 0 to below 1;
    half of it is the share of channels dropped after each block. width: multiplies all widths. Raises ValueError for
    values out of range.
    """

    def __init__(self, num_classes=10, dropout=0.2, width=1.0):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; expected at least 2")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected a share from 0 to below 1, for instance 0.2")
        if width <= 0:
            raise ValueError(f"width is {width}; expected a positive factor, for instance 1.0")
        self.width = width
        stem, *widths = (max(8, round(width * channels / 8) * 8) for channels in (24, 40, 128, 160))
        self.stem = nn.Sequential(nn.Conv2d(3, stem, kernel_size=2), nn.GELU())
        self.blocks = nn.Sequential(*(_block(i, o, dropout / 2) for i, o in pairwise([stem, *widths])))
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = x.mean(dim=(2, 3))  # global average pooling
        return F.log_softmax(self.dense(self.dropout(x)), dim=1)


def _block(channels_in, channels_out, dropout):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(channels_out),
        nn.GELU(),
        nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.GELU(),
        nn.Dropout2d(dropout),
    )
