"""The recipe, and what a device makes of it."""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

RECIPES = ("default", "one_cycle")


@dataclass(frozen=True)
class Config:
    """Every number of the recipe. The defaults are plain SGD at a constant rate; `Config.one_cycle()` is the second
    recipe.

    batch_size: None is 128 on an accelerator and 64 on a CPU. lr: the rate, or the peak of the "one_cycle" schedule,
    which rises linearly over the fraction `warmup` of training and then falls linearly to 0. weight_decay: on
    weights only, not on biases and batch norm. label_smoothing: the share of the target spread over all classes.
    cutout: the side, in pixels, of a square painted over in each training image; 0 for none. dropout: what the
    network is to be made with, `AdvancedCNN(dropout=config.dropout)`; ResNet-20 has none in any case.
    precision: "auto" is mixed precision where the hardware has it (see `mixed_precision`), "float32" is never.
    deterministic: ask PyTorch for deterministic kernels, at some cost in speed; a CPU's are so in any case.
    Raises ValueError on construction, naming the value and what is expected.
    """

    epochs: int = 40
    batch_size: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    cutout: int = 0
    dropout: float = 0.1
    schedule: str = "constant"
    warmup: float = 0.25
    precision: str = "auto"
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self):
        def check(name, valid, expected):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

        def whole(value):
            return isinstance(value, int) and not isinstance(value, bool)

        numbers = ("lr", "momentum", "weight_decay", "label_smoothing", "dropout", "warmup")
        for name in numbers:
            check(name, isinstance(getattr(self, name), int | float), "a number")
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
        check("cutout", whole(self.cutout) and 0 <= self.cutout <= 32, "a side from 0 (none) to 32 pixels")
        check("dropout", 0 <= self.dropout < 1, "a share from 0 to below 1, for instance 0.1")
        check("schedule", self.schedule in ("constant", "one_cycle"), "'constant' or 'one_cycle'")
        check("warmup", 0 < self.warmup < 1, "a fraction between 0 and 1, for instance 0.25")
        check("precision", self.precision in ("auto", "float32"), "'auto' or 'float32'")
        check("seed", whole(self.seed) and 0 <= self.seed < 2**63, "a whole number of at least 0")
        for name in numbers:
            # Plain floats, since NumPy's would be refused when a checkpoint is read.
            object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def one_cycle(cls, **changes):
        """The second recipe: a one-cycle schedule (Smith 2018, arXiv:1803.09820), Nesterov momentum, and weight decay,
        label smoothing and cutout in the place of dropout. `changes` override its numbers."""
        recipe = dict(schedule="one_cycle", lr=0.1, nesterov=True)
        regularisation = dict(weight_decay=5e-4, label_smoothing=0.1, cutout=8, dropout=0.0)
        return cls(**{**recipe, **regularisation, **changes})

    @classmethod
    def named(cls, recipe, **changes):
        """The recipe called "default" or "one_cycle", with `changes`. Raises ValueError for another name."""
        if recipe not in RECIPES:
            raise ValueError(f"recipe is {recipe!r}; expected one of {', '.join(map(repr, RECIPES))}")
        return cls(**changes) if recipe == "default" else getattr(cls, recipe)(**changes)

    def batch_size_on(self, device):
        """The batch size that the recipe comes to on `device`, a torch.device."""
        return self.batch_size or (64 if device.type == "cpu" else 128)

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


def memory_format(device):
    """How batches of images lie in the memory of `device`, a torch.device: channels_last, fastest to convolve.

    But not on MPS, where the gradients of batch norm are then wrong in many releases (PyTorch's issue 175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


@contextmanager
def kernels(config):
    """Have PyTorch use deterministic kernels, or else the fastest that cuDNN finds; its settings are put back after.

    An operation that has no deterministic kernel warns and runs all the same. What stays is the environment variable
    CUBLAS_WORKSPACE_CONFIG, which cuBLAS reads once.
    """
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS demands for it
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
