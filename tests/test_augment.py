"""The loader's batches and the statistics of its augmentation."""

import gc
import pickle
import random

import albumentations as A
import numpy as np
import pytest
import torch
from fakes import position_coded
from scipy.stats import chi2_contingency, chisquare

from model_AC import AdvancedCNN
from session8 import training as utils
from session8.data import MEAN, Split, synthetic_cifar10
from session8.training import augment, make_loader


def read_positions(images):
    """Offsets (row, column) in 0..8 of the crop of position-coded images, and whether they were flipped."""
    images = np.asarray(images).astype(int)
    flipped = images[:, 16, 17, 1] < images[:, 16, 16, 1]
    column = np.where(flipped, images[:, 16, 15, 1], images[:, 16, 16, 1])  # the crop's column 16 before the flip
    return images[:, 16, 16, 0] - 1 - 16 + 4, column - 1 - 16 + 4, flipped


def batches(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(some, others, strict=True)
    )


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


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_augmented_batches_are_the_same_for_any_number_of_workers(workers):
    split = synthetic_cifar10(200, 10)[0]
    alone, helped = (make_loader(split, 32, seed=5, num_workers=n) for n in (0, workers))
    for epoch in (0, 1):  # in the second, the workers of the first go on
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        assert same(batches(alone), batches(helped))


def test_an_empty_pipeline_is_taken_as_it_is():
    with pytest.raises(ValueError, match=r"the transform returned uint8 \(40, 40, 3\)"):
        augment(position_coded(1), 0, 3, utils.test_transforms())


def test_augmented_batches_differ_by_epoch_and_seed_and_come_back():
    split = synthetic_cifar10(100, 10)[0]
    loader = make_loader(split, 32, seed=5)
    first = batches(loader)
    loader.set_epoch(1)
    second = batches(loader)
    loader.set_epoch(0)
    assert same(first, batches(loader))
    assert not same(first, second)
    assert not same(first, batches(make_loader(split, 32, seed=6)))


def test_no_two_workers_augment_alike():
    # Equal images: two batches with equal augmentation would be equal.
    loader = make_loader(position_coded(320), 32, num_workers=4)
    drawn = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        drawn += [images.numpy().tobytes() for images, _ in loader]
    assert len(set(drawn)) == len(drawn) == 30


@pytest.mark.parametrize(
    "transform",
    [
        utils.train_transforms(cutout=8),
        A.RandomCrop(32, 32),
        A.Sequential([A.RandomCrop(32, 32), A.HorizontalFlip()], p=1.0),
        A.Compose([A.RandomCrop(32, 32), A.OneOf([A.Transpose(p=1), A.D4(p=1)], p=0.7), A.Compose([A.D4()], p=0.5)]),
        A.Compose([A.CenterCrop(32, 32), A.HorizontalFlip()], p=0.5),
    ],
    ids=["training's", "one transform", "a sequence", "nested", "at times nothing"],
)  # fmt: skip
def test_a_batch_is_what_the_pipeline_itself_returns_for_each_image(transform):
    split = synthetic_cifar10(40, 10)[0]
    at_times_nothing = isinstance(transform, A.Compose) and transform.p < 1
    loader = make_loader(split, 40, train=not at_times_nothing, seed=3, transform=transform)
    ((images, _),) = loader
    order, seed = next(iter(loader.sampler))
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    for image, index in zip(images.numpy(), order, strict=True):
        original = split.images[index] if at_times_nothing else np.pad(split.images[index], ((4, 4), (4, 4), (0, 0)))
        assert np.array_equal(image, transform(image=original)["image"])


def test_nested_transforms_are_augmented_alike_for_any_number_of_workers():
    transform = A.Compose(
        [A.RandomCrop(32, 32), A.OneOf([A.HorizontalFlip(p=1), A.Sequential([A.VerticalFlip(p=0.5)])], p=0.7)]
    )
    split = synthetic_cifar10(100, 10)[0]
    results = [batches(make_loader(split, 16, num_workers=n, transform=transform)) for n in (0, 2, 0)]
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_training_order_is_a_permutation_and_the_last_batch_partial():
    split = synthetic_cifar10(70, 10)[0]
    loader = make_loader(split, 32, transform=A.CenterCrop(32, 32))
    result = batches(loader)
    assert [len(labels) for _, labels in result] == [32, 32, 6] and len(loader) == 3
    images = torch.cat([images for images, _ in result]).numpy()
    assert not np.array_equal(images, split.images)
    key = {image.tobytes(): label for image, label in zip(split.images, split.labels, strict=True)}
    assert sorted(image.tobytes() for image in images) == sorted(key)
    labels = torch.cat([labels for _, labels in result]).tolist()
    assert [key[image.tobytes()] for image in images] == labels


def test_testing_keeps_order_and_images():
    split = synthetic_cifar10(10, 70)[1]
    result = batches(make_loader(split, 32, train=False))
    images, labels = (torch.cat(part) for part in zip(*result, strict=True))
    assert np.array_equal(images, split.images) and np.array_equal(labels, split.labels)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.shape == (70, 32, 32, 3)


def test_a_spawned_worker_can_be_given_the_augmented_batches():
    # Windows and macOS spawn their workers: what they need must survive pickling.
    dataset = make_loader(synthetic_cifar10(20, 10)[0], 10).dataset
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[np.arange(10), 7][0], dataset[np.arange(10), 7][0])


@pytest.mark.parametrize(
    "device, gpu, workers", [(None, True, 4), (None, False, 0), ("cpu", True, 0), ("cuda", True, 4)]
)
def test_workers_and_pinned_memory_are_for_cuda(monkeypatch, device, gpu, workers):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    loader = make_loader(synthetic_cifar10(20, 10)[0], 10, device=device and torch.device(device))
    assert (loader.num_workers, loader.pin_memory) == (workers, workers > 0)


def test_the_loader_leaves_the_global_random_state_alone():
    # Dropout draws from it: it must not depend on how batches are loaded.
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for workers in (0, 2):
        batches(make_loader(synthetic_cifar10(50, 10)[0], 16, num_workers=workers))
        assert torch.equal(torch.get_rng_state(), state)


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


def test_bad_input_transform_is_told_from_a_worker_too():
    loader = make_loader(synthetic_cifar10(20, 10)[0], 10, transform=A.Compose([A.HorizontalFlip()]), num_workers=1)
    with pytest.raises(ValueError, match="the transform returned uint8"):
        next(iter(loader))
    gc.collect()  # ends the worker, which the next test's workers would else inherit


def test_bad_input_transform_of_another_library():
    with pytest.raises(TypeError, match="expected albumentations"):
        make_loader(synthetic_cifar10(20, 10)[0], 10, transform=lambda image: image)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -8}, {"num_workers": -1}])
def test_bad_input_loader_sizes(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        make_loader(synthetic_cifar10(20, 10)[0], **{"batch_size": 4, **wrong})


def test_wrong_arguments_of_albumentations_are_errors_here():
    with pytest.raises(UserWarning, match="not valid"):
        A.HorizontalFlip(probability=0.5)


def test_default_transforms_turn_40_into_32_pixels_and_leave_32_alone():
    assert utils.train_transforms()(image=np.zeros((40, 40, 3), np.uint8))["image"].shape == (32, 32, 3)
    image = synthetic_cifar10(10, 10)[0].images[0]
    assert np.array_equal(utils.test_transforms()(image=image)["image"], image)


# -- cutout --------------------------------------------------------------------------------------------------------


def test_cutout_paints_one_square_in_the_mean_colour_at_any_place():
    split = Split(np.full((1, 32, 32, 3), 255, np.uint8), np.zeros(1, int), "white")
    draws = augment(split, 0, 3000, utils.train_transforms(cutout=10))
    colour = np.round(255 * np.array(MEAN)).astype(int)
    painted = (draws == colour).all(axis=3)
    assert (painted.sum((1, 2)) == 100).all()
    tops, lefts = painted.any(2).argmax(1), painted.any(1).argmax(1)
    assert (painted.any(2).sum(1) == 10).all() and (painted.any(1).sum(1) == 10).all()  # a square, whole
    for places in (tops, lefts):
        counts = np.bincount(places, minlength=23)
        assert len(counts) == 23 and ((counts - 3000 / 23) ** 2 / (3000 / 23)).sum() < 55  # chi-squared, 22 degrees
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.1


def test_recipe_with_cutout_trains_on_it(synthetic, monkeypatch):
    seen = []
    step = utils.train_step
    monkeypatch.setattr(
        utils, "train_step", lambda model, images, *rest: seen.append(images) or step(model, images, *rest)
    )
    for cutout in (0, 12):
        seen.clear()
        utils.fit(AdvancedCNN(width=0.5), *synthetic, utils.Config(epochs=1, batch_size=50, cutout=cutout), "cpu")
        painted = (torch.cat(seen) == torch.tensor([125, 123, 114])).all(3).sum((1, 2))
        assert len(painted) == 300 and (painted >= cutout**2).all() and (painted < cutout**2 + 20).float().mean() > 0.9


def test_bad_input_cutout():
    for side in (-1, 33):
        with pytest.raises(ValueError, match=f"cutout is {side}; expected a side from 0"):
            utils.train_transforms(cutout=side)
