"""The network: AdvancedCNN (hence the file's name), a small CNN for 32 by 32 images."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# How much 2 by 2 patches of CIFAR-10's training images, normalised, vary along each of the stem's filters: standard
# deviations, a row for each mixture of colours and a column for each pattern (see `_whitening`).
STEM_STD = [
    [3.1705, 0.6279, 0.5754, 0.2351],
    [0.9112, 0.1296, 0.1193, 0.0407],
    [0.4304, 0.0706, 0.0670, 0.0250],
]


class AdvancedCNN(nn.Module):
    """A CNN that looks at the fine grid briefly and thinks on the coarse one.

    Float (B, 3, 32, 32) in, normalised per channel; log-probabilities, float (B, num_classes), out. At width 1 it
    has 1.05 M parameters and takes 39.5 M multiply-accumulates an image.

        part     output             receptive field  M multiply-accumulates
        stem     24 x 31 x 31               2                0.3
        block 1  32 x 15 x 15              13               10.8
        block 2  96 x 7 x 7                35               14.3
        block 3  192 x 3 x 3               79               14.1
        head     10                    the image             0.0

    Why so:
    - The stem is a 2 by 2 convolution without padding: its 31 by 31 output halves to 15, 7 and 3 with little work on
      padding. Its filters are fixed: they take a patch apart into brightness, colour and edges, and scale each to
      the same variance. Neighbouring pixels say nearly the same, and the layers behind learn faster from what is new.
    - Each block is convolution, max-pooling, batch norm and GELU, and then two more convolutions beside a shortcut
      (He et al. 2015, arXiv:1512.03385). The pooling comes straight after the first convolution, so that everything
      behind it sees a quarter of the pixels; the others work on what the pooling kept.
    - These convolutions begin as the identity on as many channels as come in (Dirac initialisation), and random on the
      rest: at first, each passes on what it receives. (The shape of the network, whitening and identity are those of
      Jordan 2024, arXiv:2404.00498; sizes, the whitening's basis, head and training are others.)
    - Width grows where pixels are few: a weight in block 3 is used on a twentieth of the positions of one in block 1.
      A 3 by 3 grid is left, of which each position sees (nearly) the whole image.
    - Batch norm takes the place of the blocks' biases, and keeps the scale of what each layer receives.
    - Global average pooling makes the head small and indifferent to position.
    - Dropout before the dense layer, and of whole channels after each block (Tompson et al. 2015, arXiv:1411.4280),
      makes it harder to learn the training images by heart.

    num_classes: how many outputs. dropout: the share of features dropped before the dense layer, from 0 to below 1;
    half of it is the share of channels dropped after each block. width: multiplies the blocks' widths. Raises
    ValueError for values out of range.
    """

    def __init__(self, num_classes=10, dropout=0.1, width=1.0):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; expected at least 2")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected a share from 0 to below 1, for instance 0.1")
        if width <= 0:
            raise ValueError(f"width is {width}; expected a positive factor, for instance 1.0")
        self.width = width
        widths = [max(24, round(width * channels / 8) * 8) for channels in (32, 96, 192)]
        self.stem = nn.Sequential(nn.Conv2d(3, 24, kernel_size=2), nn.GELU())
        self.stem[0].weight = nn.Parameter(_whitening(), requires_grad=False)
        self.blocks = nn.Sequential(*(_Block(i, o, dropout / 2) for i, o in pairwise([24, *widths])))
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = x.mean(dim=(2, 3))  # global average pooling
        return F.log_softmax(self.dense(self.dropout(x)), dim=1)


def _whitening():
    """The stem's filters, float (24, 3, 2, 2): 12 that whiten a patch, and the same 12 with their signs turned.

    For each of three mixtures of colours (brightness, red against blue, green against both) four patterns: even,
    edges in two directions, checks. In natural images these are nearly uncorrelated, so that dividing by standard
    deviations is all that whitening takes; a little is added to the variances, lest noise be blown up.
    """
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    colours /= colours.norm(dim=1, keepdim=True)
    patterns = torch.tensor([[[1.0, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 2
    basis = torch.einsum("mc,phw->mpchw", colours, patterns)
    filters = (basis / (torch.tensor(STEM_STD).square() + 5e-4).sqrt()[:, :, None, None, None]).flatten(0, 1)
    return torch.cat([filters, -filters])


class _Block(nn.Module):
    def __init__(self, channels_in, channels_out, dropout):
        super().__init__()
        self.shrink = nn.Sequential(
            _convolution(channels_in, channels_out),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(channels_out),
            nn.GELU(),
        )
        self.residual = nn.Sequential(
            _convolution(channels_out, channels_out),
            nn.BatchNorm2d(channels_out),
            nn.GELU(),
            _convolution(channels_out, channels_out),
            nn.BatchNorm2d(channels_out),
        )
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x):
        x = self.shrink(x)
        return self.dropout(F.gelu(x + self.residual(x)))


def _convolution(channels_in, channels_out):
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight.data[:channels_in])
    return convolution
