"""The notebook: what it promises to its readers, as committed; and the notebook in Google Colab.

nbmake executes the notebook itself as another test.
"""

import ast
import base64
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from fakes import class_folders
from nbclient import NotebookClient
from packaging.requirements import Requirement

from model_AC import AdvancedCNN
from session8 import data, records, training
from session8.config import Config
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


def test_its_folder_follows_from_recipe_network_augmentation_and_data(monkeypatch):
    text = "\n".join(output.text for cell in CODE for output in cell.outputs if output.output_type == "stream")
    fingerprint = re.search(r"Fingerprint of images and labels: (\w+)", text)[1]
    monkeypatch.setattr(records, "data_fingerprint", lambda *_: fingerprint)
    config = Config.named("default", batch_size=128)
    torch.manual_seed(config.seed)
    assert f"Folder of this run: {run_folder(AdvancedCNN(), None, None, config, 'cpu').as_posix()}\n" in text


def test_no_injected_constants_are_left_in():
    assert not [cell for cell in CODE if "injected-parameters" in cell.metadata.get("tags", [])]


# -- cells that run again ------------------------------------------------------------------------------------------


def run_cells(names, *marks):
    """Execute the first code cells that contain these marks, in this process."""
    for mark in marks:
        exec(next(cell.source for cell in CODE if mark in cell.source), names)


def test_cells_that_run_again_train_a_new_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(names, seed, *marks):
        names.update(EPOCHS=1, BATCH_SIZE=20, SEED=seed, CHECKPOINTS=False, DEVICE="cpu")
        run_cells(names, "config = ", *marks, "run_folder(", "utils.fit(")
        return names["history"]["train_loss"]

    def start():
        names = dict(zip(("train_split", "test_split"), data.synthetic_cifar10(60, 20), strict=True))
        run_cells(names, "EPOCHS =", "import utils")
        return names

    expected = run(start(), 1, "def make_model")
    again = start()
    assert run(again, 0, "def make_model") != expected
    assert run(again, 1) == expected


@pytest.mark.parametrize(
    ("constants", "synthetic", "epochs"),
    [
        ({}, False, 40),
        ({}, True, 3),
        ({"EPOCHS": 5}, True, 5),
        ({"EPOCHS": 2}, False, 2),
        ({"RECIPE": "fast"}, True, 3),
    ],
)
def test_only_the_epochs_of_the_recipe_are_cut_on_the_stand_in(constants, synthetic, epochs):
    names = {}
    run_cells(names, "EPOCHS =", "import utils")
    names |= {"train_split": SimpleNamespace(synthetic=synthetic), **constants}
    run_cells(names, "config = ")
    assert names["config"].epochs == epochs


def test_no_epochs_are_refused():
    names = {"train_split": SimpleNamespace(synthetic=True)}
    run_cells(names, "EPOCHS =", "import utils")
    names["EPOCHS"] = 0
    with pytest.raises(ValueError, match="epochs is 0; expected at least 1"):
        run_cells(names, "config = ")


# -- several processes ---------------------------------------------------------------------------------------------


def run_until_trained(tmp_path, setup="", **constants):
    """Execute the notebook up to `fit` in a copy of the project. Returns its output."""
    copy_project(tmp_path)
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
    offer, shown = run_until_trained(tmp_path, setup="torch.cuda.device_count = ([0] * 99 + [3]).pop")
    assert "This machine has 3 GPUs. To train on all, set PROCESSES = 3, or run in a terminal:" in offer
    assert re.search(r"torch.distributed.run --standalone --nproc-per-node=3 .*train.py .*--epochs 1", offer)
    assert "Batch_id=3" in shown  # and trains in one process


# -- Google Colab, as far as a stand-in for its module can show -------------------------------------------------------

# What Colab has before the notebook's cells: its module. `mount` copies the folder DRIVE_CLOUD.
STAND_IN = """
import os, resource, shutil, sys
from types import ModuleType

def mount(path):
    if "DRIVE_REFUSED" in os.environ:
        raise ValueError("mount failed")
    if not os.path.exists(path):
        shutil.copytree(os.environ["DRIVE_CLOUD"], path)
    if "DRIVE_FULL" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

colab = ModuleType("google.colab")
colab.drive = ModuleType("google.colab.drive")
colab.drive.mount = mount
sys.modules.update({"google": ModuleType("google"), "google.colab": colab, "google.colab.drive": colab.drive})
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Return a user's Drive as it is in Google's cloud, without the project. The machine's /content is empty."""
    monkeypatch.setenv("DRIVE_CLOUD", str(tmp_path / "cloud"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip fails if it has to install a package
    (tmp_path / "content").mkdir()
    (tmp_path / "cloud" / "MyDrive").mkdir(parents=True)
    return tmp_path / "cloud"


def copy_project(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model_AC.py", "utils.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "session8", folder / "session8", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def colab_cells(tmp_path, **constants):
    """Return the code cells, with /content in the test's folder."""
    cells = [cell for cell in nbformat.read(ROOT / "Session_8.ipynb", 4).cells if cell.cell_type == "code"]
    cells[0].source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in constants.items())
    for cell in cells[:2]:
        cell.source = cell.source.replace("/content", str(tmp_path / "content"))
    return cells


def test_colab_whole_notebook_from_a_mounted_drive(cloud, tmp_path):
    project = copy_project(cloud / "MyDrive" / "cifar10")
    class_folders(project / "data", per_train=8, per_test=4)
    cells = colab_cells(tmp_path, EPOCHS=1, BATCH_SIZE=20, DEVICE="cpu")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(STAND_IN), *cells])
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "content")}})
    client.execute(env={**os.environ, "PYTHONPATH": ""})
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = "\n".join(output.text for output in outputs if output.output_type == "stream")
    assert "80 training images, 40 test images" in text and "1 of 1 epoch" in text
    content, on_drive = tmp_path / "content", tmp_path / "content/drive/MyDrive/cifar10"
    assert {path.name for path in (on_drive / "data").iterdir()} == {"train", "test"}  # the cache is not on the Drive
    assert any(path.stat().st_size > 100_000 for path in (content / "cifar10-data").iterdir())
    (folder,) = (on_drive / "runs").iterdir()  # survives a disconnection
    assert {"last.pt", "model.safetensors", "record.json"} <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "record.json").read_text())["n_train"] == 80
    plots = [cell for cell in cells if "utils.plot_" in cell.source]
    for cell in plots:
        figure, caption = (output for output in cell.outputs if output.output_type == "display_data")
        assert base64.b64decode(figure.data["image/png"]).startswith(b"\x89PNG"), cell.source
        assert figure.metadata["image/png"]["alt"] == caption.data["text/plain"] != "", cell.source
    print(f"{len(plots)} figures with alternative texts")


def set_up(tmp_path, times=1, **constants):
    """Run the setup cell as a script, which then prints where it is. pip does nothing."""
    pip = tmp_path / "pip"
    pip.mkdir(exist_ok=True)
    (pip / "pip.py").touch()
    first, setup = colab_cells(tmp_path, **constants)[:2]
    report = "print(Path.cwd(), Path('runs').resolve(), os.environ['CIFAR10_CACHE'], sep='\\n')"
    script = "\n".join([STAND_IN, first.source, *[setup.source] * times, report])
    environment = {**os.environ, "PYTHONPATH": str(pip)}
    options = {"cwd": tmp_path / "content", "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-c", script], **options)


@pytest.mark.parametrize(
    ("place", "constants"),
    [
        ("drive/MyDrive/cifar10", {}),
        ("drive/MyDrive/courses/2026/vision", {"PROJECT_DIR": "/content/drive/MyDrive/courses/2026/vision"}),
        ('drive/MyDrive/it\'s "mine"', {"PROJECT_DIR": 'it\'s "mine"'}),
        ("drive/Shareddrives/Team A/cifar10", {}),
        ("drive/Shareddrives/Team A/deep/cifar10", {"PROJECT_DIR": "/content/drive/Shareddrives/Team A/deep/cifar10"}),
        ("drive/.shortcut-targets-by-id/1aB-2/cifar10", {}),
    ],
)
def test_colab_finds_the_project_on_each_kind_of_drive(cloud, tmp_path, place, constants):
    copy_project(cloud / place.removeprefix("drive/"))
    (cloud / "MyDrive/cifar10").mkdir(exist_ok=True)  # a folder of that name that is not the project
    done = set_up(tmp_path, times=2, **constants)
    content = tmp_path / "content"
    assert done.stdout.splitlines() == [f"{content / place}", f"{content / place}/runs", f"{content}/cifar10-data"]
    assert done.stderr == "" and not any((content / place / "runs").iterdir())


@pytest.mark.parametrize("name", ["elsewhere", "cifar10"])
def test_colab_project_that_is_not_on_the_drive_keeps_its_runs_there(cloud, tmp_path, monkeypatch, name):
    project, runs = copy_project(tmp_path / "content" / name), tmp_path / "content/drive/MyDrive/cifar10-runs"
    constants = {} if name == "cifar10" else {"PROJECT_DIR": f"/content/{name}"}
    monkeypatch.setenv("DRIVE_REFUSED", "1")
    refused = set_up(tmp_path, times=2, **constants).stdout
    assert refused.count(f"run this cell again and allow access. Runs go to {project}/runs, which Colab deletes") == 2
    (project / "runs" / "1a2b3c4d").mkdir(parents=True)  # trained before the Drive was allowed
    monkeypatch.delenv("DRIVE_REFUSED")
    assert set_up(tmp_path, times=2, **constants).stdout.splitlines()[:2] == [f"{project}", f"{runs}"]
    assert [folder.name for folder in runs.iterdir()] == ["1a2b3c4d"]
    monkeypatch.setenv("DRIVE_REFUSED", "1")
    assert set_up(tmp_path, **constants).stdout.splitlines()[-2] == f"{project}/runs"


@pytest.mark.parametrize("refused", [False, True])
def test_colab_clones_the_project_if_it_is_on_no_drive(cloud, tmp_path, monkeypatch, refused):
    origin = copy_project(tmp_path / "origin")
    for command in ("init -q", "add .", "-c user.name=A -c user.email=a@b.c commit -q -m A"):
        subprocess.run(["git", "-C", origin, *command.split()], check=True)
    if refused:
        monkeypatch.setenv("DRIVE_REFUSED", "1")
    done = set_up(tmp_path, times=2, REPOSITORY=origin.as_uri())
    clone = tmp_path / "content/cifar10"
    runs = clone / "runs" if refused else tmp_path / "content/drive/MyDrive/cifar10-runs"
    assert done.stdout.splitlines()[-3:-1] == [f"{clone}", f"{runs}"] and done.stderr == ""
    assert ("Colab deletes when it disconnects" in done.stdout) == refused
    assert len((clone / ".git/shallow").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("fault", "constants", "messages"),
    [
        ("DRIVE_REFUSED", {}, ["not mounted (mount failed): run this cell again and allow access", "PROJECT_DIR is "]),
        ("", {}, ["MyDrive/cifar10 (lacks session8);", "Shareddrives/Team/cifar10 (lacks model_AC.py, utils.py, se"]),
        ("", {}, ["Copy the whole project folder to your Drive and set PROJECT_DIR", "or set REPOSITORY"]),
        (
            "",
            {"PROJECT_DIR": "/content/drive/MyDrive/typo"},
            ["PROJECT_DIR is ", "MyDrive/typo', and", "cifar10 (lacks"],
        ),
        ("", {"REPOSITORY": "file:///none"}, ["'file:///none', which git cannot clone", "fatal: ", "Correct the addr"]),
        ("", {"REPOSITORY": "--bare"}, ["REPOSITORY is '--bare'", "fatal: repository '--bare' does not exist"]),
        (
            "DRIVE_FULL",
            {"PROJECT_DIR": "ours"},
            ["ours/runs cannot be written", "too large", "delete old runs and empty its"],
        ),
        (
            "DRIVE_FULL",
            {"PROJECT_DIR": "/content/local"},
            ["MyDrive/cifar10-runs cannot be written", "empty its trash"],
        ),
        ("", {"PROJECT_DIR": "occupied"}, ["occupied/runs cannot be written", "File exists", "copy the project"]),
    ],
)
def test_colab_bad_input(cloud, tmp_path, monkeypatch, fault, constants, messages):
    (copy_project(cloud / "MyDrive/cifar10") / "session8").rename(tmp_path / "not uploaded")
    (cloud / "Shareddrives" / "Team").mkdir(parents=True)
    copy_project(cloud / "MyDrive" / "ours")
    copy_project(tmp_path / "content" / "local")
    (copy_project(cloud / "MyDrive" / "occupied") / "runs").touch()
    monkeypatch.setenv(fault or "NONE", "1")
    done = set_up(tmp_path, **constants)
    assert done.returncode == 1
    assert not [message for message in messages if message not in done.stderr], done.stderr


def test_outside_the_project_folder_the_setup_cell_names_the_remedy(tmp_path):
    setup = next(cell.source for cell in CODE if "google.colab" in cell.source)
    done = subprocess.run([sys.executable, "-c", setup], cwd=tmp_path, capture_output=True, text=True)
    assert f"the working directory is {tmp_path}, from which the project cannot be imported" in done.stderr
    assert "start papermill there or with --cwd FOLDER" in done.stderr
    assert subprocess.run([sys.executable, "-c", setup], cwd=ROOT).returncode == 0


def test_without_data_the_notebook_runs_on_the_stand_in_and_says_so(tmp_path):
    notebook = nbformat.read(ROOT / "Session_8.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source += "\nEPOCHS, BATCH_SIZE, CHECKPOINTS = 1, 20, False"
    offline = f"from session8 import data\ndata.MIRRORS, data.DATA_FOLDER = (), data.Path({str(tmp_path / 'data')!r})"
    notebook.cells = [nbformat.v4.new_code_cell(offline), *code]
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    text = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "SYNTHETIC STAND-IN" in text and re.search("1 of 1 epochs? on synthetic stand-in, NOT CIFAR-10", text)
    assert json.loads(next(tmp_path.glob("runs/*/record.json")).read_text())["data"] == data.SYNTHETIC


# Third-party packages that Colab has, by the name under which they are imported.
IN_COLAB = {"torch", "torchvision", "numpy", "scipy", "matplotlib", "PIL", "psutil", "tqdm", "cv2", "IPython"}
OPTIONAL = {"onnx"}  # for the export, which says how to install it
REQUIRED = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]


def imported_packages(*scripts):
    """Return the top-level names that notebook, package and scripts import, without the standard library's."""
    files = [ROOT / "model_AC.py", ROOT / "utils.py", *scripts, *(ROOT / "session8").glob("*.py")]
    sources = [file.read_text(encoding="utf-8") for file in files] + [cell.source for cell in CODE]
    names = set()
    for node in ast.walk(ast.parse("\n".join(sources))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - {*sys.stdlib_module_names, "session8", "utils", "model_AC", "google"} - OPTIONAL


def test_colab_installs_every_package_that_it_lacks_in_the_versions_of_requirements():
    setup = next(cell.source for cell in CODE if "google.colab" in cell.source)
    installed = re.findall(r'"([^"]+)"', re.search(r"packages = \[(.*?)\]", setup, re.DOTALL)[1])
    assert set(installed) <= set(REQUIRED)
    assert {Requirement(line).name for line in installed} == imported_packages() - IN_COLAB - {"torchsummary"} | {
        "torchsummary"
    }
    pip_names = {"PIL": "pillow", "cv2": None, "numpy": None, "IPython": "jupyter"}  # None: comes with another package
    imported = {pip_names.get(name, name) for name in imported_packages(ROOT / "train.py")} - {None}
    assert imported <= {Requirement(line).name for line in REQUIRED}


def test_colabs_versions_meet_the_requirements():
    """In Colab, the setup cell therefore installs none of these."""
    lines = (ROOT / "tests" / "colab-requirements.txt").read_text().splitlines()
    colab = dict(line.split("==") for line in lines if line[0] != "#")
    required = [Requirement(line) for line in REQUIRED]
    assert not [str(line) for line in required if line.name in colab and colab[line.name] not in line.specifier]
    assert {"torch", "torchvision", "albumentations", "matplotlib", "safetensors"} <= colab.keys() & {
        line.name for line in required
    }


def test_a_checkout_on_windows_keeps_line_ends(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "core.autocrlf=true", "-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    content = {"a.py": b"1\n2\n", "run": b"#!/bin/sh\n", "a.png": b"1\r\n2\n", "a.safetensors": b"{}\r\n\n"}
    for name, data_ in content.items():
        (tmp_path / name).write_bytes(data_)
    for command in ("add .", "commit -qm A", "rm -qr .", "checkout -q HEAD ."):
        subprocess.run([*git, *command.split()], check=True)
    assert {name: (tmp_path / name).read_bytes() for name in content} == content
