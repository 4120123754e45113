"""The identity of a run, its environment and its record."""

import hashlib
import importlib
import itertools
import json
import linecache
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import albumentations as A
import pytest
import torch
import torchvision
from networks import Linear, small_network
from torch import nn

from model_AC import AdvancedCNN
from session8 import records, trainer
from session8.config import Config
from session8.data import Split, synthetic_cifar10
from session8.records import count_macs, describe_record, final_metrics, source_hashes, write_record
from session8.trainer import fit, run_folder

ROOT = Path(__file__).resolve().parent.parent

# -- identity ------------------------------------------------------------------------------------------------------


def test_run_folder_is_named_after_configuration_network_augmentation_optimizer_and_data(synthetic, monkeypatch):
    def name(model=None, splits=synthetic, device="cpu", **changes):
        return run_folder(model or small_network(), *splits, Config(**changes), device, "runs")

    first = name()
    assert re.fullmatch(r"runs.[0-9a-f]{8}", str(first))
    assert first == name() != name(small_network(seed=6))  # training starts from other weights
    images = synthetic[0].images.copy()
    images[0, 0, 0, 0] ^= 1
    others = [
        name(lr=0.02),
        name(epochs=3),
        name(seed=1),
        name(batch_size=64),
        name(AdvancedCNN()),
        name(Linear()),
        name(splits=synthetic_cifar10(300, 99)),
        name(splits=(Split(images, synthetic[0].labels, "one bit differs"), synthetic[1])),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer, "train_transforms", lambda *_: A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(p=0.1)])
        )
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_optimizer", lambda model, _: torch.optim.Adam(model.parameters()))
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(Config, "batch_size_on", lambda *_: 128)  # as on an accelerator
        others.append(name())
    assert len({first, *others}) == 1 + len(others)


def test_operations_of_training_count_each_epoch_at_its_size():
    model = AdvancedCNN(width=0.5)
    config = Config(epochs=5, low_res_epochs=2, low_res_size=24)
    small, full = count_macs(model, 24), count_macs(model)
    assert 0.45 < small / full < 0.6
    assert records.training_pflop(model, config, 1000, 5) == pytest.approx(6e-12 * (2 * small + 3 * full))
    assert records.training_pflop(model, config, 1000, 1) == pytest.approx(6e-12 * small)


def test_a_changed_comment_does_not_rename_a_run(synthetic, monkeypatch):
    before = run_folder(small_network(), *synthetic, Config(), "cpu")
    monkeypatch.setattr(records, "source_hashes", lambda model: {"training.py": "changed"})
    assert run_folder(small_network(), *synthetic, Config(), "cpu") == before


# -- environment ---------------------------------------------------------------------------------------------------


def test_source_hashes_are_of_the_files_that_shape_the_result(monkeypatch, tmp_path):
    hashes = source_hashes(small_network())
    assert set(hashes) == {
        "model_AC.py",
        "config.py",
        "augment.py",
        "loaders.py",
        "training.py",
        "trainer.py",
        "distributed.py",
        "layers of AdvancedCNN",
    }
    del hashes["layers of AdvancedCNN"]
    for name, digest in hashes.items():
        file = Path(records.__file__).with_name(name) if name != "model_AC.py" else Path(__file__).parent.parent / name
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


def edited(monkeypatch, name):
    """Have a file seem to be edited on disk."""
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == name else b""))


@pytest.mark.parametrize("name", ["augment.py", "trainer.py", "model_AC.py"])
def test_source_hashes_are_of_the_files_as_they_were_imported(name, monkeypatch, synthetic, capsys):
    before = source_hashes(small_network())
    edited(monkeypatch, name)
    assert source_hashes(small_network()) == before
    history = fit(small_network(), *synthetic, Config(epochs=1, batch_size=100), "cpu")
    assert history["parts"][0]["sources"] == before
    assert f"Edited since the import: {name}. The code in memory trains; restart" in capsys.readouterr().out


def test_a_module_that_was_reloaded_after_a_change_has_no_hash(monkeypatch):
    path = records.PACKAGE / "augment.py"
    monkeypatch.setitem(records.AS_IMPORTED, path, path.read_bytes().replace(b"def normalize(", b"def normalise("))
    hashes = source_hashes(small_network())
    assert hashes["augment.py"] == records.CHANGED and hashes["loaders.py"] != records.CHANGED


NETWORK = """
import functools
from torch import nn

def scale(x):
    return 2 * x

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3072, 10)

    def __hidden(self):
        return 1

class Network(Base):
    @property
    def depth(self):
        return 1

    @functools.lru_cache
    def cached(self):
        return 1

    def forward(self, x):
        return scale(self.head(x.flatten(1)))
"""


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Return (module, path) of a network in a file of the user's."""
    path = tmp_path / "user_network.py"
    path.write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # edits within a second would not be noticed
    yield importlib.import_module("user_network"), path
    del sys.modules["user_network"]


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("", "", True),
        ("2 * x", "2 * x  # a comment", True),
        ("2 * x", "3 * x", False),
        ("return 1\n\n    @functools", "return 2\n\n    @functools", False),
        ("flatten(1)", "flatten(1).relu()", False),
        ("3072, 10", "3072, 11", False),
        (
            "lru_cache\n    def cached(self):\n        return 1",
            "lru_cache\n    def cached(self):\n        return 2",
            False,
        ),
        ("class Network(Base):\n", "class Network(Base):\n    def extra_repr(self): return ''\n", False),
        ("    def __hidden(self):\n        return 1\n", "", False),
        (NETWORK, "", False),
        (NETWORK, "class Unfinished(", False),
    ],
)
def test_a_file_that_was_edited_since_it_was_imported_has_no_hash(old, new, same, network):
    module, path = network
    model = module.Network()
    model(torch.zeros(1, 3072))
    path.write_text(NETWORK.replace(old, new))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_hashes(model)["user_network.py"] == (digest if same else records.CHANGED)
    assert records.edited_sources(model) == ([] if same else ["user_network.py"])


def test_a_file_that_was_edited_since_it_was_first_seen_keeps_its_hash(network):
    module, path = network
    before = source_hashes(module.Network())
    path.write_text(NETWORK.replace("def scale(x)", "def scale(x, factor=3)"))
    assert source_hashes(module.Network()) == before
    assert records.edited_sources(module.Network()) == ["user_network.py"]


def test_a_network_of_a_reloaded_file_has_the_hash_of_the_new_file(network):
    module, path = network
    old = module.Network()
    path.write_text(NETWORK.replace("flatten(1)", "flatten(1).relu()"))
    importlib.reload(module)
    assert source_hashes(module.Network())["user_network.py"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_hashes(old)["user_network.py"] == records.CHANGED


def test_the_code_of_libraries_has_its_hash():
    for model in (nn.Sequential(nn.Linear(1, 1)), nn.TransformerEncoderLayer(8, 2), torchvision.models.resnet18()):
        path = Path(sys.modules[type(model).__module__].__file__)
        assert source_hashes(model)[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_network_from_a_notebook_has_the_hash_of_its_source(monkeypatch):
    notebook = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    counter = itertools.count()

    def run(cell):
        name = f"<cell {next(counter)}>"
        linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
        exec(compile(cell, name, "exec"), vars(notebook))

    def entry():
        hashes = source_hashes(notebook.Network())
        assert set(hashes) == {"Network in a notebook", "layers of Network", *records.SOURCES}
        return hashes["Network in a notebook"]

    run("from torch import nn\nclass Block(nn.Module):\n  def forward(self, x):\n    return 2 * x")
    network = "class Network(nn.Module):\n  def __init__(self):\n    super().__init__()\n    self.block = Block()\n"
    run(network)
    first = entry()
    run(f"\n{network}")
    assert entry() == first
    run("class Block(nn.Module):\n  def forward(self, x):\n    return 3 * x")
    assert entry() != first
    no_cell = compile("lambda self, x: x", "<no cell>", "eval")
    notebook.Network.forward = eval(no_cell, vars(notebook))
    assert "Network in a notebook" not in source_hashes(notebook.Network())


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return (git, folder): a function that calls git in a repository with a copy of the package in `folder`."""
    folder = tmp_path / "repository" / "copy" / "session8"
    folder.mkdir(parents=True)
    (folder / "records.py").write_text("")
    (tmp_path / "repository" / "other.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]

    def git(*arguments):
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path / "repository", capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("add", "other.py")
    git("commit", "-q", "-m", "other")
    monkeypatch.setattr(records, "PACKAGE", folder)
    records.project_commit.cache_clear()
    yield git, folder
    records.project_commit.cache_clear()


def test_a_copy_in_another_repository_has_no_commit(repository):
    assert records.project_commit() is None


def test_the_commit_is_that_of_the_repository_that_tracks_the_project(repository, tmp_path, monkeypatch):
    git, folder = repository
    git("add", "copy")
    git("commit", "-q", "-m", "project")
    commit = git("rev-parse", "HEAD").strip()
    assert records.project_commit() == commit
    git("checkout", "-q", "HEAD~")  # without a restart
    assert records.project_commit() == commit
    git("checkout", "-q", "-")
    (folder / "records.py").write_text("edited")
    records.project_commit.cache_clear()
    assert records.project_commit() == f"{commit}-dirty"


# -- the record ----------------------------------------------------------------------------------------------------


def test_record_names_everything(synthetic, tmp_path):
    model, config = small_network(), Config(epochs=2, batch_size=64, seed=3)
    history = fit(model, *synthetic, config, "cpu")
    path = tmp_path / "new folder" / "record.json"
    record = write_record(path, model, *synthetic, config, history, "cpu", {2: 12.5, 6: 13.0})
    assert json.loads(path.read_text()) == record
    assert final_metrics(record) == {
        **{name: values[-1] for name, values in history.items() if name != "parts"},
        "test_accuracy_2_views": 12.5,
        "test_accuracy_6_views": 13.0,
    }
    assert record["model"] == "AdvancedCNN" and record["width"] == 0.5
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert "NOT CIFAR-10" in record["data"] and (record["n_train"], record["n_test"]) == (300, 100)
    assert record["config"]["seed"] == 3 and record["batch_size"] == 64
    assert {**record["history"], "parts": record["parts"]} == history
    assert record["seconds"] == pytest.approx(sum(history["seconds"]), abs=0.1)
    assert {"python", "torch", "albumentations", "numpy"} <= set(record["versions"]) and record["device"]
    assert record["arithmetic"] in ("float32", "bfloat16")
    (part,) = record["parts"]
    assert part["epochs"] == [0, 2] and part["commit"] == record["commit"] and part["sources"] == source_hashes(model)
    assert f"{history['test_accuracy'][-1]:.2f} %" in describe_record(record)
    assert [path.name for path in path.parent.iterdir()] == ["record.json"]


def test_a_record_written_again_is_the_same(synthetic, tmp_path, monkeypatch):
    model, config = small_network(), Config(epochs=1, batch_size=100)
    history = fit(model, *synthetic, config, "cpu", tmp_path)
    first = write_record(tmp_path / "record.json", model, *synthetic, config, history, "cpu")
    monkeypatch.setattr(records, "device_name", lambda _: "another machine")
    shown = fit(model, *synthetic, config, "cpu", tmp_path)
    assert write_record(tmp_path / "record.json", model, *synthetic, config, shown, "cpu") == first


def test_a_record_without_a_complete_epoch_can_be_described(synthetic, tmp_path):
    history = {name: [] for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds")}
    record = write_record(tmp_path / "record.json", small_network(), *synthetic, Config(), history, "cpu")
    assert "0 of 40 epochs" in describe_record(record) and record["device"]


def test_macs_agree_with_a_count_by_hand():
    model, macs = AdvancedCNN(), 0

    def add(module, _, output):
        nonlocal macs
        macs += output[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert count_macs(AdvancedCNN()) == macs


def test_counting_macs_changes_neither_the_model_nor_the_random_state():
    model = small_network()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    count_macs(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells, self.head = kind(96, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.cells(x.permute(0, 2, 3, 1).flatten(2))[0][:, -1])


class DictOutput(Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


class NoCopy(Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("cannot be copied:\nit holds a lock")


class Failing(Linear):
    def forward(self, x):
        raise TypeError("needs a mask")


def vision_transformer():
    return torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=10)


TOKENS, WIDTH = 17, 32  # of the transformer: 16 patches and the class token
BLOCK = TOKENS * 4 * WIDTH**2 + 2 * TOKENS**2 * WIDTH + 2 * TOKENS * WIDTH * 64


@pytest.mark.parametrize(
    "make, macs",
    [
        (vision_transformer, 3 * 64 * 16 * WIDTH + BLOCK + 10 * WIDTH),
        (lambda: Recurrent(nn.LSTM), 32 * 4 * 16 * (96 + 16) + 160),
        (lambda: Recurrent(nn.GRU), 32 * 3 * 16 * (96 + 16) + 160),
        (DictOutput, 30720),
        (NoCopy, math.nan),
        (Failing, math.nan),
    ],
)
def test_macs_of_other_networks_agree_with_a_count_by_hand(make, macs):
    oneDNN = torch.backends.mkldnn.enabled
    assert count_macs(make()) == pytest.approx(macs, nan_ok=True)
    assert torch.backends.mkldnn.enabled == oneDNN


@pytest.mark.parametrize(
    "make, shown",
    [
        (AdvancedCNN, ["Conv2d-1", "Total params: 1,05", "Multiply-accumulates (MACs): 39.5 million per image"]),
        (vision_transformer, ["torchsummary cannot show VisionTransformer (AttributeError: ", "Parameters: 15,690"]),
        (lambda: Recurrent(nn.LSTM), ["cannot show Recurrent (AttributeError: ", "Parameters: 7,466", "0.23 million"]),
        (DictOutput, ["Linear-1", "Total params: 30,730", "(MACs): 0.0307 million per image"]),
        (lambda: nn.Sequential(DictOutput()), ["torchsummary cannot show Sequential (AttributeError: "]),
        (NoCopy, ["(RuntimeError: cannot be copied: it holds a lock).", "(MACs): cannot be counted"]),
        (Failing, ["(TypeError: needs a mask).", "Parameters: 30,730", "(MACs): cannot be counted"]),
    ],
)
def test_summary_of_any_network(make, shown, capsys):
    model = make()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    records.print_summary(model)
    text = capsys.readouterr().out
    assert all(part in text for part in shown), text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_record_of_a_network_whose_macs_cannot_be_counted(synthetic, tmp_path):
    model, config = NoCopy(), Config(epochs=1, batch_size=100, precision="float32")
    history = fit(Linear(), *synthetic, config, "cpu")
    record = write_record(tmp_path / "record.json", model, *synthetic, config, history, "cpu")
    assert record["macs"] is None and record["pflop"] is None
    assert "NaN" not in (tmp_path / "record.json").read_text()


# -- runs side by side ---------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Six records: three seeds of one recipe, another recipe, other data, and another device."""

    def write(name, accuracy, fingerprint="real", device="one CPU", data="CIFAR-10, class folders", **config):
        full = {"lr": 0.01, "seed": 0, "epochs": 2, **config}
        record = {
            "model": "AdvancedCNN", "width": 1.0, "parameters": 5, "arithmetic": "float32", "batch_size": 64,
            "data": data, "data_fingerprint": fingerprint, "config": full, "device": device, "seconds": 30.0,
            "history": {"test_accuracy": [50.0, accuracy], "seconds": [10.0, 20.0]},
        }  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(record))

    write("a", 80.0)
    write("b", 82.0, seed=1)
    write("c", 87.0, seed=2)
    write("d", 90.0, lr=0.1)
    write("e", 99.0, fingerprint="other", data="synthetic stand-in, NOT CIFAR-10")
    write("f", 70.0, device="another GPU", lr=0.5)
    return tmp_path


def test_runs_are_averaged_if_only_the_seed_differs(runs):
    table = records.runs_table(records.read_runs(runs)).splitlines()
    assert re.split(r"  +", table[0]) == [
        "lr", "data", "seed", "test accuracy", "mean ± sd (n)", "seconds", "device", "run",
    ]  # fmt: skip
    rows = {line.split()[-1]: line for line in table[1:]}
    assert len(rows) == 6
    for name in "abc":  # mean 83, deviations -3, -1, 4: sd sqrt(26 / 2)
        assert "83.00 ± 3.61 (3)" in rows[name]
    assert not any("±" in rows[name] for name in "def")
    assert "NOT CIFAR-10" in rows["e"] and "80.00 %" in rows["a"] and "another GPU" in rows["f"]


def test_labels_name_what_the_recipe_does_not_tell(runs):
    path = runs / "d" / "record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config": asdict(Config.named("fast", cutout=8))}))
    label = {run["folder"]: run["label"] for run in records.read_runs(runs)}
    assert label["b"] == "recipe default, data CIFAR-10, class folders, seed 1"
    assert label["f"] == "recipe default, lr 0.5, data CIFAR-10, class folders, seed 0"
    assert label["d"].startswith("recipe fast,") and "cutout 8" in label["d"]
    assert not re.search("lr|width|data", label["d"])  # its recipe's, or equal in all runs with it


def test_a_record_older_than_a_field_had_its_default(runs):
    path = runs / "b" / "record.json"
    record = json.loads(path.read_text())
    record["config"] = {**asdict(Config()), **record["config"]}
    path.write_text(json.dumps(record))
    assert "83.00 ± 3.61 (3)" in records.runs_table(records.read_runs(runs))


def test_a_field_that_only_some_records_have_is_named(runs):
    path = runs / "b" / "record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config": {**record["config"], "future": 7}}))
    label = {run["folder"]: run["label"] for run in records.read_runs(runs)}
    assert "future 7" in label["b"] and "future" not in label["a"]


def test_what_changed_since_any_part_of_a_run_is_named():
    part = {"versions": {"torch": "2.9"}, "sources": {"config.py": "1"}, "device": "a", "arithmetic": "b"}
    part["augmentation"] = "albumentations"
    now = {**part, "sources": {"config.py": "1", "newer.py": "2"}, "world_size": 2}
    assert records.changes([part, {**now, "device": "b"}], now) == ["device", "newer.py", "processes"]
    assert records.changes([part, part], part) == []


def test_records_of_different_data_are_never_averaged_even_under_one_name(runs):
    path = runs / "b" / "record.json"
    path.write_text(path.read_text().replace('"real"', '"edited"'))
    table = records.runs_table(records.read_runs(runs))
    assert "83.50 ± 4.95 (2)" in table and "(3)" not in table  # 80 and 87


@pytest.mark.parametrize(
    "change", [{"sources": {"model_AC.py": "12"}}, {"versions": {"torch": "2.9"}}, {"device": "another CPU"}]
)
def test_runs_of_other_code_versions_or_devices_are_not_averaged(runs, change):
    path = runs / "b" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    found = records.read_runs(runs)
    table = records.runs_table(found)
    assert "83.50 ± 4.95 (2)" in table and "(3)" not in table  # 80 and 87
    code = {run["folder"]: run["code"] for run in found}
    assert code["d"] == code["e"] == code["f"] == ""
    if "device" in change:
        assert set(code.values()) == {""} and not re.search(r"\bcode\b", table)
    else:  # what differs is named
        assert code["a"] == code["c"] != code["b"] and table.startswith("lr ") and "  code  " in table
        labels = {run["folder"]: run["label"] for run in found}
        assert f"code {code['b']}" in labels["b"] and "code" not in labels["d"]


def test_bad_input_damaged_and_foreign_records_are_named_and_skipped(runs, capsys):
    whole = json.loads((runs / "a" / "record.json").read_text())
    without_seed = json.dumps({**whole, "config": {"lr": 0.01, "epochs": 2}})
    without_data = json.dumps({name: value for name, value in whole.items() if name != "data"})
    texts = {"x": "{", "y": '{"answer": 42}', "z": "[]", "w": without_seed, "v": without_data}
    texts["u"] = json.dumps({**whole, "device": None})
    for name, text in texts.items():
        (runs / name).mkdir()
        (runs / name / "record.json").write_text(text)
    (runs / "empty").mkdir()
    assert len(records.read_runs(runs)) == 6
    printed = capsys.readouterr().out
    assert all(f"{name}/record.json' is skipped: not a record" in printed.replace(os.sep, "/") for name in "uvwxyz")
    assert records.runs_table(records.read_runs(runs / "nowhere")) == "There are no finished runs yet."


def test_an_unfinished_run_is_told_from_a_finished_one_of_as_many_epochs(runs):
    path = runs / "b" / "record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config": {**record["config"], "epochs": 4}}))
    found = records.read_runs(runs)
    label = {run["folder"]: run["label"] for run in found}
    assert "epochs done 2 of 4" in label["b"] and "epochs done 2," in label["a"]
    assert "83.50 ± 4.95 (2)" in records.runs_table(found)  # 80 and 87


def test_a_fact_that_a_network_lacks_is_not_in_its_label(runs):
    path = runs / "d" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": "ResNet20", "width": None}))
    label = {run["folder"]: run["label"] for run in records.read_runs(runs)}
    assert "model ResNet20" in label["d"] and "width" not in label["d"]


def test_bad_input_of_the_command_is_one_message(tmp_path):
    command = [sys.executable, "-m", "session8.records", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1 and "nowhere' is not a folder" in done.stderr and "Traceback" not in done.stderr


def test_the_command_prints_the_table_of_real_runs(synthetic, tmp_path):
    for seed in (0, 1):
        config = Config(epochs=1, batch_size=100, seed=seed)
        history = fit(Linear(), *synthetic, config, "cpu")
        write_record(tmp_path / f"run {seed}" / "record.json", Linear(), *synthetic, config, history, "cpu")
    command = [sys.executable, "-m", "session8.records", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert (
        done.returncode == 0
        and done.stdout.count("(2)") == 2
        and r"mean \xb1 sd" in done.stdout
        and done.stdout.startswith("seed ")
    ), done.stderr
