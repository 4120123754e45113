"""Testing: one pass over a split, with one or several views of each image."""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from session8 import distributed
from session8.augment import normalize
from session8.config import Config
from session8.data import Split
from session8.device import autocast, backend_flags, get_device, to_device
from session8.loaders import make_loader

TEST_BATCH_SIZE = 500
VIEWS = (1, 2, 6)  # of a test image: itself; with its mirror image; with both shifted by one pixel diagonally


def test(
    model: nn.Module, loader, config: Config, device: torch.device | str | None, views: int = 1
) -> tuple[float, float]:
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
    if loader.world_size > 1:
        loss_sum, correct = distributed.sum_over_ranks(loss_sum), distributed.sum_over_ranks(correct)
    n = len(loader.dataset)
    loss, accuracy = loss_sum.item() / n, 100 * correct.item() / n
    print(test_line(loss, accuracy, n, views), flush=True)
    return loss, accuracy


def test_line(loss: float, accuracy: float, n: int, views: int = 1) -> str:
    """Return the log's line for a test with n images."""
    name = "Test set" if views == 1 else f"Test set, {views} views"
    return f"{name}: Average loss: {loss:.4f}, Accuracy: {round(accuracy * n / 100)}/{n} ({accuracy:.2f}%)\n"


def accuracy_by_views(
    model: nn.Module,
    split: Split,
    config: Config | None = None,
    device: torch.device | str | None = None,
    views: Iterable[int] = VIEWS[1:],
) -> dict[int, float]:
    """Test a Split with several numbers of views and print the results. Returns {views: percent correct}; see `test`.

    The model is left in evaluation mode on the device.
    """
    device = get_device(device)
    to_device(model, device)
    loader = make_loader(split, TEST_BATCH_SIZE, train=False, device=device)
    return {number: test(model, loader, config or Config(), device, number)[1] for number in views}


def collect_logits(
    model: nn.Module,
    split: Split,
    config: Config | None = None,
    device: torch.device | str | None = None,
    views: int = 1,
) -> torch.Tensor:
    """Run the model once over a Split, in order and without augmentation.

    config: its precision is used; `Config()` if None. views: 1, 2 or 6 of each image, as in `test`. Returns the
    outputs, float32 (N, C) on the CPU; log-probabilities if AdvancedCNN makes them, or if there are several views. The
    model is left in evaluation mode on the device.
    """
    check_views(views)
    device = get_device(device)
    to_device(model, device)
    loader = make_loader(split, TEST_BATCH_SIZE, train=False, device=device)
    batches = _predict_batches(model, loader, config or Config(), device, views)
    return torch.cat([outputs for outputs, _ in batches]).cpu()


def check_views(views: int) -> None:
    """Raise ValueError if this number of views is not one of VIEWS."""
    if views not in VIEWS:
        raise ValueError(f"views is {views!r}; expected one of {', '.join(map(str, VIEWS))}")


def make_views(images: torch.Tensor, views: int) -> list[torch.Tensor]:
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
def _predict_batches(model, loader, config, device, views) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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
