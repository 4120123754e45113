"""The state of a run: what a checkpoint holds."""

from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from session8 import distributed
from session8.config import Config
from session8.optim import make_optimizer, make_scaler

METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds")  # per epoch, in the history


class TrainingState:
    """What a checkpoint holds: weights, their average, optimizer, loss scale, position and history.

    `step` counts optimizer steps since the start of training. Epoch, batch, learning rate, image size, decay of the
    average and seeds are computed from it.
    """

    def __init__(self, model: nn.Module, config: Config, device: torch.device):
        self.model = model
        if distributed.world_size() > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(model))  # a copy: it changes its argument
        self.average = deepcopy(self.model) if config.ema_decay else None
        self.optimizer, self.scaler = make_optimizer(self.model, config), make_scaler(config, device)
        self.step = 0
        self.loss_sum, self.correct, self.seconds = 0.0, 0.0, 0.0  # of the current epoch
        self.history: dict = {name: [] for name in METRICS}

    @property
    def result(self) -> nn.Module:
        """The model that is tested and kept: the average if there is one."""
        return self.model if self.average is None else self.average

    def update_average(self, decay: float) -> None:
        """Move the averaged weights and statistics towards those of the model."""
        if self.average is not None:
            get_ema_multi_avg_fn(decay)(_averaged(self.average), _averaged(self.model), None)

    def sync_buffers(self) -> None:
        """Copy integer buffers, such as batch norm's counters, to the average, then all buffers from rank 0."""
        if self.average is not None:
            for kept, new in zip(self.average.buffers(), self.model.buffers(), strict=True):
                if not (kept.is_floating_point() or kept.is_complex()):
                    kept.copy_(new)
            distributed.share_buffers(self.average)
        distributed.share_buffers(self.model)

    def end_epoch(self, **results: float) -> None:
        """Append the epoch's results to the history, and begin the sums of the next one."""
        for name, value in results.items():
            self.history[name].append(value)
        self.loss_sum, self.correct, self.seconds = 0.0, 0.0, 0.0

    def is_finite(self) -> bool:
        """Return whether all weights, statistics and optimizer states are finite."""
        buffers = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [*self.model.state_dict().values(), *filter(torch.is_tensor, buffers)]
        # One tensor, which is read once: each read waits for the device. Adam's counters are on the CPU.
        device = next(self.model.parameters()).device
        return bool(torch.stack([tensor.isfinite().all().to(device) for tensor in tensors]).all())

    def state_dict(self) -> dict:
        """Return what a checkpoint holds: tensors of this state, not copies, and plain values."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch so far": (self.loss_sum, self.correct, self.seconds),
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned, possibly on another device or with another number of processes."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]})
        for parameter, entry in self.optimizer.state.items():
            for name, value in entry.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    entry[name] = torch.empty_like(parameter).copy_(value)  # fused SGD needs the parameter's strides
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.loss_sum, self.correct, self.seconds = state["epoch so far"]
        self.history = deepcopy(state["history"])


def _averaged(model):
    """Return the parameters and buffers that are averaged: all but integers, such as batch norm's counters."""
    tensors = [*model.parameters(), *model.buffers()]
    return [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
