"""Checkpoints and saved weights: written atomically, checked when read, and refused when they do not fit."""

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from networks import Linear, same_weights, small_network
from session8.trainer import fit

from model_AC import AdvancedCNN
from session8.checkpoint import (
    FORMAT,
    CheckpointError,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
    write_file,
)
from session8.config import Config
from session8.data import CLASSES

if os.name == "posix":
    import processes

posix = pytest.mark.skipif(os.name != "posix", reason="kills processes and limits files as POSIX systems do")


RECIPE = Config(epochs=3, batch_size=25)


@posix
def test_fault_killed_at_random_while_checkpoints_are_written(tmp_path):
    rng, newest = random.Random(0), 0
    for _ in range(25):
        before, process = processes.modified(tmp_path), processes.start(processes.write_checkpoints, tmp_path, newest)
        processes.wait_for(lambda before=before: processes.modified(tmp_path) > before)
        time.sleep(rng.uniform(0, 0.05))
        processes.kill(process)
        state = load_checkpoint(tmp_path)
        assert state["number"] >= newest and state["weights"].tolist() == [state["number"]] * 500_000
        newest = state["number"]
    assert newest >= 25


@posix
@pytest.mark.parametrize("function, call", [("fsync", 1), ("replace", 1), ("replace", 2)])
def test_fault_killed_at_each_point_of_writing_a_checkpoint(tmp_path, function, call):
    process = processes.start(processes.write_checkpoints_and_die, tmp_path, function, call)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.part"))) == 1
    state = load_checkpoint(tmp_path)
    assert state["number"] == 2 and state["weights"].tolist() == [2] * 500_000


# -- damaged, foreign and malicious files ------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(tmp_path):
    for number in (1, 2):
        save_checkpoint(tmp_path, {"number": number, "weights": torch.arange(1000) * number})
    return tmp_path


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "zeroed":
        content[:] = bytes(len(content))
    elif how == "emptied":
        content.clear()
    else:
        content[content.index(torch.arange(2, 10, 2).numpy().tobytes())] ^= 1  # a bit of the weights
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "zeroed", "emptied", "bit-flipped"])
def test_fault_damaged_checkpoint_costs_one_step_back(two_checkpoints, how):
    damage(two_checkpoints / "last.pt", how)
    with pytest.warns(UserWarning, match=r"last.pt' is damaged.*; using the previous one"):
        assert load_checkpoint(two_checkpoints)["number"] == 1
    # And the next one that is written takes the damaged one's place, not the good one's.
    save_checkpoint(two_checkpoints, {"number": 2, "weights": torch.arange(1000) * 2})
    damage(two_checkpoints / "last.pt", how)
    with pytest.warns(UserWarning):
        assert load_checkpoint(two_checkpoints)["number"] == 1


def test_fault_checkpoint_that_cannot_be_read_at_the_moment_is_not_discarded(two_checkpoints, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(CheckpointError, match=r"last.pt' cannot be read \(.*Input/output error\): try again"):
            load_checkpoint(two_checkpoints)
    assert load_checkpoint(two_checkpoints)["number"] == 2


def test_the_next_write_deletes_the_temporary_files_of_ended_processes(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    files = {  # name: age in hours, whether it is deleted
        f"last.pt.{here}-{ended.pid}-0123abcd.part": (0, True),
        f"last.pt.{here}-{os.getpid()}-0123abcd.part": (0, True),
        f"last.pt.{here}-{os.getppid()}-0123abcd.part": (0, False),
        "last.pt.another-host-1-0123abcd.part": (23, False),
        "last.pt.another-host-2-0123abcd.part": (25, True),
        "last.pt.0123abcd.part": (23, False),  # of earlier versions
        "last.pt.4567abcd.part": (25, True),
        f"model.safetensors.{here}-{ended.pid}-0123abcd.part": (25, False),
        "mine.part": (25, False),
    }
    for name, (age, _) in files.items():
        (tmp_path / name).write_bytes(b"half a file")
        os.utime(tmp_path / name, (time.time() - 3600 * age,) * 2)
    load_checkpoint(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(files)  # reading deletes nothing
    write_file(tmp_path / "last.pt", b"whole")
    left = {name for name, (_, deleted) in files.items() if not deleted}
    assert {path.name for path in tmp_path.iterdir()} == {*left, "last.pt"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
def test_an_interrupted_write_changes_nothing(two_checkpoints, monkeypatch, function, error):
    def interrupt(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(function, interrupt)
        with pytest.raises(error):
            save_checkpoint(two_checkpoints, {"number": 3})
    assert sorted(path.name for path in two_checkpoints.iterdir()) == ["last.pt", "previous.pt"]
    assert load_checkpoint(two_checkpoints)["number"] == 2


def test_a_finished_run_is_shown_from_a_read_only_folder_and_an_unfinished_one_is_not_trained(
    tmp_path, synthetic, monkeypatch
):
    finished, unfinished = tmp_path / "finished", tmp_path / "unfinished"
    history = fit(small_network(), *synthetic, Config(epochs=1, batch_size=100), "cpu", finished)
    unfinished.mkdir()
    (finished / "probe").write_text("the user's own")
    before, real = sorted(finished.iterdir()), open

    def read_only(file, mode="r", *arguments, **keywords):  # permission bits would not stop root
        if set(mode) & set("wax+") and tmp_path in Path(file).parents:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(file, mode, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", read_only)
    assert fit(small_network(), *synthetic, Config(epochs=1, batch_size=100), "cpu", finished) == history
    assert sorted(finished.iterdir()) == before and (finished / "probe").read_text() == "the user's own"
    with pytest.raises(CheckpointError, match=r"unfinished' cannot be written .*Read-only.*: choose another folder"):
        fit(small_network(), *synthetic, Config(epochs=1, batch_size=100), "cpu", unfinished)


def test_fault_any_flipped_bit_is_detected_or_harmless(two_checkpoints):
    last, rng = two_checkpoints / "last.pt", random.Random(0)
    whole, noticed = last.read_bytes(), 0
    for _ in range(150):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        save_checkpoint(two_checkpoints, {"number": 1, "weights": torch.zeros(1)})
        save_checkpoint(two_checkpoints, {"number": 2})
        last.write_bytes(content)
        try:
            with pytest.warns(UserWarning):
                number = load_checkpoint(two_checkpoints)["number"]
            assert number == 1
            noticed += 1
        except pytest.fail.Exception:  # no warning: what was read must be what was written
            state = load_checkpoint(two_checkpoints)
            assert state["number"] == 2 and torch.equal(state["weights"], torch.arange(1000) * 2)
    assert noticed > 75


def test_fault_both_checkpoints_damaged(two_checkpoints, synthetic):
    for name in ("last.pt", "previous.pt"):
        damage(two_checkpoints / name, "zeroed")
    with pytest.raises(CheckpointError, match=r"has no intact checkpoint: .*last.pt.*previous.pt.*Delete them"):
        fit(small_network(), *synthetic, RECIPE, "cpu", two_checkpoints)


@pytest.mark.parametrize("other, remedy", [(FORMAT + 1, "update the project"), (FORMAT - 1, "use another folder")])
def test_fault_checkpoint_of_another_version(two_checkpoints, synthetic, other, remedy):
    torch.save({"format": other, "number": 3}, two_checkpoints / "last.pt")
    with pytest.raises(CheckpointError, match=rf"last.pt' has format {other}, .*{remedy}"):
        fit(small_network(), *synthetic, RECIPE, "cpu", two_checkpoints)


def test_fault_checkpoint_of_another_network_or_configuration(tmp_path, synthetic):
    fit(small_network(), *synthetic, RECIPE, "cpu", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"network was 'AdvancedCNN with .*' and is 'AdvancedCNN with 1,052,482 parameters"
    ):
        fit(AdvancedCNN(), *synthetic, RECIPE, "cpu", tmp_path)
    with pytest.raises(CheckpointError, match="epochs was 3 and is 4"):
        fit(small_network(), *synthetic, Config(epochs=4, batch_size=25), "cpu", tmp_path)


@pytest.mark.parametrize("content", [{"format": FORMAT}, {"epoch": 1}, torch.zeros(3)])
def test_fault_file_of_another_program(tmp_path, synthetic, content):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"belongs to a different run|is not a checkpoint of this project"):
        fit(small_network(), *synthetic, RECIPE, "cpu", tmp_path)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_fault_malicious_checkpoint_runs_nothing(tmp_path, synthetic, as_zip):
    marker, folder = tmp_path / "the code was run", tmp_path / "run"
    folder.mkdir()
    torch.save(
        {"format": FORMAT, "model": Malicious(marker)}, folder / "last.pt", _use_new_zipfile_serialization=as_zip
    )
    with pytest.raises(CheckpointError, match=r"has no intact checkpoint"):
        fit(small_network(), *synthetic, RECIPE, "cpu", folder)
    with pytest.raises(CheckpointError, match="is not a safetensors file, or is damaged"):
        load_model(folder / "last.pt", small_network())
    assert not marker.exists()
    torch.load(folder / "last.pt", weights_only=False)
    assert marker.exists()  # the file was as malicious as it was meant to be


# -- saved weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = AdvancedCNN(num_classes=7, dropout=0.25, width=0.5).to(memory_format=torch.channels_last)
    metrics = {"test_accuracy": np.float32(88.5)}
    save_model(tmp_path / "new" / "model.safetensors", model, RECIPE, metrics, CLASSES[:7])
    return model, tmp_path / "new" / "model.safetensors"


def test_a_saved_model_is_created_from_its_metadata(saved):
    model, path = saved
    loaded, about = load_model(path)
    assert same_weights(model, loaded) and not loaded.training and type(loaded) is AdvancedCNN
    assert loaded.dropout.p == 0.25 and loaded.head.out_features == 7 and loaded.width == 0.5
    assert about["metrics"] == {"test_accuracy": 88.5} and about["classes"] == list(CLASSES[:7])
    assert Config(**about["config"]) == RECIPE and about["network"] == "AdvancedCNN"


def test_a_saved_model_is_loaded_into_a_given_network(saved):
    model, path = saved
    other = AdvancedCNN(num_classes=7, width=0.5)
    assert load_model(path, other)[0] is other and same_weights(model, other)


def test_a_saved_model_is_a_plain_safetensors_file(saved):
    model, path = saved
    tensors = safetensors.torch.load_file(path)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_a_saved_model_of_another_network_needs_one_to_load_into(tmp_path):
    save_model(tmp_path / "linear.safetensors", Linear(), RECIPE, {}, CLASSES)
    with pytest.raises(CheckpointError, match=r"holds a Linear: pass one as `model`"):
        load_model(tmp_path / "linear.safetensors")
    assert same_weights(load_model(tmp_path / "linear.safetensors", Linear())[0], Linear())
    with pytest.raises(CheckpointError, match=r"holds a Linear that does not fit this model: .*AdvancedCNN"):
        load_model(tmp_path / "linear.safetensors", small_network())


@pytest.mark.parametrize("how", ["truncated", "zeroed", "emptied", "bit-flipped", "without metadata"])
def test_a_damaged_model_is_refused(saved, how):
    model, path = saved
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[-100:]
    elif how == "zeroed":
        content[:] = bytes(len(content))
    elif how == "emptied":
        content.clear()
    elif how == "bit-flipped":
        content[-5] ^= 1  # in the weights
    else:
        content = safetensors.torch.save({name: value.contiguous() for name, value in model.state_dict().items()})
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model(path)


def test_bad_input_saved_model_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors' does not exist: train a model"):
        load_model(tmp_path / "nowhere.safetensors")


def test_fault_full_disk_when_saving_a_model_names_the_remedy(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_model(tmp_path / "model.safetensors", small_network(), RECIPE, {}, CLASSES)
    assert "model.safetensors' was not written: free some space or choose another folder" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())
