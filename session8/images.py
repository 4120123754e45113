"""One reading of an image file: training, testing and prediction see the same pixels."""

import os
import warnings
from contextlib import suppress
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from session8.console import printable

READING = 1  # raise it when a file's pixels change: caches of the earlier reading are then ignored

HEIC_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
HIDDEN = ("thumbs.db", "desktop.ini")


class UnreadableImage(ValueError):
    """An image cannot be read. `args`: its name, and the reason with the remedy."""

    def __str__(self):
        source, reason = self.args
        return f"'{source}' {reason}"


def read_image(image: str | os.PathLike | BinaryIO | Image.Image, source: str) -> Image.Image:
    """Decode an image to RGB: rotated as its EXIF data say, over white if it is transparent.

    Floating-point values are scaled from 0 to 1. 16-bit values are scaled from 0 to 65535, or to the maximum that a
    TIFF names.

    image: a path, an open binary file or a PIL image. source: its name in messages. Raises UnreadableImage if it is not
    an image, is damaged or too large, or if the range of its values is unknown.
    """
    if isinstance(image, str | os.PathLike):
        check_is_file(image)
        try:
            with open(image, "rb") as file:
                return read_image(file, source)
        except OSError as error:
            reason = f"cannot be opened ({error.strerror}): allow reading it, or delete it"
            raise UnreadableImage(source, reason) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # about metadata and size
            return _to_rgb(image if isinstance(image, Image.Image) else Image.open(image), source)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        image.seek(0)
        start = b"" if isinstance(image, Image.Image) else image.read(11)
        raise UnreadableImage(source, unknown_format(source, start)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(source, f"is too large to open safely ({error}): reduce its size first") from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = f"is not a readable image ({type(error).__name__}: {error}): replace or delete it"
        raise UnreadableImage(source, reason) from error


def _to_rgb(image, source):
    white = _white(image)
    image.load()
    if 0 in image.size:
        raise UnreadableImage(source, f"has no pixels: its size is {image.size}")
    with suppress(Exception):  # damaged EXIF data raise many kinds: keep the image's orientation
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow would clip at 255
        values = np.asarray(image, np.float32)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= white):
            remedy = "pass an array of floats from 0 to 1"
            raise UnreadableImage(source, f"has values from {low:g} to {high:g}; expected 0 to {white}: {remedy}")
        image = Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if white == 65535 and 0 < (brightest := np.max(image)) <= 16:  # as if 12 bits were stored as 16
        raise UnreadableImage(
            source,
            f"has 16 bits, but reaches only about {257 * int(brightest):,}, and does not say which value is white: "
            "convert it to 8 bits, or pass an array of floats from 0 to 1",
        )
    return image


def _white(image):
    """Return the value of white of an image that is not loaded yet. A TIFF may name it, or have fewer than 16 bits."""
    if image.mode == "F":
        return 1
    if not image.mode.startswith("I") and ";16" not in str(getattr(image, "tile", "")):
        return 255
    tags = getattr(image, "tag_v2", {})
    maximum, bits = tags.get(281, [0]), tags.get(258, [16])
    return max(maximum) or 2 ** min(16, *bits) - 1


# -- folders -------------------------------------------------------------------------------------------------------


def is_image_name(name: str) -> bool:
    """Return whether Pillow, with its registered plug-ins, reads files with this suffix."""
    return Image.registered_extensions().get(os.path.splitext(name)[1].lower()) in Image.OPEN


def unknown_format(name: str, start: bytes = b"") -> str:
    """Return why Pillow does not read a file with this name and these first bytes, with the remedy."""
    if start[4:10] == b"ftyphe" or name.lower().endswith(HEIC_SUFFIXES):
        call = "pillow_heif.register_heif_opener()"
        return f"is a HEIC photo: pip install pillow-heif and call {call}, or convert it to JPEG"
    return "is not an image that Pillow reads: convert it to PNG or JPEG, or delete it"


def check_is_file(path: str | os.PathLike) -> None:
    """Raise UnreadableImage unless this is a file: opening a pipe would wait for ever."""
    if os.path.isfile(path):
        return
    if os.path.isdir(path):
        reason = "is a folder"
    elif not os.path.exists(path):
        reason = "is a link to a file that does not exist: restore the file, or delete the link"
    else:
        reason = "is not a regular file: name an image file, or delete it"
    raise UnreadableImage(printable(path), reason)


def list_folder(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name, without what operating systems hide in it (`._*`, Thumbs.db)."""
    with os.scandir(folder) as entries:  # several times faster than pathlib for 60,000 files
        visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in HIDDEN]
    return sorted(visible, key=lambda entry: entry.name)


def print_left_out(folder: str | os.PathLike, errors: list[UnreadableImage]) -> None:
    """Print one line that names the files of a folder for which UnreadableImage was raised, by reason."""
    names: dict[str, list[str]] = {}
    for source, reason in (error.args for error in errors):
        names.setdefault(reason, []).append(os.path.relpath(source, printable(folder)))
    parts = []
    for reason, group in names.items():
        more = f" and {len(group) - 5:,} more" if len(group) > 5 else ""
        parts.append(f"{', '.join(group[:5])}{more} ({reason})")
    if parts:
        more = "; and others" if len(parts) > 10 else ""
        print(f"Left out of '{printable(folder)}': {'; '.join(parts[:10])}{more}")
