"""What the notebook promises to its readers, read from the file; nbmake executes it beside these tests."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = nbformat.read(ROOT / "Session_8.ipynb", 4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def parameters():
    (cell,) = [cell for cell in CODE if "parameters" in cell.metadata.get("tags", [])]
    return re.findall(r"^(\w+) = ", cell.source, re.MULTILINE)


def test_imports_the_network_and_the_utilities():
    source = "\n".join(cell.source for cell in CODE)
    assert "from model_AC import AdvancedCNN" in source and "import utils" in source
    assert re.search(r"AdvancedCNN\(.*dropout=config.dropout\)", source)  # which one of the recipes sets to 0
    assert not re.search(r"^\s*(def|class) ", source, re.MULTILINE)  # logic belongs in the modules


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


def test_make_can_set_the_constants():
    names = re.search(r"^CONSTANTS = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(names) <= set(parameters()) and {"EPOCHS", "RECIPE"} <= set(names)


def test_is_committed_with_the_outputs_of_a_whole_run():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6


def test_its_outputs_are_of_the_real_images_and_without_paths_of_a_machine():
    text = "\n".join(output.text for cell in CODE for output in cell.outputs if output.output_type == "stream")
    assert "50,000 training images, 10,000 test images" in text and "synthetic" not in text
    assert not re.search(r"/(home|root|Users|work)/", text)
    assert "\r" not in text
    epochs, accuracy = re.search(r"(\d+) of \d+ epochs on CIFAR-10.* test (\d+\.\d+) %", text).groups()
    assert int(epochs) >= 10 and float(accuracy) >= 82


def test_no_constants_of_somebodys_run_are_left_in():
    assert not [cell for cell in CODE if "injected-parameters" in cell.metadata.get("tags", [])]
