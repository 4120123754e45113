"""train.py: the command line, the files of a run, and messages instead of tracebacks."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
from fakes import class_folders
from networks import Linear, TinyNetwork, in_step, interrupt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from session8.checkpoint import load_model, save_model
from session8.config import Config
from session8.data import CLASSES, synthetic_cifar10, validation_split

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--epochs", "2", "--batch-size", "20", "--width", "0.25", "--device", "cpu", "--data", "images"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command in a folder that holds images. Returns None, or the status or message with which it exits."""
    class_folders(tmp_path / "images", per_train=6, per_test=2)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **keywords):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
        try:
            return train.main(**keywords)
        except SystemExit as ended:
            return ended.code

    return run


def record():
    (path,) = Path("runs").glob("*/record.json")
    return json.loads(path.read_text())


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, config",
    [
        ([], Config()),
        (["--recipe", "one_cycle", "--epochs", "5", "--lr", "0.05"], Config.named("one_cycle", epochs=5, lr=0.05)),
        (["--recipe", "fast", "--epochs", "2"], Config.named("fast", epochs=2)),
        (["--recipe", "one_cycle", "--no-nesterov"], Config.named("one_cycle", nesterov=False)),
    ],
)
def test_options_change_the_recipe(arguments, config):
    assert train.read_options(arguments)[1] == config


def test_every_field_of_the_recipe_is_an_option(capsys):
    others = {int: 20, int | None: 20, float: 0.5, bool: True}
    for field in fields(Config):
        value = others.get(field.type) or get_args(field.type)[-1]
        value = 8 if field.name == "crop_padding" else value
        option = f"--{field.name.replace('_', '-')}"
        read = train.read_options([option] if value is True else [option, str(value)])[1]
        assert read == replace(Config(), **{field.name: value}) != Config()
    with pytest.raises(SystemExit):
        train.read_options(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in Config.__dataclass_fields__)
    assert "--evaluate FILE" in shown and "Pixels of padding on each side" in shown


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--recipe", "fastest"], "invalid choice: 'fastest' .*one_cycle"),
        (["--lr", "-1"], "lr is -1.0; expected a positive number"),
        (["--lr", "abc"], "could not convert string to float"),
        (["--learning-rate", "1"], "Unrecognized options: --learning-rate"),
        (["--schedule", "cosine"], "cosine.*one_cycle"),
        (["--epochs", "0"], "epochs is 0; expected at least 1"),
        (["--epochs", "x"], "invalid int value: 'x'"),
        (["--epoch", "5"], "--epoch"),
        (["--recipe", "fast", "--epochs", "2", "--low-res-epochs", "5"], "low_res_epochs is 5; expected 0 to 2"),
        (["--device", "tpu"], "device is 'tpu', which is unknown; available: "),
    ],
)
def test_bad_input_options(run, capsys, arguments, words):
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert re.search(words, " ".join(re.sub("│", " ", output.err + output.out).split()))


def test_without_tyro_the_command_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert run() == "train.py needs tyro, which is not installed: pip install tyro"


# -- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_weights_and_a_record_which_evaluate_confirms(run, capsys):
    assert run(*SMALL, "--seed", 3) is None
    (folder,) = Path("runs").iterdir()
    written, (model, about) = record(), load_model(folder / "model.safetensors")
    accuracies = {1: written["history"]["test_accuracy"][-1], **{int(n): a for n, a in written["views"].items()}}
    assert written["config"]["seed"] == 3 and written["batch_size"] == 20 and model.width == 0.25
    assert f"Record and weights: {folder}" in capsys.readouterr().out

    assert run("--evaluate", folder / "model.safetensors", *SMALL[-4:]) is None
    shown = capsys.readouterr().out
    for views, accuracy in accuracies.items():
        assert f"Views: {views}, stated: {accuracy:.2f} %, measured minus stated: +0.00" in shown

    save_model("other.safetensors", model, Config(**about["config"]), {"test_accuracy": accuracies[1] + 4}, CLASSES)
    assert run("--evaluate", "other.safetensors", *SMALL[-4:]) is None
    shown = capsys.readouterr().out
    assert f"Views: 1, stated: {accuracies[1] + 4:.2f} %, measured minus stated: -4.00" in shown
    assert "Test set, 6 views: " in shown and shown.count("stated") == 2  # for one view only


def test_the_same_command_resumes_a_run_after_ctrl_c(run, capsys):
    assert run(*SMALL, make_model=lambda config: TinyNetwork(in_step(5, interrupt))) == 130
    assert capsys.readouterr().err == "Interrupted: run the same command again to resume.\n"
    assert not list(Path("runs").glob("*/record.json"))
    assert run(*SMALL, make_model=lambda config: TinyNetwork()) is None
    assert record()["resumed"] == 1 and len(record()["history"]["seconds"]) == 2


def test_validation_trains_without_the_held_out_images_and_tests_on_them(run, monkeypatch):
    monkeypatch.setattr(train, "validation_split", lambda split: validation_split(split, n=10))
    assert run(*SMALL, "--validation") is None
    assert (record()["n_train"], record()["n_test"]) == (50, 10) and "held out" in record()["data"]


def test_without_cifar10_the_stand_in_only_on_request(run, monkeypatch):
    monkeypatch.setattr("session8.data.synthetic_cifar10", lambda: synthetic_cifar10(60, 20))
    assert re.search(
        "does not hold CIFAR-10, and the download failed:.*allow_synthetic=True", run(*SMALL[:-2]), re.DOTALL
    )
    assert run(*SMALL[:-2], "--allow-synthetic") is None
    assert record()["data"].startswith("synthetic stand-in, NOT CIFAR-10")


# -- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "nowhere"], "root is 'nowhere', which is not a directory. Pass a folder"),
        (SMALL, "'runs/.*' cannot be written .*: choose another folder"),
        ([*SMALL, "--lr", "1e30"], "the loss became (nan|inf) in epoch 1.*: use a smaller lr"),
        (["--evaluate", "missing.safetensors"], "'missing.safetensors' does not exist: train a model, or name another"),
        (["--evaluate", "weights.safetensors", "--data", "nowhere"], "root is 'nowhere'"),
        (["--evaluate", "damaged.safetensors"], "'damaged.safetensors' is not a safetensors file, or is damaged"),
        (["--evaluate", "linear.safetensors"], "'linear.safetensors' holds a Linear: "),
        (["--evaluate", "newer.safetensors"], "'newer.safetensors' states a recipe that this version cannot read"),
    ],
)
def test_bad_input_is_one_message(run, arguments, words):
    if arguments == SMALL:
        Path("runs").write_text("a file where the folder should be")
    config = Config()
    save_model("weights.safetensors", train.AdvancedCNN(width=0.25), config, {}, CLASSES)
    save_model("linear.safetensors", Linear(), config, {}, CLASSES)
    Path("damaged.safetensors").write_bytes(Path("weights.safetensors").read_bytes()[:100])
    with safe_open("weights.safetensors", "pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), "future": 7})
    save_file(load_file("weights.safetensors"), "newer.safetensors", metadata)
    assert re.match(words, run(*arguments))


def test_bad_input_incomplete_variables_of_torchrun(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*SMALL).startswith("rank ?: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set")


def test_faults_of_the_code_keep_their_traceback(run):
    with pytest.raises(KeyError, match="a fault"):
        run(*SMALL, make_model=lambda config: {}["a fault"])


# Earlier releases of tqdm cannot delete a bar that was never shown.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name, ended", [("/dev/full", "[Errno 28] No space left on device"), ("closed pipe", 1)])
def test_output_that_cannot_be_written_is_no_traceback(run, name, ended):
    save_model("weights.safetensors", train.AdvancedCNN(width=0.25), Config(), {}, CLASSES)
    reader, pipe = os.pipe()
    os.close(reader)  # as when `head` has ended
    # The end of the block writes what the file still holds, as the end of Python does.
    with open(pipe if name == "closed pipe" else name, "w") as output, redirect_stdout(output):
        assert run("--evaluate", "weights.safetensors", *SMALL[-4:]) == ended


def start(*arguments, path=ROOT):
    """Start the command in a process of its own, whose output is ASCII."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONIOENCODING": "ascii"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, ROOT / "train.py", *arguments], env=environment, **pipes)


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    with start(path=tmp_path) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


def test_ctrl_c_during_training_is_a_message(run):
    Path("images").rename("dätä")
    with start("--epochs", "10000", *SMALL[2:-1], "dätä") as process:
        while "Epoch 2" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (130, "Interrupted: run the same command again to resume.\n")
