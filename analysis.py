"""Why the network errs: its outputs on a whole split, and the images it gets wrong."""

from typing import NamedTuple

import numpy as np
import torch

from utils import Config, autocast, get_device, make_loader, normalize


class Misclassified(NamedTuple):
    """The mistakes on a split, most confident first.

    index: int64 (M,), which image. predicted: int64 (M,), the class given. confidence: float32 (M,), its probability.
    """

    index: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


@torch.no_grad()
def collect_logits(model, split, config=None, device=None):
    """Run the model once over a split, in its order and without augmentation.

    Returns its outputs, float32 (N, 10) on the CPU; those of AdvancedCNN are log-probabilities. config: for its
    precision, the default's when None. Leaves the model in evaluation mode on the device.
    """
    device = get_device(device)
    model.to(device, memory_format=torch.channels_last).eval()
    outputs = []
    for images, _ in make_loader(split, 500, train=False):
        with autocast(config or Config(), device):
            outputs.append(model(normalize(images, device)).float())
    return torch.cat(outputs).cpu()


def misclassified(logits, labels):
    """Find the images whose most likely class is not their label.

    logits: float (N, 10), of `collect_logits`. labels: int64 (N,). Returns a Misclassified.
    """
    confidence, predicted = logits.softmax(1).max(1)
    wrong = np.flatnonzero(predicted.numpy() != labels)
    order = wrong[np.argsort(-confidence.numpy()[wrong], kind="stable")]
    return Misclassified(order, predicted.numpy()[order], confidence.numpy()[order])
