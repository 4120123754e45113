"""Augmentation with albumentations, and the normalisation that follows it on the device."""

import os
import random
from functools import cache

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would query the package index: 2 s

import albumentations as A
import numpy as np
import torch

from session8.data import MEAN, STD
from session8.device import memory_format

PADDING = 4  # zero pixels on each side of a training image, before the random crop


def train_transforms(cutout=0):
    """Return the training augmentation: uint8 (40, 40, 3), a padded image, to uint8 (32, 32, 3).

    To change the augmentation, edit the list. Normalisation is not part of it: see `normalize`.

    cutout: side in pixels of a square that is filled with the mean colour, placed inside the image; 0: none (DeVries
    and Taylor 2017, arXiv:1708.04552). Raises ValueError if it is not in [0, 32].
    """
    if not 0 <= cutout <= 32:
        raise ValueError(f"cutout is {cutout}; expected 0 (none) to 32 pixels, for instance 8")
    transforms = [A.RandomCrop(32, 32), A.HorizontalFlip(p=0.5)]
    if cutout:
        side, colour = (cutout, cutout), tuple(round(255 * mean) for mean in MEAN)
        transforms.append(A.CoarseDropout((1, 1), hole_height_range=side, hole_width_range=side, fill=colour, p=1.0))
    return A.Compose(transforms, is_check_shapes=False)  # the check is for masks, and takes a tenth of the time


def test_transforms():
    """Return the test transforms: uint8 (32, 32, 3) to uint8 (32, 32, 3), empty by default."""
    return A.Compose([])


def pad(images):
    """Pad images uint8 (N, 32, 32, 3) with zeros to uint8 (N, 40, 40, 3), for the random crop."""
    return np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))


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


def augment(split, index, n, transform=None, seed=0):
    """Return n augmentations of one training image of a Split: uint8 (n, 32, 32, 3).

    transform: an albumentations transform; `train_transforms()` if None.
    """
    image = pad(split.images[[index]])
    transform = train_transforms() if transform is None else transform
    return apply_transform(transform, np.repeat(image, n, axis=0), seed)


def normalize(images, device):
    """Copy a batch to the device and normalise it: uint8 (B, 32, 32, 3) to float32 (B, 3, 32, 32).

    The result is in `memory_format(device)`.
    """
    scale, offset = _scale_and_offset(device)
    # Asynchronous only from pinned memory, which the loader uses for CUDA: on MPS the source of an asynchronous copy
    # may be freed too early (pytorch/pytorch#189690).
    images = images.to(device, non_blocking=images.is_pinned()).float()
    # A contiguous NHWC batch seen as NCHW is in channels_last already.
    images = torch.addcmul(offset, images, scale).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=memory_format(device))


@cache
def _scale_and_offset(device):
    # Kept on the device, since a copy in each step makes a GPU wait; and expanded to the size of an image, since
    # broadcasting over three channels takes a CPU three times as long.
    scale, offset = [1 / (255 * std) for std in STD], [-mean / std for mean, std in zip(MEAN, STD, strict=True)]
    return tuple(torch.tensor(values, device=device).expand(32, 32, 3).contiguous() for values in (scale, offset))
