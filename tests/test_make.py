"""`make run` passes constants to the notebook, and writes its page."""

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
# The real programs; but papermill sets the constants without executing the notebook.
PAPERMILL = "import sys; from papermill.cli import papermill; papermill([*sys.argv[1:], '--prepare-only'])"
JUPYTER = "from jupyter_core.command import main; main()"


@pytest.fixture
def make(tmp_path):
    """Return a function that runs make in a copy of what `make run` needs, and returns its result."""
    (tmp_path / "docs").mkdir()
    for name in ("requirements.txt", "Makefile", "Session_8.ipynb", "docs/notebook.html.j2"):
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "environment" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / "environment" / "installed").touch()

    def run(*arguments, jupyter=""):
        for name, program in {"papermill": PAPERMILL, "jupyter": jupyter}.items():
            (programs / name).write_text(f"#!{sys.executable}\n{program}")
            (programs / name).chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        return subprocess.run(["make", "run", "VENV=environment", *arguments], **options)

    return run


FOLDER = '/it\'s "a" `b` #1; echo \\ & | > * ? ~ ! %s/é 猫\n/=b '


@pytest.mark.parametrize(
    "arguments, constants",
    [
        ([], {}),
        (
            ["EPOCHS=5", "RECIPE=one_cycle", "BATCH_SIZE=64", "SEED=7", "DEVICE=cpu", "CHECKPOINTS=no"],
            {"EPOCHS": 5, "RECIPE": "one_cycle", "BATCH_SIZE": 64, "SEED": 7, "DEVICE": "cpu", "CHECKPOINTS": False},
        ),
        ([f"DATA_ROOT={FOLDER}", "CHECKPOINTS=True"], {"DATA_ROOT": FOLDER, "CHECKPOINTS": True}),
        (["DATA_ROOT=2024", "EPOCHS="], {"DATA_ROOT": "2024"}),
    ],
)
def test_make_run_sets_the_constants_of_the_notebook(arguments, constants, make, tmp_path):
    assert constants.keys() <= papermill.inspect_notebook(str(ROOT / "Session_8.ipynb")).keys()
    done = make(*arguments)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(tmp_path / "runs" / "Session_8.ipynb", as_version=4)
    assert notebook.metadata.papermill.parameters == constants


@pytest.mark.parametrize("argument", ["EPOCH=5", "epochs=5", "DATA=/x"])
def test_make_run_refuses_what_is_no_constant(argument, make, tmp_path):
    done = make(argument)
    name = argument.partition("=")[0]
    assert done.returncode and f"{name}: expected constants of the notebook (EPOCHS" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_make_run_writes_a_page_with_the_alternative_texts(make, tmp_path):
    texts = ["Loss: train 0.177, test 0.345.", "a \"quoted\" <b> & 'x' > \\1 {{ y }} <img "]
    image = {"image/png": base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()}
    outputs = [nbformat.v4.new_output("display_data", image, metadata={"image/png": {"alt": text}}) for text in texts]
    outputs.append(nbformat.v4.new_output("display_data", image))
    cells = [nbformat.v4.new_code_cell("", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "Session_8.ipynb")
    done = make(jupyter=JUPYTER)
    assert done.returncode == 0, done.stderr
    page = BeautifulSoup((tmp_path / "runs" / "Session_8.html").read_text(encoding="utf-8"), "html.parser")
    assert [image["alt"] for image in page.select("img")][:2] == texts
    assert len(page.select("img")) == 3
