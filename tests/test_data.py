"""CIFAR-10: finding, reading, caching, checking and downloading it, and the stand-in."""

import errno
import io
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import filelock
import numpy as np
import processes
import pytest
from fakes import class_folders, encoded, official_archive, official_batches
from PIL import Image
from torchvision.datasets import CIFAR10

from session8 import data
from session8.data import ARCHIVE, CACHE, DatasetUnavailable, Split, load_cifar10, synthetic_cifar10, validation_split

STAND_IN = synthetic_cifar10(20, 10)  # what `class_folders` writes


def assert_same_images(loaded, expected=STAND_IN):
    """The same images with the same labels, in whatever order."""

    def rows(split):
        return sorted((label, image.tobytes()) for label, image in zip(split.labels, split.images, strict=True))

    for one, other in zip(loaded, expected, strict=True):
        assert rows(one) == rows(other)


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "a folder with blanks and ü"
    class_folders(root)
    return root


@pytest.fixture
def load(capsys):
    """Load both splits, and tell whether the images were read, not their cache."""

    def load(root):
        splits = load_cifar10(root)
        return splits, "Reading images" in capsys.readouterr().out

    return load


# -- the two layouts -----------------------------------------------------------------------------------------------


def test_class_folders_and_what_is_left_out_of_them(folders, capsys):
    cats = folders / "test" / "cat"
    for name in ("notes.txt", "00001.png~", "IMG_1.HEIC", "report.pdf", "Thumbs.db", ".DS_Store", "._00001.png"):
        (cats / name).write_bytes(b"no image")
    (cats / "album.png").mkdir()
    train, test = load_cifar10(folders)
    assert_same_images((train, test))
    assert train.source == "CIFAR-10, class folders, but 20 + 10 images" and not train.synthetic
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("Left out"))
    assert re.search(r"00001.png~, \S*notes.txt, \S*report.pdf \(is not an image that Pillow reads: convert", line)
    assert re.search(r"IMG_1.HEIC \(is a HEIC photo: pip install pillow-heif.*album.png \(is a folder\)", line)
    assert "Thumbs" not in out and "DS_Store" not in out and "._" not in out


def test_files_with_undecodable_names_are_read_and_named(folders, load, monkeypatch):
    odd = Path(os.fsdecode(os.fsencode(folders / "train" / "cat") + b"/caf\xe9.png"))
    Image.new("RGB", (32, 32), (1, 2, 3)).save(odd)
    for first in (True, False):
        (train, _), read = load(folders)
        assert read == first and (train.images == (1, 2, 3)).all((1, 2, 3)).sum() == 1
    odd.write_bytes(b"")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(ValueError, match=r"blanks and \\xfc/train/cat/caf\\udce9.png' is not an image") as error:
        load_cifar10(folders)
    print(error.value)


@pytest.fixture(params=[data.BATCHES, ARCHIVE])
def official(request, tmp_path, monkeypatch):
    """Official files in either form: one of the files, and the splits."""
    if request.param == data.BATCHES:
        return tmp_path / data.BATCHES / "data_batch_3", official_batches(tmp_path, monkeypatch)
    return official_archive(tmp_path, monkeypatch)


def test_official_files_are_read_without_unpacking_them(official, tmp_path):
    _, expected = official
    shutil.rmtree(tmp_path / "unpacked", ignore_errors=True)
    before = set(tmp_path.rglob("*"))
    for one, other in zip(load_cifar10(tmp_path), expected, strict=True):
        assert np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)
        assert one.source.startswith("CIFAR-10, official ")
    assert set(tmp_path.rglob("*")) - before == {tmp_path / CACHE}


def test_fault_damaged_official_files(official, tmp_path):
    file, _ = official
    for batch in CIFAR10.train_list + CIFAR10.test_list:
        name, md5 = batch
        batch[1] = "0" * 32
        with pytest.raises(ValueError, match=rf"damaged \('{name}' is missing or has a wrong md5\): delete it"):
            load_cifar10(tmp_path)
        batch[1] = md5
    for damage in ("bit", "cut"):
        damaged(file, damage)
        with pytest.raises(ValueError, match=r"cifar-10-.*' is incomplete or damaged .*: delete it, and download"):
            load_cifar10(tmp_path)


def damaged(file, damage):
    content = bytearray(file.read_bytes())
    half = len(content) // 2
    content[half] ^= 1
    file.write_bytes({"bit": content, "cut": content[:half], "emptied": b""}[damage])


def test_order_of_the_folders(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("CIFAR10_CACHE", str(tmp_path / "cache"))
    for seed, name in ((2, "cache"), (1, "data")):
        class_folders(tmp_path / name, seed=seed)
        assert_same_images(load_cifar10(), synthetic_cifar10(20, 10, seed))  # data/ before CIFAR10_CACHE
    monkeypatch.setenv("CIFAR10_ROOT", str(folders))
    assert_same_images(load_cifar10())
    assert_same_images(load_cifar10(tmp_path / "data"), synthetic_cifar10(20, 10, seed=1))  # what is named goes first


# -- the cache -----------------------------------------------------------------------------------------------------


def cat(root):
    return min((root / "test" / "cat").iterdir())


def resized(file):
    """Change the size of a file, not its time."""
    file.write_bytes(file.read_bytes() + b"x")
    os.utime(file, (1e9, 1e9 + 1))


def test_the_cache_saves_reading_until_something_changes(folders, load, monkeypatch):
    os.utime(cat(folders), (1e9, 1e9))
    for change, stale in (
        (lambda: None, True),
        (lambda: None, False),
        (lambda: os.utime(cat(folders), (1e9, 1e9 + 0.5)), False),  # Google Drive keeps no fractions of seconds
        (lambda: os.utime(cat(folders), (1e9, 1e9 + 1)), True),
        (lambda: resized(cat(folders)), True),
        (lambda: cat(folders).rename(cat(folders).with_name("another.png")), True),
        (lambda: monkeypatch.setattr(data, "READING", data.READING + 1), True),
    ):
        change()
        loaded, read = load(folders)
        assert read == stale
        assert_same_images(loaded)
    monkeypatch.setattr(data, "CLASSES", data.CLASSES[::-1])
    assert load(folders)[1]
    shutil.copy(cat(folders), cat(folders).with_name("zz.png"))
    assert load(folders)[1]


def test_a_shared_cache_folder_tells_two_roots_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_CACHE", str(tmp_path / "cache"))
    for seed in (1, 2):
        root = tmp_path / str(seed)
        expected = class_folders(root, seed=seed)
        for number, image in enumerate(sorted(root.rglob("*.png"))):  # equal names, sizes and times
            bitmap = image.with_name(f"{number}.bmp")
            Image.open(image).save(bitmap)
            image.unlink()
            os.utime(bitmap, (1e9, 1e9))
        assert_same_images(load_cifar10(root), expected)
        assert not (root / CACHE).exists() and (tmp_path / "cache" / CACHE).exists()


@pytest.mark.parametrize("damage", ["cut", "bit", "emptied"])
def test_fault_a_damaged_cache_is_named_and_rebuilt(folders, load, damage):
    load_cifar10(folders)
    damaged(folders / CACHE, damage)
    with pytest.warns(UserWarning, match=r"cifar10-cache.npz' is damaged .*reading the images again"):
        assert_same_images(load_cifar10(folders))
    load(folders)
    assert not load(folders)[1]


class FullDisk(io.BytesIO):
    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


def refuse(*_):
    raise OSError(errno.EROFS, "Read-only file system")


# Earlier releases of NumPy do not close their zip file after an error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("atomic_write", [refuse, lambda _: FullDisk()], ids=["read-only", "full"])
def test_without_a_writable_place_images_are_read_without_a_cache(folders, load, monkeypatch, atomic_write):
    monkeypatch.setattr(data, "atomic_write", atomic_write)
    for _ in range(2):
        loaded, read = load(folders)
        assert read
        assert_same_images(loaded)


def load_and_die(root):
    """Load class folders, and die in the middle of writing their cache."""

    def die(file, **_):
        file.write(bytes(100_000))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    np.savez = die
    load_cifar10(root)


def test_fault_a_process_killed_while_it_writes_the_cache(folders, load):
    process = processes.start(load_and_die, folders)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    loaded, read = load(folders)
    assert read and not load(folders)[1]
    assert_same_images(loaded)


# -- bad input -----------------------------------------------------------------------------------------------------


def odd(root, make):
    """Load class folders with one more file, train/cat/odd.png."""
    make(root / "train" / "cat" / "odd.png")
    load_cifar10(root)


def written(root, content):
    odd(root, lambda file: file.write_bytes(content))


def moved(root, folder):
    """Load class folders after one folder or the only file in it has another name."""
    (root / folder).rename(root / "another name")
    load_cifar10(root)


def split(shape=(2, 32, 32, 3), dtype=np.uint8, labels=(0, 0), label_dtype=np.int64):
    return Split(np.zeros(shape, dtype), np.array(labels, label_dtype), "test")


NOISE = encoded(np.random.default_rng(0).integers(0, 256, (64, 32), dtype=np.uint8))
BAD_INPUT = [
    (lambda root: load_cifar10(root / "gone"), DatasetUnavailable, "root is '.*gone', which is not a .*Pass a folder"),
    (lambda root: load_cifar10(root / "train", True), DatasetUnavailable, "train', which does not hold CIFAR-10"),
    (lambda root: moved(root, "test/horse"), ValueError, "test/horse' is missing: .* each of airplane, automobile"),
    (lambda root: moved(root, cat(root)), ValueError, "test/cat' has no image files: add some"),
    (lambda root: odd(root, lambda file: file.symlink_to("gone.png")), ValueError, "odd.png' is a link to .*: restore"),
    (lambda root: odd(root, lambda file: file.symlink_to("odd.png")), ValueError, "odd.png' is a link to .*: restore"),
    (lambda root: odd(root, os.mkfifo), ValueError, "train/cat/odd.png' is not a regular file: .*delete"),
    (lambda root: written(root, b""), ValueError, "train/cat/odd.png' is not an image .*: convert it"),
    (lambda root: written(root, NOISE[:999]), ValueError, "odd.png' is not a readable image .*: replace or delete"),
    (lambda root: written(root, NOISE), ValueError, "odd.png' is 32 by 64 pixels, expected 32 by 32: resize"),
    (lambda _: split(labels=(-1, 3)), ValueError, "labels range from -1 to 3; expected 0 to 9"),
    (lambda _: split(labels=(0, 10)), ValueError, "labels range from 0 to 10; expected 0 to 9"),
    (lambda _: split(labels=(0, 0, 0)), ValueError, r"labels are int64 \(3,\); expected int64 \(2,\)"),
    (lambda _: split(label_dtype=np.int32), ValueError, r"labels are int32 \(2,\); expected int64"),
    (lambda _: split(dtype=float), ValueError, r"images are float64 \(2, 32, 32, 3\); expected uint8 .*: resize"),
    (lambda _: split((2, 3, 32, 32)), ValueError, r"images are uint8 \(2, 3, 32, 32\); expected .*: resize"),
    (lambda _: split((0, 32, 32, 3)), ValueError, "expected .* with N > 0"),
    (lambda _: validation_split(split(), 0), ValueError, "n is 0; expected 1 to 1 images"),
    (lambda _: validation_split(split(), 2), ValueError, "n is 2; expected 1 to 1 images"),
]


@pytest.mark.parametrize("call, error, words", BAD_INPUT)
def test_bad_input(folders, call, error, words):
    with pytest.raises(error, match=words):
        call(folders)


def test_bad_input_cifar10_root_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", "nowhere")
    with pytest.raises(DatasetUnavailable, match="CIFAR10_ROOT is 'nowhere', which is not a directory"):
        load_cifar10(allow_synthetic=True)


# -- the stand-in, the validation split and the real images --------------------------------------------------------


def test_synthetic_says_so_is_balanced_and_reproducible():
    train, test = synthetic_cifar10(100, 50)
    assert train.synthetic and "synthetic" in test.source and "NOT CIFAR-10" in test.source
    assert np.bincount(train.labels).tolist() == [10] * 10 and np.bincount(test.labels).tolist() == [5] * 10
    again, other = synthetic_cifar10(100, 50)[0], synthetic_cifar10(100, 50, seed=1)[0]
    assert np.array_equal(train.images, again.images) and not np.array_equal(train.images, other.images)


def test_synthetic_classes_can_be_learned_but_not_without_mistakes():
    train, test = synthetic_cifar10(500, 300)
    means = np.stack([train.images[train.labels == label].mean(0) for label in range(10)])
    nearest = ((test.images[:, None].astype(np.float32) - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert 0.5 < (nearest == test.labels).mean() < 1


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


def test_real_images_are_complete_give_mean_and_std_and_load_in_time(real_root, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_CACHE", str(tmp_path / "cache"))
    for limit in (20, 2):  # seconds of computing without a cache and with it
        started = time.process_time()
        train, test = load_cifar10(real_root)
        assert time.process_time() - started < limit
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    for channel in range(3):
        counts = np.bincount(train.images[..., channel].ravel(), minlength=256)
        values = np.arange(256) / 255
        mean = np.average(values, weights=counts)
        std = np.sqrt(np.average((values - mean) ** 2, weights=counts))
        assert (round(mean, 4), round(std, 4)) == (data.MEAN[channel], data.STD[channel])


# -- the download --------------------------------------------------------------------------------------------------


def files(folder):
    """Return the names in a folder, without the lock file."""
    return sorted(path.name for path in folder.glob("*") if path.suffix != ".lock")


def unreachable():
    """Return an address on this machine that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/archive"


@pytest.mark.parametrize("named", [False, True])
def test_download_to_the_data_folder_or_the_one_that_cifar10_cache_names(server, monkeypatch, tmp_path, capsys, named):
    folder = tmp_path / "data"
    if named:
        folder = tmp_path / "a" / "cache"
        monkeypatch.setenv("CIFAR10_CACHE", str(folder))
    server.use("good")
    for _ in range(2):
        train, test = load_cifar10()
        assert (train.images == server.splits[0].images).all() and (test.labels == server.splits[1].labels).all()
    assert server.requests == ["good"]  # the second time nothing is downloaded
    assert files(folder) == [CACHE, ARCHIVE] and (tmp_path / "data").exists() != named
    output = capsys.readouterr()
    assert "CIFAR-10 from 127.0.0.1" in output.out and "100%" in output.out and "B/s" in output.out
    assert not output.err


def test_download_tries_cifar10_url_and_the_mirrors_in_order_and_prints_why(server, monkeypatch, tmp_path, capsys):
    server.use("missing", "wrong", "silent", "mute", "good", "late")
    monkeypatch.setenv("CIFAR10_URL", f"{server.url}/cut")
    started = time.monotonic()
    train, _ = load_cifar10()
    assert time.monotonic() - started < 10
    assert (train.images == server.splits[0].images).all() and files(tmp_path / "data") == [CACHE, ARCHIVE]
    assert server.requests == ["cut", "missing", "wrong", "silent", "mute", "good"]
    out = capsys.readouterr().out
    reasons = {"cut": "IncompleteRead|md5", "missing": "404 .*Not Found", "wrong": "md5", "silent|mute": "timed out"}
    for fault, reason in reasons.items():
        assert re.search(f"Download failed: {server.url}/({fault}): .*({reason})", out)


def test_download_that_fails_everywhere_leaves_nothing_and_says_why(server, monkeypatch, tmp_path, capsys):
    server.use("missing", "wrong", "cut")
    refused = unreachable()
    monkeypatch.setattr(data, "MIRRORS", (*data.MIRRORS, refused, "not an address"))
    words = f"(?s)/missing: .*404.*/wrong: .*md5.*/cut: .*{refused}: .*refused.*not an address.*Remedies: .*CIFAR10_URL"
    with pytest.raises(DatasetUnavailable, match=words):
        load_cifar10()
    assert files(tmp_path / "data") == []
    train, test = load_cifar10(allow_synthetic=True)
    assert train.synthetic and test.synthetic and len(train) == 2000
    assert re.search("(?s)refused.*CIFAR10_ROOT.*SYNTHETIC STAND-IN", capsys.readouterr().out)


def test_fault_a_full_disk_during_the_download_is_not_blamed_on_the_mirrors(server, tmp_path, monkeypatch):
    server.use("good", "good")
    monkeypatch.setattr(data, "atomic_write", lambda _: FullDisk())
    with pytest.raises(DatasetUnavailable, match=r"cannot be written: .*No space left on device") as raised:
        data.download_archive(tmp_path)
    assert server.url not in str(raised.value) and server.requests == ["good"]


def test_fault_a_data_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "data").write_text("a file in its place")
    server.use("good")
    with pytest.raises(DatasetUnavailable, match="data' cannot be written"):
        load_cifar10()
    assert load_cifar10(allow_synthetic=True)[0].synthetic and not server.requests


@pytest.mark.filterwarnings("ignore")  # filelock 4 warns that it marks the lock by a file
@pytest.mark.parametrize("lock", ["none", "stale"])
def test_download_without_a_lock(server, monkeypatch, tmp_path, lock):
    server.use("good")
    monkeypatch.setattr(data, "LOCK_TIMEOUT", 0.1)
    held = filelock.FileLock(tmp_path / "data" / f"{ARCHIVE}.lock")
    if lock == "stale":
        held.acquire()
    else:
        monkeypatch.setattr("fcntl.flock", refuse)
    load_cifar10()
    held.release()
    assert server.requests == ["good"]


def test_one_process_at_a_time_downloads_to_a_folder(server, tmp_path):
    folder = tmp_path / "data"
    first = processes.start(processes.download, f"{server.url}/late", folder, data.ARCHIVE_MD5)
    processes.wait_for(lambda: server.requests)  # it holds the lock, and its mirror takes a second to answer
    second = processes.start(processes.download, f"{server.url}/good", folder, data.ARCHIVE_MD5)
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert server.requests == ["late"]  # the second waited, and found the archive
    assert files(folder) == [ARCHIVE]


def test_fault_a_download_that_was_killed_is_started_again(server, tmp_path):
    folder = tmp_path / "data"
    process = processes.start(processes.download, f"{server.url}/silent", folder, data.ARCHIVE_MD5)
    processes.wait_for(lambda: any(path.stat().st_size > 1000 for path in folder.glob("*")))
    processes.kill(process)
    assert not (folder / ARCHIVE).exists()
    server.use("good")
    train, _ = load_cifar10()
    assert (train.images == server.splits[0].images).all() and (folder / ARCHIVE).exists()
