"""The analysis agrees with independent computations."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from networks import CPU, EXACT, Linear, small_network
from torch import nn

from session8 import plots, training
from session8.analysis import (
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
from session8.loaders import make_loader


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


# -- numbers -------------------------------------------------------------------------------------------------------


def test_mistakes_agree_with_the_test_pass(synthetic):
    test_split, model = synthetic[1], Linear()
    logits = training.collect_logits(model, test_split, EXACT, "cpu")
    _, accuracy = training.test(model, make_loader(test_split, 32, train=False), EXACT, CPU)
    assert len(misclassified(logits, test_split.labels).index) == round(100 - accuracy)


def test_confusion_matrix_counts_each_pair(random_outputs):
    logits, labels = random_outputs
    expected = np.zeros((10, 10), int)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        expected[label][row.index(max(row))] += 1
    assert np.array_equal(confusion_matrix(logits, labels), expected)


def test_class_accuracy_and_its_interval_solve_wilsons_equation():
    confusion = np.diag([950, 10, 0, 3]) + np.diag([50, 0, 5], k=1)
    result = class_accuracy(confusion)
    assert result.accuracy == pytest.approx([95, 100, 0, 100])
    # The ends of Wilson's interval are the p for which |share - p| is 1.96 standard errors of p.
    for share, n, low, high in zip(result.accuracy / 100, (1000, 10, 5, 3), result.low, result.high, strict=True):
        for p in (low / 100, high / 100):
            assert abs(share - p) == pytest.approx(1.959964 * np.sqrt(p * (1 - p) / n), abs=1e-6)
        assert -1e-9 <= low <= 100 * share <= high <= 100 + 1e-9


def test_class_accuracy_of_an_absent_class_is_nan():
    confusion = np.array([[3, 1], [0, 0]])
    with np.errstate(all="raise"):
        result = class_accuracy(confusion)
    assert result.accuracy[0] == 75 and all(np.isnan(values[1]) for values in result)


def test_most_confused_pairs_are_named_and_sorted():
    confusion = np.diag([90] * 10)
    confusion[3, 5], confusion[5, 3], confusion[0, 8] = 10, 7, 20
    pairs = most_confused(confusion)
    assert [(p.actual, p.predicted, p.count) for p in pairs] == [
        ("airplane", "ship", 20), ("cat", "dog", 10), ("dog", "cat", 7),
    ]  # fmt: skip
    assert len(most_confused(confusion, n=2)) == 2


def test_misclassified_images_are_found_and_sorted_by_confidence():
    logits = outputs({3: 0.6}, {4: 0.9}, {5: 0.7}, {6: 0.8}, {7: 0.95})
    mistakes = misclassified(logits, np.array([3, 0, 0, 6, 0]))
    assert mistakes.index.tolist() == [4, 1, 2] and mistakes.probabilities.argmax(1).tolist() == [7, 4, 5]
    assert mistakes.probabilities.max(1) == pytest.approx([0.95, 0.9, 0.7])


def test_misclassified_images_of_one_pair_of_classes():
    logits = outputs({3: 0.6}, {5: 0.9}, {5: 0.7}, {5: 0.8}, {3: 0.95})
    labels = np.array([5, 3, 3, 5, 4])
    assert misclassified(logits, labels, actual="cat", predicted="dog").index.tolist() == [1, 2]
    assert misclassified(logits, labels, predicted="cat").index.tolist() == [4, 0]
    assert misclassified(logits, labels, actual="dog").index.tolist() == [0]
    with pytest.raises(ValueError, match="'kitten' is not a class; expected one of airplane, "):
        misclassified(logits, labels, actual="kitten")


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


def test_calibration_of_the_perfectly_calibrated_and_of_the_overconfident():
    labels = np.array([0, 0, 0, 1])
    assert calibration(outputs(*[{0: 0.75}] * 4), labels).error == pytest.approx(0, abs=1e-6)
    assert calibration(outputs(*[{0: 0.999}] * 4), labels).error == pytest.approx(0.249, abs=1e-6)


@pytest.mark.parametrize("function", [confusion_matrix, misclassified, calibration])
def test_bad_input_outputs_of_another_split(function):
    with pytest.raises(ValueError, match="3 outputs do not match 2 labels"):
        function(torch.zeros(3, 10), np.zeros(2, int))


def test_bad_input_bins():
    with pytest.raises(ValueError, match="bins is 0; expected at least 1"):
        calibration(torch.zeros(3, 10), np.zeros(3, int), bins=0)


# -- Grad-CAM ------------------------------------------------------------------------------------------------------


class Corner(nn.Module):
    """Class 1 is how bright the red of an image's upper left quarter is, class 2 that of the lower right one."""

    def __init__(self):
        super().__init__()
        self.convolution, self.relu = nn.Conv2d(3, 1, 1, bias=False), nn.ReLU()
        self.head = nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            self.convolution.weight[:] = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
            self.head.weight[:] = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])

    def forward(self, x):
        quarters = nn.functional.adaptive_avg_pool2d(self.relu(self.convolution(x)), 2)
        return self.head(quarters.flatten(1)).log_softmax(1)


def test_grad_cam_highlights_the_region_that_determines_the_class():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[0, 4:8, 4:8, 0] = 255
    images[1, 20:24, 20:24, 0] = 255
    first, second = grad_cam(Corner(), images, device="cpu")
    assert first[5, 5] == first.max() == 1 and first[20:, 20:].max() == 0
    assert second[21, 21] == second.max() == 1 and second[:16, :16].max() == 0


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


def test_grad_cam_computes_its_gradients_with_the_flags_of_its_forward_pass():
    allowed = []

    class Watched(Corner):
        def forward(self, x):
            quarters = nn.functional.adaptive_avg_pool2d(self.relu(self.convolution(x)), 2)
            allowed.append(torch.backends.cudnn.allow_tf32)
            quarters.register_hook(lambda _: allowed.append(torch.backends.cudnn.allow_tf32))
            return self.head(quarters.flatten(1))

    grad_cam(Watched(), np.full((1, 32, 32, 3), 255, np.uint8), classes=[1], device="cpu")
    assert allowed == [False, False] and torch.backends.cudnn.allow_tf32


def test_grad_cam_is_zero_if_nothing_speaks_for_the_class():
    assert not grad_cam(Corner(), np.zeros((1, 32, 32, 3), np.uint8), classes=[0], device="cpu").any()


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


def test_bad_input_grad_cam_without_a_map():
    with pytest.raises(
        ValueError, match="grid is 3, but no module of Linear other than convolutions returns a feature map"
    ):
        grad_cam(Linear(), np.zeros((1, 32, 32, 3), np.uint8), device="cpu")


def test_grad_cam_pairs_are_of_one_class_once_right_and_once_wrong(synthetic):
    split, model = synthetic[1], small_network()
    rows = [{label: 0.5 + index / 1000} for index, label in enumerate(split.labels.tolist())]
    first, third, fourth = (int(np.flatnonzero(split.labels == label)[0]) for label in (1, 3, 5))
    second = int(np.flatnonzero(split.labels == 1)[1])  # of a class that has its mistake already
    confidences = {first: 0.99, second: 0.95, third: 0.9, fourth: 0.7}
    for index, confidence in confidences.items():  # taken for the next class
        rows[index] = {(int(split.labels[index]) + 1) % 10: confidence}
    pairs = grad_cam_pairs(model, split, outputs(*rows), n=3, device="cpu")
    assert [pair.wrong_confidence for pair in pairs] == pytest.approx([0.99, 0.9, 0.7])
    for pair, index in zip(pairs, (first, third, fourth), strict=True):
        actual = split.labels[index]
        assert (pair.actual, pair.predicted) == (CLASSES[actual], CLASSES[(actual + 1) % 10])
        assert np.array_equal(pair.wrong, split.images[index])
        right = next(i for i, image in enumerate(split.images) if np.array_equal(image, pair.right))
        assert split.labels[right] == actual and right not in confidences
        assert pair.right_confidence == pytest.approx(0.5 + right / 1000)
        # Confidence rises with the index, and the mistake's is beyond: the nearest is the last that is right.
        assert right == max(i for i in np.flatnonzero(split.labels == actual) if i not in confidences)
        for cam, image, label in (
            (pair.right_cam, pair.right, actual), (pair.wrong_cam, pair.wrong, (actual + 1) % 10),
            (pair.missed_cam, pair.wrong, actual),
        ):  # fmt: skip
            np.testing.assert_allclose(cam, grad_cam(model, image[None], [label], "cpu")[0], atol=1e-5)
    assert sum(pair.right_cam.any() + pair.wrong_cam.any() + pair.missed_cam.any() for pair in pairs) >= 3


def test_grad_cam_pairs_of_a_network_without_maps(synthetic):
    logits = outputs(*({(int(label) + index % 2) % 10: 0.9} for index, label in enumerate(synthetic[1].labels)))
    with pytest.warns(UserWarning, match="no Grad-CAM: grid is 3, but no module of Linear"):
        assert grad_cam_pairs(Linear(), synthetic[1], logits, device="cpu") == []


def test_grad_cam_pairs_without_mistakes(synthetic):
    logits = outputs(*[{label: 0.9} for label in synthetic[1].labels.tolist()])
    assert grad_cam_pairs(small_network(), synthetic[1], logits, device="cpu") == []
    assert isinstance(plots.plot_grad_cam([], "source"), Figure)
