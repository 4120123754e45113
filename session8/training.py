"""Training and testing: one step, one epoch, one pass over the test images. `trainer.fit` makes a run of them.

The path of an image: uint8 in the split, an augmented uint8 batch on the device, normalised there, CNN,
log-probabilities, negative log-likelihood (NLL), SGD.
"""

import math
import sys
import time
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from session8 import distributed
from session8.augment import normalize
from session8.checkpoint import check_savable
from session8.config import Config
from session8.console import plural
from session8.data import CLASSES
from session8.device import amp_dtype, autocast, backend_flags, fork_rng, get_device, memory_format
from session8.loaders import make_loader
from session8.records import test_line

REFRESH_SECONDS = 0.5  # interval at which the progress bar is refreshed and the device is read
REFRESH_BATCHES = 20  # the same for several processes, which must refresh together and have clocks of their own
TEST_BATCH_SIZE = 500
VIEWS = (1, 2, 6)  # of a test image: itself; with its mirror image; with both shifted by one pixel diagonally
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


# -- one step ------------------------------------------------------------------------------------------------------


def make_optimizer(model, config):
    """Return SGD as in the recipe. Weight decay applies to parameters with two or more dimensions only.

    The biases of batch norm are a group of their own if their learning rate is scaled (Page 2018, "How to train your
    ResNet"; Jordan 2024, arXiv:2404.00498). `lr_scale` of a group is the factor on its rate.
    """
    batch_norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.affine]
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
    add_momentum(optimizer)
    return optimizer


def add_momentum(optimizer):
    """Give each parameter without a momentum buffer a buffer of zeros.

    If the first step of float16 overflows, the fused kernel skips it and leaves new buffers uninitialised.
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def averaged_tensors(model):
    """Return the parameters and buffers of a model that are averaged: all but integers."""
    tensors = [*model.parameters(), *model.buffers()]
    return [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]


def copy_counters(average, model):
    """Copy the buffers of integers, such as batch norm's number of batches, to the average of a model."""
    for kept, new in zip(average.buffers(), model.buffers(), strict=True):
        if not (kept.is_floating_point() or kept.is_complex()):
            kept.copy_(new)


def set_lr(optimizer, lr):
    """Set the learning rate of each parameter group, times the factor of the group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def make_scaler(config, device):
    """Return the gradient scaler: enabled for float16, where small gradients would underflow to zero."""
    enabled = amp_dtype(config.precision, device) is torch.float16
    return torch.amp.GradScaler(torch.device(device).type, enabled=enabled)


def train_step(model, images, labels, optimizer, scaler, config, device, weight=1.0, size=32):
    """Take one step of SGD on images, uint8 (B, 32, 32, 3), and labels, int64 (B,).

    weight: factor on the loss. If processes have shares of unequal sizes, it makes the mean of their gradients that of
    the whole batch. size: side in pixels to which the images are scaled down first.

    Returns the batch's mean NLL, without label smoothing, and its number of correct predictions, both as tensors on
    the device: reading them would wait for it.
    """
    labels = labels.to(device, non_blocking=labels.is_pinned())
    with autocast(config.precision, device):
        outputs = model(scale_down(normalize(images, device), size))
    # Log-probabilities stay as they are; the logits of other networks become log-probabilities.
    log_probs = F.log_softmax(outputs.float(), dim=1)
    nll = F.nll_loss(log_probs, labels)
    smoothing = config.label_smoothing
    loss = weight * (1 - smoothing) * nll - weight * smoothing * log_probs.mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return nll.detach(), (log_probs.detach().argmax(1) == labels).sum()


def scale_down(images, size):
    """Scale float (B, C, H, H) down to (B, C, size, size) with an antialiasing bilinear filter."""
    if size == images.shape[-1]:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def check_network(model, config, device, smallest_batch):
    """Save a model to memory and run forward passes of a copy; raise ValueError if that fails.

    smallest_batch: number of images in the smallest batch, the last of an epoch. The trial takes two images at most, at
    each image size of the recipe, and tests at full size. Model and random states are unchanged. A network that cannot
    be copied is not tried, and a printed line says so.
    """
    name, n = type(model).__name__, min(2, smallest_batch)
    check_savable(model)
    with fork_rng(device), torch.no_grad(), backend_flags(config):
        try:
            copy = deepcopy(model).train()
        except Exception as error:  # some networks cannot be copied, for instance with torch.nn.utils.weight_norm
            print(f"{name} was not tried before training: it cannot be copied ({type(error).__name__}: {error}).")
            return
        trained = sorted({config.image_size(0), config.image_size(config.epochs - 1)})
        for size, train in [*((size, True) for size in trained), (32, False)]:
            copy.train(train)
            images = torch.zeros(n, 32, 32, 3, dtype=torch.uint8, device=device)
            try:
                images = scale_down(normalize(images, device), size)
            except NotImplementedError as error:  # on MPS, in PyTorch 2.6 (pytorch/pytorch#145526)
                raise ValueError(
                    f"low_res_size is {size}, but PyTorch {torch.__version__} cannot scale images down on "
                    f"{device}: update PyTorch, or set low_res_epochs=0"
                ) from error
            try:
                with autocast(config.precision, device):
                    outputs = copy(images)
            except Exception as error:  # of any kind: it is the caller's network
                batch = f"a batch of {plural(n, 'image')} of {size} by {size} pixels"
                raise ValueError(
                    f"{name} cannot {'train on' if train else 'test'} {batch} ({type(error).__name__}: {error}): "
                    f"change the network, batch_size (the last batch has {smallest_batch}) or low_res_size"
                ) from error
            shape = tuple(outputs.shape) if torch.is_tensor(outputs) else f"a {type(outputs).__name__}"
            if shape != (n, len(CLASSES)):
                raise ValueError(
                    f"{name} returns {shape} for {plural(n, 'image')}; expected a tensor of shape "
                    f"({n}, {len(CLASSES)}), one output for each of CLASSES: change its last layer"
                )


class TrainingDiverged(RuntimeError):
    """The loss or a weight is NaN or infinite. The message names the step, the learning rate and the remedy."""

    def __init__(self, what, epoch, batch_id, lr):
        super().__init__(
            f"{what} in epoch {epoch + 1}, Batch_id={batch_id}, at a learning rate of {lr:.4g}: use a smaller lr, or "
            "schedule='one_cycle', which starts with a small one"
        )


# -- one epoch -----------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How much of an epoch is done, as plain numbers."""

    batches: int = 0
    images: int = 0
    loss_sum: float = 0.0  # NLL, summed over images
    correct: int = 0
    last_loss: float = 0.0  # mean NLL of the last batch
    seconds: float = 0.0


def train(model, loader, optimizer, config, device, epoch=0, scaler=None, progress=None, on_refresh=None, average=None):
    """Train for one epoch with a progress bar, which shows the last batch's loss and the epoch's accuracy so far.

    epoch: its index, from 0, which sets the learning rate and the size of the images. scaler: from `make_scaler`.
    progress: counters of an epoch that is partly done, updated when the bar is refreshed; the loader must start at the
    same batch. on_refresh: called after each refresh. average: a copy of the model whose weights and floating-point
    buffers become the moving average after each step, by the decay of the recipe (see also `copy_counters`). Modules
    must change their buffers in place.

    If the loader yields one rank's share of each batch, the model must be a DistributedDataParallel; all ranks show and
    return the results of all images.

    Returns (loss, accuracy): mean NLL over the images, without label smoothing, and percent correct. Both are measured
    on augmented images, with dropout, while the weights change. Raises TrainingDiverged if a loss is not finite.
    """
    device = get_device(device)
    scaler = scaler or make_scaler(config, device)
    progress = Progress() if progress is None else progress
    world_size = getattr(loader, "world_size", 1)
    size = config.image_size(epoch)
    model.train()
    pending, refreshed = [], time.monotonic()
    averaged = None if average is None else (averaged_tensors(average), averaged_tensors(model))
    with (
        backend_flags(config),
        tqdm(total=len(loader), initial=progress.batches, file=sys.stdout, mininterval=0, miniters=1) as bar,
    ):
        for batch_id, (images, labels) in enumerate(loader, start=progress.batches):
            lr = config.lr_at(config.progress(epoch + (batch_id + 0.5) / len(loader)))  # at the middle of the step
            set_lr(optimizer, lr)
            n = loader.global_size(batch_id) if world_size > 1 else len(labels)
            weight = len(labels) * world_size / n  # DistributedDataParallel takes the mean over the ranks
            nll, correct = train_step(model, images, labels, optimizer, scaler, config, device, weight, size)
            if averaged:
                get_ema_multi_avg_fn(config.ema_decay_at(epoch * len(loader) + batch_id))(*averaged, None)
            pending.append((nll, correct, lr, len(labels), n))
            if world_size > 1:
                due = (batch_id + 1) % REFRESH_BATCHES == 0
            else:
                due = time.monotonic() - refreshed > REFRESH_SECONDS
            if due or batch_id == len(loader) - 1:
                _update(progress, pending, epoch, world_size)
                accuracy = 100 * progress.correct / progress.images
                batch = f"Loss={progress.last_loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}"
                bar.set_description(f"Train: {batch}", refresh=False)
                bar.update(progress.batches - bar.n)
                if on_refresh:
                    on_refresh()
                pending, refreshed = [], time.monotonic()
    return progress.loss_sum / progress.images, 100 * progress.correct / progress.images


def _update(progress, pending, epoch, world_size=1):
    """Read the results of the pending steps from the device, in two copies, and add them to `progress`."""
    losses, correct, rates, shares, sizes = zip(*pending, strict=True)
    losses, correct = torch.stack(losses), torch.stack(correct)
    if world_size > 1:
        fractions = torch.tensor(shares, device=losses.device) / torch.tensor(sizes, device=losses.device)
        losses, correct = distributed.sum_over_ranks(losses * fractions), distributed.sum_over_ranks(correct)
    losses, correct = losses.tolist(), correct.tolist()
    for loss, hits, lr, n in zip(losses, correct, rates, sizes, strict=True):
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss became {loss}", epoch, progress.batches, lr)
        progress.batches += 1
        progress.images += n
        progress.loss_sum += loss * n
        progress.correct += hits
        progress.last_loss = loss


def check_views(views):
    """Raise ValueError if this number of views is not one of VIEWS."""
    if views not in VIEWS:
        raise ValueError(f"views is {views!r}; expected one of {', '.join(map(str, VIEWS))}")


def make_views(images, views):
    """Return `views` views of a normalised batch, each float (B, C, H, W), the first of them the batch itself.

    Two: with the mirror images. Six: also with both shifted by one pixel, up and to the left, and down and to the
    right; the border is reflected (the views of Jordan 2024, arXiv:2404.00498, which weights them differently).
    """
    seen = [images]
    if views == 6:
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        seen += [padded[:, :, 2:, 2:], padded[:, :, :-2, :-2]]
    return seen if views == 1 else [*seen, *(view.flip(3) for view in seen)]


@torch.no_grad()
def _predict_batches(model, loader, config, device, views=1):
    """Yield (outputs float32 (B, C), labels int64 (B,)) on the device, with the model in evaluation mode.

    With several views, the outputs are the logarithm of their mean probabilities.
    """
    model.eval()
    with backend_flags(config):
        for images, labels in loader:
            with autocast(config.precision, device):
                outputs = [model(view).float() for view in make_views(normalize(images, device), views)]
            if views > 1:
                outputs = [torch.stack(outputs).log_softmax(2).logsumexp(0) - math.log(views)]
            yield outputs[0], labels.to(device, non_blocking=labels.is_pinned())


def test(model, loader, config, device, views=1):
    """Test in one pass and print the result. Returns (loss, accuracy): mean NLL over the images, percent correct.

    views: 1, 2 or 6 views of each image, whose probabilities are averaged (see `make_views`); the compute grows with
    their number. If the loader yields one rank's share of the images, the result is that of all ranks.
    """
    check_views(views)
    device = get_device(device)
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    for outputs, labels in _predict_batches(model, loader, config, device, views):
        log_probs = F.log_softmax(outputs, dim=1)
        loss_sum += F.nll_loss(log_probs, labels, reduction="sum")
        correct += (log_probs.argmax(1) == labels).sum()
    if getattr(loader, "world_size", 1) > 1:
        loss_sum, correct = distributed.sum_over_ranks(loss_sum), distributed.sum_over_ranks(correct)
    n = len(loader.dataset)
    loss, accuracy = loss_sum.item() / n, 100 * correct.item() / n
    print(test_line(loss, accuracy, n, views), flush=True)
    return loss, accuracy


def accuracy_by_views(model, split, config=None, device=None, views=VIEWS[1:]):
    """Test a Split with several numbers of views and print the results. Returns {views: percent correct}; see `test`.

    The model is left in evaluation mode on the device.
    """
    config, device = config or Config(), get_device(device)
    model.to(device, memory_format=memory_format(device))
    loader = make_loader(split, TEST_BATCH_SIZE, train=False, device=device)
    return {number: test(model, loader, config, device, number)[1] for number in views}


def collect_logits(model, split, config=None, device=None, views=1):
    """Run the model once over a Split, in order and without augmentation.

    config: its precision is used; `Config()` if None. views: 1, 2 or 6 of each image, as in `test`. Returns the
    outputs, float32 (N, C) on the CPU; log-probabilities if AdvancedCNN makes them, or if there are several views. The
    model is left in evaluation mode on the device.
    """
    check_views(views)
    device = get_device(device)
    model.to(device, memory_format=memory_format(device))
    loader = make_loader(split, TEST_BATCH_SIZE, train=False, device=device)
    batches = _predict_batches(model, loader, config or Config(), device, views)
    return torch.cat([outputs for outputs, _ in batches]).cpu()
