"""predict accepts any image and refuses other input; the exported graph agrees with the network."""

import io
import os

import numpy as np
import pytest
import torch
from fakes import encoded, png
from networks import Linear, small_network
from PIL import Image, ImageOps
from torch import nn

from session8.data import CLASSES
from session8.inference import export_onnx, predict


@pytest.fixture(scope="module")
def photo():
    """A 64 by 48 image with a colour per quarter, different from its flipped and rotated versions."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32], pixels[:24, 32:], pixels[24:, :32], pixels[24:, 32:] = (
        (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0),
    )  # fmt: skip
    return Image.fromarray(pixels)


def seen(thing):
    (prediction,) = predict(Linear(), thing, device="cpu")
    assert prediction.image.shape == (32, 32, 3) and prediction.image.dtype == np.uint8
    return prediction.image.astype(int)


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F", "RGBX"])
def test_every_mode_is_converted(mode):
    """A white square in the middle of black; in colour modes by way of RGB."""
    grey = np.zeros((40, 40), np.uint8)
    grey[10:30, 10:30] = 255
    if mode in ("I", "I;16"):
        image = Image.fromarray(grey.astype(np.int32 if mode == "I" else np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = Image.fromarray(grey).convert("L" if mode == "LA" else "RGB").convert(mode)
    assert image.mode == mode
    result = seen(image)
    assert result[16, 16].min() > 245 and result[2, 2].max() < 10


def test_transparent_pixels_become_white(photo):
    see_through = photo.convert("RGBA")
    see_through.putalpha(Image.new("L", photo.size, 0))
    assert (seen(encoded(see_through)) == 255).all()
    see_through.putalpha(Image.new("L", photo.size, 128))
    assert np.abs(seen(see_through)[4, 4] - (252, 127, 127)).max() <= 2
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([200, 0, 0])
    assert (seen(encoded(palette, transparency=0)) == 255).all()
    assert (seen(encoded(palette)) == (200, 0, 0)).all()


def test_damaged_exif_data_are_ignored(photo):
    damaged = encoded(photo, exif=b"garbage!")
    with pytest.raises(SyntaxError, match="not a TIFF file"):
        ImageOps.exif_transpose(Image.open(io.BytesIO(damaged)))
    assert np.array_equal(seen(damaged), seen(photo))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(photo, form):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    turned = seen(encoded(photo, form, exif=exif))
    assert np.abs(turned[4, 28] - (250, 0, 0)).max() < 30 and np.abs(turned[4, 4] - (0, 0, 250)).max() < 30


def test_an_oblong_image_is_cropped_to_its_centre():
    thirds = np.zeros((32, 96, 3), np.uint8)
    thirds[:, :32, 0], thirds[:, 32:64, 1], thirds[:, 64:, 2] = 255, 255, 255
    for pixels in (thirds, thirds.transpose(1, 0, 2)):
        assert (seen(pixels) == (0, 255, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 1000), (1000, 3), (2000, 1500)])
def test_any_size(size):
    assert (seen(Image.new("RGB", size, (10, 200, 30))) == (10, 200, 30)).all()


def test_the_first_frame_of_an_animation_is_used():
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    assert (seen(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)).all()


def test_a_folder_takes_what_a_single_call_takes_in_the_order_of_the_names_and_names_the_rest(tmp_path, photo, capsys):
    contents = {"b.ppm": "PPM", "a.PNG": "PNG", "c.jfif": "JPEG", "d.jp2": "JPEG2000", "without a suffix": "BMP"}
    for name, form in contents.items():
        photo.save(tmp_path / name, form)
    for name in ("notes.txt", "IMG_1.HEIC", "IMG_2.heic", "plan.svg", "report.pdf", "._a.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "half.png").write_bytes(encoded(photo)[:100])
    (tmp_path / "large.png").write_bytes(large())
    (tmp_path / "album.jpg").mkdir()
    predictions = predict(Linear(), tmp_path, k=1, device="cpu")
    assert [os.path.basename(prediction.source) for prediction in predictions] == sorted(contents)
    for prediction in predictions:
        (same,) = predict(Linear(), prediction.source, k=1, device="cpu")
        assert np.array_equal(prediction.image, same.image) and prediction.classes == same.classes
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and not err
    for named in (
        "notes.txt (is not a readable image",
        "IMG_1.HEIC, IMG_2.heic (is a HEIC photo: pip install pillow-heif",
        "plan.svg (is a vector drawing: convert it",
        "report.pdf (is a PDF document: convert",
        "half.png (is not a readable image (OSError",
        "large.png (is too large",
        "album.jpg (is a folder)",
    ):
        assert named in out
    assert "._a" not in out and "Thumbs" not in out


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe and a dangling link")
def test_odd_files_of_a_folder_are_named_and_left_out(tmp_path, photo, monkeypatch):
    photo.save(tmp_path / "ü.png")
    (tmp_path / "ü.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    (tmp_path / "dangling ü.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    with monkeypatch.context() as patch:
        stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
        patch.setattr("sys.stdout", stdout)
        (prediction,) = predict(Linear(), tmp_path, device="cpu")
        print(prediction.source)
        stdout.seek(0)
        out = stdout.read()
    assert "dangling \\xfc.png (is a link to a file that does not exist" in out and "pipe.png (is not a regular" in out
    assert "caf\\udce9.png" in out
    os.remove(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    with pytest.raises(ValueError, match=r"has no image files. Left out of .*dangling"):
        predict(Linear(), tmp_path, device="cpu")


def bomb():
    """A PNG of a few bytes that says it is 100,000 by 100,000 pixels."""
    return png(100_000, 100_000, 8, b"")


def large():
    """An image that is large enough for Pillow's warning and too small for its error."""
    return encoded(Image.new("1", (10_000, 10_000)))


@pytest.mark.parametrize(
    "thing, named",
    [
        (b"not an image", "'12 bytes' is not a readable image"),
        (b"", "'0 bytes' is not a readable image"),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "is a HEIC photo: pip install pillow-heif and call",
        ),
        (Image.new("I", (5, 5), 4095), "has no value above 4,095 of 65,535.* pass an array of floats from 0 to 1"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "is not a readable image"),
        (bomb(), "too large to open safely"),
        (large(), "too large to open safely"),
        (np.zeros((32, 32, 2), np.uint8), r"shape is \(32, 32, 2\); expected"),
        (np.zeros((0, 32, 3), np.uint8), r"shape is \(0, 32, 3\)"),
        (np.zeros(32, np.uint8), r"shape is \(32,\)"),
        (np.full((32, 32), 3.0), "float64, from 3.0 to 3.0; expected uint8, or float from 0 to 1"),
        (np.full((32, 32), np.nan), "from nan to nan"),
        (np.zeros((32, 32), np.int64), "the array is int64"),
        (Image.new("RGB", (0, 5)), "has no pixels"),
        (Image.new("I", (5, 5), 70_000), "values from 70000 to 70000; expected 0 to 65535"),
        (Image.new("La", (5, 5)), "mode La, which Pillow cannot convert to RGB"),
    ],
)
def test_bad_input_that_is_not_an_image(thing, named):
    with pytest.raises(ValueError, match=named):
        predict(Linear(), thing, device="cpu")


def test_bad_input_damaged_file_that_pillow_has_opened(photo, tmp_path):
    (tmp_path / "half.png").write_bytes(encoded(photo)[:100])
    with Image.open(tmp_path / "half.png") as opened, pytest.raises(ValueError, match="RGB' is not a readable image"):
        predict(Linear(), opened, device="cpu")


def test_bad_input_paths_and_kinds(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.png' does not exist"):
        predict(Linear(), "nowhere.png", device="cpu")
    with pytest.raises(FileNotFoundError, match="name an image file or a folder on this machine"):
        predict(Linear(), "https://example.org/cat.png", device="cpu")
    with pytest.raises(ValueError, match="has no image files"):
        predict(Linear(), tmp_path, device="cpu")
    with pytest.raises(TypeError, match="image is a NoneType; expected a path, bytes, a PIL image or a NumPy array"):
        predict(Linear(), None, device="cpu")


def test_three_classes_are_returned_or_all_if_there_are_fewer(photo):
    assert [len(prediction.classes) for prediction in predict(Linear(), photo, device="cpu")] == [3]
    two = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    assert set(predict(two, photo, device="cpu", names=("left", "right"))[0].classes) == {"left", "right"}


@pytest.mark.parametrize("k", [0, 11])
def test_bad_input_number_of_classes(k, photo):
    with pytest.raises(ValueError, match=f"k is {k}; expected 1 to 10"):
        predict(Linear(), photo, k=k, device="cpu")


def test_bad_input_names_that_do_not_fit_the_network(photo):
    with pytest.raises(ValueError, match="names has 3 entries, but the network has 10 outputs"):
        predict(Linear(), photo, names=("a", "b", "c"), device="cpu")


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
