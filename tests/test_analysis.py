"""The analysis agrees with independent computations."""

import numpy as np
import pytest
import torch
from networks import CPU, Linear, small_network
from torch import nn

from session8.analysis import (
    NoFeatureMap,
    calibration,
    class_accuracy,
    confusion_matrix,
    grad_cam,
    grad_cam_pairs,
    misclassified,
    most_confused,
)
from session8.augment import normalize
from session8.data import CLASSES


def outputs(*rows):
    """Return log-probabilities of rows {class: probability}; the rest is spread over the other classes."""
    table = torch.empty(len(rows), 10)
    for values, row in zip(table, rows, strict=True):
        values[:] = (1 - sum(row.values())) / (10 - len(row))
        for label, probability in row.items():
            values[label] = probability
    return table.log()


@pytest.fixture
def random_outputs():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(0, 2, (500, 10))).float(), rng.integers(10, size=500)


BLACK = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: confusion_matrix(torch.zeros(3, 10), np.zeros(2, int)), ValueError, "3 outputs .* 2 labels: use"),
        (lambda: misclassified(torch.zeros(3, 10), np.zeros(2, int)), ValueError, "3 outputs .* 2 labels: use"),
        (lambda: calibration(torch.zeros(3, 10), np.zeros(2, int)), ValueError, "3 outputs .* 2 labels: use"),
        (lambda: calibration(torch.zeros(3, 10), np.zeros(3, int), bins=0), ValueError, "bins is 0; expected at least"),
        (lambda: misclassified(torch.zeros(1, 10), np.zeros(1, int), actual="kitten"), ValueError,
         "'kitten' is not a class; expected one of airplane, "),
        (lambda: grad_cam(Linear(), BLACK, device="cpu"), NoFeatureMap,
         "grid is 3, but no module of Linear .* that wide: use a smaller grid or another network"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_confusion_matrix_and_mistakes_count_each_pair(random_outputs):
    logits, labels = random_outputs
    expected = np.zeros((10, 10), int)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        expected[label][row.index(max(row))] += 1
    assert np.array_equal(confusion_matrix(logits, labels), expected)
    assert len(misclassified(logits, labels)[0]) == 500 - expected.trace()


def test_class_accuracy_and_its_interval_solve_wilsons_equation():
    confusion = np.diag([950, 10, 0, 3, 0]) + np.diag([50, 0, 5, 0], k=1)
    with np.errstate(all="raise"):
        accuracy, lows, highs = class_accuracy(confusion)
    np.testing.assert_array_equal(accuracy, [95, 100, 0, 100, np.nan])  # the last class is absent
    assert np.isnan(lows[4]) and np.isnan(highs[4])
    # The ends of Wilson's interval are the p for which |share - p| is 1.96 standard errors of p.
    for share, n, low, high in zip(accuracy / 100, (1000, 10, 5, 3), lows, highs, strict=False):
        for p in (low / 100, high / 100):
            assert abs(share - p) == pytest.approx(1.959964 * np.sqrt(p * (1 - p) / n), abs=1e-6)
        assert -1e-9 <= low <= 100 * share <= high <= 100 + 1e-9


def test_most_confused_pairs_are_named_and_sorted():
    confusion = np.diag([90] * 10)
    confusion[3, 5], confusion[5, 3], confusion[0, 8] = 10, 7, 20
    assert most_confused(confusion) == [("airplane", "ship", 20), ("cat", "dog", 10), ("dog", "cat", 7)]
    assert len(most_confused(confusion, n=2)) == 2


@pytest.mark.parametrize(
    "selection, expected",
    [
        ({}, [4, 1, 2, 0]),
        ({"actual": "cat", "predicted": "dog"}, [1, 2]),
        ({"predicted": "cat"}, [4, 0]),
        ({"actual": "dog"}, [0]),
    ],
)
def test_misclassified_images_are_selected_and_sorted_by_confidence(selection, expected):
    confidence = [0.6, 0.9, 0.7, 0.8, 0.95]
    predicted = [3, 5, 5, 5, 3]
    logits = outputs(*({label: p} for label, p in zip(predicted, confidence, strict=True)))
    index, probabilities = misclassified(logits, np.array([5, 3, 3, 5, 4]), **selection)
    assert index.tolist() == expected
    assert probabilities.argmax(1).tolist() == [predicted[i] for i in expected]
    assert probabilities.max(1) == pytest.approx([confidence[i] for i in expected])


def test_calibration_agrees_with_a_computation_by_hand(random_outputs):
    logits, labels = random_outputs
    result, error = calibration(logits, labels, bins=10), 0.0
    probabilities = np.exp(logits.numpy().astype(float))
    probabilities /= probabilities.sum(1, keepdims=True)
    for place in range(10):
        inside = [row for row in range(500) if place / 10 < probabilities[row].max() <= (place + 1) / 10]
        assert result.count[place] == len(inside)
        if inside:
            confidence = np.mean([probabilities[row].max() for row in inside])
            accuracy = np.mean([probabilities[row].argmax() == labels[row] for row in inside])
            assert (result.confidence[place], result.accuracy[place]) == pytest.approx((confidence, accuracy))
            error += len(inside) / 500 * abs(confidence - accuracy)
    assert result.error == pytest.approx(error)
    assert calibration(torch.zeros(1, 2), np.zeros(1, int), bins=2).count.tolist() == [1, 0]  # includes its upper edge


# -- Grad-CAM ------------------------------------------------------------------------------------------------------


class Corner(nn.Module):
    """Class 1 is how bright the red of an image's upper left quarter is, class 2 that of the lower right one."""

    def __init__(self):
        super().__init__()
        self.convolution, self.relu = nn.Conv2d(3, 1, 1, bias=False), nn.ReLU()
        self.head = nn.Linear(4, 3, bias=False)
        self.tf32 = []
        with torch.no_grad():
            self.convolution.weight[:] = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
            self.head.weight[:] = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])

    def forward(self, x):
        quarters = nn.functional.adaptive_avg_pool2d(self.relu(self.convolution(x)), 2)
        self.tf32.append(torch.backends.cudnn.allow_tf32)
        quarters.register_hook(lambda _: self.tf32.append(torch.backends.cudnn.allow_tf32))
        return self.head(quarters.flatten(1)).log_softmax(1)


def test_grad_cam_highlights_the_region_that_determines_the_class():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[0, 4:8, 4:8, 0] = 255
    images[1, 20:24, 20:24, 0] = 255
    model = Corner()
    first, second = grad_cam(model, images, device="cpu")
    assert first[5, 5] == first.max() == 1 and first[20:, 20:].max() == 0
    assert second[21, 21] == second.max() == 1 and second[:16, :16].max() == 0
    assert model.tf32 == [False, False] and torch.backends.cudnn.allow_tf32  # forward and backward in float32
    assert not grad_cam(model, BLACK, classes=[0], device="cpu").any()  # no region supports the class


@pytest.mark.parametrize("grid, blocks, width", [(3, 3, 3), (6, 2, 7)])
def test_grad_cam_agrees_with_the_formula(grid, blocks, width, device):
    """The channels' weights are the mean gradients of the score, here by finite differences of the tail."""
    model = small_network().eval()
    images = np.random.default_rng(0).integers(256, size=(1, 32, 32, 3), dtype=np.uint8)
    cam = grad_cam(model, images, classes=[4], device=device, grid=grid)[0]
    model.cpu().double()
    with torch.no_grad():
        feature = model.blocks[:blocks](model.stem(normalize(torch.from_numpy(images), CPU).double()))

        def score(feature):
            return model.head(model.blocks[blocks:](feature).mean((2, 3)))[:, 4]

        step, channels = 1e-3, feature.shape[1]
        gradients = torch.zeros(channels)
        for channel in range(channels):  # the sum over positions: a shift of the whole channel
            shift = torch.zeros_like(feature)
            shift[:, channel] = step
            gradients[channel] = ((score(feature + shift) - score(feature - shift)) / (2 * step)).item()
        expected = (gradients[None, :, None, None] * feature).sum(1, keepdim=True).relu()
    large = nn.functional.interpolate(expected, 32, mode="bilinear")[0, 0]
    assert expected.shape[-1] == width and large.max() > 0
    np.testing.assert_allclose(cam, large / large.max(), atol=0.02)


def test_grad_cam_leaves_the_model_as_it_was(synthetic):
    model, images = small_network(), synthetic[0].images[:3]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        maps = grad_cam(model, images, device="cpu")
    assert maps.shape == (3, 32, 32) and maps.dtype == np.float32 and maps.min() >= 0 and maps.max() <= 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_grad_cam_of_a_network_without_a_dense_layer(synthetic):
    head = nn.Conv2d(12, 10, 1)
    network = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), head, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    maps = grad_cam(network, synthetic[0].images[:2], [3, 4], "cpu")
    with torch.no_grad():  # the mean over positions: the gradient is the head's weight everywhere
        feature = network[:2](normalize(torch.from_numpy(synthetic[0].images[:2]), CPU))
        expected = torch.einsum("bc,bchw->bhw", head.weight[[3, 4], :, 0, 0], feature).relu()
    for cam, one in zip(maps, expected, strict=True):
        large = nn.functional.interpolate(one[None, None], 32, mode="bilinear")[0, 0]
        np.testing.assert_allclose(cam, large / large.max(), atol=1e-4)


def test_grad_cam_pairs_are_of_one_class_once_right_and_once_wrong(synthetic):
    split, model = synthetic[1], small_network()
    rows = [{label: 0.5 + index / 1000} for index, label in enumerate(split.labels.tolist())]
    first, third, fourth, fifth = (int(np.flatnonzero(split.labels == label)[0]) for label in (1, 3, 5, 7))
    second = int(np.flatnonzero(split.labels == 1)[1])  # of a class that has its mistake already
    confidences = {first: 0.99, second: 0.95, third: 0.9, fourth: 0.7, fifth: 0.6}
    for index, confidence in confidences.items():  # taken for the next class
        rows[index] = {(int(split.labels[index]) + 1) % 10: confidence}
    pairs = grad_cam_pairs(model, split, outputs(*rows), n=3, device="cpu")
    visible = 0
    assert [pair["wrong_confidence"] for pair in pairs] == pytest.approx([0.99, 0.9, 0.7])
    for pair, wrong in zip(pairs, (first, third, fourth), strict=True):
        actual, predicted = split.labels[wrong], (split.labels[wrong] + 1) % 10
        # Confidence rises with the index, and the mistake's is beyond: the nearest is the last that is right.
        right = max(i for i in np.flatnonzero(split.labels == actual) if i not in confidences)
        assert (pair["actual"], pair["predicted"]) == (CLASSES[actual], CLASSES[predicted])
        assert np.array_equal(pair["right"], split.images[right]) and np.array_equal(pair["wrong"], split.images[wrong])
        assert pair["right_confidence"] == pytest.approx(0.5 + right / 1000)
        cams = grad_cam(model, split.images[[right, wrong, wrong]], [actual, predicted, actual], "cpu")
        for name, cam in zip(("right_cam", "wrong_cam", "missed_cam"), cams, strict=True):
            visible += cam.any()
            np.testing.assert_allclose(pair[name], cam, atol=1e-5)
    assert visible >= 3


def test_grad_cam_pairs_without_maps_or_without_mistakes(synthetic):
    split = synthetic[1]
    half_wrong = outputs(*({(int(label) + index % 2) % 10: 0.9} for index, label in enumerate(split.labels)))
    with pytest.warns(UserWarning, match="no Grad-CAM: grid is 3, but no module of Linear"):
        assert grad_cam_pairs(Linear(), split, half_wrong, device="cpu") == []
    assert grad_cam_pairs(small_network(), split, outputs(*({label: 0.9} for label in split.labels.tolist()))) == []
