"""Each fault is really brought about: processes killed, files damaged, disks full, numbers gone bad."""

import io
import multiprocessing
import os
import random
import signal
import tarfile
import time
from hashlib import md5
from pathlib import Path

import albumentations as A
import pytest
import torch
from fakes import official_archive
from networks import small_network

from model_AC import AdvancedCNN
from session8 import data as cifar10
from session8 import training as utils
from session8.checkpoint import FORMAT, CheckpointError, load_checkpoint, save_checkpoint, save_model
from session8.training import Config, TrainingDiverged, fit

if os.name == "posix":
    import children

posix = pytest.mark.skipif(os.name != "posix", reason="kills processes and limits files as POSIX systems do")

RECIPE = Config(epochs=3, batch_size=25)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- killed --------------------------------------------------------------------------------------------------------


def written(folder):
    """When the last checkpoint was written; 0 if there is none."""
    try:
        return (folder / "last.pt").stat().st_mtime_ns
    except FileNotFoundError:  # not yet, or just being replaced
        return 0


@posix
def test_fault_killed_at_random_moments_until_done(tmp_path):
    rng, kills, broken = random.Random(0), 0, tmp_path / "broken"

    def killed():
        """Train until a checkpoint is written, and a moment longer. False if training was done by then."""
        before, process = written(broken), children.start(children.small_training, broken)
        wait_for(lambda: written(broken) > before or process.exitcode is not None)
        process.join(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    while killed():
        kills += 1
    assert kills >= 8  # of 72 steps with a checkpoint each
    children.run(children.small_training, tmp_path / "unbroken")
    one, other = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("broken", "unbroken"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in other["model"])
    assert all(one["history"][name] == other["history"][name] for name in other["history"] if name != "seconds")


@posix
def test_fault_killed_at_random_while_checkpoints_are_written(tmp_path):
    rng, newest = random.Random(0), 0
    for _ in range(25):
        before, process = written(tmp_path), children.start(children.write_checkpoints, tmp_path, newest)
        wait_for(lambda before=before: written(tmp_path) > before)
        time.sleep(rng.uniform(0, 0.05))
        children.kill(process)
        state = load_checkpoint(tmp_path)
        assert state["number"] >= newest and state["weights"].tolist() == [state["number"]] * 500_000
        newest = state["number"]
    assert newest >= 25
    assert not list(tmp_path.glob("*.part"))  # what the killed ones left half-written was cleared away


@posix
@pytest.mark.parametrize("function, call", [("fsync", 1), ("replace", 1), ("replace", 2)])
def test_fault_killed_at_each_point_of_writing_a_checkpoint(tmp_path, function, call):
    process = children.start(children.write_checkpoints_and_die, tmp_path, function, call)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.part"))) == 1
    state = load_checkpoint(tmp_path)
    assert state["number"] == 2 and state["weights"].tolist() == [2] * 500_000


@posix
def test_fault_download_killed_and_started_again(server, tmp_path, monkeypatch):
    data = tmp_path / "data"
    part = data / f"{cifar10.ARCHIVE}.part"
    process = children.start(children.download, f"{server.url}/silent", data, cifar10.ARCHIVE_MD5)
    wait_for(lambda: part.exists() and part.stat().st_size > 1000)
    children.kill(process)
    assert part.exists() and not (data / cifar10.ARCHIVE).exists()
    monkeypatch.setattr(cifar10, "MIRRORS", (f"{server.url}/good",))
    train, _ = cifar10.load_cifar10()
    assert (train.images == server.splits[0].images).all() and not part.exists()


class KillsAWorker(AdvancedCNN):
    passes = 0

    def forward(self, x):
        self.passes += self.training
        if self.passes == 100:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            self.passes += 1
        return super().forward(x)


@posix
def test_fault_worker_killed_in_the_middle_of_an_epoch(tmp_path):
    splits, recipe = cifar10.synthetic_cifar10(1500, 100), Config(epochs=2, batch_size=20)  # 75 batches
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"a worker process that loads images died in epoch 2 .*num_workers=0"):
        fit(KillsAWorker(width=0.5), *splits, recipe, "cpu", tmp_path, num_workers=2)
    assert load_checkpoint(tmp_path)["epoch"] == 1
    torch.manual_seed(0)
    model = KillsAWorker(width=0.5)
    history = fit(model, *splits, recipe, "cpu", tmp_path)
    assert len(history["test_loss"]) == 2 and model.passes == 75


def test_fault_of_a_transform_in_a_worker_is_not_taken_for_its_death(synthetic, monkeypatch):
    def fails(image, **_):
        raise RuntimeError("the transform's own fault")

    transform = A.Compose([A.RandomCrop(32, 32), A.Lambda(image=fails, p=1.0)])
    monkeypatch.setattr(utils, "train_transforms", lambda _: transform)
    with pytest.raises(RuntimeError, match="the transform's own fault") as error:
        fit(AdvancedCNN(width=0.5), *synthetic, Config(epochs=1), "cpu", num_workers=1)
    assert "died" not in str(error.value)


# -- damaged, foreign, malicious -----------------------------------------------------------------------------------


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
    with pytest.warns(UserWarning, match=r"last.pt' is damaged.*; the one before it is taken"):
        assert load_checkpoint(two_checkpoints)["number"] == 1
    # And the next one that is written takes the damaged one's place, not the good one's.
    save_checkpoint(two_checkpoints, {"number": 2, "weights": torch.arange(1000) * 2})
    damage(two_checkpoints / "last.pt", how)
    with pytest.warns(UserWarning):
        assert load_checkpoint(two_checkpoints)["number"] == 1


def test_fault_checkpoint_that_cannot_be_read_for_the_moment_is_not_given_up(two_checkpoints, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(CheckpointError, match=r"last.pt' cannot be read now .*try again"):
            load_checkpoint(two_checkpoints)
    assert load_checkpoint(two_checkpoints)["number"] == 2


def test_fault_any_flipped_bit_is_noticed_or_harmless(two_checkpoints):
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
    with pytest.raises(CheckpointError, match=r"no checkpoint in '.*' is whole: .*last.pt.*previous.pt.*Delete them"):
        fit(small_network(), *synthetic, RECIPE, "cpu", two_checkpoints)


def test_fault_damaged_checkpoint_in_a_run(tmp_path, synthetic):
    unbroken, broken = small_network(), small_network()
    fit(unbroken, *synthetic, RECIPE, "cpu", tmp_path)
    damage(tmp_path / "last.pt", "truncated")
    with pytest.warns(UserWarning, match="the one before it is taken"):
        fit(broken, *synthetic, RECIPE, "cpu", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), broken.parameters(), strict=True))


def test_fault_checkpoint_of_a_newer_version(two_checkpoints, synthetic):
    torch.save({"format": FORMAT + 1, "number": 3}, two_checkpoints / "last.pt")
    with pytest.raises(CheckpointError, match=rf"last.pt' has format {FORMAT + 1}, .*update the project"):
        fit(small_network(), *synthetic, RECIPE, "cpu", two_checkpoints)


def test_fault_checkpoint_of_another_network_or_configuration(tmp_path, synthetic):
    fit(small_network(), *synthetic, RECIPE, "cpu", tmp_path)
    with pytest.raises(CheckpointError, match=r"network was .* and is"):
        fit(AdvancedCNN(), *synthetic, RECIPE, "cpu", tmp_path)
    with pytest.raises(CheckpointError, match="epochs was 3 and is 4"):
        fit(small_network(), *synthetic, Config(epochs=4, batch_size=25), "cpu", tmp_path)


@pytest.mark.parametrize("content", [{"format": 1, "kind": "checkpoint"}, {"format": 1}, {"epoch": 1}, torch.zeros(3)])
def test_fault_file_that_is_no_checkpoint_of_ours(tmp_path, synthetic, content):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"is of another run|is not of this project|is no checkpoint"):
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
    torch.save({"format": 1, "model": Malicious(marker)}, folder / "last.pt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(CheckpointError, match=r"no checkpoint in '.*' is whole"):
        fit(small_network(), *synthetic, RECIPE, "cpu", folder)
    with pytest.raises(CheckpointError, match="refused, and nothing was run" if as_zip else "damaged"):
        utils.load_model(folder / "last.pt", small_network())
    assert not marker.exists()
    torch.load(folder / "last.pt", weights_only=False)
    assert marker.exists()  # the file was as malicious as it was meant to be


@pytest.mark.parametrize("name", ["../outside.txt", "/absolute"])
def test_fault_archive_members_outside_the_folder(tmp_path, monkeypatch, name):
    archive, _ = official_archive(tmp_path / "data", monkeypatch)
    name = str(tmp_path / "outside.txt") if name == "/absolute" else name
    with tarfile.open(archive, "w:gz") as tar:
        for member in (name, f"{cifar10.BATCHES}/../../outside.txt"):
            information = tarfile.TarInfo(member)
            information.size = 4
            tar.addfile(information, io.BytesIO(b"evil"))
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", md5(archive.read_bytes()).hexdigest())
    with pytest.raises((tarfile.FilterError, ValueError)):
        cifar10.load_cifar10(tmp_path / "data")
    assert not list(tmp_path.rglob("outside.txt"))


# -- no room, no right ---------------------------------------------------------------------------------------------


@posix
def test_fault_disk_full_while_writing(tmp_path):
    children.run(children.training_on_a_full_disk, tmp_path)
    assert len(torch.load(tmp_path / "result.pt", weights_only=True)["history"]["test_loss"]) == 6  # training went on
    assert not list(tmp_path.glob("*.part"))
    state = load_checkpoint(tmp_path)  # the last that fitted: of the second epoch's last step
    assert (state["epoch"], state["progress"]["batches"]) == (1, 12)


def test_fault_disk_full_at_the_end_says_what_to_do(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_model(tmp_path / "model.pt", small_network(), RECIPE, {}, cifar10.CLASSES)
    assert "model.pt' was not written: make room there, or name another folder" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_fault_disk_full_is_told_and_the_last_checkpoint_kept(tmp_path, synthetic, monkeypatch, capsys):
    writes, save = [], utils.save_checkpoint

    def full(folder, state):
        writes.append(state["epoch"])
        if len(writes) > 1:
            raise OSError(28, "No space left on device")
        save(folder, state)

    monkeypatch.setattr(utils, "save_checkpoint", full)
    history = fit(small_network(), *synthetic, RECIPE, "cpu", tmp_path)
    assert len(history["test_loss"]) == 3 and writes == [1, 2, 3]
    assert capsys.readouterr().out.count("No checkpoint could be written ([Errno 28] No space left on device)") == 2
    assert load_checkpoint(tmp_path)["epoch"] == 1


def test_fault_checkpoint_folder_that_cannot_be_written(tmp_path, synthetic):
    place = tmp_path / "run"
    place.write_text("a file in its place")  # permission bits would not stop root
    model = small_network()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=r"no checkpoints can be written to '.*run' .*name another folder"):
        fit(model, *synthetic, RECIPE, "cpu", place)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# -- numbers gone bad ----------------------------------------------------------------------------------------------


class GoesBad(AdvancedCNN):
    """From the given training step on, its outputs are `value`; or its weights become so after that step."""

    def __init__(self, at, value, weights=False):
        torch.manual_seed(0)
        super().__init__(width=0.5)
        self.at, self.value, self.weights, self.passes = at, value, weights, 0

    def forward(self, x):
        self.passes += self.training
        result = super().forward(x)
        if self.training and self.passes >= self.at:
            if self.weights:
                self.dense.bias.data[0] = -float("inf")  # this class is never predicted: the loss may stay finite
            else:
                result = result * self.value
        return result


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault_loss_gone_bad_stops_training_and_names_the_first_step(tmp_path, synthetic, value):
    with pytest.raises(
        TrainingDiverged, match=r"the loss became (nan|inf|-inf) in epoch 2, Batch_id=4, .* rate of 0.01"
    ):
        fit(GoesBad(17, value), *synthetic, RECIPE, "cpu", tmp_path)  # 12 batches an epoch
    state = load_checkpoint(tmp_path)
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())


def test_fault_test_loss_gone_bad(tmp_path, synthetic, monkeypatch):
    monkeypatch.setattr(utils, "test", lambda *_: (float("nan"), 10.0))
    with pytest.raises(TrainingDiverged, match="the test loss became nan in epoch 1"):
        fit(small_network(), *synthetic, RECIPE, "cpu", tmp_path)
    assert load_checkpoint(tmp_path) is None


def test_fault_training_that_really_diverges(tmp_path, synthetic):
    recipe = Config(epochs=3, batch_size=25, lr=1e30, precision="float32")
    with pytest.raises(TrainingDiverged, match=r"at a learning rate of 1e\+30: train with a smaller lr"):
        fit(small_network(), *synthetic, recipe, "cpu", tmp_path)
    assert load_checkpoint(tmp_path) is None


def test_fault_bad_weights_are_never_saved(tmp_path, synthetic, monkeypatch):
    # The images are of other classes than the one whose bias is minus infinity: no loss tells.
    train, test = (cifar10.Split(s.images, s.labels.clip(1), s.source) for s in synthetic)
    with pytest.raises(TrainingDiverged, match=r"(a weight|the loss) became"):
        fit(GoesBad(17, None, weights=True), train, test, RECIPE, "cpu", tmp_path)
    state = load_checkpoint(tmp_path)
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())
