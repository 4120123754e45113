"""Augmentation: its statistics, edited pipelines, the same for whole batches, and normalisation."""

import random
from itertools import combinations

import albumentations as A
import numpy as np
import pytest
import torch
from fakes import position_coded, read_positions
from networks import CPU
from scipy.stats import chi2_contingency, chisquare

from session8 import augment as augmentation
from session8.augment import apply_transform, as_batch_augmentation, augment, normalize, pad, train_transforms
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


# -- the same augmentation for whole batches ----------------------------------------------------------------------


def decode(images):
    """Read the draws from augmented position-coded images, as `BatchAugmentation.draw` returns them."""
    draws = []
    for image in images.astype(int):
        hole = image[..., 2] == 114  # the blue of the mean colour; the image's own is 255, and that of the padding 0
        seen = np.argwhere(image[..., 2] == 255)
        row, column = seen[0]
        next_to_it = seen[(seen[:, 0] == row) & (seen[:, 1] != column)][0, 1]
        flip = (image[row, next_to_it, 1] - image[row, column, 1]) * (next_to_it - column) < 0
        source_row, source_column = image[row, column, :2] - 1 + 4  # in the padded image
        left = source_column - (31 - column if flip else column)
        corner = np.argwhere(hole)[0] if hole.any() else (32, 0)
        draws.append([source_row - row, left, flip, *corner])
    return np.array(draws)


@pytest.mark.parametrize(
    "transform",
    [
        train_transforms(),
        train_transforms(cutout=8),
        A.Compose([A.RandomCrop(32, 32)]),
        A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(p=0.2)]),
        A.Compose([A.RandomCrop(32, 32), A.CoarseDropout((1, 1), (5, 5), (5, 5), fill=(125, 123, 114), p=0.5)]),
    ],
    ids=["default", "one_cycle", "crop only", "rare flips", "a hole in every second image"],
)
def test_batched_augmentation_equals_albumentations_for_the_same_draws(transform):
    batched = as_batch_augmentation(transform)
    n = 300
    draws = decode(apply_transform(transform, pad(position_coded(n).images), 7))
    assert len(np.unique(draws[:, :2], axis=0)) > 60
    images = np.random.default_rng(0).integers(256, size=(n, 32, 32, 3), dtype=np.uint8)
    expected = apply_transform(transform, pad(images), 7)  # draws do not depend on the pixels
    order = np.random.default_rng(1).permutation(n)
    padded, indices = torch.from_numpy(pad(images)), torch.from_numpy(order)
    result = batched.apply(padded, indices, torch.from_numpy(draws[order]))
    assert result.dtype == torch.uint8 and np.array_equal(result.numpy(), expected[order])


def test_batched_draws_are_uniform_fair_independent_and_other_ones_in_each_epoch():
    augmentation = as_batch_augmentation(train_transforms(cutout=10))
    draws = augmentation.draw(16200, seed=3, epoch=0).astype(int)
    top, left, flip, hole_top, hole_left = draws.T
    assert chisquare(np.bincount(9 * top + left, minlength=81)).pvalue > 1e-3
    assert chisquare(np.bincount(flip)).pvalue > 1e-3
    for place in (hole_top, hole_left):
        assert chisquare(np.bincount(place, minlength=23)).pvalue > 1e-3 and place.max() == 22
    for one, other in combinations((top, left, flip, hole_top, hole_left), 2):
        table = np.histogram2d(one, other, bins=(len(np.unique(one)), len(np.unique(other))))[0]
        assert chi2_contingency(table).pvalue > 1e-4
    assert abs((draws[1:, :2] == draws[:-1, :2]).all(1).mean() - 1 / 81) < 4 * np.sqrt(1 / 81 / 16200)
    assert np.array_equal(draws, augmentation.draw(16200, seed=3, epoch=0))
    for seed, epoch in ((3, 1), (4, 0)):
        other = augmentation.draw(16200, seed, epoch)
        assert abs((draws[:, :2] == other[:, :2]).all(1).mean() - 1 / 81) < 4 * np.sqrt(1 / 81 / 16200)


def test_batched_draws_follow_the_probabilities_of_the_list():
    hole = A.CoarseDropout((1, 1), (8, 8), (8, 8), fill=0, p=0.25)
    augmentation = as_batch_augmentation(A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(p=0.1), hole]))
    draws = augmentation.draw(10_000, 0, 0)
    assert abs(draws[:, 2].mean() - 0.1) < 0.015 and abs((draws[:, 3] < 32).mean() - 0.25) < 0.02


CROP, FLIP = A.RandomCrop(32, 32), A.HorizontalFlip(p=0.5)


class OwnFlip(A.HorizontalFlip):
    """A user's subclass may do anything."""


@pytest.mark.parametrize(
    "transform",
    [
        A.Compose([]), CROP, A.Compose([FLIP]), A.Compose([FLIP, CROP]), A.Compose([CROP, FLIP, A.VerticalFlip()]),
        A.Compose([CROP], bbox_params=A.BboxParams("yolo", label_fields=[])),
        A.Compose([CROP, FLIP], p=0.5), A.Compose([CROP, OwnFlip()]), A.Compose([A.RandomCrop(32, 32, p=0.5), FLIP]),
        A.Compose([A.RandomCrop(32, 32, pad_if_needed=True)]), A.Compose([A.RandomCrop(28, 28)]),
        A.Compose([A.CenterCrop(32, 32), FLIP]), A.Compose([CROP, FLIP, FLIP]), A.Sequential([CROP, FLIP], p=1.0),
        A.Compose([CROP, A.Compose([FLIP])]), A.Compose([CROP, A.CoarseDropout((1, 2), (8, 8), (8, 8)), FLIP]),
        A.Compose([CROP, A.CoarseDropout((1, 2), (8, 8), (8, 8))]),
        A.Compose([CROP, A.CoarseDropout((1, 1), (4, 8), (8, 8))]),
        A.Compose([CROP, A.CoarseDropout((1, 1), (8, 8), (6, 6))]),
        A.Compose([CROP, A.CoarseDropout((1, 1), (4, 8), (4, 8))]),
        A.Compose([CROP, A.CoarseDropout((1, 1), (0.2, 0.2), (0.2, 0.2))]),
        A.Compose([CROP, A.CoarseDropout((1, 1), (8, 8), (8, 8), fill="random")]),
        A.Compose([CROP, A.CoarseDropout((1, 1), (8, 8), (8, 8), fill=0.5)]),
    ],
    ids=lambda transform: " ".join(repr(transform).split())[:60],
)  # fmt: skip
def test_every_other_list_falls_back_to_albumentations(transform):
    assert as_batch_augmentation(transform) is None


# -- normalisation -----------------------------------------------------------------------------------------------------


def test_normalisation_is_exact_and_channels_last(synthetic):
    images = synthetic[0].images[:5]
    expected = ((images / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    result = normalize(torch.from_numpy(images), CPU)
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-6)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
