"""The augmentation of a batch: its statistics, an edited pipeline, and normalisation."""

import random

import albumentations as A
import numpy as np
import pytest
import torch
from fakes import position_coded, read_positions
from networks import CPU
from scipy.stats import chi2_contingency, chisquare

from session8 import augment as augmentation
from session8.augment import apply_transform, augment, normalize, pad, train_transforms
from session8.data import MEAN, STD, Split, synthetic_cifar10
from session8.loaders import make_loader


@pytest.fixture(scope="module")
def positions():
    loader = make_loader(position_coded(16200), 128, num_workers=0)
    return read_positions(torch.cat([images for images, _ in loader]))


def test_crop_offsets_are_uniform_over_the_81_positions(positions):
    rows, columns, _ = positions
    counts = np.bincount(rows * 9 + columns, minlength=81)
    assert len(counts) == 81 and counts.min() > 0
    assert chisquare(counts).pvalue > 1e-3


def test_flips_are_fair(positions):
    assert chisquare(np.bincount(positions[2])).pvalue > 1e-3


def test_crop_and_flip_are_independent(positions):
    # What A.Compose(seed=...) gets wrong: it gives crop and flip equal generators.
    rows, columns, flipped = positions
    for one, other in ((rows, flipped), (columns, flipped), (rows, columns)):
        assert chi2_contingency(np.histogram2d(one, other, bins=(9, len(np.unique(other))))[0]).pvalue > 1e-3


def test_draws_are_independent_from_image_to_image_and_batch_to_batch(positions):
    rows, columns, _ = positions
    offsets = rows * 9 + columns
    for gap in (1, 128):  # the next image, and the same place in the next batch
        repeated = (offsets[gap:] == offsets[:-gap]).mean()
        assert abs(repeated - 1 / 81) < 4 * np.sqrt(1 / 81 / len(offsets))


def test_an_augmented_image_is_the_padded_image_cropped_and_flipped():
    split = synthetic_cifar10(10, 10)[0]
    padded = np.pad(split.images[3], ((4, 4), (4, 4), (0, 0)))
    crops = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    possible = {crop.tobytes() for crop in crops} | {crop[:, ::-1].tobytes() for crop in crops}
    draws = augment(split, 3, 50)
    assert {draw.tobytes() for draw in draws} <= possible
    assert len({draw.tobytes() for draw in draws}) > 30


def test_an_empty_pipeline_is_not_enough_for_training():
    with pytest.raises(ValueError, match=r"the transform returned uint8 \(40, 40, 3\)"):
        augment(position_coded(1), 0, 3, augmentation.test_transforms())


@pytest.mark.parametrize(
    "transform, returned",
    [
        (A.Compose([A.HorizontalFlip()]), r"uint8 \(40, 40, 3\)"),
        (A.Compose([A.RandomCrop(32, 32), A.Normalize()]), r"float32 \(32, 32, 3\)"),
    ],
)
def test_bad_input_transform_that_returns_something_else(transform, returned):
    loader = make_loader(synthetic_cifar10(20, 10)[0], 10, transform=transform, num_workers=0)
    with pytest.raises(ValueError, match=f"the transform returned {returned}"):
        next(iter(loader))


def test_wrong_arguments_of_albumentations_are_errors_in_the_tests():
    with pytest.raises(UserWarning, match="not valid"):
        A.HorizontalFlip(probability=0.5)


def test_default_transforms_turn_40_into_32_pixels_and_leave_32_alone():
    assert train_transforms()(image=np.zeros((40, 40, 3), np.uint8))["image"].shape == (32, 32, 3)
    image = synthetic_cifar10(10, 10)[0].images[0]
    assert np.array_equal(augmentation.test_transforms()(image=image)["image"], image)


def test_padding_is_four_zero_pixels():
    images = synthetic_cifar10(10, 10)[0].images
    padded = pad(images)
    assert padded.shape == (10, 40, 40, 3) and padded.dtype == np.uint8
    assert np.array_equal(padded[:, 4:36, 4:36], images) and padded.sum() == images.sum()


@pytest.mark.parametrize(
    "transform",
    [
        train_transforms(cutout=8),
        A.RandomCrop(32, 32),
        A.Sequential([A.RandomCrop(32, 32), A.HorizontalFlip()], p=1.0),
        A.Compose([A.RandomCrop(32, 32), A.OneOf([A.Transpose(p=1), A.D4(p=1)], p=0.7), A.Compose([A.D4()], p=0.5)]),
    ],
    ids=["the training list", "one transform", "a sequence", "nested"],
)
def test_a_transform_is_applied_image_by_image_with_one_seed_per_batch(transform):
    images = pad(synthetic_cifar10(40, 10)[0].images)
    batch = apply_transform(transform, images, 3)
    transform.set_random_state(np.random.default_rng(3), random.Random(3))
    assert all(np.array_equal(row, transform(image=image)["image"]) for row, image in zip(batch, images, strict=True))
    assert np.array_equal(batch, apply_transform(transform, images, 3))
    assert not np.array_equal(batch, apply_transform(transform, images, 4))


def test_an_empty_pipeline_does_not_call_albumentations_for_each_image(monkeypatch):
    images = synthetic_cifar10(20, 10)[0].images
    monkeypatch.setattr(A.Compose, "__call__", lambda *_, **__: pytest.fail("called"))
    assert np.array_equal(apply_transform(augmentation.test_transforms(), images, 0), images)


# -- cutout ------------------------------------------------------------------------------------------------------------


def test_cutout_fills_one_square_with_the_mean_colour_uniformly_inside_the_image():
    split = Split(np.full((1, 32, 32, 3), 255, np.uint8), np.zeros(1, int), "white")
    draws = augment(split, 0, 3000, train_transforms(cutout=10))
    colour = np.round(255 * np.array(MEAN)).astype(int)
    painted = (draws == colour).all(axis=3)
    assert (painted.sum((1, 2)) == 100).all()
    tops, lefts = painted.any(2).argmax(1), painted.any(1).argmax(1)
    assert (painted.any(2).sum(1) == 10).all() and (painted.any(1).sum(1) == 10).all()  # a square, whole
    for places in (tops, lefts):
        counts = np.bincount(places, minlength=23)
        assert len(counts) == 23 and ((counts - 3000 / 23) ** 2 / (3000 / 23)).sum() < 55  # chi-squared, 22 degrees
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.1


def test_bad_input_cutout():
    for side in (-1, 33):
        with pytest.raises(ValueError, match=rf"cutout is {side}; expected 0 \(none\) to 32"):
            train_transforms(cutout=side)


# -- normalisation -----------------------------------------------------------------------------------------------------


def test_normalisation_is_exact_and_channels_last(synthetic):
    images = synthetic[0].images[:5]
    expected = ((images / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    result = normalize(torch.from_numpy(images), CPU)
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-6)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
