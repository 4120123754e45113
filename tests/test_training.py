"""Training: one step, whole runs, and runs that are interrupted, killed, or diverge."""

import json
import multiprocessing
import os
import random
import re
import signal
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import albumentations as A
import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import fake_cuda
from networks import CPU, EXACT, RECIPES, Linear, Logits, TinyNetwork, in_step, in_test, interrupt, same_weights
from torch import nn

from model_AC import AdvancedCNN
from session8 import checkpoint, data, optim, records, start, state, training
from session8.augment import normalize, scale_down
from session8.checkpoint import CheckpointError, load_checkpoint
from session8.config import Config
from session8.data import Split
from session8.device import arithmetic
from session8.evaluation import test as run_test
from session8.loaders import make_loader
from session8.start import run_folder
from session8.training import TrainingDiverged, fit, train_step

DEFAULT, FAST = RECIPES.values()


def fail(*_, **__):
    raise RuntimeError("out of memory")


def without_run(history):
    """Return a history without what belongs to the machine: times, versions, devices."""
    return {name: values for name, values in history.items() if name not in ("seconds", "run")}


def check_tested(model, splits, config, history):
    """Check that the weights of a model are those whose test is the last in the history."""
    assert not model.training
    loss, accuracy = run_test(model, make_loader(splits[1], 500, train=False), config, CPU)
    assert (loss, accuracy) == (history["test_loss"][-1], history["test_accuracy"][-1])


@pytest.fixture(scope="module")
def unbroken(synthetic):
    """Both recipes, trained without interruption: {name: (network, history)}."""
    networks = {name: TinyNetwork() for name in RECIPES}
    return {name: (network, fit(network, *synthetic, RECIPES[name], "cpu")) for name, network in networks.items()}


# -- one step ------------------------------------------------------------------------------------------------------

STEPS = {
    "default": Config(lr=0.1),
    "16 bits": Config(lr=0.1, precision="auto"),
    "no momentum": Config(lr=0.1, momentum=0),
    "Nesterov, weight decay": Config(lr=0.1, nesterov=True, weight_decay=0.05),
    "label smoothing": Config(lr=0.1, label_smoothing=0.3),
    "scaled biases of batch norm": Config(lr=0.1, bias_lr_scale=16.0, weight_decay=0.05),
}


@pytest.mark.parametrize("kind", STEPS)
def test_steps_agree_with_sgd_written_out(kind, synthetic, device):
    config = STEPS[kind] if kind == "16 bits" else replace(STEPS[kind], precision="float32")
    names, types = ["1.weight", "2.weight", "2.bias", "3.weight", "3.bias"], []

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 10))

    ours, theirs = network().to(device), network()
    ours[3].register_forward_hook(lambda *arguments: types.append(arguments[2].dtype))
    optimizer, scaler = optim.make_optimizer(ours, config), optim.make_scaler(config, device)
    optim.set_lr(optimizer, config.lr)
    velocity = {name: 0 for name in names}
    for part in (slice(0, 32), slice(32, 64), slice(64, 96)):
        images, labels = torch.from_numpy(synthetic[0].images[part]), torch.from_numpy(synthetic[0].labels[part])
        nll, correct = train_step(ours, images, labels, optimizer, scaler, config, device, weight=0.5)
        log_probs = theirs(normalize(images, CPU)).log_softmax(1)
        targets = (1 - config.label_smoothing) * F.one_hot(labels, 10) + config.label_smoothing / 10
        gradients = torch.autograd.grad(-0.5 * (targets * log_probs).sum(1).mean(), list(theirs.parameters()))
        assert nll.dtype == torch.float32
        assert nll.item() == pytest.approx(F.nll_loss(log_probs, labels).item(), rel=0.01)  # without smoothing
        assert abs(correct.item() - (log_probs.argmax(1) == labels).sum()) <= 2 * (kind == "16 bits")
        for name, p, gradient in zip(names, theirs.parameters(), gradients, strict=True):
            gradient = gradient + (config.weight_decay * p.detach() if p.ndim > 1 else 0)
            velocity[name] = config.momentum * velocity[name] + gradient
            step = gradient + config.momentum * velocity[name] if config.nesterov else velocity[name]
            p.data -= config.lr * (config.bias_lr_scale if name == "2.bias" else 1) * step
    assert {*map(str, types)} == {f"torch.{arithmetic(config.precision, device)}"}
    tolerance = 0.03 if kind == "16 bits" else 1e-4
    for one, other, first in zip(ours.parameters(), theirs.parameters(), network().parameters(), strict=True):
        largest = (other - first).abs().max().item()
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=tolerance * largest + 1e-6)


def test_one_batch_can_be_overfitted(synthetic):
    torch.manual_seed(0)
    model, config = AdvancedCNN(width=0.5, dropout=0), Config(lr=0.05, precision="float32")
    images, labels = torch.from_numpy(synthetic[0].images[:32]), torch.from_numpy(synthetic[0].labels[:32])
    optimizer, scaler = optim.make_optimizer(model, config), optim.make_scaler(config, CPU)
    for _ in range(20):
        nll, correct = train_step(model, images, labels, optimizer, scaler, config, CPU)
    assert nll < 0.1 and correct == 32


# -- what a run computes -------------------------------------------------------------------------------------------


def test_loss_and_accuracy_of_training_and_test_agree_with_an_independent_computation(synthetic, device):
    config = replace(EXACT, lr=1e-30, momentum=0, seed=4)  # stands still
    history = fit(Linear(), *synthetic, config, device)
    batches = make_loader(synthetic[0], 32, seed=4, device=device)  # the last one has 12 images
    training_images = [np.concatenate([part.cpu().numpy() for part in parts]) for parts in zip(*batches, strict=True)]
    test_images = (synthetic[1].images, synthetic[1].labels)
    for name, (images, labels) in (("train", training_images), ("test", test_images)):
        log_probs = Linear().by_hand(images)
        assert history[f"{name}_loss"] == [pytest.approx(-log_probs[range(len(labels)), labels].mean(), rel=1e-5)]
        assert history[f"{name}_accuracy"] == [pytest.approx(100 * (log_probs.argmax(1) == labels).mean())]


def test_logits_train_like_log_probabilities(synthetic):
    config = Config(epochs=2, batch_size=50, lr=0.001, label_smoothing=0.2, precision="float32")
    one, other = (without_run(fit(network, *synthetic, config, "cpu")) for network in (Linear(), Logits()))
    for name in one:
        assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert one["train_loss"][1] < one["train_loss"][0]


def test_the_network_sees_the_recipes_batches_at_the_image_size_of_each_epoch(synthetic, device):
    config = Config.named("fast", epochs=3, batch_size=100, low_res_epochs=2, cutout=8, seed=7, precision="float32")
    seen = []
    model = TinyNetwork(lambda network, images: seen.append((network.training, images.cpu())))
    fit(model, *synthetic, replace(config, ema_decay=0), device)
    loader, expected = make_loader(synthetic[0], 100, seed=7, device=device, config=config), []
    for epoch, size in enumerate((24, 24, 32)):
        loader.set_epoch(epoch)
        expected += [(True, scale_down(normalize(images, device).cpu(), size)) for images, _ in loader]
        expected.append((False, normalize(torch.from_numpy(synthetic[1].images), CPU)))
    for (mode, images), (expected_mode, batch) in zip(seen, expected, strict=True):
        assert mode == expected_mode
        torch.testing.assert_close(images, batch)


def test_a_transform_replaces_the_recipes_augmentation_on_every_device(synthetic, device, tmp_path):
    seen, config = [], replace(EXACT, batch_size=100)
    transform = A.Compose([A.CenterCrop(32, 32), A.InvertImg(p=1.0)])
    model = TinyNetwork(lambda network, images: seen.append(images.cpu()) if network.training else None)
    history = fit(model, *synthetic, config, device, tmp_path, transform=transform, num_workers=0)
    order = np.concatenate([indices for indices, *_ in make_loader(synthetic[0], 100).batches])
    expected = normalize(torch.from_numpy(255 - synthetic[0].images[order]), CPU)
    torch.testing.assert_close(torch.cat(seen), expected)
    assert history["run"]["augmentation"] == "albumentations"
    with pytest.raises(CheckpointError, match=r"augmentation was .*InvertImg.* and is .*RandomCrop"):
        fit(TinyNetwork(), *synthetic, config, device, tmp_path)
    folders = {run_folder(TinyNetwork(), *synthetic, config, device, transform=chosen) for chosen in (None, transform)}
    assert len(folders) == 2


def test_rates_are_those_of_the_middle_of_each_step(synthetic, monkeypatch):
    rates, step = [], training.train_step

    def watched(model, images, labels, optimizer, *rest, **options):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(model, images, labels, optimizer, *rest, **options)

    monkeypatch.setattr(training, "train_step", watched)
    config = Config(schedule="one_cycle", epochs=2, batch_size=100, lr=0.01, bias_lr_scale=16.0)
    history = fit(TinyNetwork(), *synthetic, config, "cpu")
    # 3 steps per epoch, 6 in all: the middle of step k is at (k + 1/2) / 6, and the peak at 1/4.
    middles = [(k + 0.5) / 6 for k in range(6)]
    expected = [0.01 * min(m / 0.25, (1 - m) / 0.75) for m in middles]
    assert rates == [pytest.approx([lr, lr, 16 * lr]) for lr in expected]
    assert history["lr"] == pytest.approx([expected[2], expected[5]])


def test_dropout_depends_on_seed_step_and_rank_only(synthetic):
    """Each step of training begins with a generator of its own, whatever was drawn before."""

    def draws(before_training=0, in_each_step=0, **recipe):
        drawn = []

        def draw(network, images):
            drawn.append(torch.rand(1).item())
            torch.rand(in_each_step)

        model = TinyNetwork(lambda network, images: draw(network, images) if network.training else None)
        torch.manual_seed(before_training)
        fit(model, *synthetic, Config(epochs=2, **{"batch_size": 100, **recipe}), "cpu")
        return drawn

    reference = draws()
    assert len(set(reference)) == 6
    assert draws(before_training=1, in_each_step=5) == reference
    assert draws(batch_size=60)[:6] == reference
    assert not set(draws(seed=1)) & set(reference)
    for rank, same in ((0, True), (1, False)):
        training.seed_step(0, 4, rank)
        assert (torch.rand(1).item() == reference[4]) is same


def test_the_average_agrees_with_an_independent_computation(synthetic, monkeypatch):
    states, step = [], training.train_step

    def watched(model, *rest, **options):
        result = step(model, *rest, **options)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return result

    monkeypatch.setattr(training, "train_step", watched)
    model = TinyNetwork()
    fit(model, *synthetic, FAST, "cpu")
    for name, kept in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert kept == len(states) == 48  # counted, not averaged
            continue
        expected = states[0][name].double()  # the first update copies
        for k, weights in enumerate(states[1:], start=1):
            decay = min(0.9, (1 + k) / (10 + k))
            expected = decay * expected + (1 - decay) * weights[name].double()
        torch.testing.assert_close(kept.double(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(model[-1].weight, states[-1]["10.weight"])


# -- what is shown -------------------------------------------------------------------------------------------------

LOG = re.compile(
    r"(Epoch \d(, about \d+ seconds? left)?\n"
    r"(\r[^\n]*)*\rTrain: Loss=\d+\.\d{4} Batch_id=4 Accuracy=\d+\.\d{2}: "
    r"100%\|█{10}\| 5/5 \[\d\d:\d\d<\d\d:\d\d, +\d+\.\d\d(it/s|s/it)\]\n"
    r"Test set: Average loss: \d+\.\d{4}, Accuracy: \d+/100 \(\d+\.\d{2}%\)\n\n){2}"
)


def test_log_and_history(synthetic, capsys):
    """The lines have the seed project's format."""
    history = fit(Linear(), *synthetic, Config(epochs=2, batch_size=64), "cpu")
    header, log = capsys.readouterr().out.split("\n\n", 1)
    assert "synthetic stand-in, NOT CIFAR-10" in header and "300 images" in header
    assert re.search(r"on cpu, augmentation albumentations\nInitial weights: [0-9a-f]{8}$", header)
    assert LOG.fullmatch(log), repr(log)
    assert f"({history['test_accuracy'][-1]:.2f}%)" in log and f"Accuracy={history['train_accuracy'][0]:.2f}" in log
    numbers = json.loads(json.dumps(history))
    assert isinstance(numbers.pop("run"), dict) and all(len(values) == 2 for values in numbers.values())
    assert list(numbers) == ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds"]
    assert {type(value) for values in numbers.values() for value in values} == {float}


def fake_clock(monkeypatch, seconds_per_step):
    """Have `fit` measure time by steps, which take less time on small images. Return what TinyNetwork calls."""
    now = 1000.0

    def advance(network, images):
        nonlocal now
        now += network.training * seconds_per_step * (images.shape[-1] / 32) ** 2

    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now))
    return advance


@pytest.mark.parametrize("seconds_per_step, left", [
    (155, ["70 minutes", "62 minutes", "31 minutes"]), (1, ["27 seconds", "24 seconds", "12 seconds"]),
])  # fmt: skip
def test_the_time_left_is_shown_from_the_second_epoch_on(synthetic, monkeypatch, capsys, seconds_per_step, left):
    config = Config(epochs=4, batch_size=25, low_res_epochs=2, low_res_size=16)
    history = fit(TinyNetwork(fake_clock(monkeypatch, seconds_per_step)), *synthetic, config, "cpu")
    assert history["seconds"] == pytest.approx([12 * seconds_per_step * part for part in (0.25, 0.25, 1, 1)])
    small, full = "(16 by 16 pixels)", "(32 by 32 pixels)"
    assert re.findall(r"^Epoch.*", capsys.readouterr().out, re.MULTILINE) == [
        f"Epoch 1 {small}", f"Epoch 2 {small}, about {left[0]} left", f"Epoch 3 {full}, about {left[1]} left",
        f"Epoch 4 {full}, about {left[2]} left",
    ]  # fmt: skip


def test_on_epoch_gets_the_history_and_can_end_training(unbroken, synthetic, tmp_path):
    class Pruned(Exception):
        pass

    seen, arguments = [], (*synthetic, FAST, "cpu", tmp_path)

    def on_epoch(history):
        seen.append(json.loads(json.dumps(without_run(history))))
        if len(seen) == 2:
            raise Pruned
        if len(seen) == 3:
            raise KeyboardInterrupt

    model = TinyNetwork()
    with pytest.raises(Pruned):
        fit(model, *arguments, checkpoint_seconds=0, on_epoch=on_epoch)
    check_tested(model, synthetic, FAST, seen[-1])
    assert load_checkpoint(tmp_path)["step"] == 24
    assert without_run(fit(model, *arguments, on_epoch=on_epoch)) == seen[-1]  # as after Ctrl-C
    assert load_checkpoint(tmp_path)["step"] == 36
    whole = without_run(fit(model, *arguments, on_epoch=on_epoch))
    assert model.passes == 48 and same_weights(model, unbroken["fast"][0])
    assert seen == [{name: values[:epoch] for name, values in whole.items()} for epoch in (1, 2, 3, 4)]


# -- interruptions -------------------------------------------------------------------------------------------------

STOPS = {  # (what is called before a pass, number of the copy of the state that is interrupted, complete epochs)
    "in epoch 1": (in_step(4, interrupt), None, 0),
    "in test 1": (in_test(1, interrupt), None, 0),
    "between epoch 1 and the copy of its weights": (in_step(None, interrupt), 2, 0),
    "in epoch 2": (in_step(20, interrupt), None, 1),
    "in test 2": (in_test(2, interrupt), None, 1),
    "between epoch 2 and the copy of its weights": (in_step(None, interrupt), 3, 1),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("before, copy, whole", STOPS.values(), ids=STOPS)
def test_ctrl_c_leaves_history_and_weights_of_the_last_complete_epoch(
    synthetic, monkeypatch, capsys, recipe, before, copy, whole
):
    copies, deepcopy = [], training.deepcopy

    def interrupted(value):
        copies.append(value)
        if len(copies) == copy:  # the first copy is made before the first epoch
            interrupt()
        return deepcopy(value)

    monkeypatch.setattr(training, "deepcopy", interrupted)
    model = TinyNetwork(before)
    history = fit(model, *synthetic, RECIPES[recipe], "cpu")
    assert f"Interrupted: history and weights are those after {whole} epoch" in capsys.readouterr().out
    assert all(len(values) == whole for name, values in history.items() if name != "run")
    if whole:
        check_tested(model, synthetic, RECIPES[recipe], history)
    else:
        assert same_weights(model, TinyNetwork())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_is_stopped_again_and_again_is_bitwise_equal(
    unbroken, synthetic, tmp_path, monkeypatch, capsys, recipe
):
    """Checkpoints are written at each refresh, every 4 steps, and after an epoch's test."""
    config, clock, before = RECIPES[recipe], fake_clock(monkeypatch, 1.0), None
    # The step in which a call is stopped, how, the step of the checkpoint that it leaves, and the worker processes.
    for stop, how, saved, workers in (
        (3, fail, None, 0), (2, interrupt, 0, 0), (7, interrupt, 4, 0), (12, fail, 8, 0), (13, fail, 12, 2),
        (23, interrupt, 20, 0), (24, interrupt, 20, 0), (36, fail, 32, 0),
    ):  # fmt: skip
        seed = 0 if before is None else stop  # the weights of the checkpoint replace those of the network
        model = TinyNetwork(in_step(stop - (before or 0), how), clock, seed=seed)
        with pytest.raises(RuntimeError, match="out of memory") if how is fail else nullcontext() as error:
            fit(model, *synthetic, config, "cpu", tmp_path, checkpoint_seconds=0, num_workers=workers)
        if how is fail:
            assert hasattr(error.value, "__notes__") == (saved is not None)  # how to resume
        newest = load_checkpoint(tmp_path)
        assert (newest and newest["step"]) == saved
        before = saved
    capsys.readouterr()

    model, (expected, expected_history) = TinyNetwork(clock, seed=98), unbroken[recipe]
    history = fit(model, *synthetic, config, "cpu", tmp_path)
    assert model.passes == 12 * config.epochs - 32
    assert same_weights(model, expected) and without_run(history) == without_run(expected_history)
    assert history["seconds"] == pytest.approx([12 * (config.image_size(k) / 32) ** 2 for k in range(config.epochs)])
    assert history["run"]["resumed"] == 6
    shown = capsys.readouterr().out
    assert f"Resuming from '{tmp_path}', saved " in shown and f"2.667 epochs of {config.epochs} done" in shown
    assert shown.count("Epoch ") == config.epochs and shown.count("Train set: ") == 2
    loss, accuracy, seconds = (history[name][1] for name in ("train_loss", "train_accuracy", "seconds"))
    assert f"Train set: Average loss: {loss:.4f}, Accuracy: {accuracy:.2f}%, {seconds:.0f} s\nTest set: " in shown
    assert f"({history['test_accuracy'][1]:.2f}%)\n\nEpoch 3" in shown
    assert f", about {'4 seconds' if recipe == 'default' else '16 seconds'} left\n" in shown  # of steps 33 to 36 or 48

    finished = TinyNetwork(seed=99)
    assert fit(finished, *synthetic, config, "cpu", tmp_path) == history
    shown = capsys.readouterr().out
    assert "This run is finished" in shown and "Changed since" not in shown
    assert shown.count("Train set: ") == shown.count("Test set: ") == config.epochs
    assert finished.passes == 0 and not finished.training and same_weights(finished, expected)


def test_another_optimizer_resumes(synthetic, tmp_path, monkeypatch):
    arguments = {"train_split": synthetic[0], "test_split": synthetic[1], "config": DEFAULT, "device": "cpu"}
    fit(TinyNetwork(), checkpoint_dir=tmp_path / "sgd", **arguments)
    for module in (start, state):
        monkeypatch.setattr(module, "make_optimizer", lambda model, config: torch.optim.Adam(model.parameters()))
    with pytest.raises(CheckpointError, match="optimizer was 'SGD' and is 'Adam'"):
        fit(TinyNetwork(), checkpoint_dir=tmp_path / "sgd", **arguments)
    unbroken, stopped, resumed = TinyNetwork(), TinyNetwork(in_step(8, interrupt)), TinyNetwork(seed=9)
    fit(unbroken, **arguments)
    for network in (stopped, resumed):
        fit(network, checkpoint_dir=tmp_path / "adam", checkpoint_seconds=0, **arguments)
    assert same_weights(resumed, unbroken) and resumed.passes == 32


def test_weights_resume_in_another_memory_format(synthetic):
    """As from MPS to CUDA: fused SGD refuses a momentum whose strides are not those of the weights."""
    images, labels = torch.from_numpy(synthetic[0].images[:32]), torch.from_numpy(synthetic[0].labels[:32])
    there = state.TrainingState(TinyNetwork(), FAST, CPU)
    here = state.TrainingState(TinyNetwork(seed=1).to(memory_format=torch.channels_last), FAST, CPU)
    train_step(there.model, images, labels, there.optimizer, there.scaler, FAST, CPU)
    here.load_state_dict(there.state_dict())
    assert same_weights(here.model, there.model) and here.model[0].weight.stride() != there.model[0].weight.stride()
    for mine, other in zip(here.model.parameters(), there.model.parameters(), strict=True):
        momentum = here.optimizer.state[mine]["momentum_buffer"]
        assert torch.equal(momentum, there.optimizer.state[other]["momentum_buffer"]) and momentum.any()
        assert momentum.stride() == mine.stride()


@pytest.mark.parametrize("seconds, stop, saved", [
    (1000, None, [36]),  # not after every short epoch
    (None, None, [32, 36]),  # 30 seconds
    (15, None, [16, 32, 36]),
    (1000, 20, [12]),  # Ctrl-C: the last complete epoch
    (15, 20, [16]),  # unless a later checkpoint exists
    (1000, 4, [0]),
])  # fmt: skip
def test_a_checkpoint_is_written_at_intervals_at_the_end_and_on_ctrl_c(
    synthetic, tmp_path, monkeypatch, seconds, stop, saved
):
    model, steps, save = TinyNetwork(in_step(stop, interrupt)), [], checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: model.passes, time=lambda: 0))
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *a: steps.append(a[1]["step"]) or save(*a))
    fit(model, *synthetic, DEFAULT, "cpu", tmp_path, checkpoint_seconds=seconds)
    assert steps == saved and load_checkpoint(tmp_path)["step"] == saved[-1]


# -- which run it is -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(synthetic, tmp_path_factory):
    """The folder of a run that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    fit(TinyNetwork(in_step(7, interrupt)), *synthetic, Config(epochs=2), "cpu", folder)
    return folder


OTHER_RUNS = {
    "recipe": ({"config": Config(epochs=2, lr=0.03, seed=1)}, "lr was 0.01 and is 0.03, seed was 0 and is 1"),
    "augmentation": (
        {"transform": A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(p=0.1)])},
        r"augmentation was .*HorizontalFlip\(p=0.5\).* and is .*HorizontalFlip\(p=0.1\)",
    ),
    "network": ({"model": Linear()}, "network was 'TinyNetwork with .* and is 'Linear with"),
    "batch size": ({"device": "cuda"}, "batch size on the device was 64 and is 128"),
    "data": ({"train_split": data.synthetic_cifar10(300, 100, seed=1)[0]}, "data was '.*' and is '"),
}


@pytest.mark.parametrize("change, words", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_the_folder_of_another_run_is_refused_and_what_differs_named(synthetic, stopped, change, words):
    arguments = {"model": TinyNetwork(), "train_split": synthetic[0], "config": Config(epochs=2), "device": "cpu"}
    arguments |= change
    model = arguments["model"]
    with fake_cuda() if arguments["device"] == "cuda" else nullcontext():
        with pytest.raises(CheckpointError, match=rf"(?s)belongs to a different run: {words}.*Use another folder"):
            fit(**arguments, test_split=synthetic[1], checkpoint_dir=stopped)
        assert same_weights(model.cpu(), type(model)())


def test_a_run_keeps_its_first_start_and_names_what_has_changed_since(synthetic, tmp_path, monkeypatch, capsys):
    def start_again(model):
        capsys.readouterr()
        run, shown = fit(model, *synthetic, DEFAULT, "cpu", tmp_path)["run"], capsys.readouterr().out
        other_weights = f"The run started from the weights {run['initial_weights']}, not from those of the network"
        return run, re.findall("Changed since: (.*). To start over instead, delete", shown), other_weights in shown

    model = TinyNetwork(in_step(20, interrupt))
    fit(model, *synthetic, DEFAULT, "cpu", tmp_path)
    first = load_checkpoint(tmp_path)["history"]["run"]
    hashes = records.source_hashes(TinyNetwork())
    changes = {
        "package_versions": {**records.package_versions(), "torch": "99.0"}, "device_name": "another machine",
        "project_commit": "abc", "source_hashes": {**hashes, "config.py": "0", "layers of TinyNetwork": "1"},
    }  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(records, name, lambda *_, value=value: value)
    run, changed, other_weights = start_again(model)  # which has the weights of the first epoch
    assert changed == ["config.py, device, layers of TinyNetwork, torch"] and other_weights
    assert run["initial_weights"] == first["initial_weights"] and not run["trained_before"]
    assert (run["resumed"], first["resumed"]) == (1, 0) and run["first_start"] == first["first_start"]
    assert run["first_start"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (run["versions"]["torch"], run["device"], run["commit"]) == ("99.0", "another machine", "abc")
    monkeypatch.setattr(records, "source_hashes", lambda _: {**changes["source_hashes"], "loaders.py": "2"})
    assert start_again(TinyNetwork()) == (run, ["loaders.py"], False)  # of a finished run


def test_runs_from_other_weights_are_told_apart_by_folder_log_and_history(synthetic, tmp_path, capsys):
    config, trained, last_bits = replace(DEFAULT, epochs=1), TinyNetwork(), TinyNetwork()
    fit(trained, *synthetic, config, "cpu")
    with torch.no_grad():
        for p in last_bits.parameters():  # they depend on the processor
            p.copy_(p.where(p == 0, torch.nextafter(p, p + 1)))
    folders, runs = [], []
    for network in (TinyNetwork(), last_bits, trained):
        folders.append(run_folder(network, *synthetic, config, "cpu", tmp_path))
        capsys.readouterr()
        runs.append(fit(network, *synthetic, config, "cpu")["run"])
        shown = capsys.readouterr().out
        assert f"Initial weights: {runs[-1]['initial_weights']}" in shown
        assert ("of a network that was in training mode before" in shown) is runs[-1]["trained_before"]
    assert folders[0] == folders[1] != folders[2] and folders[0].parent == tmp_path
    assert runs[0]["initial_weights"] == runs[1]["initial_weights"] != runs[2]["initial_weights"]
    assert [run["trained_before"] for run in runs] == [False, False, True]


# -- what fails before training, and what does not -----------------------------------------------------------------

BAD = {
    "checkpoint_seconds": ({"checkpoint_seconds": -1}, ValueError, "checkpoint_seconds is -1; expected 0 or more"),
    "num_workers": ({"num_workers": -1}, ValueError, "num_workers is -1; expected 0"),
    "device": ({"device": "tpu"}, ValueError, "device is 'tpu', which is unknown; available: .*cpu"),
    "transform": ({"transform": torch.relu}, TypeError, "transform is .*relu.*expected an albumentations transform"),
    "network": ({"model": nn.Flatten()}, ValueError, r"Flatten returns \(2, 3072\) for 2 images; .* its last layer"),
    "folder": ({"checkpoint_dir": __file__}, CheckpointError, "test_training.py' cannot be written .*another folder"),
}


@pytest.mark.parametrize("change, error, words", BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_the_first_step(synthetic, monkeypatch, change, error, words):
    monkeypatch.setattr(training, "train_step", None)
    arguments = {"model": TinyNetwork(), "config": EXACT, "device": "cpu", **change}
    with pytest.raises(error, match=words):
        fit(**arguments, train_split=synthetic[0], test_split=synthetic[1])


@pytest.mark.parametrize("kind", ["tied", "compiled", "uncopyable"])
def test_networks_that_torch_copies_or_saves_with_care_train(synthetic, tmp_path, kind):
    model = nn.Sequential(Linear(), nn.Linear(10, 10), nn.Linear(10, 10))
    if kind == "tied":
        model[2].weight = model[1].weight
    elif kind == "compiled":
        model.compile(backend="eager")
    else:
        model.scale = model[1].weight.norm()  # torch.nn.utils.weight_norm keeps such a tensor
    history = fit(model, *synthetic, EXACT, "cpu", tmp_path)
    assert fit(model, *synthetic, EXACT, "cpu", tmp_path) == history


# -- killed processes and full disks -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_fault_killed_at_random_moments(tmp_path, recipe):
    rng, kills, broken = random.Random(0), 0, tmp_path / "broken"
    for _ in range(6):  # until a checkpoint is written, and a moment longer
        before, process = processes.modified(broken), processes.start(processes.small_training, broken, recipe, 1)
        processes.wait_for(lambda: processes.modified(broken) > before or process.exitcode is not None)  # noqa: B023
        process.join(rng.uniform(0, 0.08))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
    assert kills >= 3
    for folder in ("broken", "unbroken"):
        processes.run(processes.small_training, tmp_path / folder, recipe, 1)
    one, other = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("broken", "unbroken"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in other["model"])
    assert without_run(one["history"]) == without_run(other["history"]) and one["history"]["run"]["resumed"] > 0


def test_fault_worker_killed_in_the_middle_of_an_epoch(tmp_path):
    splits, config = data.synthetic_cifar10(800, 20), Config(epochs=1, batch_size=20)  # 40 batches
    others = multiprocessing.active_children()  # of earlier tests

    def kill_a_worker(network):
        worker = next(child for child in multiprocessing.active_children() if child not in others)
        os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed|exited unexpectedly)") as error:
        model = TinyNetwork(in_step(11, kill_a_worker))
        fit(model, *splits, config, "cpu", tmp_path, checkpoint_seconds=0, num_workers=1)
    assert f"The same call resumes from the last checkpoint in '{tmp_path}'" in error.value.__notes__[0]
    done = load_checkpoint(tmp_path)["step"]
    assert 8 <= done < 40
    model = TinyNetwork()
    fit(model, *splits, config, "cpu", tmp_path)
    assert model.passes == 40 - done


def test_fault_damaged_checkpoint_in_a_run(unbroken, synthetic, tmp_path):
    fit(TinyNetwork(in_step(20, interrupt)), *synthetic, DEFAULT, "cpu", tmp_path, checkpoint_seconds=0)
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    model = TinyNetwork(seed=99)
    with pytest.warns(UserWarning, match="using the previous one"):
        fit(model, *synthetic, DEFAULT, "cpu", tmp_path)
    assert model.passes == 24 and same_weights(model, unbroken["default"][0])


def test_fault_full_disk_during_training(unbroken, tmp_path):
    processes.run(processes.training_on_a_full_disk, tmp_path)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    message = r"Checkpoint not written to '.*' \(.*File too large.*\): free some space"
    assert len(re.findall(message, result["log"])) == 3  # within the second epoch, and at its end
    assert re.findall(r"Kept: step (\d+)", result["log"]) == ["12", "12", "36"]
    assert without_run(result["history"]) == without_run(unbroken["default"][1])
    assert load_checkpoint(tmp_path)["step"] == 36 and not list(tmp_path.glob("*.part"))


# -- divergence ----------------------------------------------------------------------------------------------------


def bias(value, classes=slice(10)):
    """Return a function that sets the bias of some classes."""

    def spoil(network):
        network[-1].bias.data[classes] = value

    return spoil


NAN, INFINITE = float("nan"), float("inf")
DIVERGES = {  # (what is called before a pass, the message, the step of the last checkpoint)
    "the loss becomes NaN": (in_step(18, bias(NAN)), "the loss became nan in epoch 2, Batch_id=4 to 7", 16),
    "the loss becomes infinite": (
        in_step(18, bias(-INFINITE, slice(9))), "the loss became inf in epoch 2, Batch_id=4 to 7", 16
    ),
    "a weight, but not the loss": (in_step(18, bias(-INFINITE, 0)), "a weight became NaN or infinite in epoch 2", 16),
    "the test": (in_test(2, bias(NAN)), "the test loss or a weight became NaN or infinite in epoch 2", 20),
}  # fmt: skip


@pytest.mark.parametrize("before, words, saved", DIVERGES.values(), ids=DIVERGES)
def test_fault_what_is_not_finite_ends_training_and_is_never_saved(synthetic, tmp_path, before, words, saved):
    # Images of class 0 count as class 1: no loss tells if the network never predicts class 0.
    splits = (Split(split.images, split.labels.clip(1), split.source) for split in synthetic)
    with pytest.raises(TrainingDiverged, match=rf"{words}.* at a learning rate of 0.01: use a smaller lr") as error:
        fit(TinyNetwork(before), *splits, DEFAULT, "cpu", tmp_path, checkpoint_seconds=0)
    assert not hasattr(error.value, "__notes__")  # resuming would not help
    newest = load_checkpoint(tmp_path)
    assert newest["step"] == saved and all(value.isfinite().all() for value in newest["model"].values())


def test_fault_training_that_really_diverges(synthetic, tmp_path):
    config = replace(DEFAULT, batch_size=64, lr=1e30, precision="float32")  # 5 steps per epoch, a refresh after 4 and 5
    with pytest.raises(
        TrainingDiverged, match=r"in epoch 1, Batch_id=0 to 3, at a learning rate of 1e\+30: use a smaller"
    ):
        fit(TinyNetwork(), *synthetic, config, "cpu", tmp_path)
    assert load_checkpoint(tmp_path) is None
