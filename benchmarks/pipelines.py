"""Input pipelines for `input_pipeline.py`: from the training images to normalised float batches on the device.

Each class takes (split, batch_size, num_workers, device). An iteration is one epoch in random order, with each image
padded by four zero pixels, cropped at random and flipped with probability 0.5. It yields (images float32
(B, 3, 32, 32), labels int64 (B,)) on the device. `Usual` is written as in common notebooks; its forked workers draw
identical crops and flips.
"""

import albumentations as A
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from session8.augment import as_batch_augmentation, normalize, pad, train_transforms
from session8.data import MEAN, STD
from session8.loaders import DeviceLoader, make_loader

PADDING = 4  # pixels


class Ours:
    """This project's loader with albumentations: uint8 batches, normalised on the device."""

    def __init__(self, split, batch_size, num_workers, device):
        self.device, self.epoch = device, 0
        self.loader = self.make_loader(split, batch_size, num_workers, device)

    def make_loader(self, split, batch_size, num_workers, device):
        # For the CPU, where the loader uses albumentations, also if the batches then go to a GPU.
        return make_loader(split, batch_size, num_workers=num_workers, device="cpu")

    def __iter__(self):
        self.loader.set_epoch(self.epoch)
        self.epoch += 1
        for images, labels in self.loader:
            yield normalize(images, self.device), labels.to(self.device, non_blocking=labels.is_pinned())


class OursOnDevice(Ours):
    """This project's loader on the device, with the same augmentation in one gather per batch."""

    def make_loader(self, split, batch_size, num_workers, device):
        return DeviceLoader(split, batch_size, as_batch_augmentation(train_transforms()), 0, device)


class _InMemory(CIFAR10):
    """torchvision's dataset, with its own `__getitem__`, over images in memory."""

    def __init__(self, split, transform):
        self.data, self.targets = split.images, split.labels.tolist()
        self.transform, self.target_transform = transform, None


class _InMemoryTensors(_InMemory):
    """The same as tensors, without PIL images."""

    def __init__(self, split, transform):
        super().__init__(split, transform)
        self.data = torch.from_numpy(split.images).permute(0, 3, 1, 2)

    def __getitem__(self, index):
        return self.transform(self.data[index]), self.targets[index]


class _PerItem:
    """torchvision's dataset with PyTorch's default collation."""

    dataset, transform = _InMemory, None

    def __init__(self, split, batch_size, num_workers, device):
        self.device = device
        self.loader = DataLoader(
            self.dataset(split, self.transform),
            batch_size,
            shuffle=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
        )

    def __iter__(self):
        for batch in self.loader:
            yield tuple(part.to(self.device, non_blocking=part.is_pinned()) for part in batch)


class _Albumentations:
    def __init__(self):
        self.compose = A.Compose(
            [
                A.PadIfNeeded(32 + 2 * PADDING, 32 + 2 * PADDING),
                A.RandomCrop(32, 32),
                A.HorizontalFlip(p=0.5),
                A.Normalize(MEAN, STD),
                ToTensorV2(),
            ]
        )

    def __call__(self, image):
        return self.compose(image=np.array(image))["image"]


class Usual(_PerItem):
    """The usual notebook pipeline: PIL, NumPy, and albumentations per item, with normalisation."""

    transform = _Albumentations()


class TorchvisionV2(_PerItem):
    """torchvision's v2 transforms on uint8 tensors, per item."""

    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=PADDING),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    dataset = _InMemoryTensors


class Limit:
    """The limit: crop and flip of whole batches by indexing one padded uint8 tensor on the device."""

    def __init__(self, split, batch_size, num_workers, device):
        self.images = torch.from_numpy(pad(split.images)).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.batch_size, self.device = batch_size, device

    def __iter__(self):
        on = {"device": self.device}
        ahead = torch.arange(32, **on)
        for index in torch.randperm(len(self.labels), **on).split(self.batch_size):
            top, left = torch.randint(2 * PADDING + 1, (2, len(index), 1), **on)
            columns = torch.where(torch.rand(len(index), 1, **on) < 0.5, ahead, 31 - ahead) + left
            rows = (index[:, None] * self.images.shape[1] + top + ahead) * self.images.shape[2]
            images = self.images.view(-1, 3)[rows[:, :, None] + columns[:, None, :]]
            yield normalize(images, self.device), self.labels[index]


PIPELINES = {
    "ours": Ours,
    "ours (device)": OursOnDevice,
    "usual": Usual,
    "torchvision v2": TorchvisionV2,
    "limit": Limit,
}
WITHOUT_WORKERS = ("ours (device)", "limit")
