"""Augmentation: its statistics, pixels and seeds, image by image and in batches on a device; normalisation."""

import random
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import combinations

import albumentations as A
import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda
from fakes import position_coded, read_draws
from scipy.stats import chi2_contingency, chisquare

from session8.augment import apply_transform, augment, normalize, pad, scale_down
from session8.config import RECIPES, Config
from session8.data import MEAN, STD, Split, synthetic_cifar10
from session8.loaders import make_loader

BACKENDS = {"cpu": nullcontext, "cuda": fake_cuda}  # albumentations, and batches on a stand-in for a GPU


def split_of(images):
    return Split(images, np.zeros(len(images), int), "made for a test")


def load(split, config, device, epoch=0):
    """Return the images of an epoch in the order of the loader, uint8 (N, 32, 32, 3)."""
    loader = make_loader(split, 128, seed=5, num_workers=0, device=device, config=config)
    loader.set_epoch(epoch)
    return torch.cat([images.cpu() for images, _ in loader]).numpy()


@cache
def order_of(n, device, epoch=0):
    """Return the indices of the images in the order of the loader."""
    numbers = np.zeros((n, 32, 32, 3), np.uint8)
    numbers[..., 0], numbers[..., 1] = (part[:, None, None] for part in divmod(np.arange(n), 256))
    loaded = load(split_of(numbers), Config(crop_padding=0), device, epoch)[:, 0, 0].astype(int)
    return 256 * loaded[:, 0] + loaded[:, 1]


# -- statistics -------------------------------------------------------------------------------------------------------

N = 3240  # 40 for each of the 81 crops


@cache
def drawn(device, epoch=0):
    """Return what an epoch draws, a row per image in the order of the loader: read_draws, as int (N, 5)."""
    with BACKENDS[device]():
        return np.stack(read_draws(load(position_coded(N), Config(cutout=8), device, epoch)), axis=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_flips_and_holes_are_uniform_and_independent(backend):
    top, left, flip, hole_top, hole_left = columns = drawn(backend).T
    for values, n in ((9 * top + left, 81), (flip, 2), (hole_top, 25), (hole_left, 25)):
        counts = np.bincount(values, minlength=n)
        assert len(counts) == n and chisquare(counts).pvalue > 1e-3
    for one, other in combinations(columns, 2):  # A.Compose(seed=...) gives crop and flip equal generators
        table = np.histogram2d(one, other, bins=(one.max() + 1, other.max() + 1))[0]
        assert chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_differ_by_image_batch_and_epoch(backend):
    crops, next_epoch = (drawn(backend, epoch)[:, :2] for epoch in (0, 1))
    with fake_cuda():  # which is faster; the order is that of the other backend
        order, next_order = (order_of(N, "cuda", epoch) for epoch in (0, 1))
    pairs = {
        "the next image": (crops[1:], crops[:-1]),
        "the same place in the next batch": (crops[128:], crops[:-128]),
        "the same place in the next epoch": (crops, next_epoch),
        "the same image in the next epoch": (crops[order.argsort()], next_epoch[next_order.argsort()]),
    }
    for name, (some, others) in pairs.items():
        assert abs((some == others).all(1).mean() - 1 / 81) < 4 * np.sqrt(1 / 81 / N), name


def test_both_backends_draw_from_the_same_distribution():
    for places in ((9, 9, 2, 1, 1), (1, 1, 1, 25, 25)):
        counts = [np.histogramdd(drawn(backend), places)[0].ravel() for backend in BACKENDS]
        assert chi2_contingency(counts).pvalue > 1e-3


def test_alternating_flips_mirror_each_image_in_every_second_epoch_with_both_backends():
    flips = {}
    for backend, context in BACKENDS.items():
        for epoch in range(3):
            with context():
                images = load(position_coded(500), Config(flip="alternate"), backend, epoch)
                flips[backend, epoch] = read_draws(images)[2][order_of(500, backend, epoch).argsort()]
    assert 200 < flips["cpu", 0].sum() < 300  # the standard deviation is 11
    for (_, epoch), mirrored in flips.items():
        assert np.array_equal(mirrored, flips["cpu", 0] ^ (epoch % 2))


# -- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_images_are_padded_cropped_mirrored_and_erased_as_the_recipe_says(recipe, device):
    config, n = Config.named(recipe), 200
    noise = np.random.default_rng(0).integers(256, size=(n, 32, 32, 3), dtype=np.uint8)
    images = load(split_of(noise), config, device)
    # The draws do not depend on the pixels.
    draws = read_draws(load(position_coded(n), replace(config, padding="zeros"), device), config.crop_padding)
    for image, index, top, left, flip, hole_top, hole_left in zip(images, order_of(n, device), *draws, strict=True):
        pixels = config.crop_padding
        if config.padding == "reflect":
            mirrored = [abs(i) if i < 32 else 62 - i for i in range(-pixels, 32 + pixels)]  # row -1 is row 1
            padded = noise[index][mirrored][:, mirrored]
        else:
            padded = np.pad(noise[index], ((pixels, pixels), (pixels, pixels), (0, 0)))
        expected = padded[top : top + 32, left : left + 32][:, :: -1 if flip else 1].copy()
        square = slice(hole_top, hole_top + config.cutout), slice(hole_left, hole_left + config.cutout)
        expected[square] = np.round(255 * np.array(MEAN))
        assert np.array_equal(image, expected)


def test_augment_returns_variants_of_one_image():
    split = synthetic_cifar10(10, 10)[0]
    variants = augment(split, 3, 50)
    assert variants.shape == (50, 32, 32, 3) and len({image.tobytes() for image in variants}) > 30
    assert np.array_equal(variants, augment(split, 3, 50, seed=0))
    assert not np.array_equal(variants, augment(split, 3, 50, seed=1))
    image, recipe = split.images[3], Config(flip="alternate", crop_padding=0)
    assert np.array_equal(augment(split, 3, 4, config=recipe), [image, image[:, ::-1]] * 2)
    upside_down = A.Compose([A.CenterCrop(32, 32), A.VerticalFlip(p=1)])
    assert np.array_equal(augment(split, 3, 2, upside_down, config=Config.named("one_cycle")), [image[::-1]] * 2)


@pytest.mark.parametrize(
    "transform",
    [
        A.RandomCrop(32, 32),
        A.Sequential([A.RandomCrop(32, 32), A.HorizontalFlip()], p=1.0),
        A.Compose([A.RandomCrop(32, 32), A.OneOf([A.Transpose(p=1), A.D4(p=1)], p=0.7), A.Compose([A.D4()], p=0.5)]),
    ],
    ids=["one", "a sequence", "nested"],
)
def test_a_transform_is_applied_image_by_image_with_one_seed_per_batch(transform):
    images = pad(synthetic_cifar10(40, 10)[0].images, Config())
    batch = apply_transform(transform, images, 3)
    transform.set_random_state(np.random.default_rng(3), random.Random(3))
    assert all(np.array_equal(row, transform(image=image)["image"]) for row, image in zip(batch, images, strict=True))
    assert np.array_equal(batch, apply_transform(transform, images, 3))
    assert not np.array_equal(batch, apply_transform(transform, images, 4))


@pytest.mark.parametrize(
    "transform, returned",
    [
        (A.Compose([]), r"uint8 \(40, 40, 3\)"),
        (A.Compose([A.HorizontalFlip()]), r"uint8 \(40, 40, 3\)"),
        (A.Compose([A.RandomCrop(32, 32), A.Normalize()]), r"float32 \(32, 32, 3\)"),
    ],
)
def test_bad_input_transform_that_returns_something_else(transform, returned):
    with pytest.raises(ValueError, match=rf"the transform returned {returned} for uint8 \(40, 40, 3\); expected uint8"):
        augment(position_coded(1), 0, 3, transform)


# -- input of the network ---------------------------------------------------------------------------------------------


def test_normalisation_is_exact(synthetic, device):
    images = synthetic[0].images[:5]
    expected = ((images / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    result = normalize(torch.from_numpy(images), device)
    np.testing.assert_allclose(result.cpu().numpy(), expected, atol=2e-6)
    assert result.dtype == torch.float32 and result.device.type == device
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_images_are_scaled_down_with_antialiasing():
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(scale_down(images, 32), images)
    # A triangle of width 4 around each pixel's centre, as Pillow's: weights 1, 3, 3, 1 of 8 in each direction.
    weights = torch.tensor([1.0, 3, 3, 1]) / 8
    rows = images[:, :, 9:13, 9:13]  # around pixel 5 of the small image
    expected = torch.einsum("bcij,i,j->bc", rows, weights, weights)
    torch.testing.assert_close(scale_down(images, 16)[:, :, 5, 5], expected)
