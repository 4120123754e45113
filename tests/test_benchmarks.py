"""The benchmarks compare equal work and report their measurements."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import common
import epoch
import numpy as np
import pytest
import scaling
import torch
import train_step
from fakes import class_folders, position_coded
from pipelines import PIPELINES
from resnet20 import ResNet20

from session8 import training
from session8.config import Config
from session8.data import MEAN, STD, Split
from session8.records import count_macs

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


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_yields_the_same_kind_of_batches(name):
    split = coded(50)
    pipeline = PIPELINES[name](split, 16, 0, CPU)
    drawn, orders = [], []
    for _ in range(40):
        images, labels = (torch.cat(part) for part in zip(*pipeline, strict=True))
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
        train_step.plain_loop(images, labels, CPU, 1),
        train_step.our_loop(images, labels, CPU, 1, config),
    ):
        work, model = loop
        before = model.head.weight.detach().clone()
        torch.manual_seed(1)  # dropout draws from it
        work()
        assert (before - model.head.weight).abs().max() > 1e-3
        trained.append(model)
    for one, other in zip(*(model.state_dict().values() for model in trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=5e-5)


def test_the_reported_time_is_of_one_step(monkeypatch, synthetic):
    reported = []
    times = {"plain loop": [2.0, 8.0, 4.0], "ours, float32": [1.0, 2.0, 2.0], "ours, auto": [1.0, 1.0, 1.0]}
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--steps", "10", "--batch-size", "8", "--device", "cpu"])
    monkeypatch.setattr(train_step, "load_training_split", lambda *_: synthetic[0])
    monkeypatch.setattr(
        train_step, "time_alternately", lambda sides, rounds, device: {name: times[name] for name in sides}
    )
    monkeypatch.setattr(train_step, "report", lambda *arguments, **_: reported.extend(arguments[-1]))
    train_step.main()
    assert reported[:2] == [["plain loop", 400.0, "1.00 to 1.00", 1.0], ["ours, float32", 200.0, "2.00 to 4.00", 2.0]]
    assert reported[-1][0] == "ours, auto"


# -- scaling.py ------------------------------------------------------------------------------------------------


def test_the_calculated_step_time_makes_communication_a_tenth():
    n_bytes, speed, processes = 4e6, 1e9, 4
    communication = 2 * 3 * (n_bytes / 4) / speed  # a ring: 2 (p - 1) messages of a p-th of the bytes
    least = scaling.least_step_seconds(n_bytes, speed, processes)
    assert communication / (communication + least) == pytest.approx(0.1)


def test_the_exchanged_bytes_are_those_of_gradients_and_statistics():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 5))
    network[2].requires_grad_(False)
    # Weights 6 + bias 2 + batch norm 4; running mean 2 + variance 2 in float32, the count of batches in int64.
    assert scaling.exchanged_bytes(network) == (4 * 12, 4 * 4 + 8)


# -- epoch.py ------------------------------------------------------------------------------------------------------


def test_the_limit_takes_the_same_steps_as_an_epoch(synthetic, monkeypatch, capsys):
    sizes = []
    step = training.train_step

    def counted(model, images, *rest):
        sizes.append(len(images))
        return step(model, images, *rest)

    monkeypatch.setattr(training, "train_step", counted)
    monkeypatch.setattr(epoch, "train_step", counted)
    functions = epoch.make_functions(common.subset(synthetic[0], 100), Config(epochs=1, batch_size=32), CPU, [0])
    taken = {}
    for name, work in functions.items():
        sizes.clear()
        work()
        taken[name] = list(sizes)
    assert taken == {name: [32, 32, 32, 4] for name in ("limit", "ours", "ours (device)")}
    assert capsys.readouterr().out == ""


# -- the clock and the record --------------------------------------------------------------------------------------


def test_a_subset_is_evenly_spaced():
    split = Split(np.zeros((100, 32, 32, 3), np.uint8), np.arange(100) // 10, "in the order of their classes")
    assert common.subset(split, 10).labels.tolist() == list(range(10))
    assert np.bincount(common.subset(split, 35).labels).tolist() == [4, 3] * 5


def test_functions_are_timed_alternately():
    calls = []
    times = common.time_alternately({name: lambda name=name: calls.append(name) for name in "AB"}, 2, CPU)
    assert calls == list("ABABAB")  # one round of warming up
    assert {name: len(values) for name, values in times.items()} == {"A": 2, "B": 2}


def test_ratio_is_the_median_over_the_rounds():
    assert common.ratio({"A": [2.0, 9.0, 4.0], "B": [1.0, 1.0, 1.0]}, "A", "B") == ("2.00 to 9.00", 4.0)


def test_the_clock_waits_for_the_device(monkeypatch):
    calls = []
    monkeypatch.setattr(common, "synchronize", lambda device: calls.append(device))
    common.elapsed(lambda: calls.append("work"), CPU)
    assert calls == [CPU, "work", CPU]


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


def run_command(command, *options):
    line = [sys.executable, BENCHMARKS / f"{command}.py", *map(str, options)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "command, options, rows",
    [
        ("input_pipeline", ["--images", 40], ["ours", "ours (device)", "usual", "torchvision v2", "limit"]),
        ("train_step", ["--steps", 1], ["plain loop", "ours, float32", "ours, auto"]),
        ("epoch", ["--images", 40], ["limit", "ours", "ours (device)"]),
        ("scaling", ["--steps", 1], ["1 process, 2 threads", "2 processes, 1 thread each", "NVLink"]),
    ],
)
def test_commands_run_on_a_folder_of_images(command, options, rows, tmp_path):
    class_folders(tmp_path, per_train=20, per_test=2)
    done = run_command(command, "--data", tmp_path, "--rounds", 1, "--batch-size", 16, *options)
    assert done.returncode == 0, done.stderr
    assert f"{command} on " in done.stdout and all(row in done.stdout for row in rows)
    if command == "epoch":
        assert re.search(r"limit +[\d.]+ +1\.00 to 1\.00 +1\.00$", done.stdout, re.MULTILINE)
        assert 0.1 < float(re.search(r"peak resident set \(GB\): ([\d.]+)", done.stdout)[1]) < 4


def test_memory_is_measured_at_the_batch_size_asked_for(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "Epoch 1\n[1.25, null]\n")

    monkeypatch.setattr(epoch.subprocess, "run", run)
    options = argparse.Namespace(device=CPU, batch_size=77, data="/some/folder")
    assert epoch.peak_memory(options) == [1.25, None]
    assert " ".join(asked[0][2:]) == "--only-memory --device cpu --batch-size 77 --data /some/folder"


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--rounds", "0"], "argument --rounds: '0' is not an integer of at least 1"),
        (["--device", "gpu"], "device is 'gpu', which is unknown; available: "),
        (["--data", "nowhere"], "root is 'nowhere', which is not a directory"),
        (["--data", "."], "128 training images needed, but 'CIFAR-10"),
        (["--data", ".", "--batch-size", "8", "--save"], "--save needs all 50,000"),
    ],
)
def test_bad_input_on_the_command_line(options, complaint, tmp_path, monkeypatch, capsys):
    class_folders(tmp_path, per_train=2, per_test=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_step.py", *options])
    with pytest.raises(SystemExit) as ended:
        train_step.main()
    assert ended.value.code
    assert complaint in f"{ended.value.code} {' '.join(capsys.readouterr().err.split())}"


# -- ResNet-20 ------------------------------------------------------------------------------------


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


def test_resnet20_shortcuts_subsample_and_pad_with_zero_channels():
    block = ResNet20().blocks[3].eval()  # the first of 32 channels
    torch.nn.init.zeros_(block.residual[4].weight)
    x = torch.rand(2, 16, 32, 32)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()
