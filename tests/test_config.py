"""The recipe: its defaults, ranges and schedule."""

import re

import numpy as np
import pytest

from session8.config import RECIPES, Config


def test_the_default_recipe_is_the_seed_projects():
    config = Config.named("default")
    assert config == Config()
    assert (config.epochs, config.lr, config.momentum, config.schedule) == (40, 0.01, 0.9, "constant")
    assert (config.weight_decay, config.label_smoothing, config.nesterov, config.cutout) == (0, 0, False, 0)


def test_the_batch_size_depends_on_the_device_unless_it_is_set():
    assert [Config().batch_size_on(device) for device in ("cpu", "cuda:1", "mps")] == [64, 128, 128]
    assert [Config(batch_size=20).batch_size_on(device) for device in ("cpu", "cuda")] == [20, 20]


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"epochs": -3}, {"epochs": 1.5}, {"epochs": "3"}, {"batch_size": 0}, {"batch_size": -64},
        {"batch_size": 12.5}, {"lr": 0}, {"lr": "fast"}, {"lr": None}, {"lr": float("nan")}, {"lr": float("inf")},
        {"momentum": 1}, {"momentum": -0.1},
        {"weight_decay": -1}, {"label_smoothing": 1}, {"schedule": "cosine"}, {"warmup": 0}, {"warmup": 1},
        {"dropout": 1.0}, {"dropout": -0.1}, {"cutout": -1}, {"cutout": 33}, {"cutout": 8.0},
        {"width": 0}, {"padding": "mirror"}, {"crop_padding": -1}, {"crop_padding": 17}, {"flip": "never"},
        {"low_res_epochs": -1}, {"low_res_epochs": 41}, {"low_res_size": 15}, {"low_res_size": 33},
        {"ema_decay": 1}, {"ema_decay": -0.1}, {"bias_lr_scale": 0}, {"bias_lr_scale": -1},
        {"lr_start": 1.5}, {"lr_end": -0.1}, {"precision": "float8"},
        {"precision": 16}, {"seed": -1}, {"seed": 0.5}, {"seed": 2**63},
    ],
)  # fmt: skip
def test_bad_input_recipe(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises((ValueError, TypeError), match=rf"{name} is {re.escape(repr(value))}(\.0)?; expected"):
        Config(**wrong)


def test_bad_input_nesterov_without_momentum():
    with pytest.raises(ValueError, match="nesterov is True; expected False if momentum is 0"):
        Config(momentum=0, nesterov=True)


def test_numbers_become_pythons_own():
    config = Config(epochs=np.int64(3), lr=np.float32(0.5), momentum=0, seed=np.int32(7), batch_size=np.int16(8))
    assert [type(v) for v in (config.epochs, config.lr, config.momentum, config.seed, config.batch_size)] == [
        int, float, float, int, int,
    ]  # fmt: skip


def test_a_named_recipe_can_be_changed_and_its_name_must_be_known():
    one_cycle = Config.named("one_cycle", epochs=3, lr=0.2)
    assert (one_cycle.epochs, one_cycle.lr, one_cycle.schedule) == (3, 0.2, "one_cycle")
    assert set(RECIPES) == {"default", "one_cycle", "fast"}
    with pytest.raises(ValueError, match="recipe is 'two_cycles'; expected one of 'default', 'one_cycle', 'fast'"):
        Config.named("two_cycles")


def test_one_cycle_rises_to_its_peak_and_decays_to_zero():
    config = Config(schedule="one_cycle", lr=0.2, warmup=0.25)
    assert config.lr_at(0.25) == pytest.approx(0.2)
    assert config.lr_at(0.125) == pytest.approx(0.1) == config.lr_at(0.625)
    assert config.lr_at(0) == config.lr_at(1) == 0
    assert Config().lr_at(0.7) == 0.01


def test_the_decay_of_the_average_rises_to_its_value():
    config = Config(ema_decay=0.99)
    assert [config.ema_decay_at(step) for step in (0, 1, 10)] == [0, 2 / 11, 11 / 20]
    assert config.ema_decay_at(880) < 0.99 == config.ema_decay_at(900) == config.ema_decay_at(10_000)


def test_new_fields_default_to_what_the_code_did_before():
    config = Config()
    assert (config.width, config.padding, config.crop_padding, config.flip) == (1, "zeros", 4, "random")
    assert (config.low_res_epochs, config.ema_decay, config.bias_lr_scale) == (0, 0, 1)
    assert (config.lr_start, config.lr_end) == (0, 0)
    assert [config.image_size(epoch) for epoch in (0, 39)] == [32, 32]
    assert [config.progress(epochs) for epochs in (0, 10, 40)] == [0, 0.25, 1]


def test_small_epochs_come_first_and_count_by_their_pixels():
    config = Config(epochs=6, low_res_epochs=4, low_res_size=16)  # a quarter of the pixels: 4 / 4 + 2 = 3 epochs' work
    assert [config.image_size(epoch) for epoch in range(6)] == [16] * 4 + [32] * 2
    assert [config.progress(n) for n in (0, 2, 4, 5, 6)] == pytest.approx([0, 0.5 / 3, 1 / 3, 2 / 3, 1])


def test_small_epochs_keep_their_share_of_a_recipes_epochs():
    fast = Config.named("fast")
    assert 0 < fast.low_res_epochs < fast.epochs
    half = Config.named("fast", epochs=2 * fast.epochs)
    assert half.low_res_epochs == 2 * fast.low_res_epochs
    assert Config.named("fast", epochs=1).low_res_epochs <= 1
    assert Config.named("fast", epochs=2, low_res_epochs=0).low_res_epochs == 0


def test_the_schedule_starts_and_ends_at_fractions_of_its_peak():
    config = Config.named("one_cycle", lr=0.5, warmup=0.2, lr_start=0.2, lr_end=0.05)
    assert config.lr_at(0) == pytest.approx(0.1) and config.lr_at(1) == pytest.approx(0.025)
    assert config.lr_at(0.2) == pytest.approx(0.5)
    assert config.lr_at(0.1) == pytest.approx(0.3) and config.lr_at(0.6) == pytest.approx((0.5 + 0.025) / 2)
