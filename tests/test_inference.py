"""predict accepts any image and refuses other input; the exported graph agrees with the network."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import deep_colours, encoded, png
from networks import Linear, small_network
from PIL import Image
from torch import nn

from session8.data import CLASSES
from session8.inference import export_onnx, predict


@pytest.fixture(scope="module")
def photo():
    """A 64 by 48 image with a colour per quarter, different from its flipped and rotated versions."""
    quarters = np.array([[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), (250, 250, 0)]], np.uint8)
    return Image.fromarray(quarters.repeat(24, 0).repeat(32, 1))


def seen(thing):
    (prediction,) = predict(Linear(), thing, device="cpu")
    assert prediction.image.shape == (32, 32, 3) and prediction.image.dtype == np.uint8
    return prediction.image


def test_an_image_of_the_right_size_is_not_changed(synthetic, device):
    image, model = synthetic[1].images[0], Linear()
    (prediction,) = predict(model, image, k=10, device=device)
    model = model.cpu()
    expected = np.exp(model.by_hand(image[None])[0])
    order = np.argsort(-expected)
    assert prediction.classes == [CLASSES[i] for i in order]
    assert prediction.probabilities == pytest.approx(expected[order], abs=1e-5)
    assert np.array_equal(prediction.image, image)


def test_every_kind_of_input_gives_the_same_image(photo, tmp_path):
    path = tmp_path / "Bild mit Ümlaut.png"
    photo.save(path)
    expected = seen(photo)
    pixels = np.asarray(photo)
    for thing in (path, str(path), encoded(photo), bytearray(encoded(photo)), pixels, pixels / 255):
        assert np.array_equal(seen(thing), expected)
    assert (expected[4, 4] == (250, 0, 0)).all() and (expected[28, 28] == (250, 250, 0)).all()
    grey = pixels[..., :1]
    assert np.array_equal(seen(grey), seen(grey[..., 0])) and np.array_equal(seen(grey), seen(grey.repeat(3, 2)))


@pytest.mark.parametrize("size", [(1, 1), (3, 1000), (1000, 3), (1500, 1000)])
def test_any_size(size):
    assert (seen(Image.new("RGB", size, (10, 200, 30))) == (10, 200, 30)).all()


def test_an_oblong_image_is_cropped_to_its_centre():
    thirds = np.zeros((32, 96, 3), np.uint8)
    thirds[:, :32, 0], thirds[:, 32:64, 1], thirds[:, 64:, 2] = 255, 255, 255
    for pixels in (thirds, thirds.transpose(1, 0, 2)):
        assert (seen(pixels) == (0, 255, 0)).all()


def test_a_folder_takes_what_a_single_call_takes_in_the_order_of_the_names_and_names_the_rest(tmp_path, photo, capsys):
    contents = {"b.ppm": "PPM", "a.PNG": "PNG", "c.jfif": "JPEG", "d.jp2": "JPEG2000", "without a suffix": "BMP"}
    for name, form in contents.items():
        photo.save(tmp_path / name, form)
    for name in ("notes.txt", "IMG_1.HEIC", "IMG_2.heic", "report.pdf", "._a.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "half.png").write_bytes(encoded(photo)[:100])
    (tmp_path / "album.jpg").mkdir()
    (tmp_path / "link.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    predictions = predict(Linear(), tmp_path, k=1, device="cpu")
    assert [os.path.basename(prediction.source) for prediction in predictions] == sorted(contents)
    for prediction in predictions:
        (same,) = predict(Linear(), prediction.source, k=1, device="cpu")
        assert np.array_equal(prediction.image, same.image) and prediction.classes == same.classes
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and not err
    for named in (
        r"notes.txt, report.pdf \(is not an image that Pillow reads: convert it",
        r"IMG_1.HEIC, IMG_2.heic \(is a HEIC photo: pip install pillow-heif",
        r"half.png \(is not a readable image \(OSError",
        r"album.jpg \(is a folder\)",
        r"link.png \(is a link to a file that does not exist",
        r"pipe.png \(is not a regular file",
    ):
        assert re.search(named, out)
    assert "._a" not in out and "Thumbs" not in out


def test_names_that_standard_output_cannot_show_are_printed_as_escapes(tmp_path, photo, monkeypatch):
    photo.save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")))
    (tmp_path / "ü.png").write_bytes(b"")
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    (prediction,) = predict(Linear(), tmp_path, device="cpu")
    print(prediction.source)
    stdout.seek(0)
    out = stdout.read()
    assert "\\xfc.png (is not an image" in out and "caf\\udce9.png" in out


def test_three_classes_are_returned_or_all_if_there_are_fewer(photo):
    assert [len(prediction.classes) for prediction in predict(Linear(), photo, device="cpu")] == [3]
    two = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    assert set(predict(two, photo, device="cpu", names=("left", "right"))[0].classes) == {"left", "right"}


def folder_of(content, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(content)
    return tmp_path


def opened(content, tmp_path):
    return Image.open(folder_of(content, tmp_path) / "photo.jpg")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
BOMB = png(100_000, 100_000, 8, b"")  # a few bytes that say they are many pixels
CUT = encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))[:999]
DARK = np.full((32, 32), 4095, np.uint16)


@pytest.mark.parametrize(
    "image, options, error, words",
    [
        (b"not an image", {}, ValueError, "'12 bytes' is not an image that Pillow reads: convert"),
        (HEIC, {}, ValueError, "'24 bytes' is a HEIC photo: pip install pillow-heif and call"),
        (CUT, {}, ValueError, r"'999 bytes' is not a readable image \(.*: replace"),
        (lambda tmp_path: opened(CUT, tmp_path), {}, ValueError, "'PIL image of mode RGB' is not a readable image"),
        (BOMB, {}, ValueError, "bytes' is too large to open safely .*: reduce"),
        (encoded(DARK), {}, ValueError, "bytes' has 16 bits, but reaches only about 4,112.* pass an array"),
        (deep_colours(DARK), {}, ValueError, "bytes' has 16 bits, but reaches only about 3,855.* convert it to 8 bits"),
        (Image.new("I", (5, 5), 70_000), {}, ValueError, "values from 70000 to 70000; expected 0 to 65535: pass"),
        (Image.new("RGB", (0, 5)), {}, ValueError, r"has no pixels: its size is \(0, 5\)"),
        (Image.new("La", (5, 5)), {}, ValueError, "mode La' is not a readable image .*conversion"),
        (np.zeros((32, 32, 2), np.uint8), {}, ValueError, r"shape is \(32, 32, 2\); expected"),
        (np.zeros((0, 32, 3), np.uint8), {}, ValueError, r"shape is \(0, 32, 3\); expected"),
        (np.zeros(32, np.uint8), {}, ValueError, r"shape is \(32,\); expected"),
        (np.full((32, 32), 3.0), {}, ValueError, "float64, from 3.0 to 3.0; expected uint8, or float from 0 to 1"),
        (np.full((32, 32), np.nan), {}, ValueError, "from nan to nan; expected"),
        (np.zeros((32, 32), np.int64), {}, ValueError, "the array is int64"),
        ("https://example.org/cat.png", {}, FileNotFoundError, "cat.png' does not exist: name an image file or a f"),
        (lambda tmp_path: tmp_path, {}, ValueError, "the folder '.*' has no image files: add images"),
        (lambda tmp_path: folder_of(CUT, tmp_path), {}, ValueError, "the folder '.*' has no image files: add images"),
        (None, {}, TypeError, "image is a NoneType; expected a path, bytes, a PIL image or a NumPy array"),
        (DARK / 65535, {"k": 0}, ValueError, "k is 0; expected 1 to 10"),
        (DARK / 65535, {"k": 11}, ValueError, "k is 11; expected 1 to 10"),
        (DARK / 65535, {"names": "abc"}, ValueError, "names has 3 entries, but the network has 10 outputs"),
        (DARK / 65535, {"views": 3}, ValueError, "views is 3; expected one of 1, 2, 6"),
    ],
)
def test_bad_input(tmp_path, image, options, error, words):
    with pytest.raises(error, match=words):
        predict(Linear(), image(tmp_path) if callable(image) else image, device="cpu", **options)


# -- export --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # the exporter's own, which change with its release
def test_the_exported_graph_agrees_with_the_network(tmp_path, synthetic):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = small_network().train(), tmp_path / "network.onnx"
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, path)
    assert model.training and all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]  # the weights are inside
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 7):
        images = synthetic[1].images[:n]
        (probabilities,) = session.run(["probabilities"], {"images": images})
        for row, image in zip(probabilities, images, strict=True):
            (prediction,) = predict(model, image, k=10, device="cpu")
            ours = dict(zip(prediction.classes, prediction.probabilities, strict=True))
            assert row == pytest.approx([ours[name] for name in CLASSES], abs=1e-5)
    graph = onnx.load(path)
    assert "includes the normalisation" in graph.doc_string
    assert {entry.key: entry.value for entry in graph.metadata_props}["classes"] == ",".join(CLASSES)


def test_bad_input_export_with_names_that_do_not_fit(tmp_path):
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="names has 2 entries, but the network has 10 outputs"):
        export_onnx(small_network(), tmp_path / "network.onnx", names=("cat", "dog"))
    assert not list(tmp_path.iterdir())


def test_export_names_missing_packages(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="export needs onnx and onnxscript: pip install onnx onnxscript onnxruntime"):
        export_onnx(small_network(), tmp_path / "network.onnx")
