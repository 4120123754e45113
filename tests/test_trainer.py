"""Whole runs, including runs that are interrupted, killed, or diverge."""

import json
import multiprocessing
import os
import random
import re
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import albumentations as A
import numpy as np
import pytest
import torch
from networks import CPU, EXACT, Linear, same_weights, small_network
from session8.trainer import Trainer, fit
from test_checkpoint import damage
from torch import nn

from model_AC import AdvancedCNN
from session8 import checkpoint, data, records, trainer, training
from session8.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from session8.config import Config
from session8.data import Split
from session8.loaders import make_loader
from session8.training import TrainingDiverged

if os.name == "posix":
    import processes

posix = pytest.mark.skipif(os.name != "posix", reason="kills processes and limits files as POSIX systems do")


def test_training_lowers_the_loss_and_learns(synthetic):
    history = fit(small_network(), *synthetic, Config(epochs=5, batch_size=20), "cpu")
    assert history["train_loss"][-1] < 0.7 * history["train_loss"][0]
    assert history["test_accuracy"][-1] > 50


def test_a_network_that_returns_logits_trains_like_one_that_returns_log_probabilities(synthetic):
    class Scores(Linear):
        def forward(self, x):
            return 3 + self.head(x.flatten(1))

    config, results = Config(epochs=2, batch_size=50, lr=0.001, label_smoothing=0.2, precision="float32"), []
    for network in (Linear(), Scores()):
        history = fit(network, *synthetic, config, "cpu")
        results.append([value for name in ("train_loss", "test_loss", "test_accuracy") for value in history[name]])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


LOG = re.compile(
    r"(Epoch (?P<epoch>\d+)\n"
    r"(\r[^\n]*)*\rTrain: Loss=\d+\.\d{4} Batch_id=4 Accuracy=\d+\.\d{2}: "
    r"100%\|█{10}\| 5/5 \[\d\d:\d\d<\d\d:\d\d, +\d+\.\d\d(it/s|s/it)\]\n"
    r"Test set: Average loss: \d+\.\d{4}, Accuracy: \d+/100 \(\d+\.\d{2}%\)\n\n){2}"
)


def test_log_lines_have_the_seed_projects_format(synthetic, capsys):
    history = fit(Linear(), *synthetic, Config(epochs=2, batch_size=64), "cpu")
    header, log = capsys.readouterr().out.split("\n\n", 1)
    assert "synthetic stand-in, NOT CIFAR-10" in header and "300 images" in header
    assert re.search(r"on cpu, augmentation albumentations\nInitial weights: [0-9a-f]{8}$", header)
    assert LOG.fullmatch(log), repr(log)
    assert f"({history['test_accuracy'][-1]:.2f}%)" in log and f"Accuracy={history['train_accuracy'][0]:.2f}" in log


def test_history_is_plain_and_complete(synthetic):
    history = fit(Linear(), *synthetic, Config(schedule="one_cycle", epochs=3, batch_size=100), "cpu")
    assert list(history) == ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds", "parts"]
    assert [part["epochs"] for part in history["parts"]] == [[0, 3]]
    numbers = [values for name, values in history.items() if name != "parts"]
    assert all(len(values) == 3 and all(type(v) is float for v in values) for values in numbers)
    # 3 steps per epoch, 9 in all: the middles of the last steps are at 2.5/9, 5.5/9 and 8.5/9 of training.
    assert history["lr"] == pytest.approx([0.01 * (1 - k / 9) / 0.75 for k in (2.5, 5.5, 8.5)])
    json.dumps(history)


def test_the_seed_determines_training(synthetic):
    states = iter(range(100, 104))

    def weights(seed):
        model = small_network()
        torch.manual_seed(next(states))  # dropout must not draw from what was before
        fit(model, *synthetic, Config(epochs=1, batch_size=64, seed=seed), "cpu")
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_recipe_with_cutout_trains_on_it(synthetic, monkeypatch):
    seen = []
    step = training.train_step
    monkeypatch.setattr(
        training, "train_step", lambda model, images, *rest: seen.append(images) or step(model, images, *rest)
    )
    for cutout in (0, 12):
        seen.clear()
        fit(AdvancedCNN(width=0.5), *synthetic, Config(epochs=1, batch_size=50, cutout=cutout), "cpu")
        painted = (torch.cat(seen) == torch.tensor([125, 123, 114])).all(3).sum((1, 2))
        assert len(painted) == 300 and (painted >= cutout**2).all() and (painted < cutout**2 + 20).float().mean() > 0.9


RECIPE = Config(epochs=3, batch_size=25, schedule="one_cycle", lr=0.02, cutout=8)  # 12 batches an epoch


class Interrupted(AdvancedCNN):
    """Ctrl-C in the given forward pass of training; the seed decides the weights, as in the notebook."""

    def __init__(self, at=None, seed=0, **sizes):
        torch.manual_seed(seed)
        super().__init__(width=0.5, **sizes)
        self.at, self.passes = at, 0

    def forward(self, x):
        self.passes += self.training
        if self.training and self.passes == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)


def without_times(history):
    return {name: values for name, values in history.items() if name not in ("seconds", "parts")}


def log_of(output):
    """Return the log as a terminal shows it: without what was overwritten, the header and times."""
    lines = [line.rpartition("\r")[2] for line in output.split("\n")]
    return [
        re.sub(r"\[.*?\]", "[]", line)
        for line in lines
        if re.match("Epoch|Train|Test set", line) and "Training on" not in line
    ]


@pytest.fixture(scope="module")
def unbroken(synthetic, tmp_path_factory):
    model = Interrupted()
    history = fit(model, *synthetic, RECIPE, "cpu", tmp_path_factory.mktemp("unbroken"))
    return model, history


def test_the_result_does_not_depend_on_the_number_of_workers(unbroken, synthetic):
    for workers in (0, 2):
        model = Interrupted()
        history = fit(model, *synthetic, RECIPE, "cpu", num_workers=workers)
        assert same_weights(model, unbroken[0]) and without_times(history) == without_times(unbroken[1])


@pytest.mark.parametrize("at, whole", [(4, 0), (10, 1)])  # an epoch is 5 batches of training and 1 of testing
def test_ctrl_c_leaves_history_and_weights_after_the_last_complete_epoch(synthetic, capsys, at, whole):
    class InterruptedLinear(Linear):
        passes = 0

        def forward(self, x):
            self.passes += 1
            if self.passes == at:
                signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    model = InterruptedLinear()
    history = fit(model, *synthetic, Config(epochs=5, batch_size=64), "cpu")
    assert all(len(values) == whole for name, values in history.items() if name != "parts")
    assert f"Interrupted: history and weights are those after {whole} epoch" in capsys.readouterr().out
    if whole:
        tested = training.test(model, make_loader(synthetic[1], 500, train=False), Config(), CPU)
        assert tested == (history["test_loss"][-1], history["test_accuracy"][-1])
    else:
        assert torch.equal(model.head.weight, Linear().head.weight)


@pytest.mark.parametrize("call, whole", [(1, 0), (2, 1)])
def test_ctrl_c_between_the_end_of_an_epoch_and_the_copy_of_its_weights(synthetic, monkeypatch, call, whole):
    copies, deepcopy = [], trainer.deepcopy

    def interrupted(value):
        copies.append(value)
        if len(copies) == 1 + call:  # the first copy is made before the first epoch
            raise KeyboardInterrupt
        return deepcopy(value)

    monkeypatch.setattr(trainer, "deepcopy", interrupted)
    model = Linear()
    history = fit(model, *synthetic, Config(epochs=5, batch_size=64), "cpu")
    assert len(history["test_loss"]) == len(history["seconds"]) == whole
    if whole:
        tested = training.test(model, make_loader(synthetic[1], 500, train=False), Config(), CPU)
        assert tested == (history["test_loss"][-1], history["test_accuracy"][-1])
    else:
        assert same_weights(model, Linear())


# -- resuming ------------------------------------------------------------------------------------------------------


@pytest.fixture
def every_step(monkeypatch):
    """Arguments of `fit` for a checkpoint after every step."""
    monkeypatch.setattr(training, "REFRESH_SECONDS", 0)
    return {"checkpoint_seconds": 0}


@pytest.mark.parametrize("at, workers", [(2, 0), (12, 0), (13, 0), (20, 0), (20, 2), (24, 0), (36, 0)])
def test_resume_is_bitwise_equal(unbroken, synthetic, tmp_path, every_step, capsys, at, workers):
    fit(Interrupted(at), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    capsys.readouterr()
    model = Interrupted(seed=99)  # its own weights do not matter
    history = fit(model, *synthetic, RECIPE, "cpu", tmp_path, num_workers=workers, **every_step)
    assert same_weights(model, unbroken[0])
    assert without_times(history) == without_times(unbroken[1])
    assert f"{(at - 1) / 12:.4g} of 3 epochs done" in capsys.readouterr().out
    assert model.passes == 36 - (at - 1)


def test_resume_prints_the_epochs_that_are_done(synthetic, tmp_path, every_step, capsys):
    fit(Interrupted(at=20), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    capsys.readouterr()
    history = fit(Interrupted(), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    log = log_of(capsys.readouterr().out)
    assert [line for line in log if line.startswith("Epoch")] == ["Epoch 1", "Epoch 2", "Epoch 3"]
    loss, accuracy = history["train_loss"][0], history["train_accuracy"][0]
    assert log[1].startswith(f"Train set: Average loss: {loss:.4f}, Accuracy: {accuracy:.2f}%")
    assert f"({history['test_accuracy'][0]:.2f}%)" in log[2] and log[4].startswith("Train: Loss=")


def test_a_checkpoint_is_written_at_intervals_at_the_end_and_on_ctrl_c(synthetic, tmp_path, monkeypatch):
    positions, save = [], checkpoint.save_checkpoint

    def noted(folder, state):
        positions.append(state["epoch"] + state["progress"]["batches"] / 12)
        save(folder, state)

    def saves(at=None, **options):
        """Train with a clock that advances by one second per step; return where checkpoints were written."""
        positions.clear()
        model = Interrupted(at)
        clock = SimpleNamespace(monotonic=lambda: model.passes, perf_counter=time.perf_counter)
        monkeypatch.setattr(training, "time", clock)
        monkeypatch.setattr(checkpoint, "time", clock)
        fit(model, *synthetic, RECIPE, "cpu", tmp_path / str(len(list(tmp_path.iterdir()))), **options)
        return [round(12 * position) for position in positions]

    monkeypatch.setattr(checkpoint, "save_checkpoint", noted)
    assert saves(checkpoint_seconds=1000) == [36]  # not after every short epoch
    assert saves() == [30, 36]
    assert saves(checkpoint_seconds=15) == [15, 30, 36]
    assert saves(checkpoint_seconds=0, at=4) == [1, 2, 3]
    assert saves(checkpoint_seconds=1000, at=20) == [12]  # Ctrl-C: the last complete epoch
    assert saves(checkpoint_seconds=15, at=20) == [15]  # unless a later checkpoint exists
    assert saves(checkpoint_seconds=1000, at=4) == [0]


def test_a_finished_run_is_shown_and_not_trained_again(unbroken, synthetic, tmp_path, capsys):
    fit(Interrupted(), *synthetic, RECIPE, "cpu", tmp_path)
    capsys.readouterr()
    model = Interrupted(seed=99)
    history = fit(model, *synthetic, RECIPE, "cpu", tmp_path)
    shown = capsys.readouterr().out
    assert "This run is finished" in shown and model.passes == 0 and not model.training
    assert shown.count("Train set: Average loss: ") == shown.count("Test set: Average loss: ") == 3
    assert f"({history['test_accuracy'][-1]:.2f}%)" in shown and "Changed since" not in shown
    assert same_weights(model, unbroken[0]) and without_times(history) == without_times(unbroken[1])


def test_resume_counts_the_seconds_before(synthetic, tmp_path, every_step):
    fit(Interrupted(at=20), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    state = load_checkpoint(tmp_path)
    before = state["progress"]["seconds"]
    state["progress"]["seconds"] = before + 100
    save_checkpoint(tmp_path, state)
    history = fit(Interrupted(), *synthetic, RECIPE, "cpu", tmp_path)
    assert 0 < before < 60 and history["seconds"][1] > 100 > history["seconds"][2]


def test_the_parts_of_a_run_are_kept_with_their_device_and_versions(
    synthetic, tmp_path, every_step, monkeypatch, capsys
):
    fit(Interrupted(at=20), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    monkeypatch.setattr(records, "package_versions", lambda: {"torch": "99.0"})
    monkeypatch.setattr(records, "device_name", lambda _: "another machine")
    monkeypatch.setattr(records, "project_commit", lambda: "abc")
    capsys.readouterr()
    history = fit(Interrupted(), *synthetic, RECIPE, "cpu", tmp_path)
    first, second = history["parts"]
    assert first["epochs"] == [0, pytest.approx(19 / 12)] and second["epochs"] == [pytest.approx(19 / 12), 3]
    assert first["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (second["versions"], second["device"], second["commit"]) == ({"torch": "99.0"}, "another machine", "abc")
    assert re.search(r"Changed since: .*device.*torch", capsys.readouterr().out)
    record = records.write_record(tmp_path / "r.json", Interrupted(), *synthetic, RECIPE, history, "cpu")
    assert record["parts"] == history["parts"] and record["device"] == "another machine"


@pytest.mark.parametrize("at", [20, None])
def test_changed_source_files_are_named_also_for_a_finished_run(synthetic, tmp_path, monkeypatch, capsys, at):
    fit(Interrupted(at), *synthetic, RECIPE, "cpu", tmp_path)
    hashes = records.source_hashes(Interrupted())
    monkeypatch.setattr(records, "source_hashes", lambda _: {**hashes, "loaders.py": "0", "config.py": "1"})
    capsys.readouterr()
    model = Interrupted()
    history = fit(model, *synthetic, RECIPE, "cpu", tmp_path)
    message = "Changed since: config.py, loaders.py. To start over instead, delete the folder."
    assert message in capsys.readouterr().out
    assert len(history["test_loss"]) == 3 and model.passes == (24 if at else 0)


@pytest.mark.parametrize("what", ["lr", "seed", "network", "optimizer", "augmentation", "data", "order", "batch size"])
def test_resume_refuses_another_run_and_names_what_differs(synthetic, tmp_path, monkeypatch, what):
    fit(Interrupted(at=20), *synthetic, RECIPE, "cpu", tmp_path)
    model, (train, test), changes = Interrupted(), synthetic, {}
    if what == "lr":
        changes, named = {"lr": 0.03}, "lr was 0.02 and is 0.03"
    elif what == "seed":
        changes, named = {"seed": 1}, "seed was 0 and is 1"
    elif what == "network":
        model, named = AdvancedCNN(), "network was 'Interrupted with .* and is 'AdvancedCNN with"
    elif what == "optimizer":
        monkeypatch.setattr(trainer, "make_optimizer", lambda model, _: torch.optim.Adam(model.parameters()))
        named = "optimizer was 'SGD' and is 'Adam'"
    elif what == "augmentation":
        flipped = A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(p=0.1)])
        monkeypatch.setattr(trainer, "train_transforms", lambda *_: flipped)
        named = r"augmentation was .*HorizontalFlip\(p=0.5\).* and is .*HorizontalFlip\(p=0.1\)"
    elif what == "batch size":
        monkeypatch.setattr(Config, "batch_size_on", lambda *_: 128)  # as on an accelerator
        named = "batch size on the device was 25 and is 128"
    elif what == "data":
        images = train.images.copy()
        images[0, 0, 0, 0] ^= 1
        train, named = Split(images, train.labels, train.source), "data was '.*' and is '"
    else:
        train, named = Split(train.images[::-1].copy(), train.labels[::-1].copy(), train.source), "data was"
    before = [p.clone() for p in model.parameters()]
    recipe = replace(RECIPE, **changes)
    with pytest.raises(CheckpointError, match=f"(?s)belongs to a different run: {named}"):
        fit(model, train, test, recipe, "cpu", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_checkpoints_are_two_small_files_of_plain_content(synthetic, tmp_path, every_step):
    fit(Interrupted(at=30), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    last, previous = (torch.load(tmp_path / name, weights_only=True) for name in ("last.pt", "previous.pt"))
    assert [state["epoch"] + state["progress"]["batches"] / 12 for state in (previous, last)] == [28 / 12, 29 / 12]
    weights = sum(value.numel() * value.element_size() for value in last["model"].values())
    assert (tmp_path / "last.pt").stat().st_size < 2.2 * weights + 100_000  # weights, momentum, random state


def test_a_run_can_be_resumed_on_a_device_with_another_memory_format_and_optimizer_kernel(synthetic, monkeypatch):
    """As from MPS to CUDA: contiguous to channels_last, unfused to fused, without and with a gradient scaler."""
    there = Trainer(Interrupted(), *synthetic, RECIPE, CPU)
    there.model.to(memory_format=torch.contiguous_format)
    images, labels = next(iter(there.train_loader))
    step = (images, labels)
    training.train_step(there.model, *step, there.optimizer, there.scaler, RECIPE, CPU)
    state = there.state_dict()

    make_optimizer = trainer.make_optimizer

    def fused(model, config):
        groups = [{"params": group["params"]} for group in make_optimizer(model, config).param_groups]
        return torch.optim.SGD(groups, lr=2, momentum=0.9, fused=True)

    monkeypatch.setattr(trainer, "make_optimizer", fused)
    monkeypatch.setattr(trainer, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=8.0))
    here = Trainer(Interrupted(seed=1), *synthetic, RECIPE, CPU)
    here.load_state_dict(state)
    assert same_weights(here.model, there.model)
    assert here.optimizer.param_groups[0]["fused"]
    strides = []
    for mine, other in zip(here.model.parameters(), there.model.parameters(), strict=True):
        if not mine.requires_grad:
            continue
        buffer = here.optimizer.state[mine]["momentum_buffer"]
        assert torch.equal(buffer, there.optimizer.state[other]["momentum_buffer"])
        assert buffer.stride() == mine.stride()
        strides.append(mine.stride() != other.stride())
    assert any(strides)
    training.train_step(here.model, *step, here.optimizer, here.scaler, RECIPE, CPU)
    here.check_finite()


def test_an_enabled_scaler_is_restored(synthetic, monkeypatch):
    monkeypatch.setattr(trainer, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=2.0))
    there = Trainer(Linear(), *synthetic, EXACT, CPU)
    there.scaler.scale(torch.ones(()))
    monkeypatch.setattr(trainer, "make_scaler", lambda *_: torch.amp.GradScaler("cpu"))
    here = Trainer(Linear(), *synthetic, EXACT, CPU)
    here.load_state_dict(there.state_dict())
    assert here.scaler.get_scale() == 2.0


def test_numpy_numbers_in_a_recipe_do_not_spoil_a_checkpoint(synthetic, tmp_path):
    recipe = Config(epochs=np.int64(1), lr=np.float64(0.01))
    fit(Interrupted(), *synthetic, recipe, "cpu", tmp_path)
    assert load_checkpoint(tmp_path)["epoch"] == 1


def test_bad_input_checkpoint_seconds(synthetic, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_seconds is -1; expected 0 or more"):
        fit(Linear(), *synthetic, EXACT, "cpu", tmp_path, checkpoint_seconds=-1)


# -- small images and averaged weights --------------------------------------------------------------------------------

FAST = Config.named("fast", epochs=4, batch_size=25, lr=0.02, width=0.5, ema_decay=0.9)  # 2 of 4 epochs are small


@pytest.fixture(scope="module")
def unbroken_fast(synthetic):
    model = Interrupted()
    return model, fit(model, *synthetic, FAST, "cpu")


def test_the_first_epochs_train_on_small_images_and_all_test_at_full_size(synthetic, capsys):
    sizes = []

    class Watched(Interrupted):
        def forward(self, x):
            if len(x) > 2:  # not the trial before training
                sizes.append((self.training, x.shape[-1]))
            return super().forward(x)

    fit(Watched(), *synthetic, FAST, "cpu")
    small, full, tested = [(True, 24)] * 12, [(True, 32)] * 12, [(False, 32)]
    assert sizes == [*small, *tested, *small, *tested, *full, *tested, *full, *tested]
    log = capsys.readouterr().out
    assert log.count("(24 by 24 pixels)") == log.count("(32 by 32 pixels)") == 2


@pytest.mark.parametrize("at", [5, 13, 20, 30])  # in small epochs, at the first step of the second, and in a full one
def test_resume_of_small_images_and_averaged_weights_is_bitwise_equal(
    unbroken_fast, synthetic, tmp_path, every_step, capsys, at
):
    fit(Interrupted(at), *synthetic, FAST, "cpu", tmp_path, **every_step)
    capsys.readouterr()
    model = Interrupted(seed=99)
    history = fit(model, *synthetic, FAST, "cpu", tmp_path, **every_step)
    small, full = "(24 by 24 pixels)", "(32 by 32 pixels)"
    log = log_of(capsys.readouterr().out)
    assert [line for line in log if line.startswith("Epoch")] == [
        f"Epoch 1 {small}", f"Epoch 2 {small}", f"Epoch 3 {full}", f"Epoch 4 {full}"
    ]  # fmt: skip
    assert same_weights(model, unbroken_fast[0]) and without_times(history) == without_times(unbroken_fast[1])
    model = Interrupted(seed=98)  # a finished run leaves the average too
    fit(model, *synthetic, FAST, "cpu", tmp_path)
    assert same_weights(model, unbroken_fast[0])


def test_the_average_is_tested_and_left_in_the_model(unbroken_fast, synthetic, tmp_path):
    model, history = unbroken_fast
    tested = training.test(model, make_loader(synthetic[1], 500, train=False), FAST, CPU)
    assert tested == (history["test_loss"][-1], history["test_accuracy"][-1])
    fit(Interrupted(), *synthetic, FAST, "cpu", tmp_path)
    state = load_checkpoint(tmp_path)
    kept = model.state_dict()
    assert all(torch.equal(state["average"][name], value) for name, value in kept.items())
    assert not torch.equal(state["model"]["head.weight"], kept["head.weight"])


def test_the_average_agrees_with_an_independent_computation(synthetic, monkeypatch):
    seen, step = [], training.train_step

    def watched(model, *rest, **options):
        result = step(model, *rest, **options)
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return result

    monkeypatch.setattr(training, "train_step", watched)
    model = Interrupted()
    fit(model, *synthetic, FAST, "cpu")
    for name in ("head.weight", "blocks.0.downsample.2.running_var"):
        expected = seen[0][name].double()  # the first update copies
        for step, state in enumerate(seen[1:], start=1):
            decay = min(0.9, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * state[name].double()
        torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=1e-4, atol=1e-6)
    counters = [value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counters and all(value == len(seen) for value in counters)  # counted, not averaged


def test_a_checkpoint_of_earlier_versions_resumes_with_its_average(unbroken_fast, synthetic, tmp_path, every_step):
    """Their average was an AveragedModel's, and their identity did not name the initial weights."""
    fit(Interrupted(13), *synthetic, FAST, "cpu", tmp_path, **every_step)
    state = load_checkpoint(tmp_path)
    old = {f"module.{name}": value for name, value in state["average"].items()}
    state["average"] = {"n_averaged": torch.tensor(12), **old}
    for part in state["history"]["parts"]:
        del part["initial_weights"], part["trained_before"]
    save_checkpoint(tmp_path, state)
    model = Interrupted(seed=99)
    history = fit(model, *synthetic, FAST, "cpu", tmp_path)
    assert same_weights(model, unbroken_fast[0]) and without_times(history) == without_times(unbroken_fast[1])


# -- what training starts from ---------------------------------------------------------------------------------------


def test_a_run_from_other_weights_is_told_apart_by_folder_log_and_record(synthetic, tmp_path, capsys):
    first, second = Config(epochs=1, batch_size=50), Config(epochs=1, batch_size=50, lr=0.02)
    network = small_network()
    fit(network, *synthetic, first, "cpu")
    capsys.readouterr()
    runs = {}
    for name, model in (("new", small_network()), ("trained", network)):
        folder = trainer.run_folder(model, *synthetic, second, "cpu", tmp_path)
        history = fit(model, *synthetic, second, "cpu", folder)
        record = records.write_record(folder / "record.json", model, *synthetic, second, history, "cpu")
        runs[name] = folder, record["initial_weights"], record["trained_before"], capsys.readouterr().out
    assert runs["new"][0] != runs["trained"][0] and runs["new"][1] != runs["trained"][1]
    assert (runs["new"][2], runs["trained"][2]) == (False, True)
    for name, said in (("new", False), ("trained", True)):
        assert f"Initial weights: {runs[name][1]}" in runs[name][3]
        assert ("of a network that was in training mode before" in runs[name][3]) is said


def test_initial_weights_do_not_depend_on_their_last_bits(synthetic):
    one, other = small_network(), small_network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.where(parameter == 0, torch.nextafter(parameter, parameter + 1)))
    assert not same_weights(one, other)
    folders = {trainer.run_folder(model, *synthetic, RECIPE, "cpu") for model in (one, other)}
    assert len(folders) == 1 and trainer.run_folder(small_network(seed=1), *synthetic, RECIPE, "cpu") not in folders


def test_a_model_that_a_run_has_left_resumes_it(synthetic, tmp_path, capsys):
    model = Interrupted(at=20)
    fit(model, *synthetic, RECIPE, "cpu", tmp_path)
    started = json.loads(json.dumps(load_checkpoint(tmp_path)["history"]))["parts"][0]["initial_weights"]
    history = fit(model, *synthetic, RECIPE, "cpu", tmp_path)
    assert len(history["test_loss"]) == 3
    assert f"The run started from the weights {started}, not from those of the network" in capsys.readouterr().out
    assert {part["initial_weights"] for part in history["parts"]} == {started}


# -- what fails before training --------------------------------------------------------------------------------------


class Extra(Linear):
    """Keeps something in its state that is no tensor."""

    def get_extra_state(self):
        return {"when": SimpleNamespace(year=2026)}

    def set_extra_state(self, state):
        pass


def with_arguments():
    model = Linear()
    model.arguments = {"dtype": torch.float32}
    return model


def classifier(outputs, inputs=3072):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def batch_norm_before_the_head():
    pooled = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(pooled, nn.BatchNorm1d(4), nn.Linear(4, 10))


IMPOSSIBLE = {
    "1000 outputs": (lambda: classifier(1000), r"\(2, 1000\) .* \(2, 10\), one output for each of CLASSES"),
    "3 outputs": (lambda: classifier(3), r"\(2, 3\) for 2 images; .* \(2, 10\)"),
    "a feature map": (lambda: nn.Conv2d(3, 10, 3), r"\(2, 10, 30, 30\) for 2 images; .* change its last layer"),
    "a tuple": (lambda: nn.Sequential(nn.Flatten(1, 2), nn.LSTM(32, 10)), "Sequential returns a tuple for 2 images"),
    "small images only": (lambda: classifier(10, 24 * 24 * 3), r"cannot train on .* of 32 by 32 pixels"),
    "224 pixels": (lambda: classifier(10, 224 * 224 * 3), r"of 32 by 32 pixels .*change the network"),
    "state that is no tensor": (Extra, r"Extra cannot be saved .* plain tensors only"),
    "arguments that are not plain": (with_arguments, r"Linear cannot be saved .* `arguments`.* plain numbers"),
    "compiled": (lambda: torch.compile(Linear()), r"result of torch\.compile.* its method compile\(\)"),
}


@pytest.mark.parametrize("make, message", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_bad_input_network_is_refused_before_the_first_step(make, message, synthetic, monkeypatch):
    monkeypatch.setattr(training, "train_step", None)
    with pytest.raises(ValueError, match=message):
        fit(make(), *synthetic, EXACT, "cpu")


@pytest.mark.parametrize("make", [batch_norm_before_the_head, AdvancedCNN])
def test_bad_input_last_batch_of_one_image_that_batch_norm_cannot_take(make, synthetic):
    odd = Split(synthetic[0].images[:17], synthetic[0].labels[:17], "17 images")
    config = Config(epochs=2, batch_size=16, low_res_epochs=1, low_res_size=16, precision="float32")
    model, before = make(), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"batch of 1 image of 16 by 16 pixels .*the last batch has 1\)"):
        fit(model, odd, synthetic[1], config, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    fit(make(), odd, synthetic[1], replace(config, batch_size=15), "cpu")  # the last batch has two


def test_bad_input_small_images_where_pytorch_cannot_scale_down(synthetic, monkeypatch):
    def interpolate(*_, **__):
        raise NotImplementedError("aten::_upsample_bilinear2d_aa.out is not implemented for the MPS device")

    monkeypatch.setattr("torch.nn.functional.interpolate", interpolate)
    with pytest.raises(ValueError, match=r"low_res_size is 24, but PyTorch .*: update PyTorch, or set low_res_ep"):
        fit(small_network(), *synthetic, FAST, "cpu")


def test_bad_input_network_for_small_images_that_cannot_be_tested_at_full_size(synthetic):
    config = Config(epochs=1, low_res_epochs=1, low_res_size=24, precision="float32")
    with pytest.raises(ValueError, match="cannot test a batch of 2 images of 32 by 32 pixels"):
        fit(classifier(10, 24 * 24 * 3), *synthetic, config, "cpu")


def test_other_layers_of_equal_shapes_are_told_when_a_run_resumes(synthetic, tmp_path, capsys):
    def network(activation):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), activation, nn.Linear(16, 10))

    fit(network(nn.ReLU()), *synthetic, EXACT, "cpu", tmp_path)
    fit(network(nn.GELU()), *synthetic, EXACT, "cpu", tmp_path)
    assert "Changed since: layers of Sequential. To start over instead, delete" in capsys.readouterr().out


def test_networks_that_torch_saves_with_care_train_and_load(synthetic, tmp_path):
    tied, compiled, uncopyable = nn.Sequential(classifier(10), nn.Linear(10, 10), nn.Linear(10, 10)), Linear(), Linear()
    tied[2].weight = tied[1].weight
    compiled.compile(backend="eager")
    uncopyable.scale = uncopyable.head.weight.norm()  # torch.nn.utils.weight_norm keeps such a tensor
    for name, model in (("tied", tied), ("compiled", compiled), ("uncopyable", uncopyable)):
        history = fit(model, *synthetic, EXACT, "cpu", tmp_path / name)
        checkpoint.save_model(tmp_path / "m.safetensors", model, EXACT, {}, data.CLASSES)
        loaded, _ = checkpoint.load_model(tmp_path / "m.safetensors", model)
        assert len(history["test_loss"]) == 1 and loaded is model
    with pytest.raises(ValueError, match=r"result of torch\.compile"):
        checkpoint.save_model(tmp_path / "c.safetensors", torch.compile(Linear()), EXACT, {}, data.CLASSES)


def test_checkpoints_are_rarer_on_google_drive(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "DRIVE", tmp_path / "drive")
    (tmp_path / "drive" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "drive" / "runs")
    for folder, seconds in (("drive/runs/a", 300), ("link/a", 300), ("local", 30)):
        assert checkpoint.Checkpoints(tmp_path / folder, {}).seconds == seconds
    assert checkpoint.Checkpoints(tmp_path / "drive", {}, 0).seconds == 0


# -- killed processes and full disks -------------------------------------------------------------------------------


@posix
def test_fault_killed_at_random_moments_until_done(tmp_path):
    rng, kills, broken = random.Random(0), 0, tmp_path / "broken"

    def killed():
        """Train until a checkpoint is written, and a moment longer. Return False if training was done by then."""
        before, process = processes.modified(broken), processes.start(processes.small_training, broken)
        processes.wait_for(lambda: processes.modified(broken) > before or process.exitcode is not None)
        process.join(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    while killed():
        kills += 1
    assert kills >= 8  # of 72 steps with a checkpoint each
    processes.run(processes.small_training, tmp_path / "unbroken")
    one, other = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("broken", "unbroken"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in other["model"])
    assert all(
        one["history"][name] == other["history"][name] for name in other["history"] if name not in ("seconds", "parts")
    )


class KillsAWorker(AdvancedCNN):
    passes, others = 0, ()  # the others are child processes of earlier tests

    def forward(self, x):
        self.passes += self.training
        if self.passes == 100:
            worker = next(child for child in multiprocessing.active_children() if child not in self.others)
            os.kill(worker.pid, signal.SIGKILL)
            self.passes += 1  # kills once only, also if a test of the network comes next
        return super().forward(x)


@posix
def test_fault_worker_killed_in_the_middle_of_an_epoch(tmp_path):
    splits, recipe = data.synthetic_cifar10(1500, 100), Config(epochs=2, batch_size=20)  # 75 batches
    torch.manual_seed(0)
    model = KillsAWorker(width=0.5)
    model.others = multiprocessing.active_children()
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed|exited unexpectedly)") as error:
        fit(model, *splits, recipe, "cpu", tmp_path, checkpoint_seconds=0, num_workers=2)
    assert f"The same call resumes from the last checkpoint in '{tmp_path}'" in error.value.__notes__[0]
    done = load_checkpoint(tmp_path)
    done = 75 * done["epoch"] + done["progress"]["batches"]
    assert 75 <= done < 100
    torch.manual_seed(0)
    model = KillsAWorker(width=0.5)
    history = fit(model, *splits, recipe, "cpu", tmp_path)
    assert len(history["test_loss"]) == 2 and model.passes == 150 - done


def test_fault_any_runtime_error_says_how_to_resume(synthetic, monkeypatch, tmp_path):
    def fails(image, **_):
        raise RuntimeError("the transform failed")

    transform = A.Compose([A.RandomCrop(32, 32), A.Lambda(name="fails", image=fails, p=1.0)])
    monkeypatch.setattr(trainer, "train_transforms", lambda *_: transform)
    for folder, noted in ((None, False), (tmp_path, True)):
        with pytest.raises(RuntimeError, match="the transform failed") as error:
            fit(small_network(), *synthetic, Config(epochs=1), "cpu", folder, num_workers=1)
        assert any("The same call resumes" in note for note in getattr(error.value, "__notes__", [])) == noted


def test_fault_damaged_checkpoint_in_a_run(tmp_path, synthetic):
    unbroken, broken = small_network(), small_network()
    fit(unbroken, *synthetic, RECIPE, "cpu", tmp_path, checkpoint_seconds=0)
    damage(tmp_path / "last.pt", "truncated")
    with pytest.warns(UserWarning, match="using the previous one"):
        fit(broken, *synthetic, RECIPE, "cpu", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), broken.parameters(), strict=True))


@posix
def test_fault_full_disk_during_training(tmp_path):
    processes.run(processes.training_on_a_full_disk, tmp_path)
    assert len(torch.load(tmp_path / "result.pt", weights_only=True)["history"]["test_loss"]) == 6  # training went on
    assert not list(tmp_path.glob("*.part"))
    state = load_checkpoint(tmp_path)  # the last that fitted: of the second epoch's last step
    assert (state["epoch"], state["progress"]["batches"]) == (1, 12)


def test_fault_full_disk_is_reported_and_the_last_checkpoint_kept(tmp_path, synthetic, monkeypatch, capsys):
    writes, save = [], checkpoint.save_checkpoint

    def full(folder, state):
        writes.append(state["epoch"])
        if len(writes) > 1:
            raise OSError(28, "No space left on device")
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    monkeypatch.setattr(training, "REFRESH_SECONDS", 1e9)
    history = fit(small_network(), *synthetic, RECIPE, "cpu", tmp_path, checkpoint_seconds=0)
    assert len(history["test_loss"]) == 3 and len(writes) > 3
    message = "Checkpoint not written ([Errno 28] No space left on device). Training continues"
    assert capsys.readouterr().out.count(message) == len(writes) - 1
    assert load_checkpoint(tmp_path)["progress"]["batches"] == 12


def test_fault_checkpoint_folder_that_cannot_be_written(tmp_path, synthetic):
    place = tmp_path / "run"
    place.write_text("a file in its place")  # permission bits would not stop root
    model = small_network()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=r"'.*run' cannot be written .*choose another folder"):
        fit(model, *synthetic, RECIPE, "cpu", place)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# -- divergence ----------------------------------------------------------------------------------------------------


class Diverges(AdvancedCNN):
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
                self.head.bias.data[0] = -float("inf")  # this class is never predicted: the loss may stay finite
            else:
                result = result * self.value
        return result


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault_loss_that_is_not_finite_stops_training_and_names_the_step(tmp_path, synthetic, value):
    with pytest.raises(
        TrainingDiverged, match=r"the loss became (nan|inf|-inf) in epoch 2, Batch_id=4, .* rate of 0.01"
    ):
        fit(Diverges(17, value), *synthetic, RECIPE, "cpu", tmp_path, checkpoint_seconds=0)  # 12 batches an epoch
    state = load_checkpoint(tmp_path)
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())


def test_fault_test_loss_that_is_not_finite(tmp_path, synthetic, monkeypatch):
    monkeypatch.setattr(trainer, "test", lambda *_: (float("nan"), 10.0))
    with pytest.raises(TrainingDiverged, match="the test loss became nan in epoch 1"):
        fit(small_network(), *synthetic, RECIPE, "cpu", tmp_path)
    assert load_checkpoint(tmp_path) is None


def test_fault_training_that_really_diverges(tmp_path, synthetic):
    recipe = Config(epochs=3, batch_size=25, lr=1e30, precision="float32")
    with pytest.raises(TrainingDiverged, match=r"at a learning rate of 1e\+30: use a smaller lr"):
        fit(small_network(), *synthetic, recipe, "cpu", tmp_path)
    assert load_checkpoint(tmp_path) is None


def test_fault_weights_that_are_not_finite_are_never_saved(tmp_path, synthetic, monkeypatch):
    # The images are of other classes than the one whose bias is minus infinity: no loss tells.
    train, test = (data.Split(s.images, s.labels.clip(1), s.source) for s in synthetic)
    with pytest.raises(TrainingDiverged, match=r"(a weight|the loss) became"):
        fit(Diverges(17, None, weights=True), train, test, RECIPE, "cpu", tmp_path, checkpoint_seconds=0)
    state = load_checkpoint(tmp_path)
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())
