"""What a dry run says agrees with the real one, and nothing is changed by it."""

from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import CPU, EXACT, Linear, small_network

from session8.data import MEAN, STD, Split
from session8.lr_finder import _suggest, estimate_seconds, lr_range_test
from session8.training import Config, make_loader


def test_estimate_leaves_everything_as_it_was(synthetic):
    model, config = small_network(), Config(epochs=2, batch_size=10)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert 0 < estimate_seconds(model, *synthetic, config, "cpu") < 60
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_estimate_is_of_all_steps_of_all_epochs(synthetic, monkeypatch):
    ticks = count(step=0.5)  # seconds: so long each step takes
    monkeypatch.setattr("session8.lr_finder.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    # 300 training images make 60 batches of 5, of which 30 are timed; the 100 test images make one.
    assert estimate_seconds(Linear(), *synthetic, Config(epochs=3, batch_size=5), "cpu") == 3 * (60 + 1) * 0.5


def test_range_test_agrees_with_a_sweep_by_hand(synthetic):
    """The same steps in NumPy and double precision: the loss's gradient, momentum, and the smoothing."""
    split = Split(synthetic[0].images[:60], synthetic[0].labels[:60], "60 images: three batches of 20 an epoch")
    model, config = Linear(), Config(batch_size=20, precision="float32", seed=5)
    result = lr_range_test(model, split, config, CPU, start=1e-4, end=1e-2, steps=7, smoothing=0.8)
    assert result.lr == pytest.approx(np.geomspace(1e-4, 1e-2, 7)) and not result.diverged

    by_hand = Linear().double()
    weight, bias = (p.detach().numpy() for p in by_hand.dense.parameters())  # views: changed in place below
    momenta, average, expected = [np.zeros_like(weight), np.zeros_like(bias)], 0.0, []
    loader = make_loader(split, 20, seed=5)
    for step in range(7):
        if step % 3 == 0:
            loader.set_epoch(step // 3)
            batches = iter(loader)
        images, labels = (part.numpy() for part in next(batches))
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
    assert np.argmin(expected) == 6  # it falls all the way
    reached = [expected[0] - loss >= 0.95 * (expected[0] - expected[6]) for loss in expected]
    assert result.suggestion == pytest.approx(result.lr[reached.index(True)])


def test_suggestion_is_where_the_fall_to_the_first_lasting_low_is_nearly_made():
    rates = np.geomspace(1e-4, 10, 201)
    log = np.log10(rates)
    ramp = np.interp(log, [-4, -1, 1], [2.5, 1.5, 1.5])  # 95 % of the fall is made at 1.55
    at_ramps_end = pytest.approx(10**-1.15, rel=0.06)  # the rates are 6 % apart
    assert _suggest(rates, ramp) == at_ramps_end
    # A hill behind it, a lower dip before the break-down, and a wiggle at the start change nothing.
    dip = np.interp(log, [-1, -0.4, 0.2, 0.5, 1], [0, 0.2, -0.1, -0.1, 5])
    wiggle = np.interp(log, [-4, -3.98, -3.9, -3.8], [0, -0.05, 0.05, 0])
    assert _suggest(rates, ramp + dip + wiggle) == at_ramps_end
    # A low that does not last is passed over.
    assert _suggest(rates, ramp + np.interp(log, [-2.1, -2, -1.9], [0, -0.1, 0])) == at_ramps_end


def test_range_test_stops_where_training_diverges(synthetic):
    result = lr_range_test(small_network(), synthetic[0], Config(batch_size=50), CPU, steps=60, end=1e4, smoothing=0.5)
    assert result.diverged and 2 < len(result.lr) == len(result.loss) < 60
    lowest = np.minimum.accumulate(result.loss)
    assert all(loss <= 4 * before for loss, before in zip(result.loss[1:], lowest, strict=False))
    assert result.suggestion < result.lr[-1]


def test_range_test_leaves_model_and_random_states_as_they_were(synthetic):
    model = small_network()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    lr_range_test(model, synthetic[0], Config(batch_size=50), CPU, steps=5)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_range_test_without_a_finite_loss(synthetic):
    model = Linear()
    torch.nn.init.constant_(model.dense.weight, float("nan"))
    with pytest.raises(ValueError, match="the first loss is nan, before any step"):
        lr_range_test(model, synthetic[0], EXACT, CPU)


def test_range_test_whose_loss_never_falls(synthetic):
    with pytest.raises(ValueError, match="the loss never fell below that at start, 1000: begin with a smaller rate"):
        lr_range_test(small_network(), synthetic[0], Config(batch_size=50), CPU, start=1e3, end=1e5)


def test_range_test_is_the_same_each_time(synthetic):
    results = []
    for state in (1, 2):
        torch.manual_seed(state)  # dropout must not draw from it
        results.append(lr_range_test(small_network(), synthetic[0], Config(batch_size=50), CPU, steps=5))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"start": 0}, "start is 0 and end is 10"), ({"start": 2, "end": 1}, "start is 2 and end is 1"),
        ({"end": float("inf")}, "end is inf"), ({"steps": 1}, "steps is 1; expected at least 2"),
        ({"smoothing": 1}, "smoothing is 1; expected"),
    ],
)  # fmt: skip
def test_bad_input_range_test(wrong, named, synthetic):
    with pytest.raises(ValueError, match=named):
        lr_range_test(Linear(), synthetic[0], EXACT, CPU, **wrong)
