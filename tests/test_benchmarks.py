"""The benchmarks compare equal work, and report what they measured."""

import argparse
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import class_folders, position_coded

from benchmarks import common, epoch, input_pipeline, scaling, train_step
from benchmarks.resnet20 import ResNet20
from session8 import training
from session8.config import Config
from session8.data import MEAN, STD, Split
from session8.network import count_macs

CPU = torch.device("cpu")
ROOT = Path(common.__file__).parent.parent


@pytest.fixture
def few(tmp_path):
    """A folder with 40 training images and 20 test images."""
    class_folders(tmp_path / "few", per_train=4, per_test=2)
    return str(tmp_path / "few")


# -- equal work ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", input_pipeline.PIPELINES)
def test_every_pipeline_yields_the_same_kind_of_batches(name):
    split = coded(50)
    pipeline = input_pipeline.PIPELINES[name](split, 16, 0, CPU)
    drawn, orders = [], []
    for number in range(40):
        images, labels = (torch.cat(part) for part in zip(*pipeline(number), strict=True))
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
            if len(drawn) <= 50:
                np.testing.assert_allclose(image, augmentations_of(split.images[index])[draw], atol=3e-6)
    assert len(set(orders)) == 40
    tops, lefts, flips = np.array(drawn).T
    offsets = np.bincount(9 * tops + lefts, minlength=81)
    assert ((offsets - 2000 / 81) ** 2 / (2000 / 81)).sum() < 140  # chi-squared with 80 degrees: mean 80, std 12.6
    assert 900 < flips.sum() < 1100  # of 2000; the standard deviation is 22
    assert abs(np.corrcoef(flips, lefts)[0, 1]) < 0.1 and abs(np.corrcoef(tops, lefts)[0, 1]) < 0.1


def test_both_loops_take_the_same_steps(synthetic):
    images, labels = torch.from_numpy(synthetic[0].images[:16]), torch.from_numpy(synthetic[0].labels[:16])
    config = Config(batch_size=16, precision="float32")
    trained = []
    for work, model in (
        train_step.plain_loop(images, labels, CPU, 1),
        train_step.our_loop(images, labels, CPU, 1, config),
    ):
        before = model.head.weight.detach().clone()
        torch.manual_seed(1)  # dropout draws from it
        work()
        assert (before - model.head.weight).abs().max() > 1e-3
        trained.append(model)
    for one, other in zip(*(model.state_dict().values() for model in trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=5e-5)


def test_the_limit_takes_the_same_steps_as_an_epoch(synthetic, monkeypatch, capsys):
    sizes = []
    step = training.train_step

    def counted(model, images, *rest, **options):
        sizes.append(len(images))
        return step(model, images, *rest, **options)

    monkeypatch.setattr(training, "train_step", counted)
    monkeypatch.setattr(epoch, "train_step", counted)
    split, config = common.subset(synthetic[0], 20), Config(epochs=1, batch_size=8)
    assert epoch.limit(split, config, CPU)() is None  # timed from outside, the epoch by `fit`
    assert 0 < epoch.epoch(split, split, config, CPU)() < 60
    assert sizes == [8, 8, 4, 8, 8, 4] and capsys.readouterr().out == ""


def test_a_subset_is_evenly_spaced():
    split = Split(np.zeros((100, 32, 32, 3), np.uint8), np.arange(100) // 10, "in the order of their classes")
    assert common.subset(split, 10).labels.tolist() == list(range(10))
    assert np.bincount(common.subset(split, 35).labels).tolist() == [4, 3] * 5


# -- numbers -------------------------------------------------------------------------------------------------------


def test_the_exchanged_bytes_are_those_of_gradients_and_statistics():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 5))
    network[2].requires_grad_(False)
    # Weights 6 + bias 2 + batch norm 4; running mean 2 + variance 2 in float32, the count of batches in int64.
    assert scaling.exchanged_bytes(network) == (4 * 12, 4 * 4 + 8)


def test_the_calculated_step_time_makes_communication_a_tenth():
    n_bytes, speed, processes = 4e6, 1e9, 4
    communication = 2 * 3 * (n_bytes / 4) / speed  # a ring: 2 (p - 1) messages of a p-th of the bytes
    least = scaling.least_step_seconds(n_bytes, speed, processes)
    assert communication / (communication + least) == pytest.approx(0.1)


def test_functions_are_timed_alternately_until_the_device_is_idle(monkeypatch):
    clock, calls = [0.0], []

    def work(name, seconds, own=None):
        calls.append(name)
        clock[0] += seconds
        return own

    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(common, "synchronize", lambda device: work("", 0.5))
    functions = {"A": lambda: work("A", 1.0), "B": lambda: work("B", 2.0), "C": lambda: work("C", 9.0, own=7.0)}
    assert common.time_alternately(functions, 2, CPU) == {"A": [1.5, 1.5], "B": [2.5, 2.5], "C": [7.0, 7.0]}
    assert "".join(calls) == "ABCABCABC"  # one round of warming up


@pytest.mark.parametrize(
    "module, row, numbers",
    [
        (train_step, "plain loop", "400.00  1.00 to 1.00  1.00"),  # 10 steps take 4 seconds in the median
        (train_step, "ours, float32", "200.00  2.00 to 4.00  2.00"),
        (input_pipeline, "ours  0", "10  1.00 to 1.00  1.00"),  # 40 images take 4 seconds
        (input_pipeline, "usual  2", "20  0.25 to 0.50  0.50"),
    ],
)
def test_the_reported_numbers_follow_from_the_times(module, row, numbers, few, monkeypatch, capsys):
    def times(functions, rounds, device):
        return {name: [1.0, 2.0, 2.0] if number else [2.0, 8.0, 4.0] for number, name in enumerate(functions)}

    monkeypatch.setattr(module, "time_alternately", times)
    sizes = ["--steps", "10", "--batch-size", "8"] if module is train_step else ["--images", "40"]
    module.main(["--data", few, "--device", "cpu", *sizes])
    assert re.search(rf" *{row}  {numbers}\n".replace("  ", " +"), capsys.readouterr().out)


def test_report_prints_and_saves_the_same(tmp_path, monkeypatch, capsys, synthetic):
    monkeypatch.setattr(common, "SAVED", tmp_path / "new")
    options = argparse.Namespace(device=CPU, save=False, rounds=3, data="/a/folder")
    rows = [["ours", 1.234], ["theirs", 20.0]]
    common.report("clock", options, synthetic[0], ["way", "ms"], rows, peak=1.5)
    assert not list(tmp_path.iterdir())
    options.save = True
    common.report("clock", options, synthetic[0], ["way", "ms"], rows, peak=1.5)
    printed = capsys.readouterr().out
    assert re.search(r"^ *ours +1\.23$", printed, re.MULTILINE) and "peak: 1.5" in printed
    record = json.loads((tmp_path / "new" / "clock_cpu.json").read_text())
    assert record["rows"] == rows and record["options"] == {"rounds": 3} and record["notes"] == {"peak": 1.5}
    assert record["data"] == synthetic[0].source and "/a/folder" not in str(record)
    assert record["device"] in printed and record["versions"]["torch"] in printed


# -- from end to end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, options, words",
    [
        (input_pipeline, ["--images=40"], "ours .*ours .device. .*usual .*torchvision v2 .*limit "),
        (train_step, ["--steps=1"], "plain loop .*ours, float32 .*ours, auto "),
        (
            epoch,
            ["--images=8", "--workers", "0"],
            r"limit .* 1\.00 to 1\.00 .*ours .*albumentations, 0 workers ",
        ),
    ],
)
def test_benchmarks_run_on_few_images(module, options, words, few, capsys):
    module.main(["--data", few, "--device=cpu", "--rounds=1", "--batch-size=8", *options])
    printed = capsys.readouterr().out
    assert re.search(words, printed, re.DOTALL)
    if module is epoch:
        assert 0.1 < float(re.search(r"peak resident set \(GB\): ([\d.]+)", printed)[1]) < 4


def test_scaling_runs_as_a_command(few):
    command = [sys.executable, "-m", "benchmarks.scaling", "--data", few, "--rounds=1", "--batch-size=8", "--steps=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search("1 process, 2 threads .*2 processes, 1 thread each .*NVLink", done.stdout, re.DOTALL)


def test_resnet20_is_trained_with_the_options_of_train_py(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data", few, "--device", "cpu", "--recipe", "one_cycle", "--epochs", "1", "--batch-size", "20"]
    monkeypatch.setattr(sys, "argv", ["train_resnet20.py", *options])
    runpy.run_module("benchmarks.train_resnet20", run_name="__main__")
    (record,) = tmp_path.glob("runs/*/record.json")
    record = json.loads(record.read_text())
    assert record["model"] == "ResNet20" and record["config"]["schedule"] == "one_cycle"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["--device", "gpu"], "device is 'gpu', which is unknown; available: "),
        (["--data", "nowhere"], "root is 'nowhere', which is not a directory"),
        (["--data", "few"], "128 training images needed, but 'CIFAR-10.*' has 40: use fewer"),
        (["--data", "few", "--batch-size", "8", "--save"], "has 40 training images: --save needs all 50,000"),
    ],
)
def test_bad_input(options, words, few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train_step.main(options)
    assert ended.value.code and re.search(words, f"{ended.value.code} {capsys.readouterr().err}")


# -- ResNet-20 -----------------------------------------------------------------------------------------------------


def test_resnet20_has_the_papers_size_and_returns_log_probabilities():
    network = ResNet20().eval()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 20
    assert sum(p.numel() for p in network.parameters()) == 269_722
    # 3 stages of equal cost but for the two convolutions that halve the grid, the stem, and the dense layer.
    stage = 32 * 32 * 16 * 16 * 9
    assert count_macs(network) == 32 * 32 * 27 * 16 + 6 * stage + 2 * (stage // 2 + 5 * stage) + 640
    torch.testing.assert_close(network(torch.randn(4, 3, 32, 32)).exp().sum(1), torch.ones(4))


def test_resnet20_shortcuts_subsample_and_pad_with_zero_channels():
    block = ResNet20().blocks[3].eval()  # the first of 32 channels
    torch.nn.init.zeros_(block.residual[4].weight)
    x = torch.rand(2, 16, 32, 32)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()
