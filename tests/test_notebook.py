"""The notebook: cells that run again, its committed outputs, and the whole of it in Google Colab.

nbmake executes the notebook itself as another test, with the recipe's augmentation.
"""

import ast
import base64
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
from fakes import class_folders
from nbclient import NotebookClient
from packaging.requirements import Requirement

import train
from session8 import data
from session8.records import describe_record

ROOT = Path(__file__).resolve().parent.parent


def code_cells():
    return [cell for cell in nbformat.read(ROOT / "Session_8.ipynb", as_version=4).cells if cell.cell_type == "code"]


CODE = code_cells()


def test_committed_outputs_are_those_of_the_run_in_results():
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = "\n".join(output.text for output in outputs if output.output_type == "stream")
    record = json.loads((ROOT / "results" / "notebook" / "record.json").read_text(encoding="utf-8"))
    assert describe_record(record) in text and record["n_train"] == 50000
    assert not re.search(r"/(home|root|Users|work)/", text)  # folders of the machine


# -- cells, executed in this process -------------------------------------------------------------------------------


def run_cells(names, *marks, **constants):
    """Execute the first code cells that contain these marks, and then set constants after the first of them."""
    for mark in marks:
        exec(next(cell.source for cell in CODE if mark in cell.source), names)
        names |= constants


SETUP = ("EPOCHS =", "google.colab", "import utils")
TRAINING = ("TRANSFORM =", "def make_model", "run_folder(", "utils.fit(")


def test_cells_that_run_again_train_a_new_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start():
        names = {}
        run_cells(names, *SETUP, EPOCHS=1, BATCH_SIZE=20, CHECKPOINTS=False, DEVICE="cpu")
        names["train_split"], names["test_split"] = data.synthetic_cifar10(60, 20)
        return names

    def losses(names, seed):
        names["SEED"] = seed
        run_cells(names, "config = ", *TRAINING)
        return names["history"]["train_loss"]

    expected = losses(start(), 1)
    again = start()
    assert losses(again, 0) != expected
    assert losses(again, 1) == expected


@pytest.mark.parametrize("recipe, constant, stand_in, real", [("default", None, 3, 40), ("fast", 5, 5, 5)])
def test_without_cifar10_the_stand_in_is_announced_and_trained_for_few_epochs(recipe, constant, stand_in, real, capsys):
    names = {}
    run_cells(names, *SETUP, EPOCHS=constant, RECIPE=recipe)
    run_cells(names, "load_cifar10", "config = ")
    printed = capsys.readouterr().out
    assert "SYNTHETIC STAND-IN" in printed and "synthetic stand-in, NOT CIFAR-10: 2,000 training images" in printed
    assert names["config"].epochs == stand_in
    run_cells({**names, "train_split": SimpleNamespace(synthetic=False)}, "config = ")
    names["train_split"] = SimpleNamespace(synthetic=False)
    run_cells(names, "config = ")
    assert names["config"].epochs == real


def test_the_run_of_the_command_line_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "images", per_train=6, per_test=4)  # one batch
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    options = re.search(r"constants of the notebook as options, such as `(.*)`", text)[1].split()
    monkeypatch.setattr(sys, "argv", ["train.py", *options, "--epochs", "1", "--data", "images", "--device", "cpu"])
    train.main()
    trained = capsys.readouterr().out
    names = {}
    run_cells(names, *SETUP, EPOCHS=1, DATA_ROOT="images", DEVICE="cpu")
    run_cells(names, "load_cifar10", "config = ", *TRAINING)
    shown = capsys.readouterr().out
    assert "Batch_id=0" in trained and "This run is finished" in shown and "Batch_id" not in shown
    assert f"({names['history']['test_accuracy'][0]:.2f}%)" in trained


def test_outside_the_project_folder_the_setup_cell_names_the_remedy(tmp_path):
    setup = next(cell.source for cell in CODE if "google.colab" in cell.source)
    done = subprocess.run([sys.executable, "-c", setup], cwd=tmp_path, capture_output=True, text=True)
    assert f"the working directory is {tmp_path}, from which the project cannot be imported" in done.stderr
    assert "start papermill there or with --cwd FOLDER" in done.stderr
    assert subprocess.run([sys.executable, "-c", setup], cwd=ROOT).returncode == 0


# -- Google Colab, as far as a stand-in for its module can show ----------------------------------------------------

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
    folder.mkdir(parents=True)
    for name in ("model_AC.py", "utils.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "session8", folder / "session8", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def colab_cells(tmp_path, **constants):
    """Return the code cells, with /content in the test's folder."""
    cells = code_cells()
    cells[0].source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in constants.items())
    for cell in cells[:2]:
        cell.source = cell.source.replace("/content", str(tmp_path / "content"))
    return cells


def test_colab_whole_notebook_from_a_mounted_drive_with_a_pipeline_of_ones_own(cloud, tmp_path):
    project = copy_project(cloud / "MyDrive" / "cifar10")
    class_folders(project / "data", per_train=8, per_test=4)
    cells = colab_cells(tmp_path, EPOCHS=1, BATCH_SIZE=8, DEVICE="cpu")
    (pipeline,) = [cell for cell in cells if "# TRANSFORM = A.Compose(" in cell.source]
    pipeline.source = pipeline.source.replace("\n# ", "\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(STAND_IN), *cells])
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "content")}})
    client.execute(env={**os.environ, "PYTHONPATH": ""})

    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = "\n".join(output.text for output in outputs if output.output_type == "stream")
    assert "80 training images, 40 test images" in text and "1 of 1 epoch" in text
    (table,) = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert "<th>accuracy</th>" in table and "<th>6 views</th>" in table
    content, on_drive = tmp_path / "content", tmp_path / "content/drive/MyDrive/cifar10"
    assert {path.name for path in (on_drive / "data").iterdir()} == {"train", "test"}  # the cache is not on the Drive
    assert any(path.stat().st_size > 100_000 for path in (content / "cifar10-data").iterdir())
    (folder,) = (on_drive / "runs").iterdir()  # survives a disconnection
    assert {"last.pt", "model.safetensors", "record.json"} <= {file.name for file in folder.iterdir()}
    record = json.loads((folder / "record.json").read_text())
    assert record["n_train"] == 80 and "ColorJitter" in record["transform"]
    plots = [cell for cell in cells if "utils.plot_" in cell.source]
    for cell in plots:
        (pair,) = [pair for pair in pairwise(cell.outputs) if "image/png" in pair[0].get("data", {})]
        figure, caption = pair
        assert base64.b64decode(figure.data["image/png"]).startswith(b"\x89PNG"), cell.source
        assert figure.metadata["image/png"]["alt"] == caption.data["text/plain"] != "", cell.source
    print(f"{len(plots)} figures with alternative texts")


def set_up(tmp_path, times=1, **constants):
    """Run the setup cell as a script, which then prints where it is. pip only writes its arguments to a file."""
    pip = tmp_path / "pip"
    pip.mkdir(exist_ok=True)
    (pip / "pip.py").write_text(f"import sys; open({str(pip / 'arguments')!r}, 'w').write('\\n'.join(sys.argv))")
    first, setup = colab_cells(tmp_path, **constants)[:2]
    report = "print(Path.cwd(), RUNS.absolute(), os.environ['CIFAR10_CACHE'], sep='\\n')"
    script = "\n".join([STAND_IN, first.source, *[setup.source] * times, report])
    environment = {**os.environ, "PYTHONPATH": str(pip)}
    options = {"cwd": tmp_path / "content", "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-c", script], **options)


@pytest.mark.parametrize(
    "place, constants",
    [
        ("drive/MyDrive/cifar10", {}),
        ("drive/MyDrive/courses/2026/vision", {"PROJECT_DIR": "/content/drive/MyDrive/courses/2026/vision"}),
        ('drive/MyDrive/it\'s "mine"', {"PROJECT_DIR": 'it\'s "mine"'}),
        ("drive/Shareddrives/Team A/cifar10", {}),
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


@pytest.mark.parametrize(
    "fault, constants, words",
    [
        ("DRIVE_REFUSED", {}, ["not mounted (mount failed): run this cell again and allow access", "PROJECT_DIR is "]),
        ("", {}, ["none of /", "MyDrive/cifar10, ", "Shareddrives/Team/cifar10, ", "contains model_AC.py, utils.py, "]),
        ("", {"PROJECT_DIR": "typo"}, ["'typo'", "MyDrive/typo, ", "copy the whole project folder", "set REPOSITORY"]),
        ("", {"REPOSITORY": "file:///none"}, ["'file:///none', which git cannot clone", "fatal: ", "correct the addr"]),
        ("", {"REPOSITORY": "--bare"}, ["REPOSITORY is '--bare'", "fatal: repository '--bare' does not exist"]),
        ("DRIVE_FULL", {"PROJECT_DIR": "ours"}, ["ours/runs cannot be written", "too large", "delete old runs and"]),
        ("DRIVE_FULL", {"PROJECT_DIR": "/content/local"}, ["MyDrive/cifar10-runs cannot be written", "its trash"]),
        ("", {"PROJECT_DIR": "occupied"}, ["occupied/runs cannot be written", "File exists", "copy the project"]),
    ],
)
def test_colab_bad_input(cloud, tmp_path, monkeypatch, fault, constants, words):
    (copy_project(cloud / "MyDrive/cifar10") / "session8").rename(tmp_path / "not uploaded")
    (cloud / "Shareddrives" / "Team").mkdir(parents=True)
    copy_project(cloud / "MyDrive" / "ours")
    copy_project(tmp_path / "content" / "local")
    (copy_project(cloud / "MyDrive" / "occupied") / "runs").touch()
    monkeypatch.setenv(fault or "NONE", "1")
    done = set_up(tmp_path, **constants)
    assert done.returncode == 1
    assert not [word for word in words if word not in done.stderr], done.stderr


def read_requirements(file):
    """Return the lines of a file of requirements by the name of the package."""
    lines = (ROOT / file).read_text().splitlines()
    return {Requirement(line).name: line for line in lines if line[0] != "#"}


def test_colab_has_or_installs_every_package_that_the_notebook_imports(cloud, tmp_path):
    copy_project(cloud / "MyDrive" / "cifar10")
    set_up(tmp_path)
    arguments = (tmp_path / "pip" / "arguments").read_text().splitlines()
    required, colab = (read_requirements(name) for name in ("requirements.txt", "tests/colab-requirements.txt"))
    installed = {name for name, line in required.items() if line in arguments}
    assert {"albumentations", "torchsummary"} <= installed and "torch" not in installed

    files = [ROOT / "model_AC.py", ROOT / "utils.py", *(ROOT / "session8").glob("*.py")]
    sources = [file.read_text(encoding="utf-8") for file in files] + [cell.source for cell in CODE]
    nodes = list(ast.walk(ast.parse("\n".join(sources))))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {"PIL": "pillow", "cv2": "opencv-python-headless", "IPython": "ipython"}
    packages = {names.get(name, name) for name in (module.partition(".")[0] for module in modules)}
    packages -= {*sys.stdlib_module_names, "session8", "utils", "model_AC", "google", "onnx"}  # onnx is optional
    assert packages <= colab.keys() | installed
    come_with_others = {"numpy", "opencv-python-headless", "ipython"}
    assert packages <= required.keys() | come_with_others


def test_colabs_versions_meet_the_requirements():
    """In Colab, the setup cell therefore installs none of these."""
    colab = {name: line.partition("==")[2] for name, line in read_requirements("tests/colab-requirements.txt").items()}
    required = {name: Requirement(line) for name, line in read_requirements("requirements.txt").items()}
    assert not [name for name in required.keys() & colab.keys() if colab[name] not in required[name].specifier]
    assert {"torch", "torchvision", "albumentations", "matplotlib", "pandas"} <= required.keys() & colab.keys()
