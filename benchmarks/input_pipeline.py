"""Images per second of several input pipelines: `python -m benchmarks.input_pipeline`.

Each pipeline is a function of (split, batch_size, num_workers, device). It returns a function of the epoch that yields
its batches in random order, images float32 (B, 3, 32, 32) and labels int64 (B,), on the device: each image is padded by
four zero pixels, cropped at random, flipped with probability 0.5 and normalised.
"""

import statistics

import albumentations as A
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from benchmarks.common import load_splits, ratio, read_options, report, subset, time_alternately
from session8.augment import normalize, pad
from session8.config import Config
from session8.data import MEAN, STD
from session8.loaders import Batches, DeviceLoader, make_loader

PADDING = 4  # pixels, as in Config()


def ours(split, batch_size, num_workers, device):
    """This project's loader with albumentations: uint8 batches, normalised on the device."""
    # For the CPU, where the loader uses albumentations, also if the batches then go to a GPU.
    return _normalized(make_loader(split, batch_size, num_workers=num_workers, device="cpu"), device)


def ours_on_device(split, batch_size, num_workers, device):
    """This project's loader on the device, with the same augmentation in one gather per batch."""
    return _normalized(DeviceLoader(split, Batches(len(split), batch_size), Config(), device), device)


def _normalized(loader, device):
    def batches(epoch):
        loader.set_epoch(epoch)
        for images, labels in loader:
            yield normalize(images, device), labels.to(device, non_blocking=labels.is_pinned())

    return batches


def usual(split, batch_size, num_workers, device):
    """The usual notebook pipeline: PIL, NumPy, and albumentations per item. Forked workers draw identical crops."""
    return _per_item(InMemory(split, Albumentations()), batch_size, num_workers, device)


class InMemory(CIFAR10):
    """torchvision's dataset, with its own `__getitem__`, over images in memory."""

    def __init__(self, split, transform):
        self.data, self.targets = split.images, split.labels.tolist()
        self.transform, self.target_transform = transform, None


class Albumentations:
    def __init__(self):
        crop = [A.PadIfNeeded(32 + 2 * PADDING, 32 + 2 * PADDING), A.RandomCrop(32, 32)]
        self.compose = A.Compose([*crop, A.HorizontalFlip(p=0.5), A.Normalize(MEAN, STD), ToTensorV2()])

    def __call__(self, image):
        return self.compose(image=np.array(image))["image"]


def torchvision_v2(split, batch_size, num_workers, device):
    """torchvision's v2 transforms on uint8 tensors, per item."""
    convert = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose([v2.RandomCrop(32, padding=PADDING), v2.RandomHorizontalFlip(), *convert])
    return _per_item(InMemoryTensors(split, transform), batch_size, num_workers, device)


class InMemoryTensors(InMemory):
    """The same as tensors, without PIL images."""

    def __init__(self, split, transform):
        super().__init__(split, transform)
        self.data = torch.from_numpy(split.images).permute(0, 3, 1, 2)

    def __getitem__(self, index):
        return self.transform(self.data[index]), self.targets[index]


def _per_item(dataset, batch_size, num_workers, device):
    """PyTorch's default collation of a dataset's items."""
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda",
    )

    def batches(epoch):
        for batch in loader:
            yield tuple(part.to(device, non_blocking=part.is_pinned()) for part in batch)

    return batches


def limit(split, batch_size, num_workers, device):
    """The limit: crop and flip of whole batches by indexing one padded uint8 tensor on the device."""
    padded = torch.from_numpy(pad(split.images, Config())).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    ahead = torch.arange(32, device=device)

    def batches(epoch):
        for index in torch.randperm(len(labels), device=device).split(batch_size):
            top, left = torch.randint(2 * PADDING + 1, (2, len(index), 1), device=device)
            flipped = torch.rand(len(index), 1, device=device) < 0.5
            columns = torch.where(flipped, 31 - ahead, ahead) + left
            rows = (index[:, None] * padded.shape[1] + top + ahead) * padded.shape[2]
            yield normalize(padded.view(-1, 3)[rows[:, :, None] + columns[:, None, :]], device), labels[index]

    return batches


PIPELINES = {
    "ours": ours,
    "ours (device)": ours_on_device,
    "usual": usual,
    "torchvision v2": torchvision_v2,
    "limit": limit,
}
WITHOUT_WORKERS = ("ours (device)", "limit")


def one_epoch(pipeline):
    def work():
        for _ in pipeline(0):
            pass

    return work


def main(arguments=None):
    options = read_options(__doc__, arguments, images=10_000, rounds=7, batch_size=128)
    split = subset(load_splits(options, options.images)[0], options.images)
    rows = []
    for num_workers in (0, 2):
        functions = {
            name: one_epoch(pipeline(split, options.batch_size, num_workers, options.device))
            for name, pipeline in PIPELINES.items()
            if num_workers == 0 or name not in WITHOUT_WORKERS
        }
        times = time_alternately(functions, options.rounds, options.device)
        for name in functions:
            speed = len(split) / statistics.median(times[name])
            rows.append([name, str(num_workers), f"{speed:,.0f}", *ratio(times, name, "ours")])
    report("input_pipeline", options, split, ["pipeline", "workers", "images/s", "range", "time / ours"], rows)


if __name__ == "__main__":
    main()
