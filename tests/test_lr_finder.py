"""The range test agrees with a computation by hand, and neither it nor the estimate changes anything."""

from itertools import combinations, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import CPU, EXACT, Linear, small_network
from session8.trainer import fit

from session8 import lr_finder, plots, trainer
from session8.checkpoint import save_checkpoint
from session8.config import Config
from session8.data import MEAN, STD, Split
from session8.loaders import make_loader
from session8.lr_finder import _valley, estimate_seconds, lr_range_test


def test_estimate_leaves_everything_as_it_was(synthetic):
    model, config = small_network(), Config(epochs=2, batch_size=10)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert 0 < estimate_seconds(model, *synthetic, config, "cpu") < 60
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def half_a_second_per_step(monkeypatch):
    """The clock stands still but for half a second in each training step and test batch."""
    now = [0.0]
    monkeypatch.setattr("session8.lr_finder.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_time(function):
        def timed(*arguments, size=32):
            now[0] += 0.5 if size == 32 else 0.25
            return function(*arguments) if size == 32 else function(*arguments, size=size)

        return timed

    monkeypatch.setattr("session8.lr_finder.train_step", pass_time(lr_finder.train_step))
    monkeypatch.setattr("session8.lr_finder.autocast", pass_time(lr_finder.autocast))


@pytest.mark.parametrize("batch_size, batches", [(5, 60), (100, 3), (300, 1)])
def test_estimate_is_of_all_steps_of_all_epochs(synthetic, half_a_second_per_step, batch_size, batches):
    config = Config(epochs=3, batch_size=batch_size)  # 300 training images; the 100 test images are one batch
    assert estimate_seconds(Linear(), *synthetic, config, "cpu") == pytest.approx(3 * (batches + 1) * 0.5)


def test_estimate_counts_small_images_at_their_own_time(synthetic, half_a_second_per_step, tmp_path):
    config = Config(epochs=5, batch_size=100, low_res_epochs=3, low_res_size=16, ema_decay=0.9)
    model = small_network()
    expected = 3 * (3 * 0.25 + 0.5) + 2 * (3 * 0.5 + 0.5)
    assert estimate_seconds(model, *synthetic, config, "cpu") == pytest.approx(expected)
    save_checkpoint(tmp_path, {"epoch": 2})
    assert estimate_seconds(model, *synthetic, config, "cpu", tmp_path) == pytest.approx(expected - 2 * (0.75 + 0.5))


def test_estimate_does_not_count_epochs_that_are_done(synthetic, half_a_second_per_step, tmp_path):
    config = Config(epochs=3, batch_size=100)
    save_checkpoint(tmp_path, {"epoch": 2})
    assert estimate_seconds(Linear(), *synthetic, config, "cpu", tmp_path) == pytest.approx((3 + 1) * 0.5)
    save_checkpoint(tmp_path, {"epoch": 3})
    assert estimate_seconds(Linear(), *synthetic, config, "cpu", tmp_path) == 0.0


def test_estimate_waits_for_the_device_twice_per_pass_and_not_in_every_step(synthetic, monkeypatch):
    waits = []
    monkeypatch.setattr("session8.lr_finder.synchronize", waits.append)
    estimate_seconds(Linear(), *synthetic, Config(epochs=1, batch_size=10), "cpu")
    assert waits == [CPU] * 4


def test_neither_test_starts_worker_processes(synthetic, monkeypatch):
    """Training starts its own; on CUDA the default is up to four."""
    asked = []
    make_loader = trainer.make_loader
    monkeypatch.setattr(
        trainer, "make_loader", lambda *a, **k: asked.append(k.get("num_workers")) or make_loader(*a, **k)
    )
    estimate_seconds(Linear(), *synthetic, EXACT, "cpu")
    lr_range_test(Linear(), synthetic[0], EXACT, "cpu", end=0.1, steps=3)
    assert asked[::2] == [0, 0]  # every second loader is a test loader


def test_range_test_scales_the_rate_of_biases_as_training_does(synthetic, monkeypatch):
    rates, step = [], lr_finder.train_step

    def watched(model, images, labels, optimizer, *rest):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(model, images, labels, optimizer, *rest)

    monkeypatch.setattr(lr_finder, "train_step", watched)
    config = Config(batch_size=20, bias_lr_scale=16.0)
    lr_range_test(small_network(), synthetic[0], config, CPU, start=1e-4, end=1e-2, steps=3)
    assert np.array(rates) == pytest.approx(np.outer([1e-4, 1e-3, 1e-2], [1, 1, 16]))


def test_range_test_agrees_with_a_sweep_by_hand(synthetic, device):
    """The same steps in NumPy and double precision: the loss's gradient, momentum, and the smoothing."""
    split = Split(synthetic[0].images[:60], synthetic[0].labels[:60], "60 images: three batches of 20 an epoch")
    model, config = Linear(), Config(batch_size=20, precision="float32", seed=5)
    result = lr_range_test(model, split, config, device, start=1e-4, end=1e-2, steps=7, smoothing=0.8)
    assert result.lr == pytest.approx(np.geomspace(1e-4, 1e-2, 7)) and not result.diverged

    by_hand = Linear().double()
    weight, bias = (p.detach().numpy() for p in by_hand.head.parameters())  # views: changed in place below
    momenta, average, expected = [np.zeros_like(weight), np.zeros_like(bias)], 0.0, []
    loader = make_loader(split, 20, seed=5, device=device)
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
    assert np.argmin(expected) == 6  # it falls all the way
    assert result.suggestion == pytest.approx(result.lr[3])  # the middle of a valley of seven points


def longest_decreasing(losses):
    """Return the indices of the longest decreasing subsequence, by trying all; of several, the earliest."""
    for size in range(len(losses), 0, -1):
        found = [
            c for c in combinations(range(len(losses)), size) if all(losses[i] > losses[j] for i, j in pairwise(c))
        ]
        if found:
            return min(found, key=lambda indices: indices[::-1])


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
def test_suggestion_is_the_middle_of_the_longest_valley(losses):
    indices = longest_decreasing(losses)
    assert _valley(losses) == indices[::-1][len(indices) // 2]


def test_suggestion_ignores_a_plateau_and_the_divergence_at_the_end():
    curve = np.concatenate([np.full(50, 2.3), np.linspace(2.3, 1.0, 100), np.full(30, 1.0), np.linspace(1, 9, 20)])
    assert 95 <= _valley(curve) <= 105


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
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(ValueError, match="the first loss is nan, before any step"):
        lr_range_test(model, synthetic[0], EXACT, CPU)


@pytest.mark.parametrize("steps, start, end", [(200, 1e3, 1e5), (2, 1e-4, 1e30)])
def test_range_test_whose_loss_never_falls_has_no_suggestion(steps, start, end, synthetic):
    result = lr_range_test(small_network(), synthetic[0], Config(batch_size=50), CPU, start, end, steps)
    assert result.suggestion is None and min(result.loss) == result.loss[0] and len(result.lr) == len(result.loss)


def test_a_network_that_cannot_be_copied_has_no_range_test_and_no_estimate(synthetic, capsys):
    model = Linear()
    model.norm = model.head.weight.norm()  # torch.nn.utils.weight_norm keeps such a tensor
    result = lr_range_test(model, synthetic[0], EXACT, CPU)
    assert (result.lr, result.suggestion) == ([], None) and estimate_seconds(model, *synthetic, EXACT, CPU) == 0
    assert "no range test" in plots.plot_lr_range(result, "source").axes[0].get_title()
    log = capsys.readouterr().out
    assert "No range test: Linear cannot be copied (RuntimeError: " in log and "No time estimate: Linear" in log
    with pytest.raises(ValueError, match=r"ema_decay is 0.9, but Linear cannot be copied .*: set ema_decay=0"):
        fit(model, *synthetic, Config(epochs=1, ema_decay=0.9), CPU)


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
