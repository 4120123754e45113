"""train.py: the command line, and the files of a run."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from fakes import class_folders

import train
from model_AC import AdvancedCNN
from session8.checkpoint import load_model
from session8.config import Config

ROOT = Path(__file__).resolve().parent.parent


def small(config):
    return AdvancedCNN(dropout=config.dropout, width=0.5)


def test_options_start_from_the_recipe_and_change_its_fields():
    options, config = train.read_options(["--recipe", "one_cycle", "--epochs", "5", "--data", "DIR", "--lr", "0.05"])
    assert (options.data, options.recipe, options.publish, options.device) == ("DIR", "one_cycle", False, None)
    assert config == Config.named("one_cycle", epochs=5, lr=0.05)
    assert train.read_options([])[1] == Config()
    assert train.read_options(["--batch-size", "64", "--no-nesterov", "--seed", "3"])[1] == Config(
        batch_size=64, seed=3
    )


def test_help_lists_every_field_of_the_recipe(capsys):
    with pytest.raises(SystemExit):
        train.read_options(["--help"])
    shown = capsys.readouterr().out
    for name in ("recipe", "data", "device", "publish", *(field.name.replace("_", "-") for field in fields(Config))):
        assert f"--{name}" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recipe", "fastest"], "invalid choice: 'fastest'"),
        (["--lr", "-1"], "lr is -1.0; expected a positive number"),
        (["--lr", "abc"], "could not convert string to float"),
        (["--learning-rate", "1"], "Unrecognized options: --learning-rate"),
        (["--schedule", "cosine"], "cosine"),
    ],
)
def test_bad_input_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.read_options(arguments)
    assert error.value.code == 2
    output = capsys.readouterr()
    assert message in " ".join(re.sub(r"[│]", " ", output.err + output.out).split())


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Return a function that trains with the given options on class folders, in folders of its own."""
    class_folders(tmp_path / "images", per_train=6, per_test=2)

    def run(*arguments, make_model=small):
        defaults = ["--data", str(tmp_path / "images"), "--epochs", "1", "--batch-size", "20", "--device", "cpu"]
        options, config = train.read_options([*defaults, *arguments])
        return train.run(make_model, options, config, runs=tmp_path / "runs", results=tmp_path / "results")

    return run


def test_a_run_leaves_weights_and_a_record(trained, tmp_path, capsys):
    record = trained("--seed", "3")
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "record.json").read_text()) == record
    assert record["model"] == "AdvancedCNN" and record["config"]["seed"] == 3 and record["batch_size"] == 20
    model, metadata = load_model(folder / "model.safetensors")
    assert model.width == 0.5 and metadata["metrics"]["test_accuracy"] == record["history"]["test_accuracy"][-1]
    assert not (tmp_path / "results").exists()
    assert "1 of 1 epochs on CIFAR-10" in capsys.readouterr().out


def test_only_publish_writes_to_results_and_never_replaces_a_record(trained, tmp_path, monkeypatch):
    record = trained("--publish", "--recipe", "one_cycle")
    published = tmp_path / "results" / "AdvancedCNN_one_cycle_seed0_cpu.json"
    assert json.loads(published.read_text()) == record
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained before the refusal"))
    with pytest.raises(SystemExit, match=r"one_cycle_seed0_cpu\.json' exists: choose another seed"):
        trained("--publish", "--recipe", "one_cycle")


def test_bad_input_publishing_a_changed_recipe(trained, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained before the refusal"))
    with pytest.raises(SystemExit, match="--publish is for the recipe 'default' as it is"):
        trained("--publish", "--lr", "0.5")


def test_an_interrupted_run_leaves_no_record(trained, tmp_path):
    class Interrupted(AdvancedCNN):
        def forward(self, x):
            raise KeyboardInterrupt

    assert trained("--publish", make_model=lambda config: Interrupted()) is None
    assert not (tmp_path / "results").exists() and not list(tmp_path.rglob("record.json"))


def test_the_command_trains_and_resumes(tmp_path):
    class_folders(tmp_path / "images", per_train=4, per_test=2)
    command = [sys.executable, ROOT / "train.py", "--data", tmp_path / "missing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "missing' is not" not in done.stdout
    assert re.fullmatch(r"root is '.*missing', which is not a directory. Pass a folder .*\n", done.stderr)


def test_resnet20_has_a_command_with_the_same_options():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "train_resnet20.py", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "--recipe" in done.stdout and "--weight-decay" in done.stdout
