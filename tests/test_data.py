"""CIFAR-10: finding, reading, caching, checking and downloading it, and the stand-in."""

import errno
import io
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fakes import RAMP, class_folders, deep_colours, encoded, official_archive, official_batches
from PIL import Image

from session8 import data
from session8.data import (
    ARCHIVE,
    CACHE,
    CLASSES,
    MEAN,
    STD,
    DatasetUnavailable,
    Split,
    load_cifar10,
    synthetic_cifar10,
    validation_split,
)

if os.name == "posix":
    import processes

posix = pytest.mark.skipif(os.name != "posix", reason="the processes are forked and killed")


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


def test_class_folders_with_the_hidden_files_of_macos(folders):
    root, expected = folders
    for image in list(root.rglob("*.png")):
        image.with_name(f"._{image.name}").write_bytes(b"AppleDouble")
    assert_same_images(load_cifar10(root), expected)


def test_other_files_of_class_folders_are_named_and_left_out(folders, capsys):
    root, expected = folders
    folder = root / "test" / "cat"
    for name in ("notes.txt", "00001.png~", "IMG_1.HEIC", "features.h5", "Thumbs.db", ".DS_Store"):
        (folder / name).write_bytes(b"no image")
    for name in ("album.png", "batch1"):
        (folder / name).mkdir()
    assert_same_images(load_cifar10(root), expected)
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("Left out"))
    assert "00001.png~, " in line and "notes.txt (is not named as an image" in line and "features.h5" in line
    assert "IMG_1.HEIC (is a HEIC photo: pip install pillow-heif and call" in line
    assert re.search(r"album.png, \S*batch1 \(is a folder\)", line)
    assert "Thumbs" not in out and "DS_Store" not in out


@posix
def test_files_with_undecodable_names_are_read(folders, decoded, monkeypatch):
    root, _ = folders
    odd = os.fsencode(root / "train" / "cat") + b"/caf\xe9.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(io.FileIO(odd, "w"), "PNG")
    for _ in range(2):
        train, _ = load_cifar10(root)
        assert (train.images == (1, 2, 3)).all((1, 2, 3)).sum() == 1
    assert len(decoded) == 1  # the second time from the cache
    Path(os.fsdecode(odd)).write_bytes(b"")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(
        ValueError, match=r"blanks and \\xfc/train/cat/caf\\udce9.png' is not a readable image"
    ) as error:
        load_cifar10(root)
    print(error.value)


@posix
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.symlink_to("gone.png"), "is a link to a file that does not exist: restore"),
        (lambda path: path.symlink_to(path.name), "is a link to a file that does not exist: restore"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.write_bytes(b""), r"is not a readable image \(unknown format\): replace or delete"),
        (lambda path: path.write_bytes(encoded(RAMP * 4)), "has no value above 4,092 of 65,535.* convert it to 8 bits"),
        (lambda path: path.write_bytes(deep_colours(RAMP * 0 + 3000)), "has no value above 3,071 of 65,535"),
    ],
    ids=["dangling link", "link to itself", "pipe", "empty", "12 bits", "12-bit colours"],
)
def test_bad_input_file_in_a_class_folder_is_named(folders, make, message):
    root, _ = folders
    make(root / "train" / "cat" / "odd.png")
    with pytest.raises(ValueError, match=rf"train/cat/odd.png' {message}"):
        load_cifar10(root)


def test_bad_input_file_that_may_not_be_read(folders, monkeypatch):
    root, _ = folders
    secret, real = next((root / "train" / "cat").iterdir()), open

    def refuse(path, *arguments, **keywords):  # permission bits would not stop root
        if os.fspath(path) == os.fspath(secret):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=rf"{secret.name}' cannot be opened \(Permission denied\): allow reading it"):
        load_cifar10(root)


def test_official_batches(tmp_path, monkeypatch):
    expected = official_batches(tmp_path, monkeypatch)
    loaded = load_cifar10(tmp_path)
    for one, other in zip(loaded, expected, strict=True):
        assert np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)
        assert "official" in one.source


def test_official_archive_is_read_without_unpacking_it(tmp_path, monkeypatch):
    archive, expected = official_archive(tmp_path / "data", monkeypatch)
    shutil.rmtree(archive.parent / "unpacked")
    assert_same_images(load_cifar10(archive.parent), expected)
    assert {path.name for path in tmp_path.rglob("*")} == {"data", ARCHIVE, CACHE}


def test_root_from_the_environment_and_before_the_data_folder(folders, monkeypatch, tmp_path):
    root, expected = folders
    class_folders(tmp_path / "data", seed=1)
    assert_same_images(load_cifar10(), synthetic_cifar10(20, 10, seed=1))
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    assert_same_images(load_cifar10(), expected)
    assert_same_images(load_cifar10(tmp_path / "data"), synthetic_cifar10(20, 10, seed=1))  # what is named goes first


@pytest.fixture
def decoded(monkeypatch):
    """The roots whose images were decoded, one entry a time."""
    roots, read = [], data._read_class_folders
    monkeypatch.setattr(data, "_read_class_folders", lambda root: (roots.append(root), read(root))[1])
    return roots


def test_cache_saves_decoding(folders, decoded):
    root, expected = folders
    first, second = load_cifar10(root), load_cifar10(root)
    assert len(decoded) == 1
    assert_same_images(first, expected)
    assert_same_images(second, expected)


@pytest.mark.parametrize("change", ["rewritten", "in another size", "added", "removed"])
def test_stale_cache_is_detected(folders, decoded, change):
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


def test_the_cache_depends_on_the_reading_and_not_on_fractions_of_seconds(folders, decoded, monkeypatch):
    root, _ = folders
    image = next((root / "test" / "dog").iterdir())
    os.utime(image, ns=(1_700_000_000_123_456_789,) * 2)
    load_cifar10(root)
    os.utime(image, ns=(1_700_000_000_123_000_000,) * 2)  # as Google Drive shows it after it is mounted again
    load_cifar10(root)
    assert len(decoded) == 1
    monkeypatch.setattr(data, "READING", data.READING + 1)
    load_cifar10(root)
    assert len(decoded) == 2


def test_a_shared_cache_folder_tells_two_roots_apart_and_follows_a_moved_one(tmp_path, decoded, monkeypatch):
    monkeypatch.setenv("CIFAR10_CACHE", str(tmp_path / "cache"))
    roots = {seed: tmp_path / str(seed) for seed in (1, 2)}
    for seed, root in roots.items():
        class_folders(root, suffix=".bmp", seed=seed)  # of the same sizes
        for image in root.rglob("*.bmp"):
            os.utime(image, (1e9, 1e9))
    for seed in (1, 2):
        assert_same_images(load_cifar10(roots[seed]), synthetic_cifar10(20, 10, seed))
        assert not (roots[seed] / CACHE).exists() and (tmp_path / "cache" / CACHE).exists()
    load_cifar10(roots[2].rename(tmp_path / "moved"))
    assert len(decoded) == 2


@pytest.mark.parametrize("damage", ["cut", "bit", "directory", "emptied"])
def test_bad_input_corrupt_cache_is_named_and_rebuilt(folders, decoded, damage):
    root, expected = folders
    load_cifar10(root)
    cache = root / CACHE
    content = bytearray(cache.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    if damage == "directory":  # the zip file's own: the compression of its first entry becomes an unknown one
        content[content.index(b"PK\x01\x02") + 10] ^= 64
    cache.write_bytes({"cut": content[: len(content) // 2], "emptied": b""}.get(damage, content))
    with pytest.warns(UserWarning, match=r"cifar10-cache.npz' is damaged .*reading the images again"):
        loaded = load_cifar10(root)
    assert_same_images(loaded, expected)
    load_cifar10(root)  # no warning now: the cache is whole again
    assert len(decoded) == 2


def test_a_read_only_data_folder_is_read_without_a_cache(folders, decoded, monkeypatch):
    root, expected = folders

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(data.np, "savez", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # such a file system refuses even to remove a file that is not there
    assert_same_images(load_cifar10(root), expected)
    assert_same_images(load_cifar10(root), expected)
    assert len(decoded) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_neither_a_cache_nor_a_temporary_file(folders, monkeypatch, error):
    root, expected = folders

    def interrupt(file, **_):
        file.write(b"half a cache")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(data.np, "savez", interrupt)
        with suppress(KeyboardInterrupt):
            assert_same_images(load_cifar10(root), expected)
    assert sorted(path.name for path in root.iterdir()) == ["test", "train"]


def test_cache_is_rebuilt_when_the_classes_change(folders, decoded, monkeypatch):
    root, _ = folders
    load_cifar10(root)
    monkeypatch.setattr(data, "CLASSES", CLASSES[::-1])
    train, _ = load_cifar10(root)
    assert len(decoded) == 2 and train.images[0].tobytes() == load_cifar10(root)[0].images[0].tobytes()


@pytest.mark.parametrize("allow_synthetic", [False, True])
def test_bad_input_root_that_does_not_exist(tmp_path, monkeypatch, allow_synthetic):
    with pytest.raises(DatasetUnavailable, match=r"root is '.*nowhere', which is not a directory. Pass a folder"):
        load_cifar10(tmp_path / "nowhere", allow_synthetic)
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetUnavailable, match=r"CIFAR10_ROOT is '.*nowhere'"):
        load_cifar10(allow_synthetic=allow_synthetic)


def test_bad_input_root_without_cifar10(tmp_path):
    with pytest.raises(DatasetUnavailable, match="does not hold CIFAR-10"):
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
    with pytest.raises(ValueError, match=r"class folder '.*ship' has no image files"):
        load_cifar10(root)


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_bad_input_unreadable_image(folders, content):
    root, _ = folders
    image = next((root / "train" / "frog").iterdir())
    image.write_bytes(image.read_bytes()[:200] if content == "cut" else content)
    with pytest.raises(ValueError, match=rf"{image.name}' is not a readable image .*: replace or delete"):
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
    batch = tmp_path / data.BATCHES / "data_batch_3"
    if damage == "missing":
        batch.unlink()
    else:
        batch.write_bytes(batch.read_bytes() + b"x")
    with pytest.raises(ValueError, match="cifar-10-batches-py' is incomplete or damaged"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("labels", [[-1, 3], [0, 10]])
def test_bad_input_labels_out_of_range(labels):
    with pytest.raises(ValueError, match=rf"labels range from {min(labels)} to {max(labels)}; expected 0 to 9"):
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
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache.npz")  # an absolute path: not the one next to the images
    for limit in (20, 2):  # without a cache and with it
        started = time.monotonic()
        load_cifar10(real_root)
        assert time.monotonic() - started < limit


# -- the download --------------------------------------------------------------------------------------------------


def files(tmp_path):
    """Return the names in the data folder, without the lock file."""
    return sorted(path.name for path in (tmp_path / "data").glob("*") if path.suffix != ".lock")


def test_download_of_a_good_archive(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "MIRRORS", (f"{server.url}/good",))
    train, test = load_cifar10()
    assert (train.images == server.splits[0].images).all() and (test.labels == server.splits[1].labels).all()
    assert "official archive" in train.source
    assert files(tmp_path) == [CACHE, ARCHIVE]
    output = capsys.readouterr()
    assert "CIFAR-10 from 127.0.0.1" in output.out and "100%" in output.out and "B/s" in output.out
    assert not output.err
    load_cifar10()
    assert server.requests == ["good"]  # the second time nothing is downloaded


def test_download_goes_to_the_folder_that_cifar10_cache_names(server, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "MIRRORS", (f"{server.url}/good",))
    monkeypatch.setenv("CIFAR10_CACHE", str(tmp_path / "a" / "cache"))
    for _ in range(2):
        train, _ = load_cifar10()
        assert (train.images == server.splits[0].images).all()
    assert server.requests == ["good"] and not (tmp_path / "data").exists()
    assert {CACHE, ARCHIVE} <= {path.name for path in (tmp_path / "a" / "cache").iterdir()}
    class_folders(tmp_path / "data", seed=1)
    assert_same_images(load_cifar10(), synthetic_cifar10(20, 10, seed=1))  # data/ goes first


def test_fault_a_full_disk_during_the_download_is_not_blamed_on_the_mirrors(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "MIRRORS", (f"{server.url}/good", f"{server.url}/good"))
    monkeypatch.setattr(data.pooch, "HTTPDownloader", lambda **_: full)
    with pytest.raises(DatasetUnavailable, match=r"cannot be written \(.*No space left on device") as raised:
        data.download_archive(tmp_path)
    assert server.url not in str(raised.value) and not list(tmp_path.glob("*.part"))


@posix
def test_download_on_a_file_system_without_locks(server, monkeypatch, tmp_path):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    monkeypatch.setattr(data, "MIRRORS", (f"{server.url}/good",))
    load_cifar10()
    assert server.requests == ["good"]


def test_download_does_not_wait_for_a_stale_lock_for_good(server, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "MIRRORS", (f"{server.url}/good",))
    monkeypatch.setattr(data, "LOCK_TIMEOUT", 0.1)
    (tmp_path / "data").mkdir()
    with data.filelock.FileLock(tmp_path / "data" / f"{ARCHIVE}.lock"):
        load_cifar10()
    assert server.requests == ["good"]


def test_download_tries_cifar10_url_first_and_then_the_mirrors_in_order(server, monkeypatch):
    monkeypatch.setattr(data, "MIRRORS", tuple(f"{server.url}/{name}" for name in ("missing", "wrong", "good", "late")))
    monkeypatch.setenv("CIFAR10_URL", f"{server.url}/cut")
    load_cifar10()
    assert server.requests == ["cut", "missing", "wrong", "good"]


FAULTS = {
    "missing": "404 .*Not Found",
    "wrong": "hash .*does not match",
    "cut": "IncompleteRead|does not match",
    "silent": "timed out",
    "mute": "timed out",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_download_skips_a_mirror_that_fails(server, monkeypatch, tmp_path, fault):
    monkeypatch.setattr(data, "MIRRORS", (f"{server.url}/{fault}", f"{server.url}/good"))
    started = time.monotonic()
    load_cifar10()
    assert time.monotonic() - started < 5
    assert server.requests == [fault, "good"] and files(tmp_path) == [CACHE, ARCHIVE]


@pytest.mark.parametrize("fault", FAULTS)
def test_download_that_fails_everywhere_leaves_nothing_and_says_why(server, monkeypatch, tmp_path, fault):
    monkeypatch.setattr(data, "MIRRORS", (f"{server.url}/{fault}",))
    message = rf"(?s){server.url}/{fault}: .*{FAULTS[fault]}.*Remedies: .*CIFAR10_URL"
    with pytest.raises(DatasetUnavailable, match=message):
        load_cifar10()
    assert files(tmp_path) == []


def unreachable():
    """Return an address on this machine that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/archive"


def test_download_without_a_connection(monkeypatch):
    urls = [unreachable(), "not an address"]
    monkeypatch.setattr(data, "MIRRORS", urls)
    with pytest.raises(DatasetUnavailable) as error:
        load_cifar10()
    assert all(url in str(error.value) for url in urls)
    assert "refused" in str(error.value) and "allow_synthetic=True" in str(error.value)


def test_the_stand_in_is_announced_by_a_banner(monkeypatch, capsys):
    monkeypatch.setattr(data, "MIRRORS", (unreachable(),))
    train, test = load_cifar10(allow_synthetic=True)
    assert train.synthetic and test.synthetic and len(train) == 2000
    printed = capsys.readouterr().out
    assert "SYNTHETIC STAND-IN" in printed and "refused" in printed and "CIFAR10_ROOT" in printed


def test_bad_input_data_folder_that_cannot_be_written(server, monkeypatch, tmp_path):
    (tmp_path / "data").write_text("a file in its place")
    monkeypatch.setattr(data, "MIRRORS", (f"{server.url}/good",))
    with pytest.raises(DatasetUnavailable, match="data': cannot be written"):
        load_cifar10()
    assert load_cifar10(allow_synthetic=True)[0].synthetic and not server.requests


@posix
def test_one_process_at_a_time_downloads_to_a_folder(server, monkeypatch, tmp_path):
    folder = tmp_path / "data"
    urls = [f"{server.url}/late", f"{server.url}/good"]
    running = [processes.start(processes.download, url, folder, data.ARCHIVE_MD5) for url in urls[:1]]
    processes.wait_for(lambda: server.requests)  # the first holds the lock, and its mirror takes a second to answer
    running.append(processes.start(processes.download, urls[1], folder, data.ARCHIVE_MD5))
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert server.requests == ["late"]  # the second waited, and found the archive
    assert files(tmp_path) == [ARCHIVE]


@posix
def test_a_download_that_was_killed_is_started_again(server, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    process = processes.start(processes.download, f"{server.url}/silent", folder, data.ARCHIVE_MD5)
    processes.wait_for(lambda: any(path.stat().st_size > 1000 for path in folder.glob("*.part")))
    processes.kill(process)
    assert not (folder / ARCHIVE).exists()
    monkeypatch.setattr(data, "MIRRORS", (f"{server.url}/good",))
    train, _ = load_cifar10()
    assert (train.images == server.splits[0].images).all() and files(tmp_path) == [CACHE, ARCHIVE]
