import json
import re
import signal

import numpy as np
import pytest
import torch
from networks import CPU, EXACT, Linear, small_network

from model_AC import AdvancedCNN
from session8 import training as utils
from session8.checkpoint import describe_record, write_record
from session8.data import MEAN, STD, Split
from session8.training import Config, fit, get_device, make_loader, normalize

# -- the recipe ----------------------------------------------------------------------------------------------------


def test_the_default_recipe_is_the_seed_projects():
    config = Config()
    assert (config.epochs, config.lr, config.momentum, config.schedule) == (40, 0.01, 0.9, "constant")
    assert (config.weight_decay, config.label_smoothing, config.nesterov, config.batch_size) == (0, 0, False, None)
    optimizer = utils.make_optimizer(AdvancedCNN(), config)
    assert type(optimizer) is torch.optim.SGD
    assert all(g["lr"] == 0.01 and g["momentum"] == 0.9 and g["weight_decay"] == 0 for g in optimizer.param_groups)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"epochs": -3}, {"epochs": 1.5}, {"epochs": True}, {"batch_size": 0}, {"batch_size": -64},
        {"lr": 0}, {"lr": "0.1"}, {"lr": None}, {"lr": float("nan")}, {"lr": float("inf")},
        {"momentum": 1}, {"momentum": -0.1},
        {"weight_decay": -1}, {"label_smoothing": 1}, {"schedule": "cosine"}, {"warmup": 0}, {"warmup": 1},
        {"dropout": 1.0}, {"dropout": -0.1},
        {"cutout": -1}, {"cutout": 33}, {"cutout": 8.0}, {"precision": "float16"}, {"seed": -1}, {"seed": 0.5},
    ],
)  # fmt: skip
def test_bad_input_recipe(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; expected")):
        Config(**wrong)


def test_bad_input_recipe_name():
    assert Config.named("one_cycle", epochs=3) == Config.one_cycle(epochs=3)
    with pytest.raises(ValueError, match="recipe is 'two_cycles'; expected one of 'default', 'one_cycle'"):
        Config.named("two_cycles")


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing():
    config = Config.one_cycle(lr=0.2, warmup=0.25)
    assert config.lr_at(0.25) == pytest.approx(0.2)
    assert config.lr_at(0.125) == pytest.approx(0.1) == config.lr_at(0.625)
    assert config.lr_at(0) == config.lr_at(1) == 0
    assert Config().lr_at(0.7) == 0.01


def test_weight_decay_is_on_weights_only():
    optimizer = utils.make_optimizer(AdvancedCNN(), Config.one_cycle())
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 5e-4 and spared["weight_decay"] == 0
    assert decayed["nesterov"] and spared["nesterov"]
    assert {p.ndim for p in decayed["params"]} == {2, 4} and {p.ndim for p in spared["params"]} == {1}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(AdvancedCNN().parameters()))


# -- device and precision ------------------------------------------------------------------------------------------


def test_device_is_the_first_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert get_device() == get_device("cpu") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert get_device().type == "mps" and get_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert get_device().type == "cuda"
    with pytest.raises(ValueError, match="device is 'cuda:1', which is not to be had"):
        get_device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "cuda", "meta", ""])
def test_bad_input_unknown_device(name, monkeypatch, synthetic):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device is '{name}', .*on this machine there is cpu"):
        fit(Linear(), *synthetic, EXACT, name)


def test_mixed_precision_follows_the_hardware(monkeypatch):
    cuda = torch.device("cuda")
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert utils.mixed_precision(Config(), cuda) is expected
    for amx, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx}, raising=False)
        assert utils.mixed_precision(Config(), CPU) is expected
    for device in (CPU, cuda):
        assert utils.mixed_precision(Config(precision="float32"), device) is None


def test_a_step_in_float16_is_that_in_float32_but_for_rounding(synthetic, monkeypatch):
    """A CPU can compute in float16 as well, though it does not pay: what GPUs without bfloat16 are given."""
    images, labels = torch.from_numpy(synthetic[0].images[:32]), torch.from_numpy(synthetic[0].labels[:32])
    config, weights, types = Config(lr=0.5, momentum=0), [], []
    for dtype in (torch.float32, torch.float16):
        for module in ("session8.config", "session8.training"):
            half = dtype if dtype is torch.float16 else None
            monkeypatch.setattr(f"{module}.mixed_precision", lambda *_, half=half: half)
        model, scaler = Linear(), utils.make_scaler(config, CPU)
        assert scaler.is_enabled() == (dtype is torch.float16)
        model.dense.register_forward_hook(lambda _, __, output: types.append(output.dtype))
        nll, _ = utils.train_step(model, images, labels, utils.make_optimizer(model, config), scaler, config, CPU)
        assert nll.dtype == torch.float32
        utils.test(model, make_loader(synthetic[1], 100, train=False), config, CPU)
        weights.append(model.dense.weight.detach() - Linear().dense.weight.detach())
    assert types == [torch.float32] * 2 + [torch.float16] * 2
    largest = weights[0].abs().max()
    assert largest > 0.01
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0.01 * largest.item())


def test_normalisation_is_exact_and_channels_last(synthetic):
    images = synthetic[0].images[:5]
    expected = ((images / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    result = normalize(torch.from_numpy(images), CPU)
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-6)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)


def test_mps_is_given_no_channels_last_in_which_its_batch_norm_is_wrong(synthetic, monkeypatch):
    assert utils.memory_format(torch.device("mps")) == torch.contiguous_format
    monkeypatch.setattr(utils, "memory_format", lambda _: torch.contiguous_format)
    images = torch.from_numpy(synthetic[0].images[:5])
    assert normalize(images, CPU).is_contiguous()
    model = small_network().to(memory_format=torch.channels_last)
    utils.Run(model, *synthetic, EXACT, CPU)
    assert all(p.is_contiguous() for p in model.parameters())


# -- training and testing ------------------------------------------------------------------------------------------


def test_means_of_training_agree_with_an_independent_computation(synthetic):
    split = Split(synthetic[0].images[:70], synthetic[0].labels[:70], "70 images: the last batch of 32 is partial")
    model, loader = Linear(), make_loader(split, 32, seed=4)
    standing_still = Config(epochs=1, lr=1e-30, momentum=0, precision="float32")
    optimizer = utils.make_optimizer(model, standing_still)
    loss, accuracy = utils.train(model, loader, optimizer, standing_still, CPU)
    images, labels = (torch.cat(part).numpy() for part in zip(*loader, strict=True))
    log_probs = model.by_hand(images)
    nll = -log_probs[np.arange(70), labels]
    assert loss == pytest.approx(nll.mean(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (log_probs.argmax(1) == labels).mean())
    of_batches = np.mean([nll[:32].mean(), nll[32:64].mean(), nll[64:].mean()])
    assert loss != pytest.approx(of_batches, rel=1e-4)  # the usual mistake would be noticed


def test_means_of_testing_agree_with_an_independent_computation(synthetic):
    test_split, model = synthetic[1], Linear()
    loss, accuracy = utils.test(model, make_loader(test_split, 32, train=False), EXACT, CPU)
    log_probs = model.by_hand(test_split.images)
    assert loss == pytest.approx(-log_probs[np.arange(100), test_split.labels].mean(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (log_probs.argmax(1) == test_split.labels).mean())


def test_label_smoothing_is_the_cross_entropy_with_smoothed_targets(synthetic):
    images, labels = torch.from_numpy(synthetic[0].images[:32]), torch.from_numpy(synthetic[0].labels[:32])
    config = Config(lr=0.5, momentum=0, label_smoothing=0.3, precision="float32")
    ours, other = Linear(), Linear()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    nll, _ = utils.train_step(ours, images, labels, utils.make_optimizer(ours, config), scaler, config, CPU)
    scores = other.dense(normalize(images, CPU).flatten(1))
    torch.nn.functional.cross_entropy(scores, labels, label_smoothing=0.3).backward()
    expected = other.dense.weight - 0.5 * other.dense.weight.grad
    torch.testing.assert_close(ours.dense.weight, expected)
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(scores, labels))  # reported without smoothing


def test_a_network_that_ends_in_scores_is_trained_and_tested_as_one_in_log_probabilities(synthetic):
    class Scores(Linear):
        def forward(self, x):
            return 3 + self.dense(x.flatten(1))

    config, results = Config(epochs=2, batch_size=50, lr=0.001, label_smoothing=0.2, precision="float32"), []
    for network in (Linear(), Scores()):
        history = fit(network, *synthetic, config, "cpu")
        results.append([value for name in ("train_loss", "test_loss", "test_accuracy") for value in history[name]])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_training_lowers_the_loss_and_learns(synthetic):
    history = fit(small_network(), *synthetic, Config(epochs=5, batch_size=20), "cpu")
    assert history["train_loss"][-1] < 0.7 * history["train_loss"][0]
    assert history["test_accuracy"][-1] > 50


def test_one_batch_can_be_overfitted(synthetic):
    torch.manual_seed(0)
    model, config = AdvancedCNN(width=0.5, dropout=0), Config(lr=0.05, precision="float32")
    images, labels = torch.from_numpy(synthetic[0].images[:32]), torch.from_numpy(synthetic[0].labels[:32])
    optimizer, scaler = utils.make_optimizer(model, config), torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(30):
        nll, hits = utils.train_step(model, images, labels, optimizer, scaler, config, CPU)
    assert nll < 0.05 and hits == 32


LOG = re.compile(
    r"(Epoch (?P<epoch>\d+)\n"
    r"(\r[^\n]*)*\rTrain: Loss=\d+\.\d{4} Batch_id=4 Accuracy=\d+\.\d{2}: "
    r"100%\|█{10}\| 5/5 \[\d\d:\d\d<\d\d:\d\d, +\d+\.\d\d(it/s|s/it)\]\n"
    r"Test set: Average loss: \d+\.\d{4}, Accuracy: \d+/100 \(\d+\.\d{2}%\)\n\n){2}"
)


def test_log_lines_are_the_seed_projects(synthetic, capsys):
    history = fit(Linear(), *synthetic, Config(epochs=2, batch_size=64), "cpu")
    header, log = capsys.readouterr().out.split("\n\n", 1)
    assert "synthetic stand-in, NOT CIFAR-10" in header and "300 images" in header
    assert LOG.fullmatch(log), repr(log)
    assert f"({history['test_accuracy'][-1]:.2f}%)" in log and f"Accuracy={history['train_accuracy'][0]:.2f}" in log


def test_history_is_plain_and_complete(synthetic):
    history = fit(Linear(), *synthetic, Config.one_cycle(epochs=3, batch_size=100, lr=0.01), "cpu")
    assert set(history) == {"train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds"}
    assert all(len(values) == 3 and all(type(v) is float for v in values) for values in history.values())
    # 3 steps an epoch, 9 in all: the last steps of the epochs begin at 2/9, 5/9 and 8/9 of training.
    expected = [0.01 * (2 / 9) / 0.25, 0.01 * (4 / 9) / 0.75, 0.01 * (1 / 9) / 0.75]
    assert history["lr"] == pytest.approx(expected)
    json.dumps(history)


def test_each_step_takes_the_schedules_rate_and_each_epoch_batches_of_its_own(synthetic, monkeypatch):
    rates, batches, step = [], [], utils.train_step

    def watched(model, images, labels, optimizer, *rest):
        rates.extend({group["lr"] for group in optimizer.param_groups})
        batches.append(images)
        return step(model, images, labels, optimizer, *rest)

    monkeypatch.setattr(utils, "train_step", watched)
    config = Config.one_cycle(epochs=2, batch_size=100, lr=0.01, seed=7)
    fit(Linear(), *synthetic, config, "cpu")
    # 3 steps an epoch, 6 in all: the rate rises over the first quarter, and falls over the rest.
    expected = [0.01 * rate for rate in (0, (1 / 6) / 0.25, (4 / 6) / 0.75, (3 / 6) / 0.75, (2 / 6) / 0.75)]
    assert rates == pytest.approx([*expected, 0.01 * (1 / 6) / 0.75])
    loader = make_loader(synthetic[0], 100, seed=7, transform=utils.train_transforms(config.cutout))
    for epoch, part in enumerate((batches[:3], batches[3:])):
        loader.set_epoch(epoch)
        assert all(torch.equal(one, other) for one, (other, _) in zip(part, loader, strict=True))
    assert not torch.equal(batches[0], batches[3])


def test_the_device_is_read_when_the_bar_is_refreshed_and_not_every_step(synthetic, monkeypatch):
    settled, settle = [], utils._settle
    monkeypatch.setattr(utils, "REFRESH_SECONDS", 1e9)
    monkeypatch.setattr(
        utils, "_settle", lambda _, pending, *rest: (settled.append(len(pending)), settle(_, pending, *rest))
    )
    fit(Linear(), *synthetic, Config(epochs=2, batch_size=64), "cpu")
    assert settled == [5, 5]


def test_one_seed_decides_training(synthetic):
    states = iter(range(100, 104))

    def weights(seed):
        model = small_network()
        torch.manual_seed(next(states))  # dropout must not draw from what was before
        fit(model, *synthetic, Config(epochs=1, batch_size=64, seed=seed), "cpu")
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_batch_size_follows_the_device_unless_it_is_set(synthetic, capsys):
    fit(Linear(), *synthetic, Config(epochs=1), "cpu")
    assert " 5/5 " in capsys.readouterr().out  # 300 images in batches of 64
    fit(Linear(), *synthetic, Config(epochs=1, batch_size=128), "cpu")
    assert " 3/3 " in capsys.readouterr().out


@pytest.mark.parametrize("at, whole", [(4, 0), (10, 1)])  # an epoch is 5 batches of training and 1 of testing
def test_ctrl_c_ends_training_with_history_and_weights_of_the_last_whole_epoch(synthetic, capsys, at, whole):
    class Interrupted(Linear):
        passes = 0

        def forward(self, x):
            self.passes += 1
            if self.passes == at:
                signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    model = Interrupted()
    history = fit(model, *synthetic, Config(epochs=5, batch_size=64), "cpu")
    assert all(len(values) == whole for values in history.values())
    printed = capsys.readouterr().out
    assert f"Interrupted in epoch {whole + 1}: the history holds the {whole} before it" in printed
    if whole:
        tested = utils.test(model, make_loader(synthetic[1], 500, train=False), Config(), CPU)
        assert tested == (history["test_loss"][-1], history["test_accuracy"][-1]) and "those after them" in printed
    else:
        assert not torch.equal(model.dense.weight, Linear().dense.weight) and "those of this moment" in printed


# -- the record ----------------------------------------------------------------------------------------------------


def test_record_names_everything(synthetic, tmp_path):
    model, config = small_network(), Config(epochs=2, batch_size=64, seed=3)
    history = fit(model, *synthetic, config, "cpu")
    path = tmp_path / "new folder" / "record.json"
    record = write_record(path, model, *synthetic, config, history, "cpu")
    assert json.loads(path.read_text()) == record
    assert record["model"] == "AdvancedCNN" and record["width"] == 0.5
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert "NOT CIFAR-10" in record["data"] and (record["n_train"], record["n_test"]) == (300, 100)
    assert record["config"]["seed"] == 3 and record["history"] == history
    assert record["seconds"] == pytest.approx(sum(history["seconds"]), abs=0.1)
    assert {"python", "torch", "albumentations", "numpy"} <= set(record["versions"]) and record["device"]
    assert f"{history['test_accuracy'][-1]:.2f} %" in describe_record(record)
    assert [path.name for path in path.parent.iterdir()] == ["record.json"]


def test_a_record_of_a_run_that_is_shown_again_is_left_as_it_is(synthetic, tmp_path, monkeypatch):
    history = {"train_accuracy": [10.0], "test_accuracy": [10.0], "seconds": [1.23]}
    arguments = (tmp_path / "record.json", small_network(), *synthetic, Config(), history, "cpu")
    first = write_record(*arguments)
    monkeypatch.setattr("session8.checkpoint.device_name", lambda _: "another machine")
    assert write_record(*arguments) == first
    history["seconds"] = [1.24]
    assert write_record(*arguments)["device"] == "another machine"
    (tmp_path / "record.json").write_text("{not whole")
    assert write_record(*arguments) == json.loads((tmp_path / "record.json").read_text())


def test_a_record_holds_null_for_what_is_no_number(synthetic, tmp_path):
    history = {"train_accuracy": [10.0], "test_accuracy": [10.0], "test_loss": [float("nan")], "seconds": [1.0]}
    record = write_record(tmp_path / "record.json", small_network(), *synthetic, Config(), history, "cpu")
    assert record["history"]["test_loss"] == [None] and "NaN" not in (tmp_path / "record.json").read_text()


def test_a_record_of_no_whole_epoch_can_be_described(synthetic, tmp_path):
    history = {name: [] for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds")}
    record = write_record(tmp_path / "record.json", small_network(), *synthetic, Config(), history, "cpu")
    assert "0 of 40 epochs" in describe_record(record)
