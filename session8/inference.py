"""Inference: classify any image, and export the network to ONNX."""

import importlib.util
import io
import os
from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from session8.augment import normalize
from session8.config import Config
from session8.console import printable
from session8.data import CLASSES, Split
from session8.evaluation import collect_logits
from session8.images import UnreadableImage, list_folder, print_left_out, read_image


class Prediction(NamedTuple):
    """The prediction for one image.

    source: path of the file, or a description of the input. image: uint8 (32, 32, 3), as the network received it.
    classes: names of the most probable classes, most probable first. probabilities: of these classes, from 0 to 1.
    """

    source: str
    image: np.ndarray
    classes: list[str]
    probabilities: list[float]


def predict(
    model: nn.Module,
    image: str | os.PathLike | bytes | Image.Image | np.ndarray,
    k: int | None = None,
    device: str | torch.device | None = None,
    names: Sequence[str] = CLASSES,
    views: int = 1,
) -> list[Prediction]:
    """Classify an image, or all images of a folder, in float32.

    The network always answers with one of its classes, even if the image shows none of them. Images of any size and
    mode are rotated as their EXIF data say, composited over white if transparent, converted to RGB, cropped to a
    centred square and resized to 32 by 32.

    image: a path, a folder, the bytes of an image file, a PIL image, or an array of shape (H, W), (H, W, 1), (H, W, 3)
    or (H, W, 4), uint8 or float from 0 to 1. k: number of classes to return; by default 3, or all if there are fewer.
    names: of the network's outputs. views: 1, 2 or 6 views of each image, as in `test`.

    Returns a list of `Prediction`, one per image; for a folder, sorted by file name. The model is left in evaluation
    mode on the device. Raises FileNotFoundError if the file does not exist; ValueError if it is not an image, is
    damaged or has more pixels than Pillow considers safe (about 179 million), if a folder has no images, if k is out of
    range, if views is another number, or if `names` do not match the outputs; TypeError for any other input.
    """
    k = min(3, len(names)) if k is None else k
    if not 1 <= k <= len(names):
        raise ValueError(f"k is {k}; expected 1 to {len(names)}, the number of classes")
    if isinstance(image, str | os.PathLike) and os.path.isdir(image):
        loaded, left_out = [], []
        for entry in list_folder(image):
            try:
                loaded.append(_load(entry))
            except UnreadableImage as error:
                left_out.append(error)
        print_left_out(image, left_out)
        if not loaded:
            raise ValueError(f"the folder '{printable(image)}' has no image files: add images, or name another")
    else:
        loaded = [_load(image)]
    sources, images = zip(*loaded, strict=True)
    split = Split(np.stack(images), np.zeros(len(images), np.int64), "images to classify")
    logits = collect_logits(model, split, Config(precision="float32"), device, views)
    if logits.shape[1] != len(names):
        raise ValueError(f"names has {len(names)} entries, but the network has {logits.shape[1]} outputs")
    values, order = (part.tolist() for part in logits.softmax(1).topk(k))
    return [
        Prediction(source, image, [names[i] for i in indices], probabilities)
        for source, image, indices, probabilities in zip(sources, images, order, values, strict=True)
    ]


def _load(image):
    """Return a description of the input, and the image as the network receives it: uint8 (32, 32, 3)."""
    if isinstance(image, np.ndarray):
        source, image = f"array of shape {image.shape}", _from_array(image)
    elif isinstance(image, Image.Image):
        source = f"PIL image of mode {image.mode}"
    elif isinstance(image, bytes | bytearray):
        source, image = f"{len(image):,} bytes", io.BytesIO(image)
    elif isinstance(image, str | os.PathLike):
        source = printable(image)
        if not os.path.lexists(image):
            raise FileNotFoundError(f"'{source}' does not exist: name an image file or a folder on this machine")
    else:
        raise TypeError(f"image is a {type(image).__name__}; expected a path, bytes, a PIL image or a NumPy array")
    return source, np.array(ImageOps.fit(read_image(image, source), (32, 32), Image.Resampling.LANCZOS))


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


class _FromPixels(nn.Module):
    """The network with normalisation and softmax: pixels to probabilities."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(normalize(images, images.device)).softmax(1)


def export_onnx(model: nn.Module, path: str | os.PathLike, names: Sequence[str] = CLASSES) -> None:
    """Export the network to ONNX with PyTorch's exporter.

    The graph includes the normalisation. Its input `images` is uint8 (B, 32, 32, 3), RGB, for any B; its output
    `probabilities` is float32 (B, C). The metadata hold the class names. The model is unchanged.

    Raises ImportError if onnx or onnxscript is not installed; ValueError if `names` do not match the outputs; OSError
    if the file cannot be written.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"export needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime")
    import onnx

    network = _FromPixels(deepcopy(model).cpu()).eval()
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    # The call also caches the constants of `normalize`, which must not be created during tracing.
    if (outputs := network(images).shape[1]) != len(names):
        raise ValueError(f"names has {len(names)} entries, but the network has {outputs} outputs")
    program = torch.onnx.export(
        network,
        (images,),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    graph = program.model_proto  # type: ignore[union-attr]
    graph.doc_string = (
        "Image classifier. Input: RGB pixels, uint8 (batch, 32, 32, 3); the graph includes the normalisation. "
        "Output: probabilities, float32 (batch, classes)."
    )
    onnx.helper.set_model_props(graph, {"classes": ",".join(names), "normalisation": "included"})
    onnx.checker.check_model(graph)
    onnx.save(graph, path)
