"""One reading of an image: class folders and predict see the same pixels, whatever the file's format."""

import errno

import numpy as np
import pytest
from fakes import RAMP, class_folders, deep_colours, encoded
from networks import Linear
from PIL import Image

from session8.data import load_cifar10
from session8.images import UnreadableImage, read_image
from session8.inference import predict

GREY = (RAMP // 4).astype(np.uint8)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned a quarter to the right
RED = Image.new("P", (32, 32), 0)
RED.putpalette([200, 0, 0])
HALF = np.zeros((32, 32, 4), np.uint8)  # transparent black on the left, red on the right
HALF[:, 16:] = (200, 0, 0, 255)
FRAMES = [Image.new("L", (32, 32), value) for value in (90, 180)]


@pytest.mark.parametrize(
    "suffix, content, expected",
    [
        ("png", encoded(RAMP * 64), RAMP * 64 / 257),
        ("png", deep_colours(RAMP * 64), RAMP * 64 // 256),
        ("tif", encoded((RAMP / 1023).astype(np.float32), "TIFF"), RAMP / 1023 * 255),
        ("tif", encoded(RAMP, "TIFF", tiffinfo={281: 1023}), RAMP / 1023 * 255),  # 281: the value of white
        ("png", encoded(GREY, exif=EXIF), np.rot90(GREY, -1)),
        ("tif", encoded(GREY, "TIFF", exif=EXIF), np.rot90(GREY, -1)),
        ("png", encoded(GREY, exif=b"garbage!"), GREY),
        ("png", encoded(HALF), np.where(np.arange(32) < 16, 255, 200)),
        ("png", encoded(np.full((32, 32, 4), (200, 0, 0, 51), np.uint8)), 244),  # a fifth of 200 on white
        ("png", encoded(RED), 200),
        ("png", encoded(RED, transparency=0), 255),
        ("PPM", encoded(GREY, "PPM"), GREY),
        ("jfif", encoded(GREY * 0 + 77, "JPEG"), 77),
        ("gif", encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), 90),
    ],
    ids=[
        *(
            "16 bits",
            "16-bit colours",
            "float",
            "10 bits",
            "EXIF",
            "EXIF of a TIFF",
            "damaged EXIF",
            "transparent half",
        ),
        *("translucent", "palette", "transparent palette", "PPM", "JFIF", "animation"),
    ],
)
def test_class_folders_and_predict_read_the_same_pixels(tmp_path, suffix, content, expected):
    class_folders(tmp_path)
    file = tmp_path / "train" / "airplane" / f"0.{suffix}"  # the first
    file.write_bytes(content)
    image = load_cifar10(tmp_path)[0].images[0]
    assert np.abs(image[..., 0] - np.broadcast_to(expected, (32, 32))).max() <= 0.5
    for same in (file, content, Image.open(file)):
        assert np.array_equal(predict(Linear(), same, device="cpu")[0].image, image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F", "RGBX"])
def test_every_mode_is_converted(mode):
    """A white square in the middle of black; in colour modes by way of RGB."""
    grey = np.zeros((32, 32), np.uint8)
    grey[8:24, 8:24] = 255
    if mode in ("I", "I;16"):
        image = Image.fromarray(grey.astype(np.int32 if mode == "I" else np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = Image.fromarray(grey).convert("L" if mode == "LA" else "RGB").convert(mode)
    assert image.mode == mode
    assert np.abs(np.asarray(read_image(image, "")) - grey[..., None].astype(int)).max() <= 10


def test_bad_input_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_):  # permission bits would not stop root
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "secret.png").write_bytes(encoded(GREY))
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UnreadableImage, match=r"'secret' cannot be opened \(Permission denied\): allow reading it"):
        read_image(tmp_path / "secret.png", "secret")
