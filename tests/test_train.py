"""train.py: the command line, and the files of a run."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from fakes import class_folders

import train
from model_AC import AdvancedCNN
from session8.checkpoint import CheckpointError, load_model
from session8.config import Config
from session8.data import DatasetUnavailable, validation_split

ROOT = Path(__file__).resolve().parent.parent


def small(config):
    return AdvancedCNN(dropout=config.dropout, width=0.5)


def test_options_start_from_the_recipe_and_change_its_fields():
    options, config = train.read_options(["--recipe", "one_cycle", "--epochs", "5", "--data", "DIR", "--lr", "0.05"])
    assert (options.data, options.recipe, options.validation, options.device) == ("DIR", "one_cycle", False, None)
    assert config == Config.named("one_cycle", epochs=5, lr=0.05)
    assert train.read_options([])[1] == Config()
    assert train.read_options(["--recipe", "fast", "--epochs", "2"])[1] == Config.named("fast", epochs=2)
    assert train.read_options(["--batch-size", "64", "--no-nesterov", "--seed", "3"])[1] == Config(
        batch_size=64, seed=3
    )


def test_help_lists_every_field_of_the_recipe(capsys):
    with pytest.raises(SystemExit):
        train.read_options(["--help"])
    shown = capsys.readouterr().out
    for name in ("recipe", "data", "device", "validation", *(field.name.replace("_", "-") for field in fields(Config))):
        assert f"--{name}" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recipe", "fastest"], "invalid choice: 'fastest'"),
        (["--lr", "-1"], "lr is -1.0; expected a positive number"),
        (["--lr", "abc"], "could not convert string to float"),
        (["--learning-rate", "1"], "Unrecognized options: --learning-rate"),
        (["--schedule", "cosine"], "cosine"),
        (["--epochs", "0"], "epochs is 0; expected at least 1"),
        (["--epochs", "x"], "invalid int value: 'x'"),
        (["--epoch", "5"], "--epoch"),
        (["--recipe", "fast", "--epochs", "2", "--low-res-epochs", "5"], "low_res_epochs is 5; expected 0 to 2"),
        (["--device", "tpu"], "device is 'tpu', which is unknown; available: "),
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
        return train.run(make_model, options, config, torch.device("cpu"), tmp_path / "runs")

    return run


def test_a_run_leaves_weights_and_a_record(trained, tmp_path, capsys):
    record = trained("--seed", "3")
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "record.json").read_text()) == record
    assert record["model"] == "AdvancedCNN" and record["config"]["seed"] == 3 and record["batch_size"] == 20
    model, metadata = load_model(folder / "model.safetensors")
    assert model.width == 0.5 and metadata["metrics"]["test_accuracy"] == record["history"]["test_accuracy"][-1]
    log = capsys.readouterr().out
    assert "1 of 1 epoch on CIFAR-10" in log
    for views in ("2", "6"):
        assert re.search(rf"Test set, {views} views: .*\({record['views'][views]:.2f}%\)", log)
        assert metadata["metrics"][f"test_accuracy_{views}_views"] == record["views"][views]


def test_an_interrupted_run_leaves_no_record(trained, tmp_path):
    class Interrupted(AdvancedCNN):
        def forward(self, x):
            if torch.is_grad_enabled():  # a step, not the trial before training
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt, match="Interrupted: run the same command again to resume"):
        trained(make_model=lambda config: Interrupted())
    assert not list(tmp_path.rglob("record.json"))


def test_bad_input_another_folder_than_expected(trained, tmp_path, monkeypatch):
    record = trained()
    (folder,) = (tmp_path / "runs").iterdir()
    assert trained("--expect-folder", str(folder))["history"] == record["history"]
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained before the refusal"))
    with pytest.raises(
        ValueError, match=r"the run's folder is '.*', not '.*': network, data, device type or code differ"
    ):
        trained("--expect-folder", str(folder), "--lr", "0.5")


def test_validation_trains_without_the_held_out_images_and_tests_on_them(trained, tmp_path, monkeypatch):
    def few(train):
        return validation_split(train, n=10)

    monkeypatch.setattr(train, "validation_split", few)
    record = trained("--validation")
    assert (record["n_train"], record["n_test"]) == (50, 10) and "held out" in record["data"]


def test_without_cifar10_the_stand_in_only_on_request(monkeypatch):
    monkeypatch.setattr(train, "run", lambda _, options, *__: asked.append(options.allow_synthetic))
    asked = []
    for arguments in ([], ["--allow-synthetic"]):
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        train.main()
    assert asked == [False, True]


def test_bad_input_incomplete_variables_of_torchrun(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"^rank \?: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        train.main()


def test_bad_input_runs_that_is_no_folder(trained, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"runs.* cannot be written"):
        trained()


@pytest.mark.parametrize("rank", ["0", "1", None])
def test_rank_0_reports_a_wrong_option(monkeypatch, rank, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--epochs", "0"])
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as error:
        train.main()
    assert error.value.code == 2 and capsys.readouterr().err.count("epochs is 0") == (rank != "1")


def test_without_tyro_the_command_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit, match=r"train\.py needs tyro, which is not installed: pip install tyro"):
        train.read_options([])


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_an_interruption_of_the_imports_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    command, environment = [sys.executable, ROOT / "train.py"], {**os.environ, "PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


@pytest.mark.parametrize("rank", ["0", "1", None])
@pytest.mark.parametrize(
    "failure, status",
    [
        (train.TrainingDiverged("the loss became nan", 0, 0, 0.01), "the loss became nan"),
        (train.distributed.RankError("rank 1 of 2: no images"), "rank 1 of 2: no images"),
    ],
)
def test_rank_0_reports_an_error_that_all_ranks_have(monkeypatch, rank, failure, status):
    def fails(*_):
        raise failure

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(train, "run", fails)
    monkeypatch.setattr(train.distributed, "process_group", contextlib.nullcontext)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as error:
        train.main()
    assert error.value.code == 1 if rank == "1" else status in error.value.code


@pytest.mark.parametrize(
    "failure", [CheckpointError("another run"), DatasetUnavailable("no images"), OSError("disk full"), ValueError("x")]
)
def test_the_errors_that_the_package_documents_are_messages(monkeypatch, failure):
    def fails(*_):
        raise failure

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(train, "run", fails)
    with pytest.raises(SystemExit, match=str(failure)):
        train.main()


def test_the_command_without_its_data_says_so(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--data", tmp_path / "missing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "missing' is not" not in done.stdout
    assert re.fullmatch(r"root is '.*missing', which is not a directory. Pass a folder .*\n", done.stderr)
