"""A network before training: its size, its layers, and whether it can be trained at all."""

import math
from contextlib import redirect_stdout
from copy import deepcopy
from io import StringIO

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from session8.augment import normalize, scale_down
from session8.checkpoint import check_savable
from session8.config import Config
from session8.console import plural
from session8.data import CLASSES
from session8.device import autocast, backend_flags, fork_rng
from session8.optim import muon_flop


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: int = 32) -> float:
    """Return the multiply-accumulates (MACs) of a forward pass on one (3, size, size) image; NaN if it fails.

    Counts convolutions and matrix products. The model and the random states are unchanged.
    """
    counter, mkldnn = FlopCounterMode(display=False), torch.backends.mkldnn
    enabled = mkldnn.enabled
    try:
        copy = deepcopy(model).cpu().eval()  # in training mode the pass would update batch norm's statistics
        # Fused kernels, such as oneDNN's LSTM, are not counted. With gradients, attention has none.
        mkldnn.enabled = False  # type: ignore[assignment]
        with torch.random.fork_rng([]), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            copy(torch.zeros(1, 3, size, size))
    except Exception:  # a network may raise any
        return math.nan
    finally:
        mkldnn.enabled = enabled
    return counter.get_total_flops() // 2


def training_pflop(model: nn.Module, config: Config, n_train: int, epochs: int, device: torch.device | str) -> float:
    """Return the floating-point operations of so many epochs in 10^15: 6 per multiply-accumulate and image.

    Two are of the forward pass and four of the backward pass. Each epoch counts at the size of its images. The matrix
    products of Muon count; tests do not. device: where the model is trained, which sets the number of steps.
    """
    sizes = [config.image_size(epoch) for epoch in range(epochs)]
    macs = {size: count_macs(model, size) for size in set(sizes)}
    steps = epochs * math.ceil(n_train / config.batch_size_on(device))
    of_muon = steps * muon_flop(model) if config.optimizer == "muon" else 0
    return (6 * n_train * sum(macs[size] for size in sizes) + of_muon) / 1e15


def print_summary(model: nn.Module, size: int = 32) -> None:
    """Print a table of the layers for a (3, size, size) image, and the multiply-accumulates (MACs) of one.

    For a network that torchsummary cannot show, print why not, and the number of parameters. The model and the random
    states are unchanged.
    """
    table = StringIO()
    try:
        from torchsummary import summary  # needed here only

        with torch.random.fork_rng([]), redirect_stdout(table):
            summary(deepcopy(model).cpu(), (3, size, size), device="cpu")
        print(table.getvalue(), end="")
    except Exception as error:  # a network may raise any
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"torchsummary cannot show {type(model).__name__} ({reason}).\nParameters: {count_parameters(model):,}")
    macs = count_macs(model, size)
    counted = "cannot be counted" if math.isnan(macs) else f"{macs / 1e6:.3g} million per image"
    print(f"Multiply-accumulates (MACs): {counted}")


def check_network(model: nn.Module, config: Config, device: torch.device, smallest_batch: int) -> None:
    """Save a model to memory and run forward passes of a copy; raise ValueError if that fails.

    smallest_batch: number of images in the smallest batch, the last of an epoch. The trial takes two images at most, at
    each image size of the recipe, and tests at full size. Model and random states are unchanged. A network that cannot
    be copied is not tried, and a printed line says so.
    """
    name, n = type(model).__name__, min(2, smallest_batch)
    check_savable(model)
    try:
        copy = deepcopy(model)
    except Exception as error:  # some networks cannot be copied, for instance with torch.nn.utils.weight_norm
        if config.ema_decay:
            raise ValueError(
                f"ema_decay is {config.ema_decay}, but {name} cannot be copied ({type(error).__name__}: {error}): set "
                "ema_decay=0, or change the network"
            ) from error
        print(f"{name} was not tried before training: it cannot be copied ({type(error).__name__}: {error}).")
        return
    sizes = sorted({config.image_size(0), config.image_size(config.epochs - 1)})
    with fork_rng(device), torch.no_grad(), backend_flags(config):
        for size, training in [*((size, True) for size in sizes), (32, False)]:
            images = torch.zeros(n, 32, 32, 3, dtype=torch.uint8, device=device)
            try:
                images = scale_down(normalize(images, device), size)
            except NotImplementedError as error:  # on MPS, in PyTorch 2.6 (pytorch/pytorch#145526)
                raise ValueError(
                    f"low_res_size is {size}, but PyTorch {torch.__version__} cannot scale images down on {device}: "
                    "update PyTorch, or set low_res_epochs=0"
                ) from error
            try:
                with autocast(config.precision, device):
                    outputs = copy.train(training)(images)
            except Exception as error:  # of any kind: it is the caller's network
                batch = f"a batch of {plural(n, 'image')} of {size} by {size} pixels"
                raise ValueError(
                    f"{name} cannot {'train on' if training else 'test'} {batch} ({type(error).__name__}: {error}): "
                    f"change the network, batch_size (the last batch has {smallest_batch}) or low_res_size"
                ) from error
            shape = tuple(outputs.shape) if torch.is_tensor(outputs) else f"a {type(outputs).__name__}"
            if shape != (n, len(CLASSES)):
                raise ValueError(
                    f"{name} returns {shape} for {plural(n, 'image')}; expected a tensor of shape "
                    f"({n}, {len(CLASSES)}), one output for each of CLASSES: change its last layer"
                )
