"""Small copies of CIFAR-10 on disk in both layouts, image files, and images that encode positions."""

import hashlib
import io
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image

from session8 import data


def class_folders(root, per_train=2, per_test=1, suffix=".png", seed=0):
    """Write train/<class>/ and test/<class>/ with images of the synthetic stand-in; return both splits."""
    splits = data.synthetic_cifar10(10 * per_train, 10 * per_test, seed)
    for name, split in zip(("train", "test"), splits, strict=True):
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            folder = Path(root) / name / data.CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:05}{suffix}")
    return splits


def official_batches(root, monkeypatch, per_batch=20):
    """Write cifar-10-batches-py/ with small batches, and replace torchvision's list of checksums."""
    train, test = data.synthetic_cifar10(5 * per_batch, per_batch)
    folder = Path(root) / data.BATCHES
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name, images, labels):
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)  # the archive's order: channel, row, column
        return write(name, {"data": rows, "labels": labels.tolist()})

    parts = [slice(i * per_batch, (i + 1) * per_batch) for i in range(5)]
    lists = [batch(f"data_batch_{i + 1}", train.images[part], train.labels[part]) for i, part in enumerate(parts)]
    expected = torchvision.datasets.CIFAR10
    monkeypatch.setattr(expected, "train_list", lists)
    monkeypatch.setattr(expected, "test_list", [batch("test_batch", test.images, test.labels)])
    write("batches.meta", {"label_names": list(data.CLASSES)})
    return train, test


def official_archive(root, monkeypatch):
    """Write cifar-10-python.tar.gz with small batches, and have cifar10 expect its checksum."""
    root = Path(root)
    splits = official_batches(root / "unpacked", monkeypatch)
    archive = root / data.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / "unpacked" / data.BATCHES, data.BATCHES)
    monkeypatch.setattr(data, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive, splits


def position_coded(n):
    """Return a Split of n equal images whose first two channels are each pixel's row + 1 and column + 1."""
    rows, columns = np.meshgrid(np.arange(1, 33), np.arange(1, 33), indexing="ij")
    image = np.stack([rows, columns, np.full_like(rows, 255)], axis=-1).astype(np.uint8)
    return data.Split(np.repeat(image[None], n, axis=0), np.arange(n) % 10, "position-coded")


def read_draws(images, padding=4):
    """Read from augmented position-coded images what was drawn for each: crop (top, left), flip, hole (top, left).

    padding: the pixels of zeros on each side before the crop. Returns five arrays of integers (N,); the hole's are 0
    without one.
    """
    images = np.asarray(images)
    hidden = images[..., 2] != 255  # by zeros of the padding, or by the mean colour of the hole
    hole = hidden & (images[..., 2] != 0)
    positions = np.where(hidden[..., None], -1000, images[..., :2].astype(np.int16) - 1 + padding)
    rows, columns = np.indices((32, 32), dtype=np.int16)
    top, left = (positions - np.stack([rows, columns], axis=-1)).max((1, 2)).astype(int).T
    left_if_mirrored = (positions[..., 1] + columns).max((1, 2)) - 31
    # Of a mirrored image, the difference between position and column is not the same in all columns.
    flip = (~hidden & (positions[..., 1] - columns != left[:, None, None])).any((1, 2))
    left = np.where(flip, left_if_mirrored, left)
    return top, left, flip.astype(int), hole.any(2).argmax(1), hole.any(1).argmax(1)


RAMP = np.arange(1024, dtype=np.uint16).reshape(32, 32)  # a value per pixel


def encoded(image, form="PNG", **options):
    """Return the bytes of an image file. image: a PIL image, or an array."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def png(width, height, bits, rows):
    """Return an RGB PNG file with any header. rows: the bytes of the pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_colours(values):
    """Return a PNG of 16 bits per channel, which Pillow does not write. values: (H, W), of each channel."""
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, rows)
