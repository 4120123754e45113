"""The loader: the same batches for any number of workers, in an order that the seed and the epoch determine."""

import gc
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda
from fakes import class_folders, position_coded, read_positions
from networks import CPU, same_weights, small_network

from session8 import loaders, trainer, training
from session8.augment import as_batch_augmentation, train_transforms
from session8.config import Config
from session8.console import plural
from session8.data import Split, synthetic_cifar10
from session8.loaders import DeviceLoader, make_loader


def batches(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_augmented_batches_are_the_same_for_any_number_of_workers(workers):
    split = synthetic_cifar10(200, 10)[0]
    alone, helped = (make_loader(split, 32, seed=5, num_workers=n) for n in (0, workers))
    for epoch in (0, 1):  # in the second, the workers of the first go on
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        assert same(batches(alone), batches(helped))


def test_augmented_batches_depend_on_epoch_and_seed_only():
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
    assert torch.equal(copy[np.arange(10), 7, None][0], dataset[np.arange(10), 7, None][0])


@pytest.mark.parametrize("device, workers", [(None, 4), ("cpu", 0), ("cuda", 4), (torch.device("cuda"), 4)])
def test_workers_and_pinned_memory_are_for_cuda(monkeypatch, device, workers):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(loaders, "available_cores", lambda: 16)
    split, edited = synthetic_cifar10(20, 10)[0], A.Compose([A.RandomCrop(32, 32), A.VerticalFlip()])
    loader = make_loader(split, 10, device=device, transform=edited)
    assert (loader.num_workers, loader.pin_memory) == (workers, workers > 0)
    assert make_loader(split, 10, train=False, device=device, transform=edited).num_workers == 0
    monkeypatch.setattr(loaders, "available_cores", lambda: 2)
    assert make_loader(split, 10, device=device, transform=edited).num_workers == min(workers, 2)


def test_bad_input_device_that_is_not_available(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', which is not available"):
        make_loader(synthetic_cifar10(20, 10)[0], 10, device="cuda")


def test_the_loader_leaves_the_global_random_state_alone():
    # Dropout draws from it: it must not depend on how batches are loaded.
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for workers in (0, 2):
        batches(make_loader(synthetic_cifar10(50, 10)[0], 16, num_workers=workers))
        assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_transform_is_reported_from_a_worker_too():
    loader = make_loader(synthetic_cifar10(20, 10)[0], 10, transform=A.Compose([A.HorizontalFlip()]), num_workers=1)
    with pytest.raises(ValueError, match="the transform returned uint8"):
        next(iter(loader))
    gc.collect()  # ends the worker, which the next test's workers would else inherit


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), EOFError()])
def test_fault_broken_connection_to_a_worker_is_the_end_of_the_worker(monkeypatch, error):
    def breaks(loader):
        yield from itertools.islice(all_batches(loader), 2)
        raise error

    all_batches = loaders.DataLoader.__iter__
    monkeypatch.setattr(loaders.DataLoader, "__iter__", breaks)
    with pytest.raises(RuntimeError, match="DataLoader worker exited unexpectedly") as raised:
        batches(make_loader(synthetic_cifar10(50, 10)[0], 10, num_workers=1))
    assert raised.value.__cause__ is error
    with pytest.raises(type(error)):  # without workers, a transform's own error
        batches(make_loader(synthetic_cifar10(50, 10)[0], 10, num_workers=0))
    gc.collect()


def test_bad_input_transform_of_another_library():
    with pytest.raises(TypeError, match="expected an albumentations transform"):
        make_loader(synthetic_cifar10(20, 10)[0], 10, transform=lambda image: image)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -8}, {"num_workers": -1}])
def test_bad_input_loader_sizes(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        make_loader(synthetic_cifar10(20, 10)[0], **{"batch_size": 4, **wrong})


@pytest.mark.parametrize("keyword, value", [("padding", "mirror"), ("flip", "never")])
def test_bad_input_padding_and_flip(keyword, value):
    with pytest.raises(ValueError, match=f"{keyword} is '{value}'; expected one of "):
        make_loader(synthetic_cifar10(20, 10)[0], 4, **{keyword: value})


# -- on the device -------------------------------------------------------------------------------------------------


def device_loader(split, batch_size, seed=0, transform=None, device="cpu"):
    augmentation = as_batch_augmentation(transform or train_transforms(cutout=8))
    return DeviceLoader(split, batch_size, augmentation, seed, torch.device(device))


def test_device_batches_have_the_order_labels_and_sizes_of_the_albumentations_loader(device):
    values = np.arange(70, dtype=np.uint8)  # image k has the value k, and the label k // 7
    split = Split(np.broadcast_to(values[:, None, None, None], (70, 32, 32, 3)).copy(), np.arange(70) // 7, "values")
    ours = device_loader(split, 32, seed=5, transform=train_transforms(), device=device)
    other = make_loader(split, 32, seed=5, device="cpu")
    for epoch in (0, 3):
        ours.set_epoch(epoch)
        other.set_epoch(epoch)
        on_host = [(images.cpu(), labels.cpu()) for images, labels in ours]
        pairs = list(zip(on_host, other, strict=True))
        assert [len(labels) for (_, labels), _ in pairs] == [32, 32, 6] and len(ours) == 3 and len(ours.dataset) == 70
        assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs)
        assert all(images.shape[1:] == (32, 32, 3) and images.dtype == torch.uint8 for (images, _), _ in pairs)
        assert all(torch.equal(images[:, 16, 16, 0] // 7, labels) for (images, labels), _ in pairs)  # never padding


def test_device_batches_are_the_draws_of_their_images(device):
    split = position_coded(50)
    loader = device_loader(split, 16, seed=5, transform=train_transforms(), device=device)
    loader.set_epoch(2)
    images = torch.cat([images.cpu() for images, _ in loader])
    draws = as_batch_augmentation(train_transforms()).draw(50, seed=5, epoch=2)
    order = np.concatenate([indices for indices, *_ in loader.sampler])
    rows, columns, flips = read_positions(images)
    assert np.array_equal(np.column_stack([rows, columns, flips]), draws[order, :3])


@pytest.mark.parametrize("start", [1, 2])
def test_device_batches_from_the_middle_of_an_epoch_are_equal(start):
    split = synthetic_cifar10(70, 10)[0]
    whole, rest = device_loader(split, 32), device_loader(split, 32)
    whole.set_epoch(4)
    rest.set_epoch(4, start)
    assert same(batches(whole)[start:], batches(rest))


def test_device_batches_differ_by_epoch_and_seed():
    split = synthetic_cifar10(70, 10)[0]
    loader = device_loader(split, 32)
    first = batches(loader)
    assert same(first, batches(loader)) and not same(first, batches(device_loader(split, 32, seed=1)))
    loader.set_epoch(1)
    assert not same(first, batches(loader))


def test_device_batches_for_testing_keep_order_and_images():
    split = synthetic_cifar10(10, 70)[1]
    result = batches(DeviceLoader(split, 32, None, 0, CPU))
    images, labels = (torch.cat(part) for part in zip(*result, strict=True))
    assert np.array_equal(images, split.images) and np.array_equal(labels, split.labels) and len(result) == 3


def test_a_run_with_device_batches_learns_and_resumes_bitwise(monkeypatch, tmp_path):
    splits = synthetic_cifar10(300, 100)

    def on_device(split, batch_size, train=True, seed=0, num_workers=None, transform=None, device=None, **_):
        augmentation = as_batch_augmentation(transform) if train else None
        return DeviceLoader(split, batch_size, augmentation, seed, device)

    monkeypatch.setattr(trainer, "make_loader", on_device)
    monkeypatch.setattr(training, "REFRESH_SECONDS", 0)
    config, results = Config(epochs=5, batch_size=20, cutout=8), []
    step, steps = training.train_step, []

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == 22:  # in the middle of the second of five epochs of 15 steps
            raise KeyboardInterrupt
        return step(*arguments)

    for folder, calls in (("unbroken", [step]), ("broken", [interrupted, step])):
        for call in calls:
            monkeypatch.setattr(training, "train_step", call)
            model = small_network()
            history = trainer.fit(model, *splits, config, "cpu", tmp_path / folder, checkpoint_seconds=0)
        results.append((model, [history[name] for name in ("train_loss", "test_loss", "test_accuracy")]))
    (unbroken, expected), (resumed, history) = results
    assert same_weights(unbroken, resumed) and history == expected and len(steps) == 22
    assert expected[2][-1] > 40


# -- alternating flip and padding ------------------------------------------------------------------------------------


def make_both_ways(split, flip, padding="zeros", pixels=4, transform=None):
    """Return the loader with albumentations, and the one whose batches are made on the device."""
    transform = transform or train_transforms(flip=flip)
    augmentation = as_batch_augmentation(transform, pixels, flip == "alternate")
    return (
        make_loader(split, 16, seed=5, transform=transform, flip=flip, padding=padding, crop_padding=pixels),
        DeviceLoader(split, 16, augmentation, 5, CPU, padding),
    )


def test_alternating_flips_mirror_each_image_in_every_second_epoch_both_ways():
    split = position_coded(2000)
    seen = []
    for loader in make_both_ways(split, "alternate"):
        for epoch in range(3):
            loader.set_epoch(epoch)
            flips = read_positions(torch.cat([images for images, _ in loader]))[2]
            order = np.concatenate([indices for indices, *_ in loader.sampler])
            seen.append(flips[np.argsort(order)])  # by image
    for first, second, third in (seen[:3], seen[3:]):
        assert np.array_equal(first, ~second) and np.array_equal(first, third)
        assert 900 < first.sum() < 1100  # of 2000; the standard deviation is 22
    assert np.array_equal(seen[0], seen[3])  # the same draw both ways


def test_crops_of_reflected_padding_both_ways():
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 10, "noise")
    padded = np.empty((40, 36, 36, 3), np.uint8)  # by hand: row -1 is row 1, row 32 is row 30
    mirrored = [abs(i) if i < 32 else 62 - i for i in range(-2, 34)]
    padded[:] = split.images[:, mirrored][:, :, mirrored]
    for loader in make_both_ways(split, "random", "reflect", 2):
        offsets = set()
        for epoch in range(4):
            loader.set_epoch(epoch)
            for image, index in zip(
                torch.cat([images for images, _ in loader]).numpy(),
                np.concatenate([indices for indices, *_ in loader.sampler]),
                strict=True,
            ):
                crops = {
                    (top, left, flipped): padded[index, top : top + 32, left : left + 32][:, :: -1 if flipped else 1]
                    for top in range(5)
                    for left in range(5)
                    for flipped in (False, True)
                }
                (found,) = [place for place, crop in crops.items() if np.array_equal(crop, image)]
                offsets.add(found[:2])
        assert len(offsets) > 20 and {0, 4} <= {top for top, _ in offsets}  # of 25


def test_a_list_that_flips_by_itself_is_not_combined_with_alternating_flips_on_the_device():
    assert as_batch_augmentation(train_transforms(), alternate=True) is None
    assert as_batch_augmentation(train_transforms(flip="alternate"), alternate=True).alternate


# -- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["albumentations", "two workers", "device"])
@pytest.mark.parametrize("world_size, start, flip", [(2, 0, "random"), (3, 0, "alternate"), (3, 2, "alternate")])
def test_the_shares_of_all_ranks_are_the_batches_of_one_process(where, world_size, start, flip):
    split = synthetic_cifar10(70, 10)[0]  # batches of 32, 32 and 6

    def load(rank, world_size):
        if where == "device":
            augmentation = as_batch_augmentation(train_transforms(8, flip), alternate=flip == "alternate")
            loader = DeviceLoader(split, 32, augmentation, 5, CPU, rank=rank, world_size=world_size)
        else:
            workers = 2 if where == "two workers" else 0
            share = {"rank": rank, "world_size": world_size}
            loader = make_loader(split, 32, seed=5, num_workers=workers, flip=flip, **share)
        loader.set_epoch(3, start)
        assert loader.world_size == world_size and [loader.global_size(batch) for batch in range(3)] == [32, 32, 6]
        return batches(loader)

    shares = [load(rank, world_size) for rank in range(world_size)]
    for parts in zip(*shares, strict=True):
        sizes = [len(labels) for _, labels in parts]
        assert max(sizes) - min(sizes) <= 1
    union = [tuple(torch.cat(part) for part in zip(*parts, strict=True)) for parts in zip(*shares, strict=True)]
    assert same(union, load(0, 1))


@pytest.mark.parametrize("n, world_size", [(70, 3), (2, 3)])
def test_each_test_image_is_of_one_rank(n, world_size):
    split = synthetic_cifar10(10, n)[1]
    for make in (
        lambda rank: make_loader(split, 8, train=False, rank=rank, world_size=world_size),
        lambda rank: DeviceLoader(split, 8, None, 0, CPU, rank=rank, world_size=world_size),
    ):
        for rank in range(world_size):
            loader = make(rank)
            images = [image for images, _ in loader for image in images.numpy()]
            assert np.array_equal(images, split.images[rank::world_size]) or rank >= n
            assert len(images) == len(range(rank, n, world_size)) and len(loader.dataset) == n


@pytest.mark.parametrize("n, batch_size, world_size", [(65, 32, 2), (64, 4, 5), (3, 32, 4)])
def test_bad_input_more_processes_than_images_in_the_last_batch(n, batch_size, world_size):
    split = synthetic_cifar10(n, 10)[0]
    last = n % batch_size or min(n, batch_size)
    message = (
        f"{world_size} processes share the last batch of {plural(last, 'image')}: use at most {plural(last, 'process')}"
    )
    with pytest.raises(ValueError, match=message):
        make_loader(split, batch_size, rank=0, world_size=world_size)
    make_loader(split, batch_size, rank=0, world_size=last)


def test_the_list_decides_where_a_gpus_batches_are_augmented():
    split = synthetic_cifar10(20, 10)[0]
    edited = A.Compose([A.RandomCrop(32, 32), A.VerticalFlip()])
    with fake_cuda():
        for train, expected in ((True, as_batch_augmentation(train_transforms())), (False, None)):
            loader = make_loader(split, 10, device="cuda", train=train)
            assert type(loader) is DeviceLoader and loader.transform == expected and loader.images.is_cuda
            loader = make_loader(split, 10, device="cuda", train=train, num_workers=0, transform=edited)
            assert loader.augmentation == "albumentations"
        assert make_loader(split, 10, device="cpu").augmentation == "albumentations"


def test_too_little_gpu_memory_falls_back_and_says_so(monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("tried to allocate 229.00 MiB")

    monkeypatch.setattr(loaders, "DeviceLoader", full)
    with fake_cuda():
        loader = make_loader(synthetic_cifar10(20, 10)[0], 10, device="cuda", num_workers=0)
    assert loader.augmentation == "albumentations"
    assert "do not fit in the memory of cuda (tried to allocate 229.00 MiB)" in capsys.readouterr().out


# -- Windows and macOS, as far as Linux can show: spawned workers, and paths with blanks and umlauts -----------------

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import json
import multiprocessing
import sys

import torch

import utils
from model_AC import AdvancedCNN

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    torch.set_num_threads(1)
    splits = utils.load_cifar10("Bilder für später")
    config = utils.Config(epochs=2, batch_size=20, precision="float32")
    histories = []
    for workers in (0, 2):
        torch.manual_seed(0)
        folder = f"Läufe mit {workers}"
        history = utils.fit(AdvancedCNN(width=0.5), *splits, config, "cpu", folder, num_workers=workers)
        histories.append({name: values for name, values in history.items() if name not in ("seconds", "parts")})
    with open("Ergebnis ü.json", "w") as file:
        json.dump(histories, file)
"""


def test_spawned_workers_give_the_same_result_in_a_folder_with_blanks_and_umlauts(tmp_path):
    project = tmp_path / "Mein Projekt (schön)"
    project.mkdir()
    for path in ("model_AC.py", "utils.py"):
        shutil.copy(ROOT / path, project)
    shutil.copytree(ROOT / "session8", project / "session8")
    class_folders(project / "Bilder für später", per_train=6, per_test=2)
    (project / "run it.py").write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "run it.py"], cwd=project, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    here, spawned = json.loads((project / "Ergebnis ü.json").read_text())
    assert here == spawned and len(here["test_accuracy"]) == 2
    assert (project / "Läufe mit 2" / "last.pt").is_file()
    assert not [path for path in project.rglob("*") if path.is_symlink()]
