"""Starting train.py in several processes from a program, such as a notebook."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace

import pytest
from fakes import class_folders
from session8.launch import run_command, torchrun_command

import train
from session8.config import RECIPES, Config

OTHER = {int: 7, float: 0.5, bool: True, int | None: 9}


def options_of(command):
    """Return what train.py reads from a command."""
    at = next(i for i, part in enumerate(command) if part.endswith("train.py"))
    return train.read_options(command[at + 1 :])


def test_the_command_starts_torchrun_on_this_machine_with_the_projects_script():
    command = torchrun_command(3, "default", Config())
    assert command[:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    assert os.path.samefile(command[5], train.__file__) and command[6:] == ["--recipe", "default", "--epochs", "40"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("field", fields(Config), ids=lambda field: field.name)
def test_the_command_passes_every_change_of_the_recipe(recipe, field):
    named = Config.named(recipe)
    values = {"schedule": "one_cycle", "precision": "float32", "batch_size": None, "nesterov": not named.nesterov}
    values |= {"padding": "reflect", "flip": "alternate", "low_res_size": 28, "epochs": 8}
    config = replace(named, **{field.name: values.get(field.name, OTHER.get(field.type))})
    options, read = options_of(torchrun_command(2, recipe, config, "a folder", "cpu", "runs/1234"))
    assert read == config and (options.recipe, options.device) == (recipe, "cpu")
    assert options.data == os.path.abspath("a folder") and options.expect_folder == os.path.abspath("runs/1234")


def test_the_output_appears_as_it_is_written(capfd, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    program = (
        "import sys, time\nfor k in range(3):\n  sys.stdout.write(f'\\r{k} █'); sys.stdout.flush(); time.sleep(0.4)\n"
        "print(); print('to standard error', file=sys.stderr)"
    )
    seen = []
    thread = threading.Thread(target=run_command, args=([sys.executable, "-c", program],))
    thread.start()
    while thread.is_alive():
        seen.append(capfd.readouterr().out)
        time.sleep(0.05)
    seen.append(capfd.readouterr().out)
    assert "".join(seen).endswith("\r0 █\r1 █\r2 █\nto standard error\n")
    assert len([text for text in seen if "█" in text]) >= 2


def test_fault_a_command_that_fails(capfd):
    with pytest.raises(RuntimeError, match="ended with status 3; its messages are above"):
        run_command([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"])
    assert "the reason" in capfd.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_an_interruption_ends_the_command(tmp_path):
    pid = tmp_path / "pid"
    program = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"

    def interrupt():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_command([sys.executable, "-c", program])
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_fault_the_commands_run_is_not_the_callers(tmp_path):
    """As in a notebook whose network was changed: the command fails before training."""
    class_folders(tmp_path / "images", per_train=4, per_test=1)
    config = Config(epochs=1, batch_size=20)
    command = torchrun_command(2, "default", config, tmp_path / "images", "cpu", tmp_path / "other")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("the run's folder is") == 1, done.stderr
    assert "Epoch" not in done.stdout
