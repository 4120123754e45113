"""What the notebook works with: transforms and loaders, training and testing; and, passed on, data and plots.

An image's way: uint8 in the split -> a batch of indices with the batch's own seed -> albumentations, image by image
-> a uint8 batch -> on the device: float, normalised, channels_last -> CNN -> log-probabilities -> NLL -> SGD.
"""

import os
import random
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the package index for news: 2 s

import albumentations as A
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from checkpoint import count_macs, describe_record, write_record
from cifar10 import CLASSES, MEAN, STD, Split, load_cifar10, synthetic_cifar10, validation_split
from plots import (
    plot_accuracy,
    plot_augmentations,
    plot_learning_rate,
    plot_loss,
    plot_misclassified,
    plot_samples,
)

PADDING = 4  # zero pixels on each side of a training image, for the random crop

# -- data ----------------------------------------------------------------------------------------------------------


def train_transforms():
    """Albumentations for training: uint8 (40, 40, 3), the padded image, in; uint8 (32, 32, 3) out.

    To add one, add it to the list; normalisation is not among them: it is done on the device.
    """
    return A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(p=0.5)])


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
        for row, index in enumerate(indices):
            image = self.transform(image=images[index])["image"]
            if image.shape != batch.shape[1:] or image.dtype != np.uint8:
                raise ValueError(
                    f"the transform returned {image.dtype} {image.shape} for uint8 {images[index].shape}; expected "
                    "uint8 (32, 32, 3): training needs a crop such as A.RandomCrop(32, 32), and neither Normalize nor "
                    "ToTensorV2, since normalisation is done on the device"
                )
            batch[row] = image
        return torch.from_numpy(batch), self.labels[indices]


def augment(split, index, n, transform=None, seed=0):
    """Draw n augmentations of one training image, as `make_loader` would: uint8 (n, 32, 32, 3)."""
    one = Split(split.images[[index]], split.labels[[index]], split.source)
    images, _ = _Batches(one, transform or train_transforms(), train=True)[np.zeros(n, int), seed]
    return images.numpy()


class _BatchSampler(Sampler):
    """Draws an epoch's batches and their seeds, in the main process, from (seed, epoch) alone."""

    def __init__(self, n, batch_size, shuffle, seed):
        self.n, self.batch_size, self.shuffle, self.seed, self.epoch = n, batch_size, shuffle, seed, 0

    def __len__(self):
        return -(-self.n // self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.n) if self.shuffle else np.arange(self.n)
        for start, seed in enumerate(rng.integers(2**63, size=len(self)).tolist()):
            yield order[start * self.batch_size : (start + 1) * self.batch_size], seed


class _Loader(DataLoader):
    def set_epoch(self, epoch):
        """Choose the epoch whose order and augmentation the next iteration yields."""
        self.sampler.epoch = epoch


def _init_worker(_):
    cv2.setNumThreads(0)  # OpenCV's own threads would fight the other workers


def make_loader(split, batch_size, train=True, seed=0, num_workers=None, transform=None):
    """Make the loader of a split: yields (images uint8 (B, 32, 32, 3), labels int64 (B,)), the last batch partial.

    train: pad by 4 pixels, shuffle, and apply `train_transforms()`; else keep the order and apply
    `test_transforms()`. transform: another albumentations pipeline instead. The batches depend on `seed` and on the
    epoch given to the loader's `set_epoch(n)`, not on num_workers, whose default is up to 4 for training where
    there is a GPU and else 0: on a CPU the cores that would load are the ones that train.

    Raises ValueError for a batch size below 1 or a negative number of workers, TypeError for a transform that is
    not albumentations'; and, on iteration, ValueError for one that does not return uint8 (32, 32, 3).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1, for instance 128")
    if num_workers is None:
        num_workers = min(4, os.cpu_count() or 1) if train and torch.cuda.is_available() else 0
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
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: else each epoch would draw from the global one, which dropout uses.
        generator=torch.Generator(),
    )


# -- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Every number of the recipe. The defaults are the seed project's; `Config.one_cycle()` is the second recipe.

    batch_size: None is 128 on an accelerator and 64 on a CPU. lr: the rate, or the peak of the "one_cycle" schedule,
    which rises linearly over the fraction `warmup` of training and then falls linearly to 0. weight_decay: on
    weights only, not on biases and batch norm. label_smoothing: the share of the target spread over all classes.
    precision: "auto" is mixed precision where the hardware has it (see `mixed_precision`), "float32" is never.
    Raises ValueError on construction, naming the value and what is expected.
    """

    epochs: int = 40
    batch_size: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.25
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self):
        def check(name, valid, expected):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

        def whole(value):
            return isinstance(value, int) and not isinstance(value, bool)

        check("epochs", whole(self.epochs) and self.epochs >= 1, "a whole number of at least 1, for instance 40")
        if self.batch_size is not None:
            check(
                "batch_size", whole(self.batch_size) and self.batch_size >= 1, "a whole number of at least 1, or None"
            )
        check("lr", 0 < self.lr < float("inf"), "a positive number, for instance 0.01")
        check("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1, for instance 0.9")
        check("nesterov", not self.nesterov or self.momentum > 0, "False when momentum is 0")
        check("weight_decay", 0 <= self.weight_decay < float("inf"), "0 or more, for instance 5e-4")
        check("label_smoothing", 0 <= self.label_smoothing < 1, "a number from 0 to below 1, for instance 0.1")
        check("schedule", self.schedule in ("constant", "one_cycle"), "'constant' or 'one_cycle'")
        check("warmup", 0 < self.warmup < 1, "a fraction between 0 and 1, for instance 0.25")
        check("precision", self.precision in ("auto", "float32"), "'auto' or 'float32'")
        check("seed", whole(self.seed) and 0 <= self.seed < 2**63, "a whole number of at least 0")

    @classmethod
    def one_cycle(cls, **changes):
        """The second recipe: a one-cycle schedule (Smith 2018, arXiv:1803.09820), Nesterov momentum, weight decay
        and label smoothing. `changes` override its numbers."""
        recipe = dict(lr=0.1, nesterov=True, weight_decay=5e-4, label_smoothing=0.1, schedule="one_cycle")
        return cls(**{**recipe, **changes})

    @classmethod
    def named(cls, recipe, **changes):
        """The recipe called "default" or "one_cycle", with `changes`. Raises ValueError for another name."""
        recipes = {"default": cls, "one_cycle": cls.one_cycle}
        if recipe not in recipes:
            raise ValueError(f"recipe is {recipe!r}; expected one of {', '.join(map(repr, recipes))}")
        return recipes[recipe](**changes)

    def lr_at(self, progress):
        """The learning rate at `progress`, the fraction of training done, from 0 to 1."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * min(progress / self.warmup, (1 - progress) / (1 - self.warmup))


def get_device(device=None):
    """The device to train on: the one named ("cuda", "mps", "cpu", ...), or the first of those three that is there.

    Returns a torch.device. Raises ValueError for a device that is unknown or not on this machine.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(name for name, available in there.items() if available))
    remedy = f"on this machine there is {', '.join(name for name, available in there.items() if available)}"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, which PyTorch does not know: {remedy}") from error
    if not there.get(found.type) or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device is {device!r}, which is not to be had: {remedy}")
    return found


def mixed_precision(config, device):
    """The 16-bit type that `device` computes convolutions in, or None where only float32 pays.

    bfloat16 on CUDA where the GPU really has it and on CPUs with AMX tiles for it, float16 on other CUDA devices.
    Weights and optimizer stay in float32 always.
    """
    if config.precision == "float32":
        return None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        # Older releases of PyTorch cannot tell; without AMX, bfloat16 on a CPU is slower than float32.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if capabilities.get("amx_bf16") else None
    return None


def autocast(config, device):
    """The context for a forward pass: in the 16-bit type that `mixed_precision` names, if it names one."""
    dtype = mixed_precision(config, device)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def normalize(images, device):
    """The fused step on the device: uint8 (B, 32, 32, 3) to float32 (B, 3, 32, 32) in channels_last, normalised.

    Mean and standard deviation are applied here and nowhere else.
    """
    scale, offset = _scale_and_offset(device)
    images = images.to(device, non_blocking=True).float()
    # Seen as NCHW, a contiguous NHWC batch is in channels_last already: the permutation moves nothing.
    return torch.addcmul(offset, images, scale).permute(0, 3, 1, 2)


@cache
def _scale_and_offset(device):
    # Kept on the device: a copy from the host each step would make a GPU wait.
    scale = torch.tensor([1 / (255 * std) for std in STD], device=device)
    return scale, torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)], device=device)


def make_optimizer(model, config):
    """SGD as the recipe asks; weight decay applies to weights (two dimensions and more) only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # Unfused, SGD makes the GPU wait in every step that scales the loss for float16.
    fused = next(model.parameters()).is_cuda
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


def _train_step(model, images, labels, optimizer, scaler, config, device):
    """One step of SGD. Returns the batch's mean NLL and number of correct predictions, both on the device."""
    labels = labels.to(device, non_blocking=True)
    with autocast(config, device):
        log_probs = model(normalize(images, device)).float()
    nll = F.nll_loss(log_probs, labels)
    loss = (1 - config.label_smoothing) * nll - config.label_smoothing * log_probs.mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return nll.detach(), (log_probs.detach().argmax(1) == labels).sum()


def _make_scaler(config, device):
    return torch.amp.GradScaler(device.type, enabled=mixed_precision(config, device) is torch.float16)


def train(model, loader, optimizer, config, device, epoch=0, scaler=None):
    """Train for one epoch, showing one progress bar.

    The bar's loss is the last batch's mean NLL, its accuracy the epoch's so far. The sums stay on the device and are
    read only when the bar is refreshed, twice a second: a `.item()` every step would make a GPU wait.

    Returns (loss, accuracy): mean NLL over the images, without label smoothing, and percent correct, both as the
    images came by, augmented and with dropout.
    """
    device = get_device(device)
    scaler = scaler or _make_scaler(config, device)
    model.train()
    loss_sum, correct, seen = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device), 0
    refreshed = time.monotonic()
    with tqdm(total=len(loader), file=sys.stdout, mininterval=0, miniters=1) as bar:
        for batch_id, (images, labels) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at((epoch + batch_id / len(loader)) / config.epochs)
            nll, hits = _train_step(model, images, labels, optimizer, scaler, config, device)
            loss_sum += nll * len(labels)
            correct += hits
            seen += len(labels)
            if time.monotonic() - refreshed > 0.5 or batch_id == len(loader) - 1:
                accuracy = 100 * correct.item() / seen
                text = f"Train: Loss={nll.item():.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}"
                bar.set_description(text, refresh=False)
                bar.update(batch_id + 1 - bar.n)
                refreshed = time.monotonic()
    return loss_sum.item() / seen, accuracy


@torch.no_grad()
def test(model, loader, config, device):
    """Test in one pass and print the result. Returns (loss, accuracy): mean NLL over the images, percent correct."""
    device = get_device(device)
    model.eval()
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in loader:
        labels = labels.to(device, non_blocking=True)
        with autocast(config, device):
            log_probs = model(normalize(images, device)).float()
        loss_sum += F.nll_loss(log_probs, labels, reduction="sum")
        correct += (log_probs.argmax(1) == labels).sum()
    n, correct = len(loader.dataset), correct.item()
    loss, accuracy = loss_sum.item() / n, 100 * correct / n
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/{n} ({accuracy:.2f}%)\n", flush=True)
    return loss, accuracy


def _prepare(model, train_split, test_split, config, device):
    """What training needs, made from the recipe: (train loader, test loader, optimizer, scaler)."""
    batch_size = config.batch_size or (64 if device.type == "cpu" else 128)
    workers = None if device.type == "cuda" else 0
    model.to(device, memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    return (
        make_loader(train_split, batch_size, train=True, seed=config.seed, num_workers=workers),
        make_loader(test_split, 500, train=False),
        make_optimizer(model, config),
        _make_scaler(config, device),
    )


def fit(model, train_split, test_split, config, device=None):
    """Train `model` in place as `config` says, testing after every epoch.

    The test accuracy is shown and chooses nothing: there is no early stopping and no best epoch. Ctrl-C ends
    training with the history so far. The seed also sets PyTorch's global random state, which dropout draws from.

    Returns the history, lists of plain numbers with one entry an epoch: `train_loss` and `test_loss` (mean NLL),
    `train_accuracy` and `test_accuracy` (percent), `lr` (of the epoch's last step), `seconds` (tests included).
    Raises ValueError for a device that is not there.
    """
    device = get_device(device)
    train_loader, test_loader, optimizer, scaler = _prepare(model, train_split, test_split, config, device)
    torch.manual_seed(config.seed)
    precision = str(mixed_precision(config, device) or torch.float32).removeprefix("torch.")
    sizes = f"{len(train_split):,} images, {len(test_split):,} for testing"
    print(f"Training on {train_split.source}: {sizes}; {config.epochs} epochs on {device.type} in {precision}\n")
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds")
    history = {name: [] for name in names}
    try:
        for epoch in range(config.epochs):
            started = time.perf_counter()
            print(f"Epoch {epoch + 1}", flush=True)
            train_loader.set_epoch(epoch)
            trained = train(model, train_loader, optimizer, config, device, epoch, scaler)
            tested = test(model, test_loader, config, device)
            lr, seconds = optimizer.param_groups[0]["lr"], time.perf_counter() - started
            for name, value in zip(names, (*trained, *tested, lr, seconds), strict=True):
                history[name].append(value)
    except KeyboardInterrupt:
        print(f"\nInterrupted in epoch {epoch + 1}: the history holds the {epoch} before it.", flush=True)
    return history


def estimate_seconds(model, train_split, test_split, config, device=None):
    """Estimate how many seconds `fit` will take, by timing a few steps on a copy of the model.

    Leaves the model and PyTorch's random states on the CPU and CUDA as they were.
    """
    device = get_device(device)
    model = deepcopy(model)
    train_loader, test_loader, optimizer, scaler = _prepare(model, train_split, test_split, config, device)

    def seconds(loader, step, steps):
        times = []
        for (images, labels), _ in zip(loader, range(steps), strict=False):
            step(images, labels).item()  # waits for the device
            times.append(time.perf_counter())
        # The first steps allocate memory and choose kernels: the median of the gaps leaves them out.
        return len(loader) * float(np.median(np.diff(times))) if len(times) > 1 else 0.0

    def train_step(images, labels):
        return _train_step(model, images, labels, optimizer, scaler, config, device)[0]

    def test_step(images, _):
        with torch.no_grad(), autocast(config, device):
            return model(normalize(images, device)).sum()

    with torch.random.fork_rng():
        model.train()
        train_seconds = seconds(train_loader, train_step, steps=30)
        model.eval()
        test_seconds = seconds(test_loader, test_step, steps=5)
    return config.epochs * (train_seconds + test_seconds)
