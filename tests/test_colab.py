"""The notebook in Google Colab, as far as a stand-in for its `google.colab` can show."""

import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from fakes import class_folders
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.name for path in ROOT.glob("*.py"))

# What Colab puts there before the notebook's own cells: its module, and here a pip that only notes what it is asked.
STAND_IN = """
import os, shutil, subprocess, sys
from pathlib import Path
from types import ModuleType

def mount(path):
    if REFUSED:
        raise ValueError("mount failed")
    shutil.copytree(DRIVE, path)

colab = ModuleType("google.colab")
colab.drive = ModuleType("google.colab.drive")
colab.drive.mount = mount
sys.modules.update({"google": ModuleType("google"), "google.colab": colab, "google.colab.drive": colab.drive})
really_run = subprocess.run
def run(command, *args, **options):
    if "pip" not in command:
        return really_run(command, *args, **options)
    Path("pip.txt").write_text(" ".join(command))
subprocess.run = run
"""


@pytest.fixture
def drive(tmp_path):
    """The user's Drive, as it is in Google's cloud: the project folder, its data beside it."""
    project = tmp_path / "cloud" / "MyDrive" / "cifar10"
    project.mkdir(parents=True)
    for name in MODULES:
        shutil.copy(ROOT / name, project)
    class_folders(project / "data", per_train=8, per_test=4)
    return project


def run_in_colab(tmp_path, cells=None, refused=False, **constants):
    """Execute the notebook, or its first code cells, in a kernel that knows nothing of the project."""
    notebook = nbformat.read(ROOT / "Session_8.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"][:cells]
    settings = {"PROJECT_DIR": str(tmp_path / "content" / "drive" / "MyDrive" / "cifar10"), **constants}
    code[0].source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    stand_in = f"DRIVE, REFUSED = {str(tmp_path / 'cloud')!r}, {refused}\n{STAND_IN}"
    notebook.cells = [nbformat.v4.new_code_cell(stand_in), *code]
    (tmp_path / "content").mkdir()
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "content")}})
    client.execute(env={**os.environ, "PYTHONPATH": ""})
    return "\n".join(out.get("text", "") for cell in code for out in cell.outputs)


def test_colab_whole_notebook_from_a_mounted_drive(drive, tmp_path):
    text = run_in_colab(tmp_path, EPOCHS=1, BATCH_SIZE=20, DEVICE="cpu")
    assert "80 training images, 40 test images" in text and "1 of 1 epochs" in text
    project = tmp_path / "content" / "drive" / "MyDrive" / "cifar10"
    (folder,) = (project / "runs").iterdir()  # checkpoints are on the Drive, where a disconnected Colab leaves them
    assert {"last.pt", "model.pt", "record.json"} <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "record.json").read_text())["n_train"] == 80
    asked = (project / "pip.txt").read_text().partition(" install ")[2]
    assert "albumentations" in asked and "torchsummary" in asked
    assert not re.search(r"torch\b|torchvision|numpy|--upgrade|-U\b|--force", asked)


def test_colab_bad_input_refused_mount(drive, tmp_path):
    with pytest.raises(Exception, match=r"Drive was not mounted \(mount failed\). Run this cell again and allow"):
        run_in_colab(tmp_path, cells=2, refused=True)


def test_colab_bad_input_missing_sibling_file(drive, tmp_path):
    (drive / "session8.training.py").unlink()
    with pytest.raises(Exception, match=r"PROJECT_DIR is .*cifar10, which lacks utils.py: copy the whole project"):
        run_in_colab(tmp_path, cells=2)


def test_colab_project_that_is_not_on_the_drive(drive, tmp_path):
    elsewhere = shutil.copytree(drive, tmp_path / "uploaded")
    run_in_colab(tmp_path, cells=2, refused=True, PROJECT_DIR=str(elsewhere))


@pytest.mark.parametrize("name", MODULES)
def test_colab_checks_for_every_module(name):
    notebook = nbformat.read(ROOT / "Session_8.ipynb", 4)
    setup = next(cell.source for cell in notebook.cells if "google.colab" in cell.source)
    assert f'"{name}"' in setup
