"""Batches: their order and seeds, made by albumentations in any number of processes, or on the device."""

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from session8.augment import (
    apply_transform,
    as_batch_augmentation,
    pad,
    test_transforms,
    train_transforms,
)
from session8.device import available_cores, get_device


class _AugmentedSplit(Dataset):
    """A split whose items are whole batches: (indices, seed) to (images, labels)."""

    def __init__(self, split, transform, train):
        # Tensors: a spawned worker shares their memory instead of receiving a copy.
        self.images, self.labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
        self.transform, self.train = transform, train

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        indices, seed = item
        images = self.images.numpy()[indices]
        batch = apply_transform(self.transform, pad(images) if self.train else images, seed)
        return torch.from_numpy(batch), self.labels[indices]


class _BatchSampler(Sampler):
    """Draws the batches of an epoch and their seeds in the main process, as a function of (seed, epoch)."""

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
    augmentation = "albumentations"

    def set_epoch(self, epoch, start=0):
        """Select the epoch, and the batch in it, that the next iteration begins with."""
        self.sampler.epoch, self.sampler.start = epoch, start


class DeviceLoader:
    """The batches of a split that stays on the device: padded, uint8, augmented in one gather per batch.

    It supports iteration, `len`, `set_epoch`, `dataset` and `augmentation`. The order of the images matches that of the
    DataLoader. augmentation: a BatchAugmentation, or None to keep order and images.
    """

    def __init__(self, split, batch_size, augmentation, seed, device):
        self.dataset, self.transform, self.seed, self.device = split, augmentation, seed, device
        self.augmentation = f"batched on {device.type}"
        self.images = torch.from_numpy(split.images if augmentation is None else pad(split.images)).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.sampler = _BatchSampler(len(split), batch_size, augmentation is not None, seed)

    def __len__(self):
        return len(self.sampler)

    def set_epoch(self, epoch, start=0):
        """Select the epoch, and the batch in it, that the next iteration begins with."""
        self.sampler.epoch, self.sampler.start = epoch, start

    def __iter__(self):
        batches = [indices for indices, _ in self.sampler]
        if not batches:
            return
        order = np.concatenate(batches)
        if self.transform is None:
            plan = order[:, None]
        else:
            draws = self.transform.draw(len(self.dataset), self.seed, self.sampler.epoch)
            plan = np.column_stack([order, draws[order]])
        plan = torch.from_numpy(plan)  # one copy per epoch, which does not wait if the memory is pinned
        plan = plan.pin_memory() if self.device.type == "cuda" else plan
        for batch in plan.to(self.device, non_blocking=plan.is_pinned()).split([len(indices) for indices in batches]):
            indices, draws = batch[:, 0], batch[:, 1:]
            images = (
                self.images[indices] if self.transform is None else self.transform.apply(self.images, indices, draws)
            )
            yield images, self.labels[indices]


def _init_worker(_):
    cv2.setNumThreads(0)  # OpenCV's threads would compete with the other workers


def make_loader(
    split, batch_size, train=True, seed=0, num_workers=None, transform=None, device=None, padding="zeros", flip="random"
):
    """Return the loader of a split. It yields (images uint8 (B, 32, 32, 3), labels int64 (B,)).

    On CUDA, with a transform that `as_batch_augmentation` supports, or an empty one for testing, it is a `DeviceLoader`
    if the images fit; otherwise a DataLoader with albumentations. Its attribute `augmentation` says which. The last
    batch may be smaller. The batches of each kind depend on `seed` and on the epoch passed to the loader's
    `set_epoch(n)`, not on `num_workers`, which a DeviceLoader does not use.

    train: pad each image by 4 pixels, shuffle and augment; otherwise keep order and images. num_workers: worker
    processes; by default up to 4 for training on CUDA and 0 otherwise, since on a CPU training needs the cores.
    transform: an albumentations transform; by default `train_transforms()` or `test_transforms()`. device: what the
    batches are for, as in `get_device`. padding: of training images, "zeros" so far. flip: "random" so far.

    Raises ValueError for a batch size below 1, a negative number of workers, an unknown padding or flip, or a device
    that is not available; TypeError for a transform of another library; and, on iteration, ValueError if the transform
    does not return uint8 (32, 32, 3).
    """
    device = get_device(device)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1, for instance 128")
    for name, value, known in (("padding", padding, ("zeros",)), ("flip", flip, ("random",))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
    if num_workers is None:
        num_workers = min(4, available_cores()) if train and device.type == "cuda" else 0
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; expected 0 (load in the main process) or more")
    if transform is None:
        transform = train_transforms() if train else test_transforms()
    if not isinstance(transform, A.BaseCompose | A.BasicTransform):
        raise TypeError(f"transform is {transform!r}; expected an albumentations transform, such as A.Compose([...])")
    if device.type == "cuda":
        loader = _make_device_loader(split, batch_size, train, seed, transform, device)
        if loader is not None:
            return loader
    return _Loader(
        _AugmentedSplit(split, transform, train),
        sampler=_BatchSampler(len(split), batch_size, train, seed),
        batch_size=None,  # the sampler yields whole batches
        num_workers=num_workers,
        worker_init_fn=_init_worker,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise each epoch draws from the global one, which dropout uses
    )


def _make_device_loader(split, batch_size, train, seed, transform, device):
    """Return a DeviceLoader for a transform, or None if it is not supported or the device's memory is too small."""
    augmentation = as_batch_augmentation(transform) if train else None
    if (train and augmentation is None) or (not train and getattr(transform, "transforms", None) != []):
        return None
    try:
        return DeviceLoader(split, batch_size, augmentation, seed, device)
    except torch.cuda.OutOfMemoryError as error:
        print(f"The images do not fit in the memory of {device} ({error}): they stay on the CPU.", flush=True)
        return None
