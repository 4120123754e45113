"""The notebook: what it promises to its readers, as committed; and the notebook in Google Colab.

nbmake executes the notebook itself as another test.
"""

import ast
import inspect
import json
import os
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from fakes import class_folders
from nbclient import NotebookClient

from model_AC import AdvancedCNN
from session8 import data, records, training
from session8.config import Config
from session8.records import describe_record
from session8.trainer import run_folder

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = nbformat.read(ROOT / "Session_8.ipynb", 4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def parameters():
    (cell,) = [cell for cell in CODE if "parameters" in cell.metadata.get("tags", [])]
    return re.findall(r"^(\w+) = ", cell.source, re.MULTILINE)


def test_imports_the_network_and_the_utilities():
    source = "\n".join(cell.source for cell in CODE)
    assert "from model_AC import AdvancedCNN" in source and "import utils" in source and "from session8" not in source
    assert re.search(r"AdvancedCNN\(.*dropout=config.dropout, width=config.width\)", source)
    assert not re.search(r"^\s*(def|class) ", source, re.MULTILINE)  # logic belongs in the package


def test_findings_are_computed_and_not_typed_in():
    """Text explains how to read a figure; numbers and rankings come from captions."""
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"\d+\.\d+ ?%|0\.0[2-9]|hardest", cell.source), cell.source


def test_the_training_step_is_shown():
    (shown,) = [cell for cell in CODE if "inspect.getsource(utils.train_step)" in cell.source]
    assert "".join(output.text for output in shown.outputs).startswith(inspect.getsource(training.train_step))


def test_figures_are_committed_with_captions_and_alternative_text():
    for cell in CODE:
        for figure, caption in pairwise(cell.outputs):
            if "image/png" in figure.get("data", {}):
                alt = figure.metadata["image/png"]["alt"]
                assert len(alt) > 20 and caption.data["text/markdown"].replace("\\", "") == alt


def test_cells_are_short():
    for cell in CODE:
        lines = [line for line in cell.source.splitlines() if line and not re.match(r"(from|import) ", line)]
        assert len(lines) <= 10 or "google.colab" in cell.source, cell.source


def test_every_step_is_introduced():
    steps = ("EPOCHS =", "load_cifar10", "augment", "AdvancedCNN(", "fit", "plot_loss", "plot_misclassified")
    kinds = [cell.cell_type for cell in NOTEBOOK.cells]
    for step in steps:
        first = next(i for i, cell in enumerate(NOTEBOOK.cells) if cell.cell_type == "code" and step in cell.source)
        assert kinds[first - 1] == "markdown", step
    assert sum(cell.source.startswith("## ") for cell in NOTEBOOK.cells) >= 8


def test_the_smoke_run_of_nbmake_is_short_and_trains():
    (cell,) = [cell for cell in CODE if "parameters" in cell.metadata.get("tags", [])]
    assert cell.metadata.nbmake.mock == {"EPOCHS": 2, "BATCH_SIZE": 20, "CHECKPOINTS": False}


def test_make_sets_the_constants():
    names = re.search(r"^CONSTANTS = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(names) <= set(parameters()) and {"EPOCHS", "RECIPE"} <= set(names)


def test_is_committed_with_the_outputs_of_a_complete_run():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6


def test_its_outputs_are_of_the_real_images_and_name_no_local_path():
    text = "\n".join(output.text for cell in CODE for output in cell.outputs if output.output_type == "stream")
    assert "50,000 training images, 10,000 test images" in text and "synthetic" not in text
    assert not re.search(r"/(home|root|Users|work)/", text)
    assert "This run is finished" not in text and "Resuming" not in text  # trained from start to end
    assert "\r" not in text
    epochs, accuracy = re.search(r"(\d+) of \d+ epochs on CIFAR-10.* test (\d+\.\d+) %", text).groups()
    assert int(epochs) >= 2 and float(accuracy) >= 60


def test_its_run_is_the_published_record_of_the_default_recipe(monkeypatch):
    text = "\n".join(output.text for cell in CODE for output in cell.outputs if output.output_type == "stream")
    published = json.loads((ROOT / "results" / "AdvancedCNN_default_seed0_bfloat16.json").read_text())
    fingerprint = re.search(r"Fingerprint of images and labels: (\w+)", text)[1]
    assert fingerprint == published["data_fingerprint"]
    history = published["history"]
    for n, accuracy in enumerate(history["test_accuracy"], start=1):
        assert f"Accuracy: {round(100 * accuracy)}/10000 ({accuracy:.2f}%)" in text.split(f"Epoch {n}\n")[1]
    assert describe_record(published) in text and len(history["test_accuracy"]) == 40
    # Its folder follows from the recipe, the network, the augmentation and the fingerprint.
    monkeypatch.setattr(records, "data_fingerprint", lambda *_: fingerprint)
    config = Config.named("default", batch_size=128)
    assert f"Folder of this run: {run_folder(AdvancedCNN(), None, None, config, 'cpu').as_posix()}\n" in text


def test_no_injected_constants_are_left_in():
    assert not [cell for cell in CODE if "injected-parameters" in cell.metadata.get("tags", [])]


# -- several processes ---------------------------------------------------------------------------------------------


def run_until_trained(tmp_path, setup="", **constants):
    """Execute the notebook up to `fit` in a copy of the project. Returns its output."""
    for name in ("model_AC.py", "utils.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "session8", tmp_path / "session8", ignore=shutil.ignore_patterns("__pycache__"))
    class_folders(tmp_path / "images", per_train=8, per_test=4)
    last = next(i for i, cell in enumerate(CODE) if "utils.fit(" in cell.source)
    notebook = nbformat.read(ROOT / "Session_8.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"][: last + 1]
    settings = {"EPOCHS": 1, "BATCH_SIZE": 20, "DATA_ROOT": "images", "DEVICE": "cpu", **constants}
    code[0].source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    notebook.cells = [*code[:-2], nbformat.v4.new_code_cell(setup), *code[-2:]]
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": ""})
    return [("".join(out.get("text", "") for out in cell.outputs)) for cell in code[-2:]]


@pytest.mark.xdist_group("several processes")
def test_the_notebook_shows_the_run_of_two_processes(tmp_path):
    command, shown = run_until_trained(tmp_path, PROCESSES=2, CHECKPOINTS=False)
    assert "--nproc-per-node=2" in command and "2 processes share each batch of 20" in command
    assert "Batch_id=3" in command and "1 of 1 epoch" in command
    assert "This run is finished" in shown and "Batch_id" not in shown
    record = json.loads(next(tmp_path.glob("runs/*/record.json")).read_text())
    assert record["world_size"] == 2 and f"({record['history']['test_accuracy'][0]:.2f}%)" in shown


def test_a_notebook_on_a_machine_with_several_gpus_offers_a_command(tmp_path):
    offer, shown = run_until_trained(tmp_path, setup="torch.cuda.device_count = lambda: 3")
    assert "This machine has 3 GPUs. To train on all, set PROCESSES = 3, or run in a terminal:" in offer
    assert re.search(r"torch.distributed.run --standalone --nproc-per-node=3 .*train.py .*--epochs 1", offer)
    assert "Batch_id=3" in shown  # and trains in one process


# -- Google Colab, as far as a stand-in for its module can show -------------------------------------------------------

# What Colab has before the notebook's cells: its module; and a pip that only notes its arguments.
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
    """Return the project folder on a user's Drive, as it is in Google's cloud, with data."""
    project = tmp_path / "cloud" / "MyDrive" / "cifar10"
    project.mkdir(parents=True)
    for name in ("model_AC.py", "utils.py"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "session8", project / "session8", ignore=shutil.ignore_patterns("__pycache__"))
    class_folders(project / "data", per_train=8, per_test=4)
    return project


def run_in_colab(tmp_path, cells=None, refused=False, **constants):
    """Execute the notebook, or its first code cells, in a kernel that cannot import the project."""
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
    assert "80 training images, 40 test images" in text and "1 of 1 epoch" in text
    project = tmp_path / "content" / "drive" / "MyDrive" / "cifar10"
    (folder,) = (project / "runs").iterdir()  # on the Drive, where they survive a disconnection
    assert {"last.pt", "model.safetensors", "record.json"} <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "record.json").read_text())["n_train"] == 80
    installed = (project / "pip.txt").read_text().partition(" install ")[2]
    assert not re.search(r"torch\b|torchvision|numpy|--upgrade|-U\b|--force", installed)


def test_colab_bad_input_refused_mount(drive, tmp_path):
    with pytest.raises(Exception, match=r"Drive was not mounted \(mount failed\). Run this cell again"):
        run_in_colab(tmp_path, cells=2, refused=True)


@pytest.mark.parametrize("name", ["utils.py", "model_AC.py", "session8"])
def test_colab_bad_input_incomplete_project(drive, tmp_path, name):
    (drive / name).rename(drive / "elsewhere")
    with pytest.raises(Exception, match=rf"PROJECT_DIR is .*cifar10, which lacks {name}: copy the whole project"):
        run_in_colab(tmp_path, cells=2)


def test_colab_project_that_is_not_on_the_drive(drive, tmp_path):
    elsewhere = shutil.copytree(drive, tmp_path / "uploaded")
    run_in_colab(tmp_path, cells=2, refused=True, PROJECT_DIR=str(elsewhere))


def test_without_data_the_notebook_runs_on_the_stand_in_and_says_so(tmp_path):
    notebook = nbformat.read(ROOT / "Session_8.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source += "\nEPOCHS, BATCH_SIZE, CHECKPOINTS = 1, 20, False"
    offline = f"from session8 import data\ndata.MIRRORS, data.DATA_FOLDER = (), data.Path({str(tmp_path / 'data')!r})"
    notebook.cells = [nbformat.v4.new_code_cell(offline), *code]
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    text = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "SYNTHETIC STAND-IN" in text and "1 of 1 epoch on synthetic stand-in, NOT CIFAR-10" in text
    assert json.loads(next(tmp_path.glob("runs/*/record.json")).read_text())["data"] == data.SYNTHETIC


# Third-party packages that Colab has, by the name under which they are imported.
IN_COLAB = {"torch", "torchvision", "numpy", "scipy", "matplotlib", "PIL", "tqdm", "cv2", "IPython"}
OPTIONAL = {"onnx"}  # for the export, which says how to install it


def imported_packages():
    """Return the top-level names that the notebook, train.py and the package import, without the standard library's."""
    files = [ROOT / "model_AC.py", ROOT / "utils.py", ROOT / "train.py", *(ROOT / "session8").glob("*.py")]
    sources = [file.read_text(encoding="utf-8") for file in files] + [cell.source for cell in CODE]
    names = set()
    for node in ast.walk(ast.parse("\n".join(sources))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - {*sys.stdlib_module_names, "session8", "utils", "model_AC", "google"}


def test_colab_installs_every_package_that_it_lacks_in_the_versions_of_requirements():
    setup = next(cell.source for cell in CODE if "google.colab" in cell.source)
    installed = re.findall(r'"([^"]+)"', re.search(r"packages = \[(.*?)\]", setup, re.DOTALL)[1])
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(installed) <= set(required)
    names = {re.split(r"[<>=]", line)[0] for line in installed}
    assert names == imported_packages() - IN_COLAB - OPTIONAL
    wanted = {re.split(r"[<>=]", line)[0] for line in required}
    pip_names = {"PIL": "pillow", "cv2": None, "numpy": None, "IPython": "jupyter"}  # None: comes with another package
    assert {pip_names.get(name, name) for name in imported_packages() - OPTIONAL} - {None} <= wanted
