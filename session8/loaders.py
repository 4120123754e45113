"""Batches: their order and seeds, made by albumentations in any number of processes, or on the device."""

import time

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from session8.augment import (
    MEAN_COLOUR,
    alternating_flips,
    apply_transform,
    augment_batch,
    draw_augmentation,
    pad,
    test_transforms,
    train_transforms,
)
from session8.config import Config
from session8.console import plural
from session8.data import Split
from session8.device import available_cores, get_device


def make_loader(
    split: Split,
    batch_size: int,
    train: bool = True,
    seed: int = 0,
    num_workers: int | None = None,
    transform: A.BaseCompose | A.BasicTransform | None = None,
    device: torch.device | str | None = None,
    config: Config | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> "ImageLoader | DeviceLoader":
    """Return the loader of a split. It yields (images uint8 (B, 32, 32, 3), labels int64 (B,)).

    On CUDA, without a transform, it is a `DeviceLoader` if the images fit; otherwise an `ImageLoader` with
    albumentations. Its attribute `augmentation` says which. The batches depend on `seed` and on the epoch passed to
    `set_epoch(n)`, not on `num_workers`, which a DeviceLoader does not use. The last batch may be smaller.

    Args:
        train: pad each image, shuffle and augment; otherwise keep order and images.
        num_workers: worker processes; by default up to 4 for training on CUDA and 0 otherwise, since on a CPU training
            needs the cores.
        transform: an albumentations transform from the padded image, or for testing the image, to uint8 (32, 32, 3). It
            replaces the crop, flip and cutout of the recipe.
        device: what the batches are for, as in `get_device`.
        config: the recipe whose padding, crop, flip and cutout are used in training; `Config()` if None.
        rank, world_size: the process and the number of processes that share the images. The loader yields the rank's
            share of each training batch, of nearly equal sizes, which together are the batch of a single process; and
            every world_size-th test image.

    Raises ValueError for a batch size below 1, a negative number of workers, a device that is not available, or a
    training batch with fewer images than processes; TypeError for a transform of another library; and, on iteration,
    ValueError if the transform does not return uint8 (32, 32, 3).
    """
    device, config = get_device(device), config or Config()
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1, for instance 128")
    if num_workers is None:
        num_workers = min(4, available_cores()) if train and device.type == "cuda" else 0
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; expected 0 (load in the main process) or more")
    if not isinstance(transform, A.BaseCompose | A.BasicTransform | None):
        raise TypeError(f"transform is {transform!r}; expected an albumentations transform, such as A.Compose([...])")
    smallest = len(split) % batch_size or min(batch_size, len(split))
    if train and world_size > smallest:
        raise ValueError(
            f"{world_size} processes share the last batch of {plural(smallest, 'image')}: use at most "
            f"{plural(smallest, 'process')}, or another batch_size than {batch_size}"
        )
    batches = Batches(len(split), batch_size, train, seed, rank, world_size)
    if device.type == "cuda" and transform is None:
        try:
            return DeviceLoader(split, batches, config, device)
        except torch.cuda.OutOfMemoryError as error:
            print(f"The images do not fit in the memory of {device} ({error}): they stay on the CPU.", flush=True)
    return ImageLoader(split, batches, config, transform, num_workers, pin_memory=device.type == "cuda")


class Batches(Sampler):
    """The batches of an epoch, drawn in the main process as a function of (seed, epoch): yields (indices, seed, epoch).

    For training, the batches are those of all ranks, and `share` returns this rank's part of one. For testing, they
    are of the images rank::world_size.
    """

    def __init__(self, n, batch_size, train=True, seed=0, rank=0, world_size=1):
        self.order = np.arange(n) if train else np.arange(rank, n, world_size)
        self.batch_size, self.train, self.seed, self.rank, self.world_size = batch_size, train, seed, rank, world_size
        self.epoch, self.start = 0, 0

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.order)) if self.train else self.order
        seeds = rng.integers(2**63, size=len(self)).tolist()
        for batch in range(self.start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size], seeds[batch], self.epoch

    def share(self, rows):
        """Return this rank's share of a batch. The shares of two ranks differ by one row at most."""
        return rows.tensor_split(self.world_size)[self.rank] if self.train else rows


class _Epochs:
    """The epochs and batch sizes of both kinds of loader."""

    batches: Batches

    @property
    def world_size(self) -> int:
        """Number of ranks that share the images. Sums over the loader's images must then be added over the ranks."""
        return self.batches.world_size

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the epoch, and the batch in it, that the next iteration begins with."""
        self.batches.epoch, self.batches.start = epoch, start

    def batch_size_at(self, batch: int) -> int:
        """Return the number of images in a training batch, those of all ranks."""
        return self.images_until(batch + 1) - self.images_until(batch)

    def images_until(self, batch: int) -> int:
        """Return the number of images in the first `batch` training batches of an epoch, those of all ranks."""
        return min(batch * self.batches.batch_size, len(self.batches.order))


class ImageLoader(_Epochs, DataLoader):
    """A DataLoader that augments image by image, with albumentations."""

    augmentation = "albumentations"

    def __init__(self, split, batches, config, transform, num_workers, pin_memory):
        self.batches = batches
        super().__init__(
            _AugmentedBatches(split, batches, config, transform),
            sampler=batches,
            batch_size=None,  # the sampler yields whole batches
            num_workers=num_workers,
            worker_init_fn=_init_worker,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # otherwise each epoch draws from the global one
        )

    def __iter__(self):
        # A rank makes the whole batch, since its images draw from one generator, one after the other.
        try:
            for images, labels in super().__iter__():
                yield self.batches.share(images), self.batches.share(labels)
        except (ConnectionError, EOFError) as error:
            if self.num_workers == 0:
                raise  # by a transform
            # The connection of a killed worker can break before PyTorch reports its end: its SIGCHLD handler raises
            # during this sleep.
            time.sleep(1)
            raise RuntimeError("DataLoader worker exited unexpectedly: its connection broke") from error


class _AugmentedBatches(Dataset):
    """A split whose items are whole batches: (indices, seed, epoch) to (images, labels)."""

    def __init__(self, split, batches, config, transform):
        # Tensors: a spawned worker shares their memory instead of receiving a copy.
        self.images, self.labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
        self.train, self.config = batches.train, config
        self.alternates = batches.train and transform is None and config.flip == "alternate"
        self.flips = [alternating_flips(len(split), batches.seed, epoch) for epoch in (0, 1)]
        self.transform = transform or (train_transforms(config) if self.train else test_transforms())

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        indices, seed, epoch = item
        images = self.images.numpy()[indices]
        if self.alternates:
            flips = self.flips[epoch % 2][indices]
            images[flips] = images[flips, :, ::-1]
        if self.train:
            images = pad(images, self.config)
        return torch.from_numpy(apply_transform(self.transform, images, seed)), self.labels[indices]


def _init_worker(_):
    cv2.setNumThreads(0)  # OpenCV's threads would compete with the other workers


class DeviceLoader(_Epochs):
    """The batches of a split that stays on the device: padded, uint8, augmented in one gather per batch.

    The order of the images is that of an ImageLoader.
    """

    def __init__(self, split, batches, config, device):
        self.dataset, self.batches, self.config, self.device = split, batches, config, device
        self.augmentation = f"batched on {device.type}"
        images = pad(split.images, config) if batches.train else split.images
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8, device=device)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        batches = [self.batches.share(torch.from_numpy(indices)) for indices, *_ in self.batches]
        if not batches:
            return
        plan = torch.cat(batches)[:, None]
        if self.batches.train:
            draws = draw_augmentation(self.config, len(self.dataset), self.batches.seed, self.batches.epoch)
            plan = torch.hstack([plan, torch.from_numpy(draws)[plan[:, 0]]])
        plan = plan.pin_memory() if self.device.type == "cuda" else plan  # one copy per epoch, which nothing waits for
        for batch in plan.to(self.device, non_blocking=plan.is_pinned()).split([len(indices) for indices in batches]):
            indices, draws = batch[:, 0], batch[:, 1:]
            if self.batches.train:
                images = augment_batch(self.config, self.images, indices, draws, self.colour)
            else:
                images = self.images[indices]
            yield images, self.labels[indices]
