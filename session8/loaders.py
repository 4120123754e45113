"""Batches of images: albumentations' transforms, and loaders that give the same batches for any number of workers."""

import os
import random

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the package index for news: 2 s

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from session8.data import MEAN, Split

PADDING = 4  # zero pixels on each side of a training image, for the random crop


def train_transforms(cutout=0):
    """Albumentations for training: uint8 (40, 40, 3), the padded image, in; uint8 (32, 32, 3) out.

    cutout: the side, in pixels, of a square that is painted over in the mean colour; 0 for none (DeVries and Taylor
    2017, arXiv:1708.04552; here it lies wholly inside the image). To add a transform, add it to the list;
    normalisation is not among them: it is done on the device. Raises ValueError for a side of less than 0 or more
    than 32 pixels.
    """
    if not 0 <= cutout <= 32:
        raise ValueError(f"cutout is {cutout}; expected a side from 0 (none) to 32 pixels, for instance 8")
    transforms = [A.RandomCrop(32, 32), A.HorizontalFlip(p=0.5)]
    if cutout:
        side, colour = (cutout, cutout), tuple(round(255 * mean) for mean in MEAN)
        transforms.append(A.CoarseDropout((1, 1), hole_height_range=side, hole_width_range=side, fill=colour, p=1.0))
    # Shapes are checked against each other where an image has masks: without, the check takes a tenth of the time.
    return A.Compose(transforms, is_check_shapes=False)


def test_transforms():
    """Albumentations for testing: uint8 (32, 32, 3) in and out, unchanged."""
    return A.Compose([])


class _Batches(Dataset):
    """A split as augmented batches. An item is a pair (indices of the images, seed of their augmentation)."""

    def __init__(self, split, transform, train):
        padding = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
        # Tensors, because a spawned worker then shares their memory instead of receiving a copy.
        self.images = torch.from_numpy(np.pad(split.images, padding) if train else split.images)
        self.labels = torch.from_numpy(split.labels)
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        indices, seed = item
        # albumentations draws from generators that each transform made when it was built; forked workers would
        # inherit identical ones. One stream for the whole pipeline, begun anew for each batch from a seed that
        # travels with it, is the same in whichever process the batch is made, and gives each transform its own draws.
        self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        images = self.images.numpy()
        batch = np.empty((len(indices), 32, 32, 3), np.uint8)
        shape, dtype = batch.shape[1:], batch.dtype
        for row, index in enumerate(indices.tolist()):
            image = _apply(self.transform, images[index])
            if image.shape != shape or image.dtype != dtype:
                raise ValueError(
                    f"the transform returned {image.dtype} {image.shape} for uint8 {images[index].shape}; expected "
                    "uint8 (32, 32, 3): training needs a crop such as A.RandomCrop(32, 32), and neither Normalize nor "
                    "ToTensorV2, since normalisation is done on the device"
                )
            batch[row] = image
        return torch.from_numpy(batch), self.labels[indices]


def _apply(transform, image):
    """What `transform(image=image)["image"]` is, with the same random draws, in a tenth less time."""
    if type(transform) is not A.Compose or transform.processors:
        return transform(image=image)["image"]
    # A Compose looks after masks, boxes and lists of images around each of its transforms: an image alone has none.
    if transform.py_random.random() < transform.p:
        data = {"image": image}
        for step in transform.transforms:
            data = step(**data)
        return data["image"]
    return image


def augment(split, index, n, transform=None, seed=0):
    """Draw n augmentations of one training image, as `make_loader` would: uint8 (n, 32, 32, 3)."""
    one = Split(split.images[[index]], split.labels[[index]], split.source)
    transform = train_transforms() if transform is None else transform
    images, _ = _Batches(one, transform, train=True)[np.zeros(n, int), seed]
    return images.numpy()


class _BatchSampler(Sampler):
    """Draws an epoch's batches and their seeds, in the main process, from (seed, epoch) alone."""

    def __init__(self, n, batch_size, shuffle, seed):
        self.n, self.batch_size, self.shuffle, self.seed = n, batch_size, shuffle, seed
        self.epoch, self.start = 0, 0

    def __len__(self):
        return -(-self.n // self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.n) if self.shuffle else np.arange(self.n)
        seeds = rng.integers(2**63, size=len(self)).tolist()
        for batch in range(self.start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size], seeds[batch]


class _Loader(DataLoader):
    def set_epoch(self, epoch, start=0):
        """Choose the epoch whose order and augmentation the next iteration yields, and the batch it starts with."""
        self.sampler.epoch, self.sampler.start = epoch, start


def _init_worker(_):
    cv2.setNumThreads(0)  # OpenCV's own threads would fight the other workers


def make_loader(split, batch_size, train=True, seed=0, num_workers=None, transform=None, device=None):
    """Make the loader of a split: yields (images uint8 (B, 32, 32, 3), labels int64 (B,)), the last batch partial.

    train: pad by 4 pixels, shuffle, and apply `train_transforms()`; else keep the order and apply
    `test_transforms()`. transform: another albumentations pipeline instead. The batches depend on `seed` and on the
    epoch given to the loader's `set_epoch(n)`, not on num_workers, whose default is up to 4 for training on a CUDA
    device and else 0: on a CPU the cores that would load are the ones that train. device: the torch.device that the
    batches are for; CUDA, where it is to be had, when None.

    Raises ValueError for a batch size below 1 or a negative number of workers, TypeError for a transform that is
    not albumentations'; and, on iteration, ValueError for one that does not return uint8 (32, 32, 3).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1, for instance 128")
    cuda = device.type == "cuda" if device else torch.cuda.is_available()
    if num_workers is None:
        num_workers = min(4, os.cpu_count() or 1) if train and cuda else 0
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; expected 0 (load in this process) or more")
    if transform is None:
        transform = train_transforms() if train else test_transforms()
    if not isinstance(transform, (A.BaseCompose, A.BasicTransform)):
        raise TypeError(f"transform is {transform!r}; expected albumentations, for instance A.Compose([...])")
    return _Loader(
        _Batches(split, transform, train),
        sampler=_BatchSampler(len(split), batch_size, train, seed),
        batch_size=None,  # the sampler's items are batches already
        num_workers=num_workers,
        worker_init_fn=_init_worker,
        persistent_workers=num_workers > 0,
        pin_memory=cuda,
        # A generator of its own: else each epoch would draw from the global one, which dropout uses.
        generator=torch.Generator(),
    )
