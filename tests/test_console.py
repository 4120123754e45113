"""Text for messages: numbers with their nouns, and paths that standard output cannot show."""

import io

import pytest

from session8.console import plural, printable


@pytest.mark.parametrize(
    "n, noun, words",
    [
        (1, "thread", "1 thread"), (0, "run", "0 runs"), (2000, "test image", "2,000 test images"),
        (1, "process", "1 process"), (2, "process", "2 processes"), (3, "batch", "3 batches"), (2, "epoch", "2 epochs"),
    ],
)  # fmt: skip
def test_a_noun_is_plural_unless_there_is_one(n, noun, words):
    assert plural(n, noun) == words
    assert plural(1.5, "epoch", ".4g") == "1.5 epochs"


@pytest.mark.parametrize("encoding, shown", [("utf-8", "猫 ü"), ("latin-1", r"\u732b ü"), (None, "猫 ü")])
def test_a_path_is_shown_as_far_as_standard_output_can(encoding, shown, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding) if encoding else io.StringIO()
    monkeypatch.setattr("sys.stdout", stdout)
    assert printable("猫 ü") == shown
    print(printable("\udcff.png"), file=stdout)  # of bytes that are no UTF-8
