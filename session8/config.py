"""The recipe: the hyperparameters of training in one frozen dataclass."""

import operator
from dataclasses import dataclass, fields
from typing import Literal

import torch

# Named recipes: changes to the defaults of `Config`.
RECIPES = {
    "default": {},
    # One-cycle schedule (Smith 2018, arXiv:1803.09820). Weight decay, label smoothing and cutout replace dropout.
    "one_cycle": dict(
        schedule="one_cycle", lr=0.1, nesterov=True, weight_decay=5e-4, label_smoothing=0.1, cutout=8, dropout=0.0
    ),
}
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


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
    """Learning rate; for the one_cycle schedule, its peak."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: float = 0.0
    """L2 penalty on weights; not applied to biases and batch norm."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    cutout: int = 0
    """Side in pixels of the square erased in each training image; 0: none."""
    dropout: float = 0.1
    """Dropout of the network: AdvancedCNN(dropout=config.dropout)."""
    schedule: Literal["constant", "one_cycle"] = "constant"
    """Constant, or a linear rise to lr followed by a linear decay to 0."""
    warmup: float = 0.25
    """Fraction of training in which the one_cycle schedule rises."""
    precision: Literal[PRECISIONS] = "auto"
    """Dtype of autocast; auto: 16 bits where the hardware computes in them."""
    deterministic: bool = False
    """Use deterministic CUDA kernels, at some cost in speed."""
    seed: int = 0
    """Seed of order, augmentation and dropout."""

    def __post_init__(self):
        # Plain Python numbers: a checkpoint that holds NumPy scalars cannot be read with weights_only=True.
        kinds = {int: operator.index, float: float, int | None: lambda n: n if n is None else operator.index(n)}
        for field in fields(self):
            value, convert = getattr(self, field.name), kinds.get(field.type)
            if convert:
                try:
                    object.__setattr__(self, field.name, convert(value))
                except (TypeError, ValueError) as error:
                    kind = "a number" if field.type is float else "an integer"
                    raise type(error)(f"{field.name} is {value!r}; expected {kind}") from None
        ranges = {
            "epochs": (self.epochs >= 1, "at least 1, for instance 40"),
            "batch_size": (self.batch_size is None or self.batch_size >= 1, "at least 1, or None"),
            "lr": (0 < self.lr < float("inf"), "a positive number, for instance 0.01"),
            "momentum": (0 <= self.momentum < 1, "0 <= momentum < 1, for instance 0.9"),
            "nesterov": (not self.nesterov or self.momentum > 0, "False if momentum is 0"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "0 or more, for instance 5e-4"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "0 <= label_smoothing < 1, for instance 0.1"),
            "cutout": (0 <= self.cutout <= 32, "0 (none) to 32 pixels, for instance 8"),
            "dropout": (0 <= self.dropout < 1, "0 <= dropout < 1, for instance 0.1"),
            "schedule": (self.schedule in ("constant", "one_cycle"), "'constant' or 'one_cycle'"),
            "warmup": (0 < self.warmup < 1, "0 < warmup < 1, for instance 0.25"),
            "precision": (self.precision in PRECISIONS, f"one of {', '.join(map(repr, PRECISIONS))}"),
            "seed": (0 <= self.seed < 2**63, "0 <= seed < 2**63"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    @classmethod
    def named(cls, recipe, **changes):
        """Return the recipe of this name ("default" or "one_cycle") with `changes` applied.

        Raises ValueError for an unknown name or a value out of range.
        """
        if recipe not in RECIPES:
            raise ValueError(f"recipe is {recipe!r}; expected one of {', '.join(map(repr, RECIPES))}")
        return cls(**{**RECIPES[recipe], **changes})

    def batch_size_on(self, device):
        """Return the number of images per step on `device`, a torch.device or a string."""
        return self.batch_size or (64 if torch.device(device).type == "cpu" else 128)

    def lr_at(self, progress):
        """Return the learning rate at `progress`, the fraction of training that is done, in [0, 1]."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * min(progress / self.warmup, (1 - progress) / (1 - self.warmup))
