"""Commands: numbers with their nouns, errors as one message and a status, output that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from session8.console import command_line, plural

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "n, noun, words",
    [
        (1, "thread", "1 thread"), (0, "run", "0 runs"), (2000, "test image", "2,000 test images"),
        (1, "process", "1 process"), (2, "process", "2 processes"), (3, "batch", "3 batches"), (2, "epoch", "2 epochs"),
    ],
)  # fmt: skip
def test_a_noun_is_plural_unless_there_is_one(n, noun, words):
    assert plural(n, noun) == words


class Documented(RuntimeError):
    pass


NOTED = OSError("disk full")
NOTED.add_note("free some space")


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("lr is -1"), "lr is -1"),
        (FileNotFoundError(2, "No such file", "x.png"), "[Errno 2] No such file: 'x.png'"),
        (NOTED, "disk full\nfree some space"),
        (Documented("another run"), "another run"),
        (KeyboardInterrupt("Interrupted: resume"), 130),
        (BrokenPipeError(), 1),
        (SystemExit(2), 2),
    ],
)
def test_errors_of_a_command_are_a_message_and_a_status(error, status, capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended, command_line(Documented):
        raise error
    assert ended.value.code == status
    shown = capsys.readouterr().err
    assert shown == ("Interrupted: resume\n" if status == 130 else "")


@pytest.mark.parametrize("error", [TypeError("a fault"), RuntimeError("another")])
def test_faults_of_the_code_keep_their_traceback(error):
    with pytest.raises(type(error)), command_line(Documented):
        raise error


@pytest.mark.skipif(os.name != "posix", reason="uses a shell's redirections")
@pytest.mark.parametrize(
    "end, encoding, expected",
    [
        ("", "ascii", (0, "83 \\xb1 4 \\u732b\n", "")),
        ("", "cp1252", (0, "83 ± 4 \\u732b\n", "")),
        ("", "utf-8", (0, "83 ± 4 猫\n", "")),
        ("| true", "utf-8", (1, "", "")),
        ("> /dev/full", "utf-8", (1, "", "[Errno 28] No space left on device\n")),
        (">&-", "utf-8", (0, "", "")),
    ],
)
def test_output_that_cannot_be_encoded_or_written(end, encoding, expected):
    if "full" in end and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    program = "import time; from session8.console import *\nwith command_line(): time.sleep(0.1); print('83 ± 4 猫')"
    shell = ["bash", "-c", f'"$0" -c "$1" {end}; exit ${{PIPESTATUS[0]}}', sys.executable, program]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(shell, capture_output=True, env=environment, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout.decode(encoding), done.stderr.decode()) == expected
