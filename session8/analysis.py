"""Error analysis: confusion, accuracy per class, mistakes, calibration and Grad-CAM."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from torch import nn

from session8.augment import normalize
from session8.config import Config
from session8.data import CLASSES, Split
from session8.device import backend_flags, get_device, to_device

# -- from the outputs of one pass over a split ---------------------------------------------------------------------


def confusion_matrix(logits: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Return the confusion matrix, int64 (C, C): rows are actual classes, columns are predictions.

    logits: float (N, C), from `collect_logits`. labels: int64 (N,). Raises ValueError if their lengths differ.
    """
    predicted, classes = _probabilities(logits, labels).argmax(1), logits.shape[1]
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_accuracy(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the accuracy of each class and the ends of its 95 % confidence interval (Wilson's score interval).

    All three are in percent, float64 (C,), NaN for absent classes. The interval accounts for the choice of test images,
    not for the choice of the training seed.
    """
    values = np.full((3, len(confusion)), np.nan)
    for label, (correct, n) in enumerate(zip(confusion.diagonal(), confusion.sum(1), strict=True)):
        if n:
            interval = binomtest(int(correct), int(n)).proportion_ci(0.95, method="wilson")
            values[:, label] = 100 * correct / n, 100 * interval.low, 100 * interval.high
    accuracy, low, high = values
    return accuracy, low, high


def most_confused(confusion: np.ndarray, n: int = 10, names: Sequence[str] = CLASSES) -> list[tuple[str, str, int]]:
    """Return the n most frequent confusions, largest first: actual class, predicted class, number of images."""
    mistakes = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-mistakes, axis=None, kind="stable")[:n]
    pairs = [divmod(int(place), len(confusion)) for place in order]
    return [(names[a], names[p], int(mistakes[a, p])) for a, p in pairs if mistakes[a, p]]


def misclassified(
    logits: torch.Tensor,
    labels: np.ndarray,
    actual: str | None = None,
    predicted: str | None = None,
    names: Sequence[str] = CLASSES,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the images whose most probable class is not their label, the most confident mistake first.

    logits: float (N, C), from `collect_logits`. labels: int64 (N,). actual, predicted: class names, to select images
    of one class, predictions of one class, or one pair. Returns the indices of the M images, int64 (M,), and their
    probabilities, float (M, C). Raises ValueError for a name that is not a class.
    """
    for name in (actual, predicted):
        if name is not None and name not in names:
            raise ValueError(f"{name!r} is not a class; expected one of {', '.join(names)}")
    probabilities = _probabilities(logits, labels)
    predictions = probabilities.argmax(1)
    selected = predictions != labels
    if actual is not None:
        selected &= labels == names.index(actual)
    if predicted is not None:
        selected &= predictions == names.index(predicted)
    index = np.flatnonzero(selected)
    index = index[np.argsort(-probabilities[index].max(1), kind="stable")]
    return index, probabilities[index]


class Calibration(NamedTuple):
    """Confidence and accuracy in bins of equal width.

    count: int64 (bins,), images per bin. confidence, accuracy: float64 (bins,), the means in each bin, from 0 to 1;
    NaN in empty bins. error: the expected calibration error, from 0 to 1.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def calibration(logits: torch.Tensor, labels: np.ndarray, bins: int = 15) -> Calibration:
    """Compare confidence, the probability of the predicted class, with accuracy.

    The images are sorted into bins of equal width by confidence. The expected calibration error is the difference
    between mean confidence and accuracy per bin, averaged over the images (Guo et al. 2017, arXiv:1706.04599).

    logits: float (N, C), from `collect_logits`. labels: int64 (N,). Raises ValueError if bins is below 1.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected at least 1, for instance 15")
    probabilities = _probabilities(logits.double(), labels)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # a bin includes its upper edge
    count = np.bincount(place, minlength=bins)
    filled = np.where(count, count, np.nan)
    confidences, accuracies = (np.bincount(place, values, minlength=bins) / filled for values in (confidence, correct))
    error = np.nansum(count * np.abs(confidences - accuracies)) / len(labels)
    return Calibration(count, confidences, accuracies, float(error))


def _probabilities(logits, labels):
    if len(logits) != len(labels):
        raise ValueError(
            f"{len(logits):,} outputs do not match {len(labels):,} labels: use the labels of the split that "
            "`collect_logits` was given"
        )
    return logits.softmax(1).numpy()


# -- Grad-CAM ------------------------------------------------------------------------------------------------------


class NoFeatureMap(ValueError):
    """The network has no feature map that Grad-CAM can use."""


@torch.enable_grad()
def grad_cam(
    model: nn.Module,
    images: np.ndarray,
    classes: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    grid: int = 3,
) -> np.ndarray:
    """Compute Grad-CAM maps: which regions of an image support a class score (Selvaraju et al. 2017, arXiv:1610.02391).

    The map is the sum of the feature map's channels, weighted by the mean gradients of the class score, clipped at 0
    and resized to the image. The feature map is the last module output that is at least `grid` pixels wide. Outputs of
    convolutions are skipped: batch norm cancels constant offsets in them, but Grad-CAM does not. The score is the
    output of the last linear layer if it has one number per class, since the gradients of a log-probability near 0
    vanish.

    images: uint8 (B, 32, 32, 3). classes: int64 (B,), the classes to explain; the predictions if None. grid: least
    width of the feature map. Earlier, wider maps are finer, but later layers process them further.

    Returns float32 (B, 32, 32), each map scaled to [0, 1], or 0 everywhere if no region supports the class. The model
    is left in evaluation mode on the device, its gradients unchanged. Raises NoFeatureMap if there is no such map.
    """
    device = get_device(device)
    to_device(model, device).eval()
    maps, scores = [], []

    def keep(module, _, output):
        if isinstance(module, nn.Linear):
            scores.append(output)
        elif not isinstance(module, nn.Conv2d) and torch.is_tensor(output) and output.ndim == 4:
            maps.append(output)

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        with backend_flags(Config(precision="float32")):
            output = model(normalize(torch.as_tensor(images), device).requires_grad_())
            maps = [feature for feature in maps if feature.shape[-1] >= grid]
            if not maps:
                raise NoFeatureMap(
                    f"grid is {grid}, but no module of {type(model).__name__} other than convolutions returns a "
                    "feature map that wide: use a smaller grid or another network"
                )
            score, feature = scores[-1] if scores and scores[-1].shape == output.shape else output, maps[-1]
            chosen = score.argmax(1) if classes is None else torch.as_tensor(classes, device=device)
            (gradient,) = torch.autograd.grad(score.gather(1, chosen[:, None]).sum(), feature)
    finally:
        for hook in hooks:
            hook.remove()
    cam = (gradient.mean((2, 3), keepdim=True) * feature).sum(1, keepdim=True).relu().detach()
    cam = nn.functional.interpolate(cam, images.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    highest = cam.amax((1, 2), keepdim=True)
    return torch.where(highest > 0, cam / highest, 0.0).cpu().numpy()


def grad_cam_pairs(
    model: nn.Module,
    split: Split,
    logits: torch.Tensor,
    n: int = 4,
    device: str | torch.device | None = None,
    names: Sequence[str] = CLASSES,
) -> list[dict]:
    """Compare Grad-CAM maps of mistakes and correct predictions.

    Takes the most confident mistakes of n different classes, each with the correctly classified image of its class
    whose confidence is closest. logits: float (N, C), from `collect_logits` on the same split.

    Returns a list of dictionaries: shorter if fewer classes have both, and empty, with a warning, if the network has no
    feature map. actual: class of both images. predicted: the class that the second was predicted as. right, wrong: the
    images, uint8 (32, 32, 3). right_cam, wrong_cam: float32 (32, 32), for the predicted class. missed_cam: for the
    actual class of the second image. right_confidence, wrong_confidence: probabilities of the predictions.
    """
    labels = split.labels
    probabilities = _probabilities(logits, labels)
    confidence, predictions = probabilities.max(1), probabilities.argmax(1)
    pairs: dict = {}  # the right and the wrong image by actual class
    for wrong in misclassified(logits, labels)[0]:
        correct = np.flatnonzero((labels == labels[wrong]) & (predictions == labels))
        if len(pairs) < n and labels[wrong] not in pairs and len(correct):
            pairs[labels[wrong]] = correct[np.abs(confidence[correct] - confidence[wrong]).argmin()], wrong
    result = []
    for right, wrong in pairs.values():
        images = split.images[[right, wrong, wrong]]
        try:
            cams = grad_cam(model, images, [predictions[right], predictions[wrong], labels[wrong]], device)
        except NoFeatureMap as error:
            warnings.warn(f"no Grad-CAM: {error}", stacklevel=2)
            return []
        result.append(
            {
                "actual": names[labels[wrong]],
                "predicted": names[predictions[wrong]],
                "right": images[0],
                "right_cam": cams[0],
                "right_confidence": float(confidence[right]),
                "wrong": images[1],
                "wrong_cam": cams[1],
                "missed_cam": cams[2],
                "wrong_confidence": float(confidence[wrong]),
            }
        )
    return result
