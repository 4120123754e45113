"""utils.py is an index, and the package's imports point one way."""

import ast
from pathlib import Path

import pytest

import utils

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted(path.stem for path in (ROOT / "session8").glob("*.py"))
LOWEST = {"config", "console", "data", "device", "distributed"}
MIDDLE = {*LOWEST, "augment", "loaders"}
# What each module may import from the package.
ALLOWED = {
    "__init__": set(),
    **{name: {"console"} for name in LOWEST},
    "distributed": {"console", "device"},
    "data": {"checkpoint", "images"},
    **{name: set() for name in ("images", "console", "checkpoint")},
    "launch": {"config"},
    "augment": LOWEST,
    "loaders": {*LOWEST, "augment"},
    "records": {*MIDDLE, "checkpoint"},
    "training": {*MIDDLE, "checkpoint", "records"},
    "trainer": {*MIDDLE, "checkpoint", "records", "training"},
    "lr_finder": {*MIDDLE, "checkpoint", "training", "trainer"},
    **{name: {*MIDDLE, "images", "training"} for name in ("analysis", "inference")},
    "evaluate": {*MIDDLE, "checkpoint", "records", "training"},
    "plots": {"console", "data"},
}


def imports(path):
    """Return the modules that a file imports: {module: names}."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update({alias.name: {alias.name} for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("name", PACKAGE)
def test_the_package_imports_in_one_direction_and_nothing_of_the_root(name):
    found = imports(ROOT / "session8" / f"{name}.py")
    inside = {module.removeprefix("session8.") for module in found if module.startswith("session8.")}
    inside |= found.get("session8", set())
    assert inside <= ALLOWED[name]
    root = {path.stem for path in ROOT.glob("*.py")} & set(found)
    assert root == ({"model_AC"} if name == "checkpoint" else set())  # load_model creates an AdvancedCNN


def test_the_plots_import_only_class_names():
    assert imports(ROOT / "session8" / "plots.py")["session8.data"] == {"CLASSES"}


def test_utils_is_an_index_without_logic():
    text = (ROOT / "utils.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    _, *from_package, exported = ast.parse(text).body  # after the docstring
    assert all(isinstance(node, ast.ImportFrom) and node.module.startswith("session8.") for node in from_package)
    names = {alias.name for node in from_package for alias in node.names}
    assert exported.targets[0].id == "__all__" and set(utils.__all__) == names
    assert len(utils.__all__) == len(set(utils.__all__)) and all(hasattr(utils, name) for name in names)


def test_only_the_notebook_imports_from_utils():
    files = [path for folder in ("session8", "benchmarks", "results") for path in (ROOT / folder).glob("*.py")]
    files += [ROOT / f"{name}.py" for name in ("train", "model_AC", "hubconf")]
    assert not [path for path in files if "utils" in imports(path)]


def test_the_root_has_the_seed_projects_files_the_command_and_the_entry_point_of_pytorch_hub():
    assert {path.name for path in ROOT.glob("*.py")} == {"model_AC.py", "utils.py", "train.py", "hubconf.py"}
