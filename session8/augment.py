"""Augmentation per image (albumentations) or per batch (on the device), and normalisation."""

import os
import random
from dataclasses import dataclass
from functools import cache

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would query the package index: 2 s

import albumentations as A
import numpy as np
import torch

from session8.config import Config
from session8.data import MEAN, STD
from session8.device import memory_format


def train_transforms(cutout=0, flip="random"):
    """Return the training augmentation: uint8 (H, W, 3), a padded image, to uint8 (32, 32, 3).

    To change the augmentation, edit the list. Normalisation is not part of it: see `normalize`.

    cutout: side in pixels of a square that is filled with the mean colour, placed inside the image; 0: none (DeVries
    and Taylor 2017, arXiv:1708.04552). flip: "random"; or "alternate", for which the loader flips the images before
    (see `alternating_flips`). Raises ValueError if cutout is not in [0, 32].
    """
    if not 0 <= cutout <= 32:
        raise ValueError(f"cutout is {cutout}; expected 0 (none) to 32 pixels, for instance 8")
    transforms = [A.RandomCrop(32, 32)]
    if flip == "random":
        transforms.append(A.HorizontalFlip(p=0.5))
    if cutout:
        side, colour = (cutout, cutout), tuple(round(255 * mean) for mean in MEAN)
        transforms.append(A.CoarseDropout((1, 1), hole_height_range=side, hole_width_range=side, fill=colour, p=1.0))
    return A.Compose(transforms, is_check_shapes=False)  # the check is for masks, and takes a tenth of the time


def test_transforms():
    """Return the test transforms: uint8 (32, 32, 3) to uint8 (32, 32, 3), empty by default."""
    return A.Compose([])


def pad(images, pixels=4, padding="zeros"):
    """Pad images uint8 (N, 32, 32, 3) for the random crop, to uint8 (N, 32 + 2 * pixels, 32 + 2 * pixels, 3).

    padding: "zeros", or "reflect", which mirrors the image at its outermost pixels.
    """
    widths = ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0))
    return np.pad(images, widths, mode={"zeros": "constant", "reflect": "reflect"}[padding])


def alternating_flips(n, seed, epoch):
    """Return which of n images are mirrored in an epoch: bool (n,).

    Each image is drawn once, with probability 0.5, and is then mirrored in every second epoch (Jordan 2024,
    arXiv:2404.00498).
    """
    return (np.random.default_rng((seed, 0, 2)).random(n) < 0.5) ^ bool(epoch % 2)


def apply_transform(transform, images, seed):
    """Apply an albumentations transform to each image of a batch.

    images: uint8 (N, H, W, 3). seed: seeds the transform, so that the result depends on nothing else. Returns uint8
    (N, 32, 32, 3). Raises ValueError if the transform returns another shape or dtype.
    """
    if getattr(transform, "transforms", None) == []:
        transformed = images  # an empty pipeline: no call per image
    else:
        # Each transform draws from a generator made when it was built, and forked workers inherit copies of it. One
        # generator for the whole pipeline, seeded per batch, gives the same batch in any process.
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        transformed = (transform(image=image)["image"] for image in images)
    batch = np.empty((len(images), 32, 32, 3), np.uint8)
    for row, image in zip(batch, transformed, strict=True):
        if image.shape != row.shape or image.dtype != row.dtype:
            raise ValueError(
                f"the transform returned {image.dtype} {image.shape} for {images.dtype} {images.shape[1:]}; expected "
                "uint8 (32, 32, 3): end with a crop such as A.RandomCrop(32, 32), without Normalize or ToTensorV2 "
                "(the device normalises)"
            )
        row[:] = image
    return batch


def augment(split, index, n, transform=None, seed=0, config=None):
    """Return n augmentations of one training image of a Split: uint8 (n, 32, 32, 3).

    config: the recipe whose padding and flip are used; `Config()` if None. If the flip alternates, every second result
    is mirrored. transform: an albumentations transform; the recipe's `train_transforms` if None.
    """
    config = config or Config()
    images = np.repeat(pad(split.images[[index]], config.crop_padding, config.padding), n, axis=0)
    if config.flip == "alternate":
        images[1::2] = images[1::2, :, ::-1]
    transform = train_transforms(config.cutout, config.flip) if transform is None else transform
    return apply_transform(transform, images, seed)


# -- the same augmentation for whole batches ----------------------------------------------------------------------


@dataclass(frozen=True)
class BatchAugmentation:
    """The standard augmentation for whole batches: random crop, horizontal flip, and one square hole.

    flip_p, hole_p: probabilities. hole: side of the square in pixels; 0: none. fill: its colour. pixels: of padding.
    alternate: mirror by `alternating_flips` instead of flip_p.
    """

    flip_p: float = 0.0
    hole: int = 0
    hole_p: float = 0.0
    fill: tuple[int, int, int] = (0, 0, 0)
    pixels: int = 4
    alternate: bool = False

    def draw(self, n, seed, epoch):
        """Draw the augmentation of n images for an epoch, as a function of (seed, epoch): uint8 (n, 5).

        The columns are the row and column of the crop, whether to flip, and the row and column of the hole. If there is
        no hole, its row is 32, outside the image.
        """
        rng = np.random.default_rng((seed, epoch, 1))  # the order of the images is drawn from (seed, epoch)
        draws = np.empty((n, 5), np.uint8)
        draws[:, :2] = rng.integers(2 * self.pixels + 1, size=(n, 2))
        flips = rng.random(n) < self.flip_p
        draws[:, 2] = alternating_flips(n, seed, epoch) if self.alternate else flips
        draws[:, 3:] = rng.integers(32 - self.hole + 1, size=(n, 2))
        draws[rng.random(n) >= self.hole_p, 3] = 32
        return draws

    def apply(self, images, indices, draws):
        """Augment a batch in one gather, on the device of its arguments.

        images: padded, uint8 (N, H, H, 3), contiguous. indices: int64 (B,). draws: int64 (B, 5). Returns uint8
        (B, 32, 32, 3).
        """
        ahead = torch.arange(32, device=images.device)
        top, left, flip, hole_top, hole_left = draws.T[:, :, None]  # each (B, 1)
        columns = left + torch.where(flip > 0, 31 - ahead, ahead)
        size = images.shape[1]
        rows = (indices[:, None] * size + top + ahead) * size
        batch = images.view(-1, 3)[rows[:, :, None] + columns[:, None, :]]  # (image * size + row) * size + column
        if self.hole:
            in_rows, in_columns = ((ahead >= start) & (ahead < start + self.hole) for start in (hole_top, hole_left))
            inside = (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
            batch = torch.where(inside, on_device(self.fill, images.device), batch)
        return batch


@cache
def on_device(values, device):
    """Return uint8 values as a tensor on a device."""
    return torch.tensor(values, dtype=torch.uint8, device=device)  # once: a copy in each step makes a GPU wait


def as_batch_augmentation(transform, pixels=4, alternate=False):
    """Return the BatchAugmentation with the same distribution as an albumentations transform, or None.

    pixels, alternate: of the padding and the flip that come before it.

    Supported: A.Compose of A.RandomCrop(32, 32), then A.HorizontalFlip, then A.CoarseDropout of one square of
    fixed size and colour; the last two are optional.
    """
    if type(transform) is not A.Compose or transform.p != 1 or transform.processors:
        return None
    crop, *rest = transform.transforms or [None]
    if type(crop) is not A.RandomCrop or (crop.height, crop.width, crop.p, crop.pad_if_needed) != (32, 32, 1, False):
        return None
    found = {"pixels": pixels, "alternate": alternate}
    if rest and type(rest[0]) is A.HorizontalFlip:
        found["flip_p"] = float(rest.pop(0).p)
        if alternate:
            return None
    if rest and type(rest[0]) is A.CoarseDropout:
        dropout = rest.pop(0)
        low, high = dropout.hole_height_range
        fill = dropout.fill if isinstance(dropout.fill, tuple) else (dropout.fill,) * 3
        square = tuple(dropout.hole_width_range) == (low, high) and low == high and low == int(low) and 1 <= low <= 32
        colour = len(fill) == 3 and all(isinstance(v, int | float) and v == int(v) and 0 <= v <= 255 for v in fill)
        if tuple(dropout.num_holes_range) != (1, 1) or not square or not colour:
            return None
        found |= {"hole": int(low), "hole_p": float(dropout.p), "fill": tuple(map(int, fill))}
    return None if rest else BatchAugmentation(**found)


# -- on the device -------------------------------------------------------------------------------------------------


def normalize(images, device):
    """Copy a batch to the device and normalise it: uint8 (B, 32, 32, 3) to float32 (B, 3, 32, 32).

    The result is in `memory_format(device)`.
    """
    # Asynchronous only from pinned memory, which the loader uses for CUDA: on MPS the source of an asynchronous copy
    # may be freed too early (pytorch/pytorch#189690).
    images = images.to(device, non_blocking=images.is_pinned()).float()
    scale, offset = _scale_and_offset(images.device)  # with an index: "cuda" is another GPU after a change of device
    # A contiguous NHWC batch seen as NCHW is in channels_last already.
    images = torch.addcmul(offset, images, scale).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=memory_format(device))


@cache
def _scale_and_offset(device):
    # Kept on the device, as above; and expanded to the size of an image, since broadcasting over three channels takes
    # a CPU three times as long.
    scale, offset = [1 / (255 * std) for std in STD], [-mean / std for mean, std in zip(MEAN, STD, strict=True)]
    return tuple(torch.tensor(values, device=device).expand(32, 32, 3).contiguous() for values in (scale, offset))
