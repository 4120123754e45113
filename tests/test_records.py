"""The identity of a run, its environment, its record, and runs side by side."""

import hashlib
import importlib
import itertools
import json
import linecache
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import albumentations as A
import pytest
import torch
from networks import Linear, small_network

from model_AC import AdvancedCNN
from session8 import records, start
from session8.config import Config
from session8.data import Split, synthetic_cifar10
from session8.records import describe_record, final_metrics, source_hashes, write_record
from session8.runs import read_runs, runs_table
from session8.start import run_folder
from session8.training import fit

ROOT = Path(__file__).resolve().parent.parent

# -- identity ------------------------------------------------------------------------------------------------------


def edit(monkeypatch, *names):
    """Have files seem to be edited on disk."""
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name in names else b""))


def test_run_folder_is_named_after_configuration_network_augmentation_optimizer_and_data(synthetic, monkeypatch):
    def name(model=None, splits=synthetic, device="cpu", transform=None, **changes):
        return run_folder(model or small_network(), *splits, Config(**changes), device, "runs", transform)

    first = name()
    assert re.fullmatch(r"runs.[0-9a-f]{8}", str(first))
    images, labels = synthetic[0].images.copy(), synthetic[0].labels.copy()
    images[0, 0, 0, 0] ^= 1
    labels[0] ^= 1
    with torch.no_grad():
        rounded_otherwise = small_network()
        for parameter in rounded_otherwise.parameters():
            parameter.mul_(1 + 2**-23)
    assert first == name() == name(rounded_otherwise)
    others = [
        name(lr=0.02),
        name(seed=1),
        name(batch_size=128),
        name(small_network(seed=6)),  # training starts from other weights
        name(AdvancedCNN()),
        name(Linear()),
        name(splits=synthetic_cifar10(300, 99)),
        name(splits=(Split(images, synthetic[0].labels, "one bit differs"), synthetic[1])),
        name(splits=(Split(synthetic[0].images, labels, "one label differs"), synthetic[1])),
        name(transform=A.Compose([A.RandomCrop(32, 32)])),
        name(transform=A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(p=0.1)])),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Config, "batch_size_on", lambda *_: 256)  # as on another kind of device
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(start, "make_optimizer", lambda model, _: torch.optim.Adam(model.parameters()))
        others.append(name())
    assert len({first, *others}) == 1 + len(others)
    edit(monkeypatch, "training.py")  # source code is no part of the name
    assert name() == first


# -- environment ---------------------------------------------------------------------------------------------------


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_source_hashes_are_of_the_files_and_layers_that_shape_the_result():
    hashes = source_hashes(small_network())
    layers = hashes.pop("layers of AdvancedCNN")
    assert {"model_AC.py", "session8/augment.py", "session8/training.py", "session8/loaders.py"} <= hashes.keys()
    assert hashes == {name: sha256(ROOT / name) for name in hashes}
    assert source_hashes(AdvancedCNN(dropout=0.2, width=0.5))["layers of AdvancedCNN"] != layers


def test_files_that_were_edited_since_the_import_have_no_hash(monkeypatch, synthetic, capsys):
    before = source_hashes(small_network())
    edit(monkeypatch, "model_AC.py", "augment.py")
    history = fit(small_network(), *synthetic, Config(epochs=1, batch_size=100), "cpu")
    edited = {"model_AC.py": records.EDITED, "session8/augment.py": records.EDITED}
    assert history["run"]["sources"] == {**before, **edited}
    assert "Edited since the import: model_AC.py, session8/augment.py. Restart" in capsys.readouterr().out


def test_the_file_of_a_network_counts_as_it_was_first_seen(tmp_path, monkeypatch):
    path = tmp_path / "user_network.py"
    path.write_text("from torch import nn\nclass Network(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    network = importlib.import_module("user_network").Network
    assert source_hashes(network(1, 1))["user_network.py"] == sha256(path)
    path.write_text(path.read_text().replace("pass", "scale = 2"))
    assert source_hashes(network(1, 1))["user_network.py"] == records.EDITED


def test_a_network_from_a_notebook_has_the_hash_of_its_source(monkeypatch):
    notebook = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    counter = itertools.count()

    def entry(cell, has_source=True):
        name = f"<cell {next(counter)}>"
        if has_source:
            linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
        exec(compile(cell, name, "exec"), vars(notebook))
        return source_hashes(notebook.Network()).get("Network in a notebook")

    cell = "from torch import nn\nclass Network(nn.Module):\n  def forward(self, x):\n    return 2 * x"
    first = entry(cell)
    assert re.fullmatch("[0-9a-f]{64}", first) and entry(f"\n{cell}") == first
    assert entry(cell.replace("2 * x", "3 * x")) not in (first, None)
    assert entry(cell, has_source=False) is None


def test_the_commit_is_that_of_the_repository_that_tracks_the_project(tmp_path, monkeypatch):
    package = tmp_path / "copy" / "session8"
    package.mkdir(parents=True)
    (package / "records.py").touch()
    (tmp_path / "other.py").touch()
    monkeypatch.setattr(records, "PACKAGE", package)

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit_after_restart():
        records.project_commit.cache_clear()
        return records.project_commit()

    git("init", "-q")
    git("add", "other.py")
    git("commit", "-qm", "other")
    assert commit_after_restart() is None  # a copy in another repository
    git("add", "copy")
    git("commit", "-qm", "project")
    commit = git("rev-parse", "HEAD")
    assert commit_after_restart() == commit
    git("checkout", "-q", "HEAD~")
    assert records.project_commit() == commit  # without a restart
    git("checkout", "-q", "-")
    (package / "records.py").write_text("edited")
    assert commit_after_restart() == f"{commit}-dirty"
    records.project_commit.cache_clear()


def test_a_checkout_on_windows_has_the_same_source_hashes(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "core.autocrlf=true", "-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    content = {"a.py": b"1\n2\n", "run": b"#!/bin/sh\n", "a.png": b"1\r\n2\n", "a.safetensors": b"{}\r\n\n"}
    for name, text in content.items():
        (tmp_path / name).write_bytes(text)
    for command in ("add .", "commit -qm A", "rm -qr .", "checkout -q HEAD ."):
        subprocess.run([*git, *command.split()], check=True)
    assert {name: (tmp_path / name).read_bytes() for name in content} == content


# -- the record ----------------------------------------------------------------------------------------------------


def interrupt(_):
    raise KeyboardInterrupt


def test_a_record_holds_what_is_needed_to_repeat_the_run(synthetic, tmp_path, monkeypatch):
    config, transform = Config(epochs=2, batch_size=64, seed=3), A.Compose([A.CenterCrop(32, 32)])
    folder = tmp_path / "new folder"
    fit(small_network(), *synthetic, config, "cpu", folder, transform=transform, on_epoch=interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(records, "device_name", lambda _: "another machine")
        model = small_network()
        history = fit(model, *synthetic, config, "cpu", folder, transform=transform)
    path = folder / "record.json"
    record = write_record(path, model, *synthetic, config, history, "cpu", {2: 12.5, 6: 13.0})
    assert json.loads(path.read_text()) == record
    assert record["model"] == "AdvancedCNN" and record["width"] == 0.5
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["pflop"] == pytest.approx(6e-15 * 2 * 300 * record["macs"], abs=1e-6) and record["macs"] > 1e6
    assert "NOT CIFAR-10" in record["data"] and (record["n_train"], record["n_test"]) == (300, 100)
    assert record["config"] == asdict(config) and record["batch_size"] == 64
    assert {**record["history"], "run": history["run"]} == history and len(record["history"]["lr"]) == 2
    assert record["seconds"] == pytest.approx(sum(history["seconds"]), abs=0.1)
    assert record["arithmetic"] in ("float32", "bfloat16") and record["augmentation"] == "albumentations"
    assert "CenterCrop" in record["transform"] and not record["trained_before"]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0] and "numpy" in record["versions"]
    assert record["sources"] == source_hashes(model) and record["commit"] == records.project_commit()
    assert (record["resumed"], record["world_size"], len(record["devices"])) == (1, 1, 1)
    assert record["device"] == "another machine" != record["first_start"]["device"]
    accuracy = history["test_accuracy"][-1]
    assert f"2 of 2 epochs on {record['data']}, another machine, in " in describe_record(record)
    assert describe_record(record).endswith(f"test {accuracy:.2f} %")
    assert final_metrics(record)["test_accuracy"] == accuracy and final_metrics(record)["test_accuracy_6_views"] == 13.0
    shown = fit(small_network(), *synthetic, config, "cpu", folder, transform=transform)  # a finished run
    again = write_record(path, model, *synthetic, config, shown, "cpu", {2: 12.5, 6: 13.0})
    assert again == {**record, "finished": again["finished"]}


class NoCopy(Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("cannot be copied")


def test_a_record_without_epochs_of_a_network_whose_macs_cannot_be_counted(synthetic, tmp_path):
    history = {name: [] for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds")}
    record = write_record(tmp_path / "record.json", NoCopy(), *synthetic, Config(), history, "cpu")
    assert "0 of 40 epochs" in describe_record(record) and record["resumed"] == 0
    assert record["macs"] is None and "NaN" not in (tmp_path / "record.json").read_text()
    assert final_metrics(record) == {}


# -- runs side by side ---------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the record of a run: changes are to its entries, or to the fields of its recipe."""

    def write(folder, accuracy=80.0, recipe="default", entries=(), **changes):
        config = Config.named(recipe, **{"epochs": 2, **changes})
        record = {
            "model": "AdvancedCNN", "data": "CIFAR-10, class folders", "data_fingerprint": "489ffb261ecf461a",
            "config": asdict(config), "batch_size": 128, "device": "one CPU", "arithmetic": "float32",
            "history": {"test_accuracy": [50.0, accuracy], "seconds": [60.0, 120.0]}, "views": {"2": accuracy + 1},
            "sources": {"a.py": "1"}, "versions": {"torch": "2.9"}, **dict(entries),
        }  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "record.json").write_text(json.dumps(record))

    return write


def test_labels_name_the_recipe_and_what_the_run_changes(write, tmp_path):
    write("a")
    write("b", seed=1)
    write("c", lr=0.05)
    write("d", recipe="fast")
    write("e", recipe="fast", cutout=8, epochs=5, seed=1)
    expected = {
        "a": "default, epochs 2, seed 0",
        "b": "default, epochs 2, seed 1",
        "c": "default, epochs 2, lr 0.05, seed 0",
        "d": "fast, epochs 2, seed 0",
        "e": "fast, epochs 5, cutout 8, seed 1",
    }
    runs = read_runs(tmp_path)
    assert {run["folder"]: run["label"] for run in runs} == expected
    assert [run["group"] == runs[0]["group"] for run in runs] == [True, True, False, False, False]
    columns = ["recipe", "epochs", "lr", "cutout", "seed"]
    results = ["epochs done", "accuracy", "2 views", "minutes", "device", "folder"]
    assert list(runs_table(runs)) == columns + results
    assert list(runs_table(runs[:1])) == results


def test_a_table_of_two_recipes_has_their_results_and_means_over_seeds(write, tmp_path):
    write("a", 80.0)
    write("b", 82.0, seed=1)
    write("c", 87.0, seed=2)
    write("d", 90.0, recipe="fast")
    table = runs_table(read_runs(tmp_path))
    assert list(table) == ["recipe", "seed", "epochs done", "accuracy", "2 views", "minutes", "device", "folder"]
    assert list(table.sort_values("accuracy", ascending=False)["folder"]) == ["d", "c", "b", "a"]
    assert list(table.loc[0]) == ["default", 0, 2, 80.0, 81.0, 3.0, "one CPU", "a"]
    means = table.groupby("recipe")["accuracy"].agg(["mean", "std", "count"])
    # Mean 83, deviations -3, -1, 4: sd sqrt(26 / 2).
    assert list(means.loc["default"]) == pytest.approx([83, math.sqrt(13), 3])
    assert list(means.loc["fast"]) == pytest.approx([90, math.nan, 1], nan_ok=True)


@pytest.mark.parametrize(
    "entries, column, label",
    [
        ({"model": "ResNet20"}, "model", "ResNet20, default"),
        ({"batch_size": 64}, "batch_size", "default, batch_size 64"),
        ({"data": "synthetic stand-in"}, "data", "default, data synthetic stand-in (489ffb26)"),
        ({"data_fingerprint": "0123456789abcdef"}, "data", "default, data CIFAR-10, class folders (01234567)"),
        ({"arithmetic": "bfloat16"}, "arithmetic", "default, arithmetic bfloat16"),
        ({"world_size": 2}, "world_size", "default, world_size 2"),
        ({"trained_before": True}, "trained_before", "default, trained_before True"),
        ({"device": "another CPU"}, "device", "default, device another CPU"),
        ({"config": {**asdict(Config()), "future": 7}}, "future", "default, future 7"),
        ({"transform": "Compose([...])"}, "transform", "default, transform [0-9a-f]{8}"),
        ({"sources": {"a.py": "2"}}, "code", "default, code [0-9a-f]{8}"),
        ({"versions": {"torch": "2.10"}}, "code", "default, code [0-9a-f]{8}"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_told_apart(entries, column, label, write, tmp_path):
    write("a", epochs=40)
    write("b", epochs=40, seed=1)
    write("c", epochs=40, entries=entries)
    a, b, c = runs = read_runs(tmp_path)
    assert a["group"] == b["group"] != c["group"]
    assert re.fullmatch(label.replace("(", r"\(").replace(")", r"\)"), c["group"])
    assert column in runs_table(runs) and "seed 0" in c["label"]


def test_settings_that_explain_other_code_leave_it_out_and_equal_runs_are_told_apart_by_folder(write, tmp_path):
    write("a", entries={"sources": {"layers": "narrow"}})
    write("b", recipe="fast", entries={"sources": {"layers": "wide"}})
    write("c", recipe="fast", entries={"sources": {"layers": "wide"}})
    runs = read_runs(tmp_path)
    assert [run["label"] for run in runs] == ["default", "fast, b", "fast, c"]
    assert "code" not in runs_table(runs)


def test_published_records_of_earlier_versions_are_read(tmp_path, capsys):
    published = sorted((ROOT / "results").glob("*.json"))
    for path in published:
        (tmp_path / path.stem).mkdir()
        shutil.copy(path, tmp_path / path.stem / "record.json")
    runs = read_runs(tmp_path)
    assert len(runs) == len(published) > 3 and capsys.readouterr().out == ""
    table = runs_table(runs)
    means = table.groupby([run["group"] for run in runs])["accuracy"].agg(["mean", "std", "count"])
    (same,) = (means.loc[name] for name in means.index if "AdvancedCNN, one_cycle" in name and "AMD EPYC" in name)
    # 93.01, 93.11 and 93.16 %, seeds 0 to 2.
    assert list(same) == pytest.approx([93.0933, 0.0764, 3], abs=1e-4)


def test_bad_input_damaged_and_foreign_records_are_named_and_skipped(write, tmp_path, capsys):
    write("a")
    whole = json.loads((tmp_path / "a" / "record.json").read_text())
    texts = {"t": "{", "u": '{"answer": 42}', "v": "[]"}
    changes = ({"config": None}, {"data": None}, {"history": {"test_accuracy": ["x"], "seconds": []}})
    texts |= {name: json.dumps({**whole, **change}) for name, change in zip("xyz", changes, strict=True)}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(text)
    (tmp_path / "no record yet").mkdir()
    write("b", entries={"history": {"test_accuracy": [], "seconds": []}, "views": {}})  # interrupted in its first epoch
    runs = read_runs(tmp_path)
    assert [run["folder"] for run in runs] == ["a", "b"] and math.isnan(runs_table(runs)["accuracy"][1])
    printed = capsys.readouterr().out
    assert all(f"{name}/record.json' is skipped: not a record" in printed for name in texts)
    assert read_runs(tmp_path / "nowhere") == [] and runs_table([]).empty
