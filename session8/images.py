"""One reading of an image file: training, testing and prediction see the same pixels."""

import io
import os
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from session8.console import printable

READING = 1  # raise it when a file's pixels change: caches of the earlier reading are then ignored

# What people keep among images and Pillow does not read, by suffix.
HEIC = "a HEIC photo: pip install pillow-heif and call pillow_heif.register_heif_opener(), or convert it to JPEG"
OTHER_KINDS = {
    HEIC: (".heic", ".heics", ".heif", ".heifs", ".hif"),
    "an AVIF image, which this build of Pillow cannot read: update Pillow, or convert it to PNG": (".avif",),
    "a JPEG XL image: convert it to PNG": (".jxl",),
    "a raw photo: convert it to JPEG": (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
    "a vector drawing: convert it to PNG": (".ai", ".svg", ".svgz"),
    "a PDF document: convert its pages to PNG": (".pdf",),
    "a video: save single frames as PNG": (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"),
}
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # which Pillow identifies and does not decode
HIDDEN = ("thumbs.db", "desktop.ini")


class UnreadableImage(ValueError):
    """An image cannot be read. `args`: its name, and the reason with the remedy."""

    def __str__(self):
        return "'{}' {}".format(*self.args)


def read_image(file):
    """Decode an image to RGB: rotated as its EXIF data say, over white if it is transparent.

    Floating-point values are scaled from 0 to 1. 16-bit values are scaled from 0 to 65535, or to the maximum that a
    TIFF names. A JPEG above Pillow's limit of about 89 million pixels is decoded at a reduced size, up to twice the
    limit.

    file: a path, or the bytes of a file. Returns a PIL image. Raises UnreadableImage if the file is not an image, is
    damaged or too large, or if the range of its values is unknown.
    """
    if isinstance(file, bytes | bytearray):
        return _decode(io.BytesIO(file), f"{len(file):,} bytes", "")
    check_is_file(file)
    try:
        with open(file, "rb") as opened:
            return _decode(opened, printable(file), os.fspath(file))
    except OSError as error:
        reason = f"cannot be opened ({error.strerror}): allow reading it, or delete it"
        raise UnreadableImage(printable(file), reason) from error


def _decode(file, source, name):
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # warnings about metadata and size
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                if image.format not in ("JPEG", "MPO"):
                    raise Image.DecompressionBombError(f"{image.width:,} by {image.height:,} pixels")
                image.draft("RGB", (512, 512))  # down to an eighth of the width, but not below this size
            return to_rgb(image, source)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        heic = file.seek(4) and file.read(7) in (b"ftyphei", b"ftyphev")  # whatever its name
        kind = other_kind(".heic" if heic else name) or "not a readable image (unknown format): replace or delete it"
        raise UnreadableImage(source, f"is {kind}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(source, f"is too large to open safely ({error}): reduce its size first") from error
    except Exception as error:
        raise _damaged(source, error) from error


def _damaged(source, error):
    """Return what to raise after an exception of Pillow's, which has many kinds for damaged files."""
    return UnreadableImage(source, f"is not a readable image ({type(error).__name__}: {error}): replace or delete it")


def to_rgb(image, source):
    """Convert a PIL image as `read_image` does. source: its name in messages."""
    try:
        top = 1 if image.mode == "F" else _maximum(getattr(image, "tag_v2", {}))
        high_bytes = ";16" in str(getattr(image, "tile", ""))  # Pillow keeps only these of 16-bit colours
        image.load()
    except Exception as error:  # a PIL image is decoded on first use
        raise _damaged(source, error) from error
    if 0 in image.size:
        raise UnreadableImage(source, f"has no pixels: its size is {image.size}")
    with suppress(Exception):  # damaged EXIF data raise many kinds: keep the image's orientation
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow would clip at 255
        values = np.asarray(image, np.float32)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= top):
            remedy = "pass an array of floats from 0 to 1"
            raise UnreadableImage(source, f"has values from {low:g} to {high:g}; expected 0 to {top}: {remedy}")
        if top == 65535 and high > 0:
            _check_highest(int(high), source)
        if isinstance(transparent := image.info.get("transparency"), int):
            values = np.where(values == transparent, top, values)
        return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8)).convert("RGB")
    if high_bytes and any(high for _, high in image.convert("RGB").getextrema()):
        _check_highest(256 * max(high for _, high in image.convert("RGB").getextrema()) + 255, source)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except ValueError as error:
        remedy = "convert it to PNG or JPEG"
        raise UnreadableImage(source, f"has mode {image.mode}, which Pillow cannot convert to RGB: {remedy}") from error


def _maximum(tags):
    """Return the value of white in a file of more than 8 bits: a TIFF may name it, or have fewer bits."""
    return max(tags.get(281, [0])) or 2 ** min(16, *tags.get(258, [16])) - 1


def _check_highest(high, source):
    """Refuse 16-bit values that may be 12-bit ones: they would be almost black."""
    if high < 4096:
        raise UnreadableImage(
            source,
            f"has no value above {high:,} of 65,535, and does not say which value is white: "
            "convert it to 8 bits, or pass an array of floats from 0 to 1",
        )


# -- folders -------------------------------------------------------------------------------------------------------


def _suffix(name):
    return os.path.splitext(f"_{name}")[1].lower()


def is_image_name(name):
    """Return whether Pillow, with its registered plug-ins, reads files with this suffix."""
    kind = Image.registered_extensions().get(_suffix(name))
    return kind in Image.OPEN and kind not in STUBS  # the others are only written


def other_kind(name):
    """Return what a file with this suffix is that Pillow does not read, with the remedy, or None."""
    if not is_image_name(name):
        return next((kind for kind, suffixes in OTHER_KINDS.items() if _suffix(name) in suffixes), None)


def check_is_file(path):
    """Raise UnreadableImage unless this is a file: opening a pipe would wait for ever."""
    if os.path.islink(path) and not os.path.exists(path):
        reason = "is a link to a file that does not exist: restore the file, or delete the link"
        raise UnreadableImage(printable(path), reason)
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "is not a regular file: name an image file, or delete it"
        raise UnreadableImage(printable(path), kind)


def list_folder(folder):
    """Return the entries of a folder, sorted by name, without what operating systems hide in it (`._*`, Thumbs.db)."""
    try:
        with os.scandir(folder) as entries:  # several times faster than pathlib for 60,000 files
            visible = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in HIDDEN]
    except OSError as error:
        raise ValueError(
            f"folder '{printable(folder)}' cannot be read ({error.strerror}): allow reading it, or name another"
        ) from error
    return sorted(visible, key=lambda entry: entry.name)


def describe_left_out(folder, errors):
    """Return one line that names the files of a folder for which UnreadableImage was raised, by reason."""
    names = {}
    for source, reason in (error.args for error in errors):
        names.setdefault(reason, []).append(os.path.relpath(source, printable(folder)))
    parts = [
        f"{', '.join(group[:5])}{f' and {len(group) - 5:,} more' if len(group) > 5 else ''} ({reason})"
        for reason, group in names.items()
    ]
    return f"Left out of '{printable(folder)}': {'; '.join(parts[:10])}{'; and others' if len(parts) > 10 else ''}"
