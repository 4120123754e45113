"""Finding, reading, caching and checking the data; the download has a file of its own."""

import errno
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import class_folders, official_archive, official_batches
from PIL import Image

from session8 import data as cifar10
from session8.data import (
    CLASSES,
    MEAN,
    STD,
    DatasetUnavailable,
    Split,
    load_cifar10,
    synthetic_cifar10,
    validation_split,
)


def assert_same_images(loaded, expected):
    """The same images with the same labels, in whatever order."""

    def rows(split):
        return sorted((label, image.tobytes()) for label, image in zip(split.labels, split.images, strict=True))

    for one, other in zip(loaded, expected, strict=True):
        assert rows(one) == rows(other)


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "a folder with blanks and ü"
    return root, class_folders(root)


def test_class_folders(folders):
    root, expected = folders
    train, test = load_cifar10(root)
    assert_same_images((train, test), expected)
    assert train.images.dtype == np.uint8 and train.images.shape == (20, 32, 32, 3)
    assert train.labels.dtype == np.int64 and train.labels.tolist() == sorted(train.labels.tolist())
    assert train.source == "CIFAR-10, class folders, but 20 + 10 images" and not train.synthetic


def test_class_folders_of_jpeg_and_grey_images(tmp_path):
    class_folders(tmp_path, suffix=".JPG")
    grey = next((tmp_path / "train" / "cat").iterdir())
    Image.new("L", (32, 32), 77).save(grey)
    train, _ = load_cifar10(tmp_path)
    assert any((image == 77).all() for image in train.images[train.labels == CLASSES.index("cat")])


def test_class_folders_with_what_macos_leaves_beside_images(folders):
    root, expected = folders
    for image in list(root.rglob("*.png")):
        image.with_name(f"._{image.name}").write_bytes(b"AppleDouble")
    assert_same_images(load_cifar10(root), expected)


def test_official_batches(tmp_path, monkeypatch):
    expected = official_batches(tmp_path, monkeypatch)
    loaded = load_cifar10(tmp_path)
    for one, other in zip(loaded, expected, strict=True):
        assert np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)
        assert "official" in one.source


def test_official_archive_is_read_without_unpacking_beside_it(tmp_path, monkeypatch):
    archive, expected = official_archive(tmp_path, monkeypatch)
    assert_same_images(load_cifar10(archive.parent), expected)
    assert not (archive.parent / cifar10.BATCHES).exists()


def test_root_from_the_environment_and_before_the_data_folder(folders, monkeypatch, tmp_path):
    root, expected = folders
    class_folders(tmp_path / "data", seed=1)
    assert_same_images(load_cifar10(), synthetic_cifar10(20, 10, seed=1))
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    assert_same_images(load_cifar10(), expected)
    assert_same_images(load_cifar10(tmp_path / "data"), synthetic_cifar10(20, 10, seed=1))  # what is named goes first


# -- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The roots whose images were decoded, one entry a time."""
    roots, read = [], cifar10._read_class_folders
    monkeypatch.setattr(cifar10, "_read_class_folders", lambda root: (roots.append(root), read(root))[1])
    return roots


def test_cache_saves_decoding(folders, decoded):
    root, expected = folders
    first, second = load_cifar10(root), load_cifar10(root)
    assert len(decoded) == 1
    assert_same_images(first, expected)
    assert_same_images(second, expected)


@pytest.mark.parametrize("change", ["rewritten", "in another size", "added", "removed"])
def test_stale_cache_is_noticed(folders, decoded, change):
    root, _ = folders
    load_cifar10(root)
    image = next((root / "test" / "dog").iterdir())
    if change == "rewritten":  # as large as before: only the time tells
        os.utime(image, ns=(1, 1))
    elif change == "in another size":  # and at the same time
        times = image.stat().st_atime_ns, image.stat().st_mtime_ns
        Image.new("RGB", (32, 32), (1, 2, 3)).save(image)
        os.utime(image, ns=times)
    elif change == "added":
        shutil.copy(image, image.with_name("another.png"))
    else:
        shutil.copy(next((root / "test" / "cat").iterdir()), image.with_name("another.png"))
        image.unlink()
    _, test = load_cifar10(root)
    dogs = test.images[test.labels == CLASSES.index("dog")]
    assert len(decoded) == 2
    assert len(dogs) == (2 if change == "added" else 1)
    if change == "in another size":
        assert (dogs[0] == (1, 2, 3)).all()


@pytest.mark.parametrize("damage", ["cut", "bit", "directory", "emptied"])
def test_bad_input_corrupt_cache_is_named_and_made_again(folders, decoded, damage):
    root, expected = folders
    load_cifar10(root)
    cache = root / ".cifar10-cache.npz"
    content = bytearray(cache.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    if damage == "directory":  # the zip file's own: the compression of its first entry becomes an unknown one
        content[content.index(b"PK\x01\x02") + 10] ^= 64
    cache.write_bytes({"cut": content[: len(content) // 2], "emptied": b""}.get(damage, content))
    with pytest.warns(UserWarning, match=r"cifar10-cache.npz' is damaged .* made again"):
        loaded = load_cifar10(root)
    assert_same_images(loaded, expected)
    load_cifar10(root)  # no warning now: the cache is whole again
    assert len(decoded) == 2


def test_fault_read_only_data_folder_caches_in_the_temporary_one(folders, decoded, tmp_path):
    root, expected = folders
    # Permission bits do not stop root, so the cache's place is taken by a folder.
    (root / ".cifar10-cache.npz").mkdir()
    load_cifar10(root)
    assert_same_images(load_cifar10(root), expected)
    assert len(decoded) == 1
    assert len(list(tmp_path.glob("cifar10-cache-*.npz"))) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_fault_read_only_data_folder_and_temporary_folder(folders, monkeypatch):
    root, expected = folders

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cifar10.np, "savez", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # which such a file system refuses even for a file that is not there
    assert_same_images(load_cifar10(root), expected)
    assert_same_images(load_cifar10(root), expected)


def test_cache_is_made_again_when_the_classes_change(folders, decoded, monkeypatch):
    root, _ = folders
    load_cifar10(root)
    monkeypatch.setattr(cifar10, "CLASSES", CLASSES[::-1])
    train, _ = load_cifar10(root)
    assert len(decoded) == 2 and train.images[0].tobytes() == load_cifar10(root)[0].images[0].tobytes()


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allow_synthetic", [False, True])
def test_bad_input_root_that_does_not_exist(tmp_path, monkeypatch, allow_synthetic):
    with pytest.raises(DatasetUnavailable, match=r"root is '.*nowhere', which is no folder. Name a folder"):
        load_cifar10(tmp_path / "nowhere", allow_synthetic)
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetUnavailable, match=r"CIFAR10_ROOT is '.*nowhere'"):
        load_cifar10(allow_synthetic=allow_synthetic)


def test_bad_input_root_without_cifar10(tmp_path):
    with pytest.raises(DatasetUnavailable, match="holds no CIFAR-10"):
        load_cifar10(tmp_path, allow_synthetic=True)


def test_bad_input_class_folder_missing(folders):
    root, _ = folders
    shutil.rmtree(root / "test" / "horse")
    with pytest.raises(ValueError, match=r"class folder '.*horse' is missing: .*airplane, automobile"):
        load_cifar10(root)


def test_bad_input_class_folder_empty(folders):
    root, _ = folders
    for image in (root / "train" / "ship").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"class folder '.*ship' holds no .png"):
        load_cifar10(root)


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_bad_input_unreadable_image(folders, content):
    root, _ = folders
    image = next((root / "train" / "frog").iterdir())
    image.write_bytes(image.read_bytes()[:200] if content == "cut" else content)
    with pytest.raises(ValueError, match=rf"{image.name}' cannot be read as an image .*: replace or delete"):
        load_cifar10(root)


def test_bad_input_image_of_another_size(folders):
    root, _ = folders
    image = next((root / "train" / "deer").iterdir())
    Image.new("RGB", (64, 48)).save(image)
    with pytest.raises(ValueError, match=rf"{image.name}' is 64 by 48 pixels, expected 32 by 32: resize"):
        load_cifar10(root)


def test_bad_input_corrupt_archive(tmp_path, monkeypatch):
    archive, _ = official_archive(tmp_path, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz' has md5 \w{32}, expected \w{32}: delete it"):
        load_cifar10(archive.parent)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_bad_input_corrupt_batches(tmp_path, monkeypatch, damage):
    official_batches(tmp_path, monkeypatch)
    batch = tmp_path / cifar10.BATCHES / "data_batch_3"
    if damage == "missing":
        batch.unlink()
    else:
        batch.write_bytes(batch.read_bytes() + b"x")
    with pytest.raises(ValueError, match="cifar-10-batches-py' is incomplete or damaged"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("labels", [[-1, 3], [0, 10]])
def test_bad_input_labels_out_of_range(labels):
    with pytest.raises(ValueError, match=rf"labels run from {min(labels)} to {max(labels)}; expected 0 to 9"):
        Split(np.zeros((2, 32, 32, 3), np.uint8), np.array(labels), "test")


@pytest.mark.parametrize(
    "images, labels",
    [
        (np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, np.int64)),
        (np.zeros((2, 3, 32, 32), np.uint8), np.zeros(2, np.int64)),
        (np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, np.int64)),
        (np.zeros((2, 32, 32, 3), np.uint8), np.zeros(3, np.int64)),
        (np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int32)),
    ],
)
def test_bad_input_arrays_of_another_form(images, labels):
    with pytest.raises(ValueError, match=r"expected (uint8|int64)"):
        Split(images, labels, "test")


# -- the stand-in, the validation split, the constants -------------------------------------------------------------


def test_synthetic_says_so_and_is_reproducible():
    train, test = synthetic_cifar10(100, 50)
    assert train.synthetic and "synthetic" in test.source and "NOT CIFAR-10" in test.source
    assert np.bincount(train.labels).tolist() == [10] * 10 and len(test) == 50
    again, other = synthetic_cifar10(100, 50)[0], synthetic_cifar10(100, 50, seed=1)[0]
    assert np.array_equal(train.images, again.images) and not np.array_equal(train.images, other.images)


def test_synthetic_classes_differ():
    train, test = synthetic_cifar10(1000, 500)
    means = np.stack([train.images[train.labels == label].mean(0) for label in range(10)])
    nearest = ((test.images[:, None].astype(float) - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert 0.5 < (nearest == test.labels).mean() < 1  # to be learned, and not without mistakes


@pytest.mark.parametrize("n", [100, 133])
def test_validation_split_is_stratified_and_reproducible(n):
    train, _ = synthetic_cifar10(500, 10)
    rest, held_out = validation_split(train, n)
    assert len(held_out) == n and len(rest) == 500 - n
    counts = np.bincount(held_out.labels)
    assert counts.max() - counts.min() <= 1
    together = sorted(image.tobytes() for split in (rest, held_out) for image in split.images)
    assert together == sorted(image.tobytes() for image in train.images)
    assert np.array_equal(validation_split(train, n)[1].images, held_out.images)
    assert not np.array_equal(validation_split(train, n, seed=1)[1].images, held_out.images)
    assert "held out" in held_out.source and rest.synthetic


@pytest.mark.parametrize("n", [0, -1, 500])
def test_bad_input_validation_size(n):
    with pytest.raises(ValueError, match=f"n is {n}; expected"):
        validation_split(synthetic_cifar10(500, 10)[0], n)


def test_real_images_are_complete_and_give_mean_and_std(real_splits):
    train, test = real_splits
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    for channel in range(3):
        counts = np.bincount(train.images[..., channel].ravel(), minlength=256)
        values = np.arange(256) / 255
        mean = np.average(values, weights=counts)
        std = np.sqrt(np.average((values - mean) ** 2, weights=counts))
        assert (round(mean, 4), round(std, 4)) == (MEAN[channel], STD[channel])


def test_real_images_load_in_time(real_splits, real_root, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_cache_files", lambda root: [tmp_path / "cache.npz"])
    for limit in (20, 2):  # without a cache and with it
        started = time.monotonic()
        load_cifar10(real_root)
        assert time.monotonic() - started < limit
