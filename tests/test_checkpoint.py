"""Checkpoints and saved weights: written atomically, checked when read, and refused when they do not fit."""

import builtins
import errno
import os
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import safetensors.torch
import torch
from networks import EXACT, Linear, same_weights, small_network
from torch import nn

from model_AC import AdvancedCNN
from session8 import checkpoint
from session8.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint, save_model
from session8.config import Config
from session8.data import CLASSES
from session8.training import fit

RECIPE = Config(epochs=3, batch_size=25)


def state(number):
    return {"number": number, "step": number, "weights": torch.arange(1000) * number}


@pytest.fixture
def two_checkpoints(tmp_path):
    for number in (1, 2):
        save_checkpoint(tmp_path, state(number))
    return tmp_path


DAMAGES = ("truncated", "zeroed", "emptied", "bit-flipped")


def damage(path, how):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2  # in the weights
    if how == "bit-flipped":
        content[middle] ^= 1
    damaged = {"truncated": content[:middle], "zeroed": bytes(len(content)), "emptied": b"", "bit-flipped": content}
    path.write_bytes(damaged[how])


# -- writing -----------------------------------------------------------------------------------------------------------


def test_fault_killed_at_random_while_checkpoints_are_written(tmp_path):
    rng, newest = random.Random(0), 0
    for _ in range(12):
        before, process = processes.modified(tmp_path), processes.start(processes.write_checkpoints, tmp_path, newest)
        processes.wait_for(lambda before=before: processes.modified(tmp_path) > before)
        time.sleep(rng.uniform(0, 0.03))
        processes.kill(process)
        found = load_checkpoint(tmp_path)
        assert found["number"] >= newest and found["weights"].tolist() == [found["number"]] * 500_000
        newest = found["number"]
    assert newest >= 12


@pytest.mark.parametrize("function, call", [("fsync", 1), ("replace", 1), ("replace", 2)])
def test_fault_killed_at_each_point_of_writing_a_checkpoint(tmp_path, function, call):
    process = processes.start(processes.write_checkpoints_and_die, tmp_path, function, call)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.part"))) == 1
    found = load_checkpoint(tmp_path)
    assert found["number"] == 2 and found["weights"].tolist() == [2] * 500_000


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("function, call", [("fsync", 1), ("replace", 1), ("replace", 2)])
def test_fault_interrupted_write_loses_nothing(two_checkpoints, monkeypatch, function, call, error):
    original, calls = getattr(os, function), []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise error
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(type(error)) as raised:
            save_checkpoint(two_checkpoints, state(3))
    if isinstance(error, OSError):
        assert "last.pt' was not written: free some space or choose another folder" in raised.value.__notes__[-1]
    assert not list(two_checkpoints.glob("*.part"))
    assert load_checkpoint(two_checkpoints)["number"] == 2


def test_a_write_deletes_temporary_files_of_the_same_name_older_than_ten_minutes(tmp_path):
    old = "last.pt.0123abcd.part"
    files = {old: 11, "last.pt.4567abcd.part": 9, "model.safetensors.0123abcd.part": 11, "mine.part": 11}
    for name, minutes in files.items():
        (tmp_path / name).write_bytes(b"half a file")
        os.utime(tmp_path / name, (time.time() - 60 * minutes,) * 2)
    assert load_checkpoint(tmp_path) is None and len(list(tmp_path.iterdir())) == 4  # reading deletes nothing
    checkpoint.write_file(tmp_path / "last.pt", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {*files, "last.pt"} - {old}


def test_a_finished_run_is_shown_from_a_read_only_folder_and_an_unfinished_one_is_refused(
    tmp_path, synthetic, monkeypatch
):
    history = fit(Linear(), *synthetic, EXACT, "cpu", tmp_path / "finished")
    (tmp_path / "new").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def read_only(original):  # permission bits would not stop root
        def refuse(file, mode="r", *arguments, **keywords):
            writes = mode & (os.O_WRONLY | os.O_RDWR) if isinstance(mode, int) else set(mode) & set("wax+")
            if writes and Path(file).is_relative_to(tmp_path):
                raise OSError(errno.EROFS, "Read-only file system")
            return original(file, mode, *arguments, **keywords)

        return refuse

    for module in (builtins, os):
        monkeypatch.setattr(module, "open", read_only(module.open))
    assert fit(Linear(), *synthetic, EXACT, "cpu", tmp_path / "finished") == history
    with pytest.raises(CheckpointError, match=r"new' cannot be written \(.*Read-only.*: choose another folder"):
        fit(Linear(), *synthetic, EXACT, "cpu", tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("session8.checkpoint.time.monotonic", lambda: now.seconds)
    return now


@pytest.mark.parametrize("folder, interval", [("local", 30), ("drive/runs/a", 300), ("link/a", 300)])
def test_checkpoints_are_written_at_intervals_which_are_longer_on_google_drive(
    tmp_path, monkeypatch, clock, folder, interval
):
    monkeypatch.setattr(checkpoint, "DRIVE", tmp_path / "drive")
    (tmp_path / "drive" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "drive" / "runs")
    writer = checkpoint.CheckpointWriter(tmp_path / folder, {})
    clock.seconds = interval - 1
    assert not writer.due()
    clock.seconds = interval
    assert writer.due()
    writer.save(state(1))
    assert load_checkpoint(tmp_path / folder)["step"] == 1 and not writer.due()
    assert checkpoint.CheckpointWriter(tmp_path / folder, {}, seconds=0).due()


def test_a_checkpoint_is_written_only_if_it_is_newer_and_there_is_a_folder(tmp_path, clock):
    writer, nowhere = checkpoint.CheckpointWriter(tmp_path, {}, step=5), checkpoint.CheckpointWriter(None, {})
    clock.seconds = 1000
    nowhere.save(state(1))
    assert not nowhere.due()
    for step, newest in ((4, None), (5, None), (6, 6), (6, 6)):
        writer.save(state(step))
        assert (load_checkpoint(tmp_path) or {}).get("step") == newest
    assert not (tmp_path / "previous.pt").exists()


def test_fault_full_disk_is_reported_and_the_last_checkpoint_kept(tmp_path, monkeypatch, capsys, clock):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = checkpoint.CheckpointWriter(tmp_path, {})
    writer.save(state(1))
    clock.seconds = 100
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        writer.save(state(2))
    assert re.search(r"not written to '.*' \(\[Errno 28\] No space .*\): free some space", capsys.readouterr().out)
    assert load_checkpoint(tmp_path)["step"] == 1 and not writer.due()  # it tries again after the interval
    writer.save(state(2))
    assert load_checkpoint(tmp_path)["step"] == 2


# -- damaged, foreign and malicious files ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", DAMAGES)
def test_fault_damaged_checkpoint_costs_one_step_back(two_checkpoints, how):
    # The second time, the checkpoint that is written next has taken the damaged one's place, not the good one's.
    for _ in range(2):
        damage(two_checkpoints / "last.pt", how)
        with pytest.warns(UserWarning, match=r"last.pt' is damaged.*; using the previous one"):
            assert load_checkpoint(two_checkpoints)["number"] == 1
        save_checkpoint(two_checkpoints, state(2))


def test_fault_any_flipped_bit_is_detected_or_harmless(two_checkpoints):
    last, rng = two_checkpoints / "last.pt", random.Random(0)
    whole, previous = last.read_bytes(), (two_checkpoints / "previous.pt").read_bytes()
    noticed = 0
    for _ in range(100):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        last.write_bytes(content)
        (two_checkpoints / "previous.pt").write_bytes(previous)
        try:
            with pytest.warns(UserWarning):
                assert load_checkpoint(two_checkpoints)["number"] == 1
            noticed += 1
        except pytest.fail.Exception:  # no warning: what was read must be what was written
            found = load_checkpoint(two_checkpoints)
            assert found["number"] == 2 and torch.equal(found["weights"], torch.arange(1000) * 2)
    assert noticed > 50


def test_fault_checkpoint_that_cannot_be_read_at_the_moment_is_not_discarded(two_checkpoints, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(CheckpointError, match=r"last.pt' cannot be read \(.*Input/output error\): try again"):
            load_checkpoint(two_checkpoints)
    assert load_checkpoint(two_checkpoints)["number"] == 2


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_fault_malicious_checkpoint_runs_nothing(tmp_path, as_zip):
    marker, path = tmp_path / "the code was run", tmp_path / "last.pt"
    torch.save({"format": checkpoint.FORMAT, "model": Malicious(marker)}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(CheckpointError, match=r"has no intact checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a safetensors file, or is damaged"):
        load_model(path, small_network())
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file was as malicious as it was meant to be


# -- saved weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = AdvancedCNN(num_classes=7, dropout=0.25, width=0.5).to(memory_format=torch.channels_last)
    path = tmp_path / "new" / "model.safetensors"
    save_model(path, model, RECIPE, {"test_accuracy": np.float32(88.5)}, CLASSES[:7])
    return model, path


def test_a_saved_model_is_created_from_its_metadata_or_loaded_into_a_given_network(saved):
    model, path = saved
    loaded, about = load_model(path)
    assert same_weights(model, loaded) and not loaded.training and type(loaded) is AdvancedCNN
    assert loaded.dropout.p == 0.25 and loaded.head.out_features == 7 and loaded.width == 0.5
    assert about["metrics"] == {"test_accuracy": 88.5} and about["classes"] == list(CLASSES[:7])
    assert Config(**about["config"]) == RECIPE and about["network"] == "AdvancedCNN"
    other = AdvancedCNN(num_classes=7, width=0.5)
    assert load_model(path, other)[0] is other and same_weights(model, other)
    tensors = safetensors.torch.load_file(path)  # without this project
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_networks_with_tied_weights_and_networks_that_cannot_be_copied_are_saved_and_loaded(tmp_path):
    tied, uncopyable = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)), Linear()
    tied[1].weight = tied[0].weight
    uncopyable.scale = uncopyable.head.weight.norm()  # torch.nn.utils.weight_norm keeps such a tensor
    for model in (tied, uncopyable):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        save_model(tmp_path / "model.safetensors", model, RECIPE, {}, CLASSES)
        nn.init.zeros_(next(model.parameters()))
        assert load_model(tmp_path / "model.safetensors", model)[0] is model
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", [*DAMAGES, "without metadata"])
def test_fault_damaged_model_is_refused(saved, how):
    model, path = saved
    if how == "without metadata":
        safetensors.torch.save_model(model, path)
    else:
        damage(path, how)
    with pytest.raises(CheckpointError, match=r"model.safetensors' is .*damaged"):
        load_model(path)


# -- bad input ---------------------------------------------------------------------------------------------------------

RUN, OTHER_RUN = ({"model": "Linear", "config": {"epochs": epochs, "seed": 0}} for epochs in (3, 4))


def load_damaged(folder):
    for name in ("last.pt", "previous.pt"):
        damage(folder / name, "zeroed")
    load_checkpoint(folder)


def load(content):
    def load_content(folder):
        torch.save(content, folder / "last.pt")
        (folder / "previous.pt").unlink()
        load_checkpoint(folder, RUN)

    return load_content


def save_linear(folder, model=None):
    save_model(folder / "linear", Linear() if model is None else model, RECIPE, {}, CLASSES)
    return folder / "linear"


NEWER, OLDER, SAME = ({"format": checkpoint.FORMAT + change} for change in (1, -1, 0))
OTHER = {**SAME, "identity": OTHER_RUN}
BAD = [
    (load_damaged, CheckpointError, "has no intact checkpoint: .*last.pt.*previous.pt.* Delete them to start over"),
    (load({"epoch": 1}), CheckpointError, "last.pt' is not a checkpoint of this project.* Delete them to start over"),
    (load(torch.zeros(3)), CheckpointError, "last.pt' is not a checkpoint of this project"),
    (load(NEWER), CheckpointError, rf"last.pt' has format {NEWER['format']}, .*: update the project"),
    (load(OLDER), CheckpointError, rf"last.pt' has format {OLDER['format']}, .*: use another folder, or delete it"),
    (load(SAME), CheckpointError, "different run: .*model was None and is 'Linear'.* Use another folder, or undo"),
    (load(OTHER), CheckpointError, "last.pt' belongs to a different run: epochs was 4 and is 3"),
    (lambda folder: load_model(folder / "no"), FileNotFoundError, "no' does not exist: train a model, or name another"),
    (lambda folder: load_model(save_linear(folder)), CheckpointError, "linear' holds a Linear: pass one as `model`"),
    (lambda folder: load_model(save_linear(folder), AdvancedCNN()), CheckpointError, "does not fit this model: .*Adv"),
    (lambda folder: save_linear(folder, torch.compile(Linear())), ValueError, "result of torch.compile.*pass"),
]


@pytest.mark.parametrize("call, error, words", BAD)
def test_bad_input_checkpoints_and_saved_models(call, error, words, two_checkpoints):
    with pytest.raises(error, match=words):
        call(two_checkpoints)
