"""One reading of an image: class folders and predict see the same pixels, whatever the file's format."""

import numpy as np
import pytest
from fakes import RAMP, class_folders, deep_colours, encoded
from networks import Linear
from PIL import Image

from session8.data import load_cifar10
from session8.images import read_image
from session8.inference import predict


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded((RAMP // 4).astype(np.uint8), exif=exif)


def transparent_left_half():
    """Red, transparent black on the left."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 16:] = (200, 0, 0, 255)
    return encoded(pixels)


@pytest.mark.parametrize(
    "suffix, content, expected",
    [
        ("png", encoded(RAMP * 64), RAMP * 64 / 257),
        ("png", deep_colours(RAMP * 64), RAMP * 64 // 256),
        ("tif", encoded((RAMP / 1023).astype(np.float32), "TIFF"), RAMP / 1023 * 255),
        ("tif", encoded(RAMP, "TIFF", tiffinfo={281: 1023}), RAMP / 1023 * 255),  # 281: the value of white
        ("png", turned(), np.rot90(RAMP // 4, -1)),
        ("png", transparent_left_half(), np.where(np.arange(32) < 16, 255, 200)),
        ("PPM", encoded((RAMP // 4).astype(np.uint8), "PPM"), RAMP // 4),
        ("jfif", encoded(np.full((32, 32), 77, np.uint8), "JPEG"), 77),
    ],
    ids=["16 bits", "16-bit colours", "float", "10 bits", "EXIF", "transparent", "PPM", "JFIF"],
)
def test_class_folders_and_predict_read_the_same_pixels(tmp_path, suffix, content, expected):
    class_folders(tmp_path)
    file = tmp_path / "train" / "airplane" / f"0.{suffix}"  # the first
    file.write_bytes(content)
    image = load_cifar10(tmp_path)[0].images[0]
    assert np.abs(image[..., 0] - np.broadcast_to(expected, (32, 32))).max() <= 0.5
    for same in (file, content, Image.open(file)):
        assert np.array_equal(predict(Linear(), same, device="cpu")[0].image, image)


@pytest.mark.parametrize("form", ["JPEG", "MPO"])
def test_a_jpeg_above_pillows_limit_is_decoded_reduced_to_nearly_the_same_pixels(monkeypatch, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels).resize((1600, 1200), Image.Resampling.BICUBIC), form, exif=exif)
    (full,) = predict(Linear(), content, device="cpu")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    assert read_image(content).size == (600, 800)
    (reduced,) = predict(Linear(), content, device="cpu")
    assert np.abs(reduced.image.astype(int) - full.image).max() <= 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900_000)  # twice that is Pillow's hard limit
    with pytest.raises(ValueError, match="is too large to open safely"):
        read_image(content)
