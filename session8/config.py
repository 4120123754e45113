"""The recipe: the hyperparameters of training in one frozen dataclass."""

import operator
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

import torch

# Named recipes: changes to the defaults of `Config`.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    # One-cycle schedule (Smith 2018, arXiv:1803.09820). Weight decay, label smoothing and cutout replace dropout. The
    # averaged weights are the result. Alternating flip, reflected padding and scaled biases follow Jordan (2024,
    # arXiv:2404.00498).
    "one_cycle": dict(
        batch_size=128, schedule="one_cycle", lr=0.1, lr_start=0.2, lr_end=0.05, nesterov=True, weight_decay=5e-4,
        bias_lr_scale=16.0, ema_decay=0.998, label_smoothing=0.1, cutout=8, dropout=0.0, padding="reflect",
        flip="alternate",
    ),
    # A wider network for fewer epochs, the first on small images (arXiv:2104.00298), trained by Muon (Jordan et al.
    # 2024), with less augmentation than `one_cycle`.
    "fast": dict(
        epochs=9, batch_size=512, width=1.75, optimizer="muon", muon_lr=0.04, schedule="one_cycle", lr=0.4,
        lr_start=0.2, lr_end=0.02, warmup=0.05, momentum=0.85, nesterov=True, bias_lr_scale=15.0, ema_decay=0.98,
        label_smoothing=0.2, dropout=0.0, padding="reflect", crop_padding=2, flip="alternate", low_res_epochs=4,
        low_res_size=24,
    ),
    # `fast` for longer, with a wider network and stronger augmentation.
    "accurate": dict(
        epochs=19, batch_size=512, width=2.5, optimizer="muon", muon_lr=0.04, schedule="one_cycle", lr=0.4,
        lr_start=0.2, lr_end=0.02, warmup=0.05, momentum=0.85, nesterov=True, bias_lr_scale=15.0, ema_decay=0.98,
        label_smoothing=0.1, cutout=8, dropout=0.0, padding="reflect", flip="alternate", low_res_epochs=10,
        low_res_size=24,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A training recipe. The defaults are plain SGD at a constant learning rate.

    Raises ValueError if a value is out of range, TypeError if it is not a number.
    """

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int | None = None
    """Images per step. None: 128 on an accelerator, 64 on a CPU."""
    lr: float = 0.01
    """Learning rate of SGD; for the one_cycle schedule, its peak."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """Optimizer of the convolution filters; Muon orthogonalises their momentum. All other parameters have SGD."""
    muon_lr: float = 0.04
    """Learning rate of Muon; it follows the same schedule as lr."""
    momentum: float = 0.9
    """Momentum of SGD and Muon."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: float = 0.0
    """L2 penalty on weights; not applied to biases, batch norm and filters that Muon trains."""
    bias_lr_scale: float = 1.0
    """Factor on the learning rate of batch norm's biases."""
    ema_decay: float = 0.0
    """Decay per step of the moving average of weights and batch norm's statistics, which is tested; 0: none."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    cutout: int = 0
    """Side in pixels of the square erased in each training image; 0: none."""
    padding: Literal["zeros", "reflect"] = "zeros"
    """What training images are padded with before the random crop."""
    crop_padding: int = 4
    """Pixels of padding on each side."""
    flip: Literal["random", "alternate"] = "random"
    """Random: mirror with probability 0.5. Alternate: draw once per image, then mirror in every second epoch."""
    low_res_epochs: int = 0
    """Number of first epochs that train on images scaled down to low_res_size."""
    low_res_size: int = 24
    """Side in pixels of these images."""
    dropout: float = 0.1
    """Dropout of the network: AdvancedCNN(dropout=config.dropout)."""
    width: float = 1.0
    """Factor on the channels of the network: AdvancedCNN(width=config.width)."""
    schedule: Literal["constant", "one_cycle"] = "constant"
    """Constant, or a linear rise from lr_start to lr followed by a linear decay to lr_end."""
    lr_start: float = 0.0
    """First learning rate of the one_cycle schedule, as a fraction of lr."""
    lr_end: float = 0.0
    """Last learning rate of the one_cycle schedule, as a fraction of lr."""
    warmup: float = 0.25
    """Fraction of training in which the one_cycle schedule rises."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of autocast; auto: 16 bits where the hardware computes in them."""
    deterministic: bool = False
    """Use deterministic CUDA kernels, at some cost in speed."""
    seed: int = 0
    """Seed of order, augmentation and dropout."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                choices = ", ".join(map(repr, get_args(field.type)))
                raise ValueError(f"{field.name} is {value!r}; expected one of {choices}")
            # Plain Python numbers: a checkpoint that holds NumPy scalars cannot be read with weights_only=True.
            if field.type is float or (field.type in (int, int | None) and value is not None):
                try:
                    object.__setattr__(self, field.name, float(value) if field.type is float else operator.index(value))
                except (TypeError, ValueError) as error:
                    kind = "a number" if field.type is float else "an integer"
                    raise type(error)(f"{field.name} is {value!r}; expected {kind}") from None
        ranges = {
            "epochs": (self.epochs >= 1, "at least 1, for instance 40"),
            "batch_size": (self.batch_size is None or self.batch_size >= 1, "at least 1, or None"),
            "lr": (0 < self.lr < float("inf"), "a positive number, for instance 0.01"),
            "muon_lr": (0 < self.muon_lr < float("inf"), "a positive number, for instance 0.04"),
            "momentum": (0 <= self.momentum < 1, "0 <= momentum < 1, for instance 0.9"),
            "nesterov": (not self.nesterov or self.momentum > 0, "False if momentum is 0"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "0 or more, for instance 5e-4"),
            "bias_lr_scale": (0 < self.bias_lr_scale < float("inf"), "a positive number, for instance 16"),
            "ema_decay": (0 <= self.ema_decay < 1, "0 (none) to below 1, for instance 0.996"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "0 <= label_smoothing < 1, for instance 0.1"),
            "cutout": (0 <= self.cutout <= 32, "0 (none) to 32 pixels, for instance 8"),
            "crop_padding": (0 <= self.crop_padding <= 16, "0 to 16 pixels, for instance 4"),
            "low_res_epochs": (0 <= self.low_res_epochs <= self.epochs, f"0 to {self.epochs}, the number of epochs"),
            "low_res_size": (16 <= self.low_res_size <= 32, "16 to 32 pixels, for instance 24"),
            "width": (0 < self.width < float("inf"), "a positive number, for instance 1.0"),
            "dropout": (0 <= self.dropout < 1, "0 <= dropout < 1, for instance 0.1"),
            "lr_start": (0 <= self.lr_start <= 1, "a fraction of lr, for instance 0.2"),
            "lr_end": (0 <= self.lr_end <= 1, "a fraction of lr, for instance 0.05"),
            "warmup": (0 < self.warmup < 1, "0 < warmup < 1, for instance 0.25"),
            "seed": (0 <= self.seed < 2**63, "0 <= seed < 2**63"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    @classmethod
    def named(cls, recipe: str, **changes) -> "Config":
        """Return the recipe of this name ("default", "one_cycle", "fast" or "accurate") with `changes` applied.

        If they change the number of epochs, the recipe's low_res_epochs keep their share of it.

        Raises ValueError for an unknown name or a value out of range.
        """
        if recipe not in RECIPES:
            raise ValueError(f"recipe is {recipe!r}; expected one of {', '.join(map(repr, RECIPES))}")
        values = RECIPES[recipe]
        if "epochs" in changes and "low_res_epochs" in values:
            share = values["low_res_epochs"] / values["epochs"]
            values = {**values, "low_res_epochs": round(share * changes["epochs"])}
        return cls(**{**values, **changes})

    def batch_size_on(self, device: torch.device | str) -> int:
        """Return the number of images per step on a device."""
        return self.batch_size or (64 if torch.device(device).type == "cpu" else 128)

    def image_size(self, epoch: int) -> int:
        """Return the side in pixels of the training images in an epoch, counted from 0."""
        return self.low_res_size if epoch < self.low_res_epochs else 32

    def progress(self, epochs_done: float) -> float:
        """Return the fraction of training that is done, in [0, 1], measured by pixels: small images count less."""

        def pixels(epochs):
            return epochs - min(epochs, self.low_res_epochs) * (1 - (self.low_res_size / 32) ** 2)

        return pixels(epochs_done) / pixels(self.epochs)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0 since the start of training: the rate at its middle."""
        if self.schedule == "constant":
            return self.lr
        epoch, batch = divmod(step, steps_per_epoch)
        progress = self.progress(epoch + (batch + 0.5) / steps_per_epoch)
        rise = self.lr_start + (1 - self.lr_start) * progress / self.warmup
        return self.lr * min(rise, self.lr_end + (1 - self.lr_end) * (1 - progress) / (1 - self.warmup))

    def ema_decay_at(self, step: int) -> float:
        """Return the decay of the moving average in a step, counted from 0 since the start of training.

        It is 0 in the first step and rises as in TensorFlow's ExponentialMovingAverage, so that the initial weights do
        not dominate the average of a short run.
        """
        return min(self.ema_decay, (1 + step) / (10 + step)) if step else 0.0
