"""Augmentation as the recipe describes it, per image (albumentations) or per batch (on the device); normalisation."""

import os
import random
from functools import cache

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would query the package index: 2 s

import albumentations as A
import numpy as np
import torch
import torch.nn.functional as F

from session8.config import Config
from session8.data import MEAN, STD, Split
from session8.device import memory_format

MEAN_COLOUR = tuple(round(255 * mean) for mean in MEAN)  # of what cutout erases


# -- per image ------------------------------------------------------------------------------------------------------


def train_transforms(config: Config | None = None) -> A.Compose:
    """Return the recipe's augmentation: uint8 (H, W, 3), a padded image, to uint8 (32, 32, 3).

    A random crop, a horizontal flip unless it alternates (see `alternating_flips`), and with cutout a square that is
    filled with the mean colour, placed inside the image (DeVries and Taylor 2017, arXiv:1708.04552). Normalisation is
    not part of it: see `normalize`. config: the recipe; `Config()` if None.
    """
    config = config or Config()
    transforms = [A.RandomCrop(32, 32)]
    if config.flip == "random":
        transforms.append(A.HorizontalFlip(p=0.5))
    if config.cutout:
        side = (config.cutout, config.cutout)
        hole = A.CoarseDropout((1, 1), hole_height_range=side, hole_width_range=side, fill=MEAN_COLOUR, p=1.0)
        transforms.append(hole)
    return A.Compose(transforms, is_check_shapes=False)  # the check is for masks, and takes a tenth of the time


def test_transforms() -> A.Compose:
    """Return the test transforms: uint8 (32, 32, 3) to uint8 (32, 32, 3), empty by default."""
    return A.Compose([])


def pad(images: np.ndarray, config: Config) -> np.ndarray:
    """Pad images uint8 (N, 32, 32, 3) for the random crop, to uint8 (N, H, H, 3), as the recipe says."""
    pixels = (config.crop_padding, config.crop_padding)
    return np.pad(images, ((0, 0), pixels, pixels, (0, 0)), "reflect" if config.padding == "reflect" else "constant")


def alternating_flips(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return which of n images are mirrored in an epoch: bool (n,).

    Each image is drawn once, with probability 0.5, and is then mirrored in every second epoch (Jordan 2024,
    arXiv:2404.00498).
    """
    return (np.random.default_rng((seed, 0, 2)).random(n) < 0.5) ^ bool(epoch % 2)


def apply_transform(transform: A.BaseCompose | A.BasicTransform, images: np.ndarray, seed: int) -> np.ndarray:
    """Apply an albumentations transform to each image of a batch.

    images: uint8 (N, H, W, 3). seed: seeds the transform, so that the result depends on nothing else. Returns uint8
    (N, 32, 32, 3). Raises ValueError if the transform returns another shape or dtype.
    """
    if getattr(transform, "transforms", None) == [] and images.shape[1:] == (32, 32, 3):
        return images  # an empty pipeline: no call per image
    # Each transform draws from a generator made when it was built, and forked workers inherit copies of it. One
    # generator for the whole pipeline, seeded per batch, gives the same batch in any process.
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    batch = np.empty((len(images), 32, 32, 3), np.uint8)
    for row, original in zip(batch, images, strict=True):
        image = transform(image=original)["image"]
        if image.shape != row.shape or image.dtype != row.dtype:
            raise ValueError(
                f"the transform returned {image.dtype} {image.shape} for {images.dtype} {images.shape[1:]}; expected "
                "uint8 (32, 32, 3): use a crop such as A.RandomCrop(32, 32), without Normalize or ToTensorV2 "
                "(the device normalises)"
            )
        row[:] = image
    return batch


def augment(
    split: Split,
    index: int,
    n: int,
    transform: A.BaseCompose | A.BasicTransform | None = None,
    seed: int = 0,
    config: Config | None = None,
) -> np.ndarray:
    """Return n augmentations of one training image of a Split: uint8 (n, 32, 32, 3).

    transform: as in `make_loader`. config: the recipe; `Config()` if None. If its flip alternates, every second result
    is mirrored.
    """
    config = config or Config()
    images = np.repeat(pad(split.images[[index]], config), n, axis=0)
    if transform is None:
        transform = train_transforms(config)
        if config.flip == "alternate":
            images[1::2] = images[1::2, :, ::-1]
    return apply_transform(transform, images, seed)


# -- per batch, on the device ---------------------------------------------------------------------------------------


def draw_augmentation(config: Config, n: int, seed: int, epoch: int) -> np.ndarray:
    """Draw the augmentation of n images for an epoch, as a function of (seed, epoch): uint8 (n, 5).

    The columns are the row and column of the crop, whether to flip, and the row and column of the hole.
    """
    rng = np.random.default_rng((seed, epoch, 1))  # the order of the images is drawn from (seed, epoch)
    draws = np.empty((n, 5), np.uint8)
    draws[:, :2] = rng.integers(2 * config.crop_padding + 1, size=(n, 2))
    flips = rng.random(n) < 0.5
    draws[:, 2] = alternating_flips(n, seed, epoch) if config.flip == "alternate" else flips
    draws[:, 3:] = rng.integers(32 - config.cutout + 1, size=(n, 2))
    return draws


def augment_batch(
    config: Config, images: torch.Tensor, indices: torch.Tensor, draws: torch.Tensor, colour: torch.Tensor
) -> torch.Tensor:
    """Augment a batch in one gather, on the device of its arguments.

    images: all training images, padded, uint8 (N, H, H, 3), contiguous. indices: int64 (B,), of the batch. draws: int64
    (B, 5), from `draw_augmentation`. colour: uint8 (3,), of cutout. Returns uint8 (B, 32, 32, 3).
    """
    ahead = torch.arange(32, device=images.device)
    top, left, flip, hole_top, hole_left = draws.T[:, :, None]  # each (B, 1)
    columns = left + torch.where(flip > 0, 31 - ahead, ahead)
    size = images.shape[1]
    rows = (indices[:, None] * size + top + ahead) * size
    batch = images.view(-1, 3)[rows[:, :, None] + columns[:, None, :]]  # (image * size + row) * size + column
    if config.cutout:
        in_rows, in_columns = ((ahead >= start) & (ahead < start + config.cutout) for start in (hole_top, hole_left))
        inside = (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
        batch = torch.where(inside, colour, batch)
    return batch


# -- input of the network -------------------------------------------------------------------------------------------


def normalize(images: torch.Tensor, device: torch.device | str) -> torch.Tensor:
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
    # Kept on the device: a copy in each step would make a GPU wait. Expanded to the size of an image: broadcasting over
    # three channels takes a CPU three times as long.
    scale, offset = [1 / (255 * std) for std in STD], [-mean / std for mean, std in zip(MEAN, STD, strict=True)]
    return tuple(torch.tensor(values, device=device).expand(32, 32, 3).contiguous() for values in (scale, offset))


def scale_down(images: torch.Tensor, size: int) -> torch.Tensor:
    """Scale float (B, C, H, H) down to (B, C, size, size) with an antialiasing bilinear filter."""
    if size == images.shape[-1]:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
