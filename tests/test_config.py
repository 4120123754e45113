"""The recipe: its defaults, ranges and schedules."""

import re

import numpy as np
import pytest

from session8.config import RECIPES, Config


def test_the_default_recipe_is_the_seed_projects():
    config = Config.named("default")
    assert config == Config()
    assert (config.epochs, config.lr, config.momentum, config.schedule) == (40, 0.01, 0.9, "constant")
    assert (config.weight_decay, config.label_smoothing, config.nesterov, config.cutout) == (0, 0, False, 0)
    assert (config.width, config.padding, config.crop_padding, config.flip) == (1, "zeros", 4, "random")
    assert (config.low_res_epochs, config.ema_decay, config.bias_lr_scale) == (0, 0, 1)


def test_the_batch_size_depends_on_the_device_unless_it_is_set():
    assert [Config().batch_size_on(device) for device in ("cpu", "cuda:1", "mps")] == [64, 128, 128]
    assert [Config(batch_size=20).batch_size_on(device) for device in ("cpu", "cuda")] == [20, 20]


def test_a_named_recipe_can_be_changed():
    one_cycle = Config.named("one_cycle", epochs=3, lr=0.2)
    assert (one_cycle.epochs, one_cycle.lr, one_cycle.schedule) == (3, 0.2, "one_cycle")


def test_small_epochs_come_first_and_keep_their_share_of_a_recipes_epochs():
    config = Config(epochs=6, low_res_epochs=4, low_res_size=16)
    assert [config.image_size(epoch) for epoch in range(6)] == [16] * 4 + [32] * 2
    fast = Config.named("fast")
    assert 0 < fast.low_res_epochs < fast.epochs
    assert Config.named("fast", epochs=2 * fast.epochs).low_res_epochs == 2 * fast.low_res_epochs
    assert Config.named("fast", epochs=1).low_res_epochs <= 1
    assert Config.named("fast", epochs=2, low_res_epochs=0).low_res_epochs == 0


def test_numbers_become_pythons_own():
    numbers = {"epochs": np.int64(3), "lr": np.float32(0.5), "momentum": 0, "seed": np.int32(7), "batch_size": None}
    config = Config(**numbers)
    assert {name: type(getattr(config, name)) for name in numbers} == {
        "epochs": int, "lr": float, "momentum": float, "seed": int, "batch_size": type(None),
    }  # fmt: skip


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        *(Config.named(recipe) for recipe in RECIPES),
        Config(epochs=5, schedule="one_cycle", lr=0.3, warmup=0.4, low_res_epochs=2, low_res_size=16),
        Config(epochs=1, schedule="one_cycle", lr=0.5, lr_start=0.5, lr_end=1),
    ],
)
@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_the_learning_rate_rises_and_falls_linearly_in_the_pixels_seen(config, steps_per_epoch):
    sides = [config.image_size(step // steps_per_epoch) for step in range(config.epochs * steps_per_epoch)]
    pixels = np.square(sides)
    seen_at_middle = (np.cumsum(pixels) - pixels / 2) / pixels.sum()
    expected = np.full(len(sides), config.lr)
    if config.schedule == "one_cycle":
        points = config.lr_start, 1, config.lr_end
        expected = config.lr * np.interp(seen_at_middle, [0, config.warmup, 1], points)
    assert [config.lr_at(step, steps_per_epoch) for step in range(len(sides))] == pytest.approx(expected)


def test_the_decay_of_the_average_rises_to_its_value():
    config = Config(ema_decay=0.99)
    assert [config.ema_decay_at(step) for step in (0, 1, 10)] == [0, 2 / 11, 11 / 20]
    assert config.ema_decay_at(880) < 0.99 == config.ema_decay_at(900) == config.ema_decay_at(10_000)
    assert Config().ema_decay_at(10) == 0


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = [  # values of a field, and what the message says is expected
    ("epochs", [0, -3], "at least 1"),
    ("batch_size", [0, -64], "at least 1, or None"),
    ("lr", [0, float("nan"), float("inf")], "a positive number, for instance 0.01"),
    ("momentum", [1, -0.1], "0 <= momentum < 1"),
    ("optimizer", ["adam", None], "one of 'sgd', 'muon'"),
    ("muon_lr", [0, -0.04, float("inf"), float("nan")], "a positive number, for instance 0.04"),
    ("weight_decay", [-1, float("inf")], "0 or more"),
    ("bias_lr_scale", [0, -1], "a positive number"),
    ("ema_decay", [1, -0.1], r"0 \(none\) to below 1"),
    ("label_smoothing", [1, -0.1], "0 <= label_smoothing < 1"),
    ("cutout", [-1, 33], r"0 \(none\) to 32 pixels"),
    ("padding", ["mirror", None], "one of 'zeros', 'reflect'"),
    ("crop_padding", [-1, 17], "0 to 16 pixels"),
    ("flip", ["never"], "one of 'random', 'alternate'"),
    ("low_res_epochs", [-1, 41], "0 to 40, the number of epochs"),
    ("low_res_size", [15, 33], "16 to 32 pixels"),
    ("width", [0, -1], "a positive number"),
    ("dropout", [1, -0.1], "0 <= dropout < 1"),
    ("schedule", ["cosine"], "one of 'constant', 'one_cycle'"),
    ("lr_start", [1.5, -0.1], "a fraction of lr"),
    ("lr_end", [1.5, -0.1], "a fraction of lr"),
    ("warmup", [0, 1], "0 < warmup < 1"),
    ("precision", ["float8", 16], "one of 'auto', 'float32', 'bfloat16', 'float16'"),
    ("seed", [-1, 2**63], r"0 <= seed < 2\*\*63"),
    ("epochs", [1.5, "3"], "an integer"),
    ("batch_size", [1.5, "3"], "an integer"),
    ("cutout", [1.5, "3"], "an integer"),
    ("seed", [1.5, "3"], "an integer"),
    ("lr", ["fast", None], "a number"),
    ("warmup", ["fast", None], "a number"),
]


@pytest.mark.parametrize("name, values, expected", BAD)
def test_bad_input_recipe(name, values, expected):
    for value in values:
        message = rf"^{name} is {re.escape(repr(value))}(\.0)?; expected {expected}"
        with pytest.raises((ValueError, TypeError), match=message):
            Config(**{name: value})


def test_bad_input_nesterov_without_momentum_and_unknown_recipe():
    with pytest.raises(ValueError, match="nesterov is True; expected False if momentum is 0"):
        Config(momentum=0, nesterov=True)
    with pytest.raises(
        ValueError, match="recipe is 'two_cycles'; expected one of 'default', 'one_cycle', 'fast', 'accurate'"
    ):
        Config.named("two_cycles")
