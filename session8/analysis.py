"""Why the network errs: its outputs on a whole split, and what they say of classes, confidence and single images."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from session8.training import CLASSES, Config, autocast, get_device, make_loader, memory_format, normalize

# -- numbers, all from one pass over a split -----------------------------------------------------------------------


class ClassAccuracy(NamedTuple):
    """Accuracy of each class in percent, and the ends of its 95 % interval: float64 (C,), NaN for an absent class."""

    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Confusion(NamedTuple):
    """How often one class is taken for another: their names, and the number of images."""

    actual: str
    predicted: str
    count: int


class Misclassified(NamedTuple):
    """The mistakes on a split, most confident first.

    index: int64 (M,), which image. probabilities: float32 (M, C), what the network gave each class.
    """

    index: np.ndarray
    probabilities: np.ndarray


class Calibration(NamedTuple):
    """Confidence and accuracy in bins of equal width.

    count: int64 (bins,), images in each. confidence, accuracy: float64 (bins,), their means there, from 0 to 1; NaN
    where a bin is empty. error: the expected calibration error, from 0 to 1.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


@torch.no_grad()
def collect_logits(model, split, config=None, device=None):
    """Run the model once over a split, in its order and without augmentation.

    Returns its outputs, float32 (N, C) on the CPU; those of AdvancedCNN are log-probabilities. config: for its
    precision, the default's when None. Leaves the model in evaluation mode on the device.
    """
    device = get_device(device)
    model.to(device, memory_format=memory_format(device)).eval()
    outputs = []
    for images, _ in make_loader(split, 500, train=False, device=device):
        with autocast(config or Config(), device):
            outputs.append(model(normalize(images, device)).float())
    return torch.cat(outputs).cpu()


def confusion_matrix(logits, labels):
    """Count the predictions of each class.

    logits: float (N, C), of `collect_logits`. labels: int64 (N,). Returns int64 (C, C): rows are actual classes,
    columns predicted ones. Raises ValueError when there are not as many labels as outputs.
    """
    predicted, classes = _probabilities(logits, labels).argmax(1), logits.shape[1]
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_accuracy(confusion):
    """The accuracy of each class with its interval after Wilson (1927, J. Am. Stat. Assoc. 22), which stays within 0
    and 100 % and holds for few images too.

    confusion: int64 (C, C), of `confusion_matrix`. Returns a ClassAccuracy.
    """
    z = 1.959964  # standard deviations on either side that hold 95 % of a normal distribution
    n = np.where(confusion.sum(1), confusion.sum(1), np.nan)
    share = confusion.diagonal() / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At 0 and 100 % an end is the accuracy itself, which rounding must not push past it.
    low, high = np.minimum(centre - half, share), np.maximum(centre + half, share)
    return ClassAccuracy(100 * share, 100 * low, 100 * high)


def most_confused(confusion, n=10, names=CLASSES):
    """The n largest confusions of one class with another, largest first: a list of `Confusion`, shorter if there are
    not so many. confusion: int64 (C, C), of `confusion_matrix`."""
    mistakes = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-mistakes, axis=None, kind="stable")[:n]
    pairs = [divmod(int(place), len(confusion)) for place in order]
    return [Confusion(names[a], names[p], int(mistakes[a, p])) for a, p in pairs if mistakes[a, p]]


def misclassified(logits, labels, actual=None, predicted=None, names=CLASSES):
    """Find the images whose most likely class is not their label.

    logits: float (N, C), of `collect_logits`. labels: int64 (N,). actual, predicted: class names, to find only
    images of one class, only those taken for one, or one pair of classes. Returns a Misclassified. Raises ValueError
    for a name that is no class.
    """
    for name in (actual, predicted):
        if name is not None and name not in names:
            raise ValueError(f"{name!r} is no class; expected one of {', '.join(names)}")
    probabilities = _probabilities(logits, labels)
    given = probabilities.argmax(1)
    wanted = given != labels
    if actual is not None:
        wanted &= labels == names.index(actual)
    if predicted is not None:
        wanted &= given == names.index(predicted)
    index = np.flatnonzero(wanted)
    index = index[np.argsort(-probabilities[index].max(1), kind="stable")]
    return Misclassified(index, probabilities[index])


def calibration(logits, labels, bins=15):
    """Compare confidence, the probability of the predicted class, with how often the prediction is right.

    The images are sorted into bins of equal width by their confidence; the expected calibration error is the distance
    between mean confidence and accuracy in a bin, averaged over the images (Guo et al. 2017, arXiv:1706.04599).

    logits: float (N, C), of `collect_logits`. labels: int64 (N,). Returns a Calibration. Raises ValueError for fewer
    bins than one.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected at least 1, for instance 15")
    probabilities = _probabilities(logits.double(), labels)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # a bin holds its upper end
    count = np.bincount(place, minlength=bins)
    filled = np.where(count, count, np.nan)
    means = [np.bincount(place, values, minlength=bins) / filled for values in (confidence, right)]
    error = np.nansum(count * np.abs(means[0] - means[1])) / len(labels)
    return Calibration(count, *means, float(error))


def _probabilities(logits, labels):
    if len(logits) != len(labels):
        raise ValueError(
            f"{len(logits):,} outputs and {len(labels):,} labels do not belong together: "
            "take the labels of the split that `collect_logits` was given"
        )
    return logits.softmax(1).numpy()


# -- where the network looks ---------------------------------------------------------------------------------------


class NoFeatureMap(ValueError):
    """The network keeps no map of an image's places that Grad-CAM could explain."""


@torch.enable_grad()
def grad_cam(model, images, classes=None, device=None, grid=3):
    """Grad-CAM: where in an image the evidence for a class lies (Selvaraju et al. 2017, arXiv:1610.02391).

    The channels of the last feature map that is at least `grid` pixels wide, each weighted by the mean gradient of the
    class's score, are summed, cut off below 0, and enlarged to the image. That map is what a module returns that is
    no convolution: a constant added to a convolution's output changes the sum, though a batch norm behind it takes it
    away again. Earlier maps, of a larger `grid`, are finer, and say less of what decided: later layers still judge
    them. The score is what the last dense layer returns, if it is one number a class: the gradient of a
    log-probability close to 0 would vanish.

    images: uint8 (B, 32, 32, 3). classes: int64 (B,), which class to explain; the predicted one when None. Returns
    float32 (B, 32, 32): each map from 0 to 1, or all 0 where nothing speaks for the class. The model is left in
    evaluation mode on the device, its gradients as they were. Raises NoFeatureMap for a model without such a map.
    """
    device = get_device(device)
    model.to(device, memory_format=memory_format(device)).eval()
    maps, dense = [], []

    def keep(module, _, output):
        if isinstance(module, nn.Linear):
            dense.append(output)
        elif not isinstance(module, nn.Conv2d) and torch.is_tensor(output) and output.ndim == 4:
            maps.append(output)

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        output = model(normalize(torch.as_tensor(images), device).requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    maps = [feature for feature in maps if feature.shape[-1] >= grid]
    if not maps:
        raise NoFeatureMap(
            f"grid is {grid}, and {type(model).__name__} has no module that returns maps at least that wide (a "
            "convolution's own output is not taken): ask for a smaller grid, or for another network"
        )
    score, feature = dense[-1] if dense and dense[-1].shape == output.shape else output, maps[-1]
    classes = score.argmax(1) if classes is None else torch.as_tensor(classes, device=device)
    (gradient,) = torch.autograd.grad(score.gather(1, classes[:, None]).sum(), feature)
    cam = (gradient.mean((2, 3), keepdim=True) * feature).sum(1, keepdim=True).relu().detach()
    cam = nn.functional.interpolate(cam, images.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    highest = cam.amax((1, 2), keepdim=True)
    return torch.where(highest > 0, cam / highest, 0.0).cpu().numpy()


class CamPair(NamedTuple):
    """An image of a class that was recognised and one that was not, with their Grad-CAM maps.

    actual, predicted: names of the class of both images, and of what the second was taken for. right, wrong: uint8
    (32, 32, 3). right_cam, wrong_cam: float32 (32, 32), what spoke for the class predicted. missed_cam: what spoke in
    the second image for its actual class. right_confidence, wrong_confidence: of the predictions, from 0 to 1.
    """

    actual: str
    predicted: str
    right: np.ndarray
    right_cam: np.ndarray
    right_confidence: float
    wrong: np.ndarray
    wrong_cam: np.ndarray
    missed_cam: np.ndarray
    wrong_confidence: float


def grad_cam_pairs(model, split, logits, n=4, device=None, names=CLASSES):
    """Set right and wrong predictions side by side: the most confident mistakes, of n different classes, each beside
    the image of its class that was recognised with the confidence nearest to the mistake's.

    logits: float (N, C), of `collect_logits` for the same split. Returns a list of `CamPair`, shorter where fewer
    classes have both, and empty, with a warning, for a network that has no feature maps.
    """
    labels = split.labels
    probabilities = _probabilities(logits, labels)
    confidence, given = probabilities.max(1), probabilities.argmax(1)
    pairs = {}  # by actual class
    for wrong in misclassified(logits, labels).index.tolist():
        if len(pairs) == n or labels[wrong] in pairs:
            continue
        rights = np.flatnonzero((labels == labels[wrong]) & (given == labels))
        if len(rights):
            pairs[labels[wrong]] = rights[np.abs(confidence[rights] - confidence[wrong]).argmin()], wrong
    if not pairs:
        return []
    right, wrong = map(np.array, zip(*pairs.values(), strict=True))
    try:
        cams = [grad_cam(model, split.images[index], classes[index], device)
                for index, classes in ((right, given), (wrong, given), (wrong, labels))]  # fmt: skip
    except NoFeatureMap as error:
        warnings.warn(f"no Grad-CAM: {error}", stacklevel=2)
        return []
    return [
        CamPair(names[labels[w]], names[given[w]], split.images[r], right_cam, float(confidence[r]),
                split.images[w], wrong_cam, missed_cam, float(confidence[w]))
        for r, w, right_cam, wrong_cam, missed_cam in zip(right, wrong, *cams, strict=True)
    ]  # fmt: skip
