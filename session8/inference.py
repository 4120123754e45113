"""Use without training: classify any image, and export the network for other programs."""

import importlib.util
import io
import os
import warnings
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from session8.analysis import collect_logits
from session8.config import Config
from session8.data import CLASSES, Split
from session8.training import normalize

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Prediction(NamedTuple):
    """What the network says of one image.

    source: the file's path, or in words what the image came as. image: uint8 (32, 32, 3), as the network saw it.
    classes: names of the likeliest classes, the likeliest first. probabilities: theirs, from 0 to 1.
    """

    source: str
    image: np.ndarray
    classes: list[str]
    probabilities: list[float]


def predict(model, image, k=None, device=None, names=CLASSES):
    """Classify an image, or all images of a folder. The network answers with the likeliest of its classes, also where
    an image shows none of them.

    image: a path; a folder's path; the bytes of an image file; a PIL image; or an array, (H, W), (H, W, 1), (H, W, 3)
    or (H, W, 4), uint8 or float from 0 to 1. Any size and mode: it is turned as its EXIF data say, laid on white
    where it is transparent, made RGB, cut to a square about its middle, and scaled to 32 by 32 pixels.

    Returns a list of `Prediction` with the k likeliest classes each (3, or all of fewer, when None): one, or one for
    each file of the folder that is named like an image, in the order of their names. Raises FileNotFoundError for a
    file that is not there; ValueError for what is no image, is damaged, or has more pixels than Pillow deems safe
    (about 89 million), for a folder without images, for k out of range, and for `names` that are not as many as the
    network's outputs; TypeError for anything else. The model is left in evaluation mode on the device.
    """
    k = min(3, len(names)) if k is None else k
    if not 1 <= k <= len(names):
        raise ValueError(f"k is {k}; expected 1 to {len(names)}, the number of classes")
    things = [image]
    if isinstance(image, str | os.PathLike) and Path(image).is_dir():
        # Without files that begin with a dot: macOS leaves such beside each image on other file systems.
        paths = (path for path in Path(image).iterdir() if path.is_file() and not path.name.startswith("."))
        things = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
        if not things:
            raise ValueError(f"the folder '{image}' holds no image ({', '.join(SUFFIXES)})")
    sources, images = zip(*map(_load, things), strict=True)
    split = Split(np.stack(images), np.zeros(len(images), np.int64), "images to classify")
    logits = collect_logits(model, split, Config(precision="float32"), device)
    if logits.shape[1] != len(names):
        raise ValueError(f"names are {len(names)}, and the network has {logits.shape[1]} outputs: name as many")
    values, order = (part.tolist() for part in logits.softmax(1).topk(k))
    return [
        Prediction(source, image, [names[i] for i in likeliest], probabilities)
        for source, image, likeliest, probabilities in zip(sources, images, order, values, strict=True)
    ]


def _load(thing):
    """In words what `thing` is, and its image as the network takes it: uint8 (32, 32, 3)."""
    if isinstance(thing, np.ndarray):
        source, image = f"array of shape {thing.shape}", _from_array(thing)
    elif isinstance(thing, Image.Image):
        source, image = f"PIL image of mode {thing.mode}", thing
    elif isinstance(thing, bytes | bytearray):
        source = f"{len(thing):,} bytes"
        image = _from_file(io.BytesIO(thing), source)
    elif isinstance(thing, str | os.PathLike):
        source = str(thing)
        if not Path(thing).is_file():
            raise FileNotFoundError(f"there is no image '{source}': name a file or a folder on this machine")
        image = _from_file(Path(thing), source)
    else:
        raise TypeError(f"image is a {type(thing).__name__}; expected a path, bytes, a PIL image or a NumPy array")
    return source, _as_input(image, source)


def _from_file(file, source):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.load()
                return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"'{source}' is too large to be opened safely ({error}): scale it down first") from error
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ValueError(f"'{source}' is no image that can be read ({type(error).__name__}: {error})") from error


def _from_array(array):
    shape = array.shape
    if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        raise ValueError(f"the array's shape is {shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"the array is {array.dtype}, from {array.min()} to {array.max()}; expected uint8, or float from 0 to 1"
            )
        array = np.round(255 * array).astype(np.uint8)
    return Image.fromarray(array[:, :, 0] if shape[2:] == (1,) else array)


def _as_input(image, source):
    if 0 in image.size:
        raise ValueError(f"'{source}' has no pixels: its size is {image.size}")
    try:
        image.load()
    except Exception as error:  # a PIL image is read when it is used
        raise ValueError(f"'{source}' cannot be read ({type(error).__name__}: {error})") from error
    with suppress(Exception):  # EXIF data are damaged in many ways: then the image is taken as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which Pillow would cut off at 255
        values, top = np.asarray(image, np.float32), 65535 if image.mode.startswith("I") else 1
        if not (values.min() >= 0 and values.max() <= top):
            raise ValueError(f"'{source}' has values from {values.min():g} to {values.max():g}; expected 0 to {top}")
        image = Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"'{source}' has mode {image.mode}, which Pillow cannot make RGB: convert it first") from error
    return np.array(ImageOps.fit(image, (32, 32), Image.Resampling.LANCZOS))


class _FromPixels(nn.Module):
    """From pixels to probabilities: who runs the exported graph need not know mean and standard deviation."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(normalize(images, images.device)).softmax(1)


def export_onnx(model, path, names=CLASSES):
    """Write the network as an ONNX graph, with PyTorch's own exporter.

    The graph includes the normalisation: its input `images` is uint8 (B, 32, 32, 3), RGB, for any B, its output
    `probabilities` float32 (B, C). Its metadata say so, and hold the class names. The model is left as it was. Raises
    ImportError, with the command that installs them, when the packages onnx and onnxscript are missing; ValueError for
    more or fewer names than outputs; OSError when the file cannot be written.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"export needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime")
    import onnx

    network = _FromPixels(deepcopy(model).cpu()).eval()
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    # This also has `normalize` make its constants, which must not be made while the graph is traced.
    if (outputs := network(images).shape[1]) != len(names):
        raise ValueError(f"names are {len(names)}, and the network has {outputs} outputs: name as many")
    program = torch.onnx.export(
        network,
        (images,),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    graph = program.model_proto
    graph.doc_string = (
        "Image classifier. Input: RGB pixels, uint8 (batch, 32, 32, 3); the graph includes the normalisation. "
        "Output: probabilities, float32 (batch, classes)."
    )
    onnx.helper.set_model_props(graph, {"classes": ",".join(names), "normalisation": "included"})
    onnx.checker.check_model(graph)
    onnx.save(graph, path)
