"""The optimizer of the recipe, and the scaling of the loss that float16 needs."""

from typing import Any

import torch
from torch import nn

from session8.config import Config
from session8.device import amp_dtype


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer of the recipe: SGD, or Muon for the filters of convolutions and SGD for all else.

    Weight decay applies to parameters with two or more dimensions only, and not to the filters of Muon. The biases of
    batch norm are a group of their own if their learning rate is scaled (Page 2018, "How to train your ResNet"; Jordan
    2024, arXiv:2404.00498). `lr_scale` of a group is the factor on its rate.

    Raises ValueError if the recipe asks for Muon and the model has no trainable convolution filters.
    """
    muon, device = config.optimizer == "muon", next(model.parameters()).device
    filters = convolution_filters(model) if muon else []
    others = [p for p in model.parameters() if id(p) not in {id(one) for one in filters}]
    batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
    scaled = {id(m.bias) for m in batch_norms} if config.bias_lr_scale != 1 else set()
    small = [p for p in others if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in small if id(p) not in scaled], "weight_decay": 0.0},
    ]
    if scaled:
        biases = [p for p in small if id(p) in scaled]
        groups.append({"params": biases, "weight_decay": 0.0, "lr_scale": config.bias_lr_scale})
    # Unfused, SGD synchronises with the GPU in every step that scales the loss for float16.
    fused = device.type == "cuda"
    settings: dict[str, Any] = dict(lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    optimizer: torch.optim.SGD
    if muon:
        if not filters:
            raise ValueError(
                f"optimizer is 'muon', but {type(model).__name__} has no trainable convolution filters: set "
                "optimizer='sgd'"
            )
        dtype = torch.bfloat16 if amp_dtype(config.precision, device) is torch.bfloat16 else torch.float32
        groups.append({"params": filters, "lr_scale": config.muon_lr / config.lr, "orthogonal": True})
        optimizer = Muon(groups, dtype, **settings)
    else:
        optimizer = torch.optim.SGD(groups, **settings)
    if config.momentum or muon:
        # SGD creates its buffers in the first step. If it overflows in float16, the fused kernel leaves them undefined.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    set_lr(optimizer, config.lr)
    return optimizer


# -- Muon -----------------------------------------------------------------------------------------------------------

# Of one Newton-Schulz iteration, a X + b (X Xᵀ) X + c (X Xᵀ)² X, and the number of iterations, from airbench94_muon
# (https://github.com/KellerJordan/cifar10-airbench).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 3


class Muon(torch.optim.SGD):
    """SGD whose groups with `orthogonal=True`, of convolution filters, take steps of orthogonalised momentum.

    A tensor of filters counts as a matrix of shape (output channels, the rest). Before each step it is scaled to the
    Frobenius norm sqrt(output channels). A step sets the gradients of the filters to None.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the scaling is that of
    airbench94_muon. PyTorch's Muon takes matrices only.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype = torch.float32, **settings):
        """dtype: of the Newton-Schulz iterations. settings: of SGD."""
        super().__init__(groups, **settings)
        self.defaults["dtype"] = dtype  # copied with the optimizer; not in its state, which may move to another device

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for filters in group["params"] if group.get("orthogonal") else []:
                if filters.grad is not None:
                    self._step_filters(filters, group)
                    filters.grad = None  # SGD, below, leaves these parameters out
        super().step()
        return loss

    def _step_filters(self, filters, group):
        # A fused optimizer receives the gradient's scale and whether it overflowed from the GradScaler, as tensors.
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        gradient = filters.grad if scale is None else filters.grad / scale
        buffer = self.state[filters]["momentum_buffer"]
        momentum = gradient.add(buffer, alpha=group["momentum"])
        direction = gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        update = orthogonalize(direction.flatten(1).to(self.defaults["dtype"])).view_as(filters)
        updated = (filters * (len(filters) ** 0.5 / (filters.norm() + 1e-7))).sub_(update, alpha=group["lr"])
        for tensor, new in ((buffer, momentum), (filters, updated)):
            tensor.copy_(new if overflow is None else torch.where(overflow > 0, tensor, new))


def convolution_filters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable filters of a model's convolutions, without those of grouped convolutions."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    weights = [m.weight for m in convolutions if m.groups == 1]  # filters of several groups are not one matrix
    # A parametrized weight, such as one of spectral norm, is computed: its parameters are trained by SGD.
    return [w for w in dict.fromkeys(weights) if isinstance(w, nn.Parameter) and w.requires_grad]


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return (M, N) with the same singular vectors and with singular values moved towards 1, approximately."""
    a, b, c = COEFFICIENTS
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T  # the smaller Gram matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if len(matrix) <= matrix.shape[1] else x.T


def muon_flop(model: nn.Module) -> int:
    """Return the floating-point operations of the Newton-Schulz iterations in one step, two per multiply-accumulate."""
    sides = [sorted((len(p), p[0].numel())) for p in convolution_filters(model)]
    return ITERATIONS * sum(2 * (2 * m * m * n + m**3) for m, n in sides)


def make_scaler(config: Config, device: torch.device | str) -> torch.amp.GradScaler:
    """Return the gradient scaler: enabled for float16, where small gradients would underflow to zero."""
    enabled = amp_dtype(config.precision, device) is torch.float16
    return torch.amp.GradScaler(torch.device(device).type, enabled=enabled)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each parameter group, times the factor of the group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
