"""The optimizer of the recipe, and the scaling of the loss that float16 needs."""

import torch
from torch import nn

from session8.config import Config
from session8.device import amp_dtype


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return SGD as in the recipe. Weight decay applies to parameters with two or more dimensions only.

    The biases of batch norm are a group of their own if their learning rate is scaled (Page 2018, "How to train your
    ResNet"; Jordan 2024, arXiv:2404.00498). `lr_scale` of a group is the factor on its rate.
    """
    batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
    scaled = {id(m.bias) for m in batch_norms} if config.bias_lr_scale != 1 else set()
    small = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in small if id(p) not in scaled], "weight_decay": 0.0},
    ]
    if scaled:
        biases = [p for p in small if id(p) in scaled]
        groups.append({"params": biases, "weight_decay": 0.0, "lr_scale": config.bias_lr_scale})
    # Unfused, SGD synchronises with the GPU in every step that scales the loss for float16.
    fused = next(model.parameters()).is_cuda
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if isinstance(optimizer, torch.optim.SGD) and config.momentum:
        # SGD creates its buffers in the first step. If it overflows in float16, the fused kernel leaves them undefined.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scaler(config: Config, device: torch.device | str) -> torch.amp.GradScaler:
    """Return the gradient scaler: enabled for float16, where small gradients would underflow to zero."""
    enabled = amp_dtype(config.precision, device) is torch.float16
    return torch.amp.GradScaler(torch.device(device).type, enabled=enabled)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each parameter group, times the factor of the group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
