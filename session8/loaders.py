"""Batches: their order and seeds, made by albumentations in any number of processes, or on the device."""

import time

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from session8.augment import (
    alternating_flips,
    apply_transform,
    as_batch_augmentation,
    on_device,
    pad,
    test_transforms,
    train_transforms,
)
from session8.config import FLIPS, PADDINGS
from session8.console import plural
from session8.device import available_cores, get_device


class _AugmentedSplit(Dataset):
    """A split whose items are whole batches: (indices, seed, flips) to (images, labels)."""

    def __init__(self, split, transform, padding):
        # Tensors: a spawned worker shares their memory instead of receiving a copy.
        self.images, self.labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
        self.transform, self.padding = transform, padding

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        indices, seed, flips = item
        images = self.images.numpy()[indices]
        if flips is not None:
            images[flips] = images[flips, :, ::-1]
        batch = apply_transform(self.transform, pad(images, *self.padding), seed)
        return torch.from_numpy(batch), self.labels[indices]


class _BatchSampler(Sampler):
    """Draws the batches of an epoch, their seeds and flips in the main process, as a function of (seed, epoch).

    In training the batches are those of all ranks, and `share` selects a rank's rows. For testing they are of a rank's
    own images, every world_size-th. Flips are None unless they alternate.
    """

    def __init__(self, n, batch_size, train, seed, alternate=False, rank=0, world_size=1):
        self.alternate = alternate
        self.order = np.arange(n) if train else np.arange(rank, n, world_size)
        self.batch_size, self.train, self.seed, self.rank, self.world_size = batch_size, train, seed, rank, world_size
        self.epoch, self.start = 0, 0

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.order)) if self.train else self.order
        seeds = rng.integers(2**63, size=len(self)).tolist()
        flips = alternating_flips(len(order), self.seed, self.epoch) if self.alternate else None
        for batch in range(self.start, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield indices, seeds[batch], None if flips is None else flips[indices]

    def share(self, rows):
        """Return this rank's share of a batch. The shares of two ranks differ by one row at most."""
        return rows.tensor_split(self.world_size)[self.rank] if self.train else rows


class _Epochs:
    """The interface of both kinds of loader, besides iteration and `len`."""

    @property
    def world_size(self):
        """Number of ranks that share the images. Sums over the loader's images must then be added over the ranks."""
        return self.sampler.world_size

    def set_epoch(self, epoch, start=0):
        """Select the epoch, and the batch in it, that the next iteration begins with."""
        self.sampler.epoch, self.sampler.start = epoch, start

    def global_size(self, batch):
        """Return the number of images in a training batch, the shares of all ranks together."""
        return min(self.sampler.batch_size, len(self.sampler.order) - batch * self.sampler.batch_size)


class _Loader(_Epochs, DataLoader):
    augmentation = "albumentations"

    def __iter__(self):
        # A rank makes the whole batch, since its images draw from one generator, one after the other.
        try:
            for images, labels in super().__iter__():
                yield self.sampler.share(images), self.sampler.share(labels)
        except (ConnectionError, EOFError) as error:
            if self.num_workers == 0:
                raise  # by a transform
            # The connection of a killed worker can break before PyTorch reports its end: its SIGCHLD handler raises
            # during this sleep.
            time.sleep(1)
            raise RuntimeError("DataLoader worker exited unexpectedly: its connection broke") from error


class DeviceLoader(_Epochs):
    """The batches of a split that stays on the device: padded, uint8, augmented in one gather per batch.

    The order of the images matches that of the DataLoader. augmentation: a BatchAugmentation, or None to keep order and
    images. padding, rank, world_size: as in `make_loader`.
    """

    def __init__(self, split, batch_size, augmentation, seed, device, padding="zeros", rank=0, world_size=1):
        self.dataset, self.transform, self.seed, self.device = split, augmentation, seed, device
        self.augmentation = f"batched on {device.type}"
        images = split.images if augmentation is None else pad(split.images, augmentation.pixels, padding)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        if augmentation is not None:
            on_device(augmentation.fill, self.images.device)  # before the first step, which would wait for the copy
        train = augmentation is not None  # which draws its own flips
        self.sampler = _BatchSampler(len(split), batch_size, train, seed, rank=rank, world_size=world_size)

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        batches = [self.sampler.share(torch.from_numpy(indices)) for indices, *_ in self.sampler]
        if not batches:
            return
        plan = torch.cat(batches)[:, None]
        if self.transform is not None:
            draws = self.transform.draw(len(self.dataset), self.seed, self.sampler.epoch)
            plan = torch.hstack([plan, torch.from_numpy(draws)[plan[:, 0]]])
        plan = plan.pin_memory() if self.device.type == "cuda" else plan  # one copy per epoch, which nothing waits for
        for batch in plan.to(self.device, non_blocking=plan.is_pinned()).split([len(indices) for indices in batches]):
            indices, draws = batch[:, 0], batch[:, 1:]
            images = (
                self.images[indices] if self.transform is None else self.transform.apply(self.images, indices, draws)
            )
            yield images, self.labels[indices]


def _init_worker(_):
    cv2.setNumThreads(0)  # OpenCV's threads would compete with the other workers


def make_loader(
    split,
    batch_size,
    train=True,
    seed=0,
    num_workers=None,
    transform=None,
    device=None,
    padding="zeros",
    crop_padding=4,
    flip="random",
    rank=0,
    world_size=1,
):
    """Return the loader of a split. It yields (images uint8 (B, 32, 32, 3), labels int64 (B,)).

    On CUDA, with a transform that `as_batch_augmentation` supports, or an empty one for testing, it is a `DeviceLoader`
    if the images fit; otherwise a DataLoader with albumentations. Its attribute `augmentation` says which. The last
    batch may be smaller. The batches of each kind depend on `seed` and on the epoch passed to the loader's
    `set_epoch(n)`, not on `num_workers`, which a DeviceLoader does not use.

    train: pad each image, shuffle and augment; otherwise keep order and images. num_workers: worker
    processes; by default up to 4 for training on CUDA and 0 otherwise, since on a CPU training needs the cores.
    transform: an albumentations transform; by default `train_transforms()` or `test_transforms()`. device: what the
    batches are for, as in `get_device`. padding, crop_padding: of training images, as in `augment.pad`. flip: "random",
    which is the transform's task; or "alternate", which flips images by `augment.alternating_flips` before it.

    rank, world_size: the process and the number of processes that share the images. The loader yields the rank's share
    of each training batch, of nearly equal sizes, which together are the batch of a single process; and every
    world_size-th test image.

    Raises ValueError for a batch size below 1, a negative number of workers, an unknown padding or flip, a device that
    is not available, or a training batch with fewer images than processes; TypeError for a transform of another
    library; and, on iteration, ValueError if the transform does not return uint8 (32, 32, 3).
    """
    device = get_device(device)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1, for instance 128")
    for name, value, known in (("padding", padding, PADDINGS), ("flip", flip, FLIPS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
    if num_workers is None:
        num_workers = min(4, available_cores()) if train and device.type == "cuda" else 0
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; expected 0 (load in the main process) or more")
    if transform is None:
        transform = train_transforms(flip=flip) if train else test_transforms()
    if not isinstance(transform, A.BaseCompose | A.BasicTransform):
        raise TypeError(f"transform is {transform!r}; expected an albumentations transform, such as A.Compose([...])")
    smallest = len(split) % batch_size or min(batch_size, len(split))
    if train and world_size > smallest:
        raise ValueError(
            f"{world_size} processes share the last batch of {plural(smallest, 'image')}: use at most "
            f"{plural(smallest, 'process')}, or another batch_size than {batch_size}"
        )
    augmentation = as_batch_augmentation(transform, crop_padding, flip == "alternate") if train else None
    supported = augmentation is not None if train else getattr(transform, "transforms", None) == []
    if device.type == "cuda" and supported:
        try:
            return DeviceLoader(split, batch_size, augmentation, seed, device, padding, rank, world_size)
        except torch.cuda.OutOfMemoryError as error:
            print(f"The images do not fit in the memory of {device} ({error}): they stay on the CPU.", flush=True)
    return _Loader(
        _AugmentedSplit(split, transform, (crop_padding, padding) if train else (0, "zeros")),
        sampler=_BatchSampler(len(split), batch_size, train, seed, train and flip == "alternate", rank, world_size),
        batch_size=None,  # the sampler yields whole batches
        num_workers=num_workers,
        worker_init_fn=_init_worker,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise each epoch draws from the global one, which dropout uses
    )
