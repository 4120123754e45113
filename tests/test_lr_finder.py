"""The learning rate range test agrees with a computation by hand, and leaves everything else as it was."""

from itertools import combinations, pairwise

import albumentations as A
import numpy as np
import pytest
import torch
from networks import CPU, EXACT, Linear, small_network

from session8 import lr_finder
from session8.config import Config
from session8.data import MEAN, STD, Split
from session8.loaders import make_loader
from session8.lr_finder import _valley, lr_range_test


def longest_decreasing(losses):
    """Return the indices of the longest decreasing subsequence, by trying all; of several, the earliest."""
    for size in range(len(losses), 0, -1):
        found = [
            c for c in combinations(range(len(losses)), size) if all(losses[i] > losses[j] for i, j in pairwise(c))
        ]
        if found:
            return min(found, key=lambda indices: indices[::-1])


@pytest.mark.parametrize("transform", [None, A.CenterCrop(32, 32)], ids=["the recipe's", "a transform"])
def test_losses_agree_with_a_sweep_by_hand(synthetic, device, transform):
    """The same steps in NumPy and double precision: the loss's gradient, momentum, and the smoothing."""
    split = Split(synthetic[0].images[:60], synthetic[0].labels[:60], "60 images: three batches of 20 an epoch")
    model, config = Linear(), Config(batch_size=20, precision="float32", seed=5, cutout=8, flip="alternate")
    result = lr_range_test(model, split, config, device, 1e-4, 1e-2, steps=7, smoothing=0.8, transform=transform)
    assert result.lr == pytest.approx(np.geomspace(1e-4, 1e-2, 7)) and not result.diverged

    by_hand = Linear().double()
    weight, bias = (p.detach().numpy() for p in by_hand.head.parameters())  # views: changed in place below
    momenta, average, expected = [np.zeros_like(weight), np.zeros_like(bias)], 0.0, []
    loader = make_loader(split, 20, seed=5, num_workers=0, transform=transform, device=device, config=config)
    for step in range(7):
        if step % 3 == 0:
            loader.set_epoch(step // 3)
            batches = iter(loader)
        images, labels = (part.cpu().numpy() for part in next(batches))
        log_probs = by_hand.by_hand(images)
        average = 0.8 * average + 0.2 * -log_probs[np.arange(20), labels].mean()
        expected.append(average / (1 - 0.8 ** (step + 1)))
        residual = (np.exp(log_probs) - np.eye(10)[labels]) / 20
        x = ((images / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2).reshape(20, -1)
        for value, momentum, gradient in zip((weight, bias), momenta, (residual.T @ x, residual.sum(0)), strict=True):
            momentum *= 0.9
            momentum += gradient
            value -= result.lr[step] * momentum
    assert result.loss == pytest.approx(expected, rel=1e-4)
    valley = longest_decreasing(expected)
    assert len(valley) > 3 and result.suggestion == result.lr[valley[::-1][len(valley) // 2]]


@pytest.mark.parametrize(
    "losses",
    [
        [5, 9, 9, 9, 9, 4, 9, 9, 9, 3],  # its points are far apart
        [9, 1, 9, 9, 8, 9, 9, 7, 9, 9, 9, 6],
        [3, 2, 1, 9, 8, 7],  # two of one length
        [2, 2, 1, 1],  # equal losses
        [1, 2, 3],
        *np.random.default_rng(0).integers(0, 6, (10, 9)).tolist(),
        *np.random.default_rng(1).normal(size=(5, 10)).tolist(),
    ],
)
def test_the_suggestion_is_the_middle_of_the_longest_valley(losses):
    indices = longest_decreasing(losses)
    assert _valley(losses) == indices[::-1][len(indices) // 2]


def test_the_test_stops_where_training_diverges(synthetic):
    result = lr_range_test(Linear(), synthetic[0], EXACT, CPU, steps=40, end=1e4, smoothing=0.5)
    assert result.diverged and 2 < len(result.lr) == len(result.loss) < 40
    lowest = np.minimum.accumulate(result.loss)
    assert all(loss <= 4 * before for loss, before in zip(result.loss[1:], lowest, strict=False))
    assert result.suggestion < result.lr[-1]


def test_a_loss_that_never_falls_gives_no_suggestion(synthetic):
    result = lr_range_test(small_network(), synthetic[0], EXACT, CPU, start=1e3, end=1e5)
    assert result.suggestion is None and min(result.loss) == result.loss[0] and len(result.lr) == len(result.loss)


def test_the_rate_of_biases_is_scaled_as_in_training(synthetic):
    configs = [Config(batch_size=32, bias_lr_scale=scale) for scale in (1, 16)]
    one, other = (lr_range_test(small_network(), synthetic[0], c, CPU, steps=4, end=1).loss for c in configs)
    assert one[0] == other[0] and one != other


@pytest.mark.parametrize("batch_size, steps", [(64, 200), (128, 200), (256, 100), (512, 50), (2000, 50)])
def test_large_batches_take_fewer_steps_and_less_smoothing(batch_size, steps, synthetic, monkeypatch):
    """A jump of the loss in mid-test has decayed to 8 % after a quarter of the steps, whatever their number."""
    taken = []

    def train_step(*_):
        taken.append(1)
        return torch.tensor(1.0 + (len(taken) > steps // 2)), None

    monkeypatch.setattr(lr_finder, "train_step", train_step)
    result = lr_range_test(Linear(), synthetic[0], Config(batch_size=batch_size), CPU)
    assert len(result.lr) == len(taken) == steps
    assert result.loss[steps * 3 // 4 - 1] == pytest.approx(2 - 0.95**50, abs=0.01)


def test_model_and_random_state_are_unchanged_and_do_not_matter(synthetic):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # dropout must not draw from this state
        state, model = torch.get_rng_state(), small_network()
        torch.set_rng_state(state)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        results.append(lr_range_test(model, synthetic[0], EXACT, CPU, steps=5))
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters()) and model.training
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]


def test_a_network_that_cannot_be_copied_has_no_range_test(synthetic, capsys):
    model = Linear()
    model.norm = model.head.weight.norm()  # torch.nn.utils.weight_norm keeps such a tensor
    result = lr_range_test(model, synthetic[0], EXACT, CPU)
    assert (result.lr, result.suggestion) == ([], None)
    assert "No range test: Linear cannot be copied (RuntimeError: " in capsys.readouterr().out


def not_finite():
    model = Linear()
    torch.nn.init.constant_(model.head.weight, float("nan"))
    return model


BAD = [
    (Linear, {"start": 0}, "start is 0 and end is 10.0; expected 0 < start < end, for instance 1e-4 and 10"),
    (Linear, {"start": 2, "end": 1}, "start is 2 and end is 1; expected 0 < start < end"),
    (Linear, {"end": float("inf")}, "start is 0.0001 and end is inf; expected 0 < start < end"),
    (Linear, {"steps": 1}, "steps is 1; expected at least 2, for instance 200"),
    (Linear, {"smoothing": 1}, "smoothing is 1; expected 0 <= smoothing < 1, for instance 0.95"),
    (not_finite, {}, "the first loss is nan, before any step: the weights or the images are not finite"),
]


@pytest.mark.parametrize("make, wrong, words", BAD)
def test_bad_input_range_test(make, wrong, words, synthetic):
    with pytest.raises(ValueError, match=words):
        lr_range_test(make(), synthetic[0], EXACT, CPU, **wrong)
