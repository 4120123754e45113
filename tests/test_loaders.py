"""The loaders: the same batches for any number of workers and ranks, in an order that seed and epoch determine."""

import gc
import itertools
import multiprocessing
from functools import partial

import albumentations as A
import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda
from fakes import class_folders, position_coded
from networks import TinyNetwork

from session8 import loaders
from session8.config import Config
from session8.data import Split, load_cifar10, synthetic_cifar10
from session8.loaders import DeviceLoader, ImageLoader, make_loader
from session8.training import fit

SPLIT = synthetic_cifar10(70, 10)[0]  # three batches of 32, 32 and 6
ONE_CYCLE = Config.named("one_cycle")
CENTRE = A.CenterCrop(32, 32)
NESTED = A.Compose(
    [A.RandomCrop(32, 32), A.OneOf([A.HorizontalFlip(p=1), A.Sequential([A.VerticalFlip(p=0.5)])], p=0.7)]
)


def batches(loader, epoch=0, start=0):
    loader.set_epoch(epoch, start)
    return [(images.cpu().clone(), labels.cpu().clone()) for images, labels in loader]


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(some, others, strict=True)
    )


# -- order, seeds, epochs ----------------------------------------------------------------------------------------------


def test_training_batches_are_a_permutation_of_the_images_with_their_labels(device):
    values = np.arange(70, dtype=np.uint8)  # image k has the value k and the label k // 7
    split = Split(np.broadcast_to(values[:, None, None, None], (70, 32, 32, 3)).copy(), np.arange(70) // 7, "values")
    loader = make_loader(split, 32, seed=5, device=device)
    orders = []
    for epoch in (0, 3):
        result = batches(loader, epoch)
        assert [len(labels) for _, labels in result] == [32, 32, 6] and len(loader) == 3
        images, labels = (torch.cat(part) for part in zip(*result, strict=True))
        assert images.dtype == torch.uint8 and images.shape == (70, 32, 32, 3) and labels.dtype == torch.int64
        orders.append(images[:, 16, 16, 0].tolist())  # the middle is never padding
        assert sorted(orders[-1]) == list(range(70)) and labels.tolist() == [value // 7 for value in orders[-1]]
        on_cpu = batches(make_loader(split, 32, seed=5, device="cpu"), epoch)
        assert torch.equal(labels, torch.cat([labels for _, labels in on_cpu]))
    assert len({tuple(order) for order in (*orders, range(70))}) == 3


def test_batches_depend_on_epoch_and_seed_only(device):
    loader = make_loader(SPLIT, 32, seed=5, device=device, config=ONE_CYCLE)
    first, second = batches(loader, 0), batches(loader, 1)
    assert same(first, batches(loader, 0)) and not same(first, second)
    assert same(second[2:], batches(loader, 1, start=2))  # from the middle of an epoch
    assert not same(first, batches(make_loader(SPLIT, 32, seed=6, device=device, config=ONE_CYCLE)))


def test_testing_keeps_order_and_images(device):
    images, labels = (torch.cat(p) for p in zip(*batches(make_loader(SPLIT, 32, False, device=device)), strict=True))
    assert np.array_equal(images, SPLIT.images) and np.array_equal(labels, SPLIT.labels)


def test_loading_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    for workers in (0, 1):
        batches(make_loader(SPLIT, 32, num_workers=workers))
        assert torch.equal(torch.get_rng_state(), state)


# -- transforms of the user's own --------------------------------------------------------------------------------------


def test_a_transform_of_the_users_own_runs_with_albumentations_on_every_device(device, monkeypatch):
    make = partial(make_loader, SPLIT, 32, config=ONE_CYCLE, num_workers=0)
    assert isinstance(make(device=device), ImageLoader if device == "cpu" else DeviceLoader)
    loader = make(transform=NESTED, device=device)
    assert isinstance(loader, ImageLoader) and loader.augmentation == "albumentations"
    assert same(batches(loader), batches(make(transform=NESTED, device="cpu")))
    mirrored = batches(make(train=False, transform=A.HorizontalFlip(p=1), device=device))
    assert np.array_equal(torch.cat([images for images, _ in mirrored]), SPLIT.images[:, :, ::-1])
    # It replaces crop, flip and cutout of the recipe.
    plain = torch.cat([images for images, _ in batches(make(transform=CENTRE, device=device))]).numpy()
    assert sorted(image.tobytes() for image in plain) == sorted(image.tobytes() for image in SPLIT.images)
    for cores in (2, 16):
        monkeypatch.setattr(loaders, "available_cores", lambda cores=cores: cores)
        workers = make(transform=NESTED, device=device, num_workers=None).num_workers
        assert workers == (0 if device == "cpu" else min(4, cores))


def test_without_enough_memory_on_the_gpu_the_images_stay_on_the_cpu(monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("tried to allocate 229.00 MiB")

    monkeypatch.setattr(loaders, "DeviceLoader", full)
    with fake_cuda():
        result = batches(make_loader(SPLIT, 32, device="cuda", num_workers=0))
    assert same(result, batches(make_loader(SPLIT, 32, device="cpu")))
    assert "do not fit in the memory of cuda (tried to allocate 229.00 MiB)" in capsys.readouterr().out


# -- workers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, transform", [(1, None), (3, None), (2, NESTED)])
def test_batches_are_the_same_for_any_number_of_workers(workers, transform):
    make = partial(make_loader, SPLIT, 16, seed=5, transform=transform, config=ONE_CYCLE)
    alone, helped = make(num_workers=0), make(num_workers=workers)
    for epoch, start in ((0, 0), (1, 0), (1, 3)):  # in the second epoch the workers of the first go on
        assert same(batches(alone, epoch, start), batches(helped, epoch, start))


def test_no_two_workers_augment_alike():
    # Equal images: two batches with equal augmentation would be equal.
    loader = make_loader(position_coded(320), 32, num_workers=4)
    drawn = [images.numpy().tobytes() for epoch in range(3) for images, _ in batches(loader, epoch)]
    assert len(set(drawn)) == len(drawn) == 30


def test_fault_wrong_transform_is_reported_by_a_worker():
    loader = make_loader(SPLIT, 32, transform=A.HorizontalFlip(), num_workers=1)
    with pytest.raises(ValueError, match="the transform returned uint8"):
        next(iter(loader))
    gc.collect()  # ends the worker, which the next test's workers would else inherit


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), EOFError()])
def test_fault_broken_connection_is_the_end_of_a_worker(monkeypatch, error):
    def breaks(loader):
        yield from itertools.islice(all_batches(loader), 2)
        raise error

    all_batches = loaders.DataLoader.__iter__
    monkeypatch.setattr(loaders.DataLoader, "__iter__", breaks)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(RuntimeError, match="DataLoader worker exited unexpectedly") as raised:
        batches(make_loader(SPLIT, 10, num_workers=1))
    assert raised.value.__cause__ is error
    with pytest.raises(type(error)):  # without workers, a transform's own error
        batches(make_loader(SPLIT, 10, num_workers=0))
    gc.collect()


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where, workers", [("cpu", 0), ("cpu", 2), ("cuda", 0)])
@pytest.mark.parametrize("world_size, start", [(2, 0), (3, 2)])
def test_the_shares_of_all_ranks_are_the_batches_of_one_process(where, workers, world_size, start):
    def load(rank, world_size):
        share = {"rank": rank, "world_size": world_size}
        with fake_cuda():
            loader = make_loader(SPLIT, 32, True, 5, workers, device=where, config=ONE_CYCLE, **share)
            assert loader.world_size == world_size and [loader.batch_size_at(batch) for batch in range(3)] == [
                32,
                32,
                6,
            ]
            assert [loader.images_until(batch) for batch in range(4)] == [0, 32, 64, 70]
            return batches(loader, 3, start)

    union = []
    for parts in zip(*(load(rank, world_size) for rank in range(world_size)), strict=True):
        sizes = [len(labels) for _, labels in parts]
        assert max(sizes) - min(sizes) <= 1
        union.append([torch.cat(part) for part in zip(*parts, strict=True)])
    assert same(union, load(0, 1))


@pytest.mark.parametrize("n", [70, 2])
def test_each_test_image_is_of_one_rank(n, device):
    split = Split(SPLIT.images[:n], SPLIT.labels[:n], "few")
    for rank in range(3):
        loaded = batches(make_loader(split, 8, train=False, device=device, rank=rank, world_size=3))
        assert [image.tobytes() for images, _ in loaded for image in images.numpy()] == [
            image.tobytes() for image in split.images[rank::3]
        ]


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = [
    ({"batch_size": 0}, ValueError, "batch_size is 0; expected at least 1, for instance 128"),
    ({"batch_size": -8}, ValueError, "batch_size is -8; expected at least 1"),
    ({"num_workers": -1}, ValueError, r"num_workers is -1; expected 0 \(load in the main process\) or more"),
    ({"transform": abs}, TypeError, "transform is <built-in function abs>; expected an albumentations transform"),
    ({"device": "cuda"}, ValueError, "device is 'cuda', which is not available; available: cpu"),
    (
        {"world_size": 7},
        ValueError,
        "7 processes share the last batch of 6 images: use at most 6 processes, or",
    ),
    (
        {"batch_size": 69, "world_size": 2},
        ValueError,
        "last batch of 1 image: use at most 1 process, or another",
    ),
    ({"batch_size": 99, "world_size": 71}, ValueError, "71 processes share the last batch of 70 images: .* than 99"),
]


@pytest.mark.parametrize("wrong, error, words", BAD)
def test_bad_input_loader(wrong, error, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(error, match=words):
        make_loader(SPLIT, **{"batch_size": 32, **wrong})


# -- Windows and macOS, as far as Linux can show: spawned workers, and paths with blanks and umlauts -------------------


def test_a_spawned_worker_gives_the_same_result_in_folders_with_blanks_and_umlauts(tmp_path):
    class_folders(tmp_path / "Bilder für später", per_train=4, per_test=2)
    splits = load_cifar10(tmp_path / "Bilder für später")
    config, histories, method = Config(epochs=2, batch_size=20), [], multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        for workers in (0, 1):
            folder = tmp_path / f"Läufe mit {workers}"
            histories.append(fit(TinyNetwork(), *splits, config, "cpu", folder, num_workers=workers))
            assert (folder / "last.pt").is_file()
    finally:
        multiprocessing.set_start_method(method, force=True)
    here, spawned = ([*history["train_loss"], *history["test_loss"]] for history in histories)
    assert here == spawned and len(here) == 4
