"""Windows and macOS, as far as Linux can show: spawned workers, and a folder whose name is no ASCII word."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fakes import class_folders

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import json
import multiprocessing
import sys

import torch

from session8 import training as utils
from model_AC import AdvancedCNN

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    torch.set_num_threads(1)
    splits = utils.load_cifar10("Bilder für später")
    config = utils.Config(epochs=2, batch_size=20, precision="float32")
    histories = []
    for workers in (0, 2):
        torch.manual_seed(0)
        folder = f"Läufe mit {workers}"
        history = utils.fit(AdvancedCNN(width=0.5), *splits, config, "cpu", folder, num_workers=workers)
        histories.append({name: values for name, values in history.items() if name != "seconds"})
    with open("Ergebnis ü.json", "w") as file:
        json.dump(histories, file)
"""


def test_spawned_workers_give_the_same_result_in_a_folder_with_blanks_and_umlauts(tmp_path):
    project = tmp_path / "Mein Projekt (schön)"
    project.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, project)
    class_folders(project / "Bilder für später", per_train=6, per_test=2)
    (project / "run it.py").write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "run it.py"], cwd=project, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    here, spawned = json.loads((project / "Ergebnis ü.json").read_text())
    assert here == spawned and len(here["test_accuracy"]) == 2
    assert (project / "Läufe mit 2" / "last.pt").is_file()
    assert not [path for path in project.rglob("*") if path.is_symlink()]
