"""The benchmarks compare like with like, and what they say is what they measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import common
import epoch
import numpy as np
import pytest
import torch
import train as training
import train_step
from fakes import class_folders, position_coded
from resnet20 import ResNet20
from sides import SIDES

from checkpoint import count_macs
from cifar10 import MEAN, STD, Split
from utils import Config

CPU = torch.device("cpu")
BENCHMARKS = Path(common.__file__).parent


# -- input_pipeline.py ---------------------------------------------------------------------------------------------


def coded(n):
    """n images whose third channel tells which it is, and whose first two tell where each pixel was."""
    split = position_coded(n)
    images = split.images.copy()
    images[..., 2] = 100 + np.arange(n)[:, None, None]
    return Split(images, split.labels, split.source)


def augmentations_of(image):
    """All crops of the padded image, plain and flipped, normalised: {(top, left, flipped): float (3, 32, 32)}."""
    padded = np.zeros((40, 40, 3), np.uint8)
    padded[4:36, 4:36] = image
    found = {}
    for top in range(9):
        for left in range(9):
            crop = ((padded[top : top + 32, left : left + 32] / 255 - MEAN) / STD).transpose(2, 0, 1)
            found[top, left, False], found[top, left, True] = crop, crop[:, :, ::-1]
    return found


@pytest.mark.parametrize("name", SIDES)
def test_every_side_ends_in_the_same_batches(name):
    split = coded(50)
    side = SIDES[name](split, 16, 0, CPU)
    drawn, orders = [], []
    for _ in range(40):
        images, labels = (torch.cat(part) for part in zip(*side, strict=True))
        assert images.dtype == torch.float32 and images.shape == (50, 3, 32, 32) and labels.dtype == torch.int64
        middle = images[:, :, 16, 16] * torch.tensor(STD) + torch.tensor(MEAN)  # a pixel that is never of the padding
        rows, columns, which = (255 * middle).round().int().numpy().T
        which = which - 100
        assert sorted(which) == list(range(50))  # every image once an epoch
        assert np.array_equal(labels.numpy(), split.labels[which])
        orders.append(tuple(which))
        for image, row, column, index in zip(images.numpy(), rows, columns, which, strict=True):
            # Row 16 of the crop is row 16 + top - 4 of the image, coded plus 1; a flipped crop is seen from its 15th.
            flipped = bool(image[1, 16, 15] > image[1, 16, 16])
            draw = row - 13, column - (12 if flipped else 13), flipped
            drawn.append(draw)
            if len(drawn) <= 200:
                np.testing.assert_allclose(image, augmentations_of(split.images[index])[draw], atol=3e-6)
    assert len(set(orders)) == 40
    tops, lefts, flips = np.array(drawn).T
    offsets = np.bincount(9 * tops + lefts, minlength=81)
    assert ((offsets - 2000 / 81) ** 2 / (2000 / 81)).sum() < 140  # chi-squared with 80 degrees: mean 80, std 12.6
    assert 900 < flips.sum() < 1100  # of 2000; the standard deviation is 22
    assert abs(np.corrcoef(flips, lefts)[0, 1]) < 0.1 and abs(np.corrcoef(tops, lefts)[0, 1]) < 0.1


# -- train_step.py -------------------------------------------------------------------------------------------------


def test_both_loops_take_the_same_steps(synthetic):
    images, labels = torch.from_numpy(synthetic[0].images[:16]), torch.from_numpy(synthetic[0].labels[:16])
    config = Config(batch_size=16, precision="float32")
    trained = []
    for loop in (
        train_step.plain_loop(images, labels, CPU, 3),
        train_step.our_loop(images, labels, CPU, 3, config),
    ):
        work, model = loop
        before = model.dense.weight.detach().clone()
        torch.manual_seed(1)  # dropout draws from it
        work()
        assert not torch.equal(before, model.dense.weight)
        trained.append(model)
    for one, other in zip(*(model.state_dict().values() for model in trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # a hundredth of what the steps change


# -- epoch.py ------------------------------------------------------------------------------------------------------


def test_limit_takes_as_many_steps_as_an_epoch(synthetic, monkeypatch, capsys):
    import utils

    sizes = []
    step = utils.train_step

    def counted(model, images, *rest):
        sizes.append(len(images))
        return step(model, images, *rest)

    monkeypatch.setattr(utils, "train_step", counted)
    monkeypatch.setattr(epoch, "train_step", counted)
    split = common.evenly(synthetic[0], 100)
    sides = epoch.sides_of(split, Config(batch_size=32), CPU, [0])
    taken = {}
    for name, work in sides.items():
        sizes.clear()
        work()
        taken[name] = list(sizes)
    assert taken == {"limit": [32, 32, 32, 4], "0 workers": [32, 32, 32, 4]}
    assert capsys.readouterr().out == ""


# -- the clock and the record --------------------------------------------------------------------------------------


def test_images_are_taken_evenly():
    split = Split(np.zeros((100, 32, 32, 3), np.uint8), np.arange(100) // 10, "in the order of their classes")
    assert common.evenly(split, 10).labels.tolist() == list(range(10))
    assert np.bincount(common.evenly(split, 35).labels).tolist() == [4, 3] * 5
    with pytest.raises(ValueError, match="101 images are asked for, and there are 100"):
        common.evenly(split, 101)


def test_sides_are_timed_in_turn():
    calls = []
    times = common.in_turn({name: lambda name=name: calls.append(name) for name in "AB"}, 2, CPU)
    assert calls == list("ABABAB")  # one round of warming up
    assert {name: len(values) for name, values in times.items()} == {"A": 2, "B": 2}


def test_ratio_is_the_median_over_the_rounds():
    assert common.ratio({"A": [2.0, 9.0, 4.0], "B": [1.0, 1.0, 1.0]}, "A", "B") == 4.0


def test_report_prints_and_saves_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "SAVED", tmp_path)
    common.report("clock", CPU, False, ["way", "ms"], [["ours", 1.234], ["theirs", 20.0]], rounds=3)
    assert not list(tmp_path.iterdir())
    common.report("clock", CPU, True, ["way", "ms"], [["ours", 1.234], ["theirs", 20.0]], rounds=3)
    printed = capsys.readouterr().out
    assert re.search(r"^ *ours +1\.23$", printed, re.MULTILINE) and "rounds: 3" in printed
    record = json.loads((tmp_path / "clock_cpu.json").read_text())
    assert record["rows"] == [["ours", 1.234], ["theirs", 20.0]] and record["rounds"] == 3
    assert record["device"] in printed and record["versions"]["torch"] in printed


@pytest.mark.parametrize("command", ["input_pipeline", "train_step", "epoch"])
def test_commands_run_on_a_folder_of_images(command, tmp_path):
    class_folders(tmp_path, per_train=20, per_test=2)
    few = {"input_pipeline": ["--images", "40"], "train_step": ["--steps", "1"], "epoch": ["--images", "40"]}[command]
    line = [sys.executable, BENCHMARKS / f"{command}.py", "--data", tmp_path, "--rounds", "1", "--batch-size", "16"]
    line += few
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{command} on " in done.stdout and "ours" in done.stdout + "ours" * (command == "epoch")
    if command == "epoch":
        limit, none, *_ = re.findall(r"(limit|\d workers) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
        assert limit[2] == "1.00" and none[0] == "0 workers"
        assert 0.1 < float(re.search(r"peak resident set GB: ([\d.]+)", done.stdout)[1]) < 4


def test_bad_input_on_the_command_line(tmp_path):
    def complaint(*options):
        line = [sys.executable, BENCHMARKS / "train_step.py", *options]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False).stderr

    assert "'0' is not a whole number of at least 1" in complaint("--rounds", "0")
    assert "gpu" in complaint("--device", "gpu")


# -- ResNet-20 and its training ------------------------------------------------------------------------------------


def test_resnet20_has_the_papers_size():
    network = ResNet20()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 20
    assert sum(p.numel() for p in network.parameters()) == 269_722
    # 3 stages of equal cost but for the two convolutions that halve the grid, the stem, and the dense layer.
    stage = 32 * 32 * 16 * 16 * 9
    assert count_macs(network) == 32 * 32 * 27 * 16 + 6 * stage + 2 * (stage // 2 + 5 * stage) + 640


def test_resnet20_returns_log_probabilities():
    network = ResNet20().eval()
    log_probs = network(torch.randn(4, 3, 32, 32))
    assert log_probs.shape == (4, 10)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(4))


def test_resnet20_shortcuts_carry_the_image_through():
    block = ResNet20().blocks[3].eval()  # the first of 32 channels
    torch.nn.init.zeros_(block.convolutions[4].weight)
    x = torch.rand(2, 16, 32, 32)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()


def test_a_published_run_leaves_its_record(synthetic, tmp_path, monkeypatch, capsys):
    config = Config.one_cycle(epochs=1, batch_size=50, seed=3)
    record = training.publish(ResNet20, config, *synthetic, CPU, tmp_path / "runs", tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert path.name == "ResNet20_one_cycle_seed3_cpu.json" and json.loads(path.read_text()) == record
    assert record["model"] == "ResNet20" and record["config"]["seed"] == 3
    assert list(tmp_path.glob("runs/*/model.pt"))


def test_an_interrupted_run_is_not_published(synthetic, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ResNet20, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    config = Config(epochs=1, batch_size=50)
    assert training.publish(ResNet20, config, *synthetic, CPU, tmp_path / "runs", tmp_path) is None
    assert not list(tmp_path.glob("*.json"))
