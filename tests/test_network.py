"""A network before training: its size against counts by hand, its summary, and networks that cannot be trained."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torchvision
from networks import CPU, EXACT, Linear, small_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model_AC import AdvancedCNN
from session8.config import Config
from session8.data import Split
from session8.network import check_network, count_macs, print_summary, training_pflop
from session8.optim import orthogonalize
from session8.training import fit


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells, self.head = kind(96, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.cells(x.permute(0, 2, 3, 1).flatten(2))[0][:, -1])


class DictOutput(Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


class NoCopy(Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("cannot be copied:\nit holds a lock")


class Failing(Linear):
    def forward(self, x):
        raise TypeError("needs a mask")


class Extra(Linear):
    """Keeps something in its state that is no tensor."""

    def get_extra_state(self):
        return {"when": SimpleNamespace(year=2026)}


class WithArguments(Linear):
    arguments = {"dtype": torch.float32}  # noqa: RUF012


def vision_transformer():
    return torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=10)


def classifier(outputs, inputs=3072):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def batch_norm_before_the_head():
    pooled = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(pooled, nn.BatchNorm1d(4), nn.Linear(4, 10))


# -- size --------------------------------------------------------------------------------------------------------------

# AdvancedCNN: the stem's output has 31 by 31 pixels, and those of the blocks 15, 7 and 3.
BLOCKS = [(24, 32, 31), (32, 96, 15), (96, 192, 7)]
CNN = 24 * 12 * 31**2 + sum(9 * o * (i * size**2 + 2 * o * (size // 2) ** 2) for i, o, size in BLOCKS) + 1920
# The transformer: 17 tokens (16 patches and the class token) of 32 numbers.
VIT = 3 * 64 * 16 * 32 + (17 * 4 * 32**2 + 2 * 17**2 * 32 + 2 * 17 * 32 * 64) + 10 * 32
LSTM, GRU = (32 * gates * 16 * (96 + 16) + 160 for gates in (4, 3))
CASES = [
    (AdvancedCNN, CNN, ["Conv2d-1", "Total params: 1,05", "Multiply-accumulates (MACs): 39.5 million per image"]),
    (vision_transformer, VIT, ["torchsummary cannot show VisionTransformer (AttributeError: ", "Parameters: 15,690"]),
    (lambda: Recurrent(nn.LSTM), LSTM, ["torchsummary cannot show Recurrent (AttributeError: ", "Parameters: 7,466"]),
    (lambda: Recurrent(nn.GRU), GRU, ["(MACs): 0.172 million per image"]),
    (batch_norm_before_the_head, 4 * 768 * 4 + 40, ["BatchNorm1d-4", "(MACs): 0.0123 million per image"]),
    (DictOutput, 30720, ["Linear-1", "Total params: 30,730", "(MACs): 0.0307 million per image"]),
    (NoCopy, math.nan, ["(RuntimeError: cannot be copied: it holds a lock).", "(MACs): cannot be counted"]),
    (Failing, math.nan, ["(TypeError: needs a mask).", "Parameters: 30,730", "(MACs): cannot be counted"]),
]


@pytest.mark.parametrize("make, macs, shown", CASES)
def test_macs_and_summary_of_any_network(make, macs, shown, capsys):
    model, mkldnn = make(), torch.backends.mkldnn.enabled
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert count_macs(model) == pytest.approx(macs, nan_ok=True)
    print_summary(model)
    text = capsys.readouterr().out
    assert all(part in text for part in shown), text
    # Neither changes the model, the random state or PyTorch's flags.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert torch.equal(torch.get_rng_state(), state) and torch.backends.mkldnn.enabled == mkldnn


def test_operations_of_training_count_each_epoch_at_its_size():
    model, config = AdvancedCNN(width=0.5), Config(epochs=5, low_res_epochs=2, low_res_size=24)
    small, full = count_macs(model, 24), count_macs(model)
    assert 0.45 < small / full < 0.6
    assert training_pflop(model, config, 1000, 5, "cpu") == pytest.approx(6e-12 * (2 * small + 3 * full))
    assert training_pflop(model, config, 1000, 1, "cpu") == pytest.approx(6e-12 * small)


def test_operations_of_training_count_the_matrix_products_of_muon():
    """Counted by PyTorch in one call of the iterations per tensor of filters; wide and tall matrices."""
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 8, 5, bias=False), nn.Conv2d(8, 64, 1), nn.Flatten())
    sgd, muon = (Config(epochs=2, optimizer=optimizer, batch_size=30) for optimizer in ("sgd", "muon"))
    with FlopCounterMode(display=False) as counter:
        for layer in list(model)[:3]:
            orthogonalize(layer.weight.flatten(1))
    added = training_pflop(model, muon, 1000, 2, "cpu") - training_pflop(model, sgd, 1000, 2, "cpu")
    assert added == pytest.approx(2 * 34 * counter.get_total_flops() / 1e15)
    model[1].weight.requires_grad_(False)
    assert training_pflop(model, muon, 1000, 2, "cpu") - training_pflop(model, sgd, 1000, 2, "cpu") < 0.7 * added


# -- what fails before training ----------------------------------------------------------------------------------------

SMALL = Config(epochs=2, low_res_epochs=1, low_res_size=16, precision="float32")
ONLY_SMALL = Config(epochs=1, low_res_epochs=1, low_res_size=24, precision="float32")
BAD = {
    "1000 outputs": (
        lambda: classifier(1000),
        EXACT,
        9,
        r"\(2, 1000\) for 2 images; .* \(2, 10\), one output for",
    ),
    "a feature map": (
        lambda: nn.Conv2d(3, 10, 3),
        EXACT,
        9,
        r"\(2, 10, 30, 30\) for 2 images; .* change its last layer",
    ),
    "a dict": (DictOutput, EXACT, 9, "DictOutput returns a dict for 2 images; expected a tensor of shape"),
    "it raises": (Failing, EXACT, 9, r"Failing cannot train on .* \(TypeError: needs a mask\): change the network"),
    "another size": (lambda: classifier(10, 99), EXACT, 9, "cannot train on a batch of 2 images of 32 by 32 pixels"),
    "small images": (lambda: classifier(10), SMALL, 9, r"cannot train on .* of 16 by 16 pixels .*or low_res_size"),
    "small images only": (lambda: classifier(10, 24 * 24 * 3), ONLY_SMALL, 9, "cannot test .* of 32 by 32 pixels"),
    "extra state": (Extra, EXACT, 9, r"Extra cannot be saved .* plain tensors only"),
    "arguments": (WithArguments, EXACT, 9, r"WithArguments cannot be saved .* `arguments`.* plain numbers and strings"),
    "a copy": (
        NoCopy,
        Config(ema_decay=0.9),
        9,
        "(?s)ema_decay is 0.9, but NoCopy cannot be copied .*: set ema_d",
    ),
    "one image": (batch_norm_before_the_head, EXACT, 1, r"of 1 image of 32 by .*batch_size \(the last batch has 1\)"),
    "one small image": (AdvancedCNN, SMALL, 1, r"of 1 image of 16 by .*batch_size \(the last batch has 1\)"),
}


@pytest.mark.parametrize("make, config, smallest_batch, words", BAD.values(), ids=BAD)
def test_bad_input_network(make, config, smallest_batch, words):
    with pytest.raises(ValueError, match=words):
        check_network(make(), config, CPU, smallest_batch)


def test_bad_input_small_images_where_pytorch_cannot_scale_down(monkeypatch):
    def interpolate(*_, **__):
        raise NotImplementedError("aten::_upsample_bilinear2d_aa.out is not implemented for the MPS device")

    monkeypatch.setattr("torch.nn.functional.interpolate", interpolate)
    with pytest.raises(ValueError, match=r"low_res_size is 16, but PyTorch .* on cpu: update PyTorch, or set"):
        check_network(small_network(), SMALL, CPU, 9)


@pytest.mark.parametrize("config", [EXACT, SMALL])
def test_trying_a_network_changes_nothing(config, device):
    model, state = small_network().to(device), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_network(model, config, torch.device(device), 2)
    assert all(torch.equal(value.cpu(), before[name].cpu()) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_a_network_that_cannot_be_copied_is_not_tried(capsys):
    check_network(NoCopy(), EXACT, CPU, 9)
    assert "NoCopy was not tried before training: it cannot be copied (RuntimeError" in capsys.readouterr().out


def test_training_tries_the_network_on_the_size_of_its_last_batch(synthetic):
    split = Split(synthetic[0].images[:17], synthetic[0].labels[:17], "17 images")
    with pytest.raises(ValueError, match=r"batch of 1 image .*the last batch has 1\)"):
        fit(batch_norm_before_the_head(), split, synthetic[1], replace(EXACT, batch_size=16), "cpu")
    fit(batch_norm_before_the_head(), split, synthetic[1], replace(EXACT, batch_size=15), "cpu")
