"""Muon against the singular value decomposition and steps written out in NumPy."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import fake_cuda
from networks import CPU, Linear, TinyNetwork
from torch import nn

from session8.augment import normalize
from session8.config import Config
from session8.optim import Muon, convolution_filters, make_optimizer, make_scaler, orthogonalize, set_lr
from session8.start import run_folder
from session8.training import fit, train_step

MUON = Config(optimizer="muon", muon_lr=0.05, lr=0.1, momentum=0.8, nesterov=True, precision="float32")


def by_decomposition(matrix):
    """Return what three iterations make of a matrix: each maps the singular values only."""
    u, s, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    s /= np.sqrt((s**2).sum())
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8), (1, 30)])
def test_orthogonalize_maps_the_singular_values(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    result = orthogonalize(torch.from_numpy(matrix))
    np.testing.assert_allclose(result, by_decomposition(matrix), atol=1e-6)
    assert ((values := np.linalg.svd(result)[1]) > 0.3).all() and (values < 1.3).all()
    assert not orthogonalize(torch.zeros(shape)).any()  # and not NaN
    rounded = orthogonalize(torch.from_numpy(matrix).bfloat16())
    assert rounded.dtype == torch.bfloat16 and abs(rounded.double() - result).max() < 0.05


def network(device=CPU):
    """A frozen convolution, two that are trained, one of them with a bias, batch norm and a head."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=3), nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.GELU(),
        nn.Conv2d(6, 40, 2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    )  # fmt: skip
    layers[0].weight.requires_grad_(False)
    return layers.to(device)


@pytest.mark.parametrize(
    "changes", [{}, {"nesterov": False, "weight_decay": 0.1}, {"momentum": 0.0, "nesterov": False}]
)
def test_steps_agree_with_muon_and_sgd_written_out(changes, synthetic, device):
    config = replace(MUON, bias_lr_scale=4.0, label_smoothing=0.1, **changes)
    ours, theirs = network(device), network().double()
    optimizer, scaler = make_optimizer(ours, config), make_scaler(config, device)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    velocity = {name: 0.0 for name in trained}
    for step, part in enumerate((slice(0, 32), slice(32, 64), slice(64, 96))):
        rate = 1 / (1 + step)  # a schedule changes both rates alike
        images, labels = torch.from_numpy(synthetic[0].images[part]), torch.from_numpy(synthetic[0].labels[part])
        if step:  # the first rates are those of a new optimizer
            set_lr(optimizer, rate * config.lr)
        train_step(ours, images, labels, optimizer, scaler, config, device)
        log_probs = theirs(normalize(images, CPU).double()).log_softmax(1)
        targets = (1 - config.label_smoothing) * F.one_hot(labels, 10) + config.label_smoothing / 10
        gradients = torch.autograd.grad(-(targets * log_probs).sum(1).mean(), list(trained.values()))
        for (name, p), gradient in zip(trained.items(), gradients, strict=True):
            p, filters = p.data.numpy(), name in ("1.weight", "4.weight")
            gradient = gradient.numpy() + (config.weight_decay * p if name == "7.weight" else 0)
            velocity[name] = config.momentum * velocity[name] + gradient
            direction = gradient + config.momentum * velocity[name] if config.nesterov else velocity[name]
            if filters:
                p *= np.sqrt(len(p) / (p**2).sum())
                direction = by_decomposition(direction.reshape(len(p), -1)).reshape(p.shape)
            p -= rate * (config.muon_lr if filters else config.lr * (4 if name == "2.bias" else 1)) * direction
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.float(), rtol=1e-3, atol=1e-4, msg=name)
    assert torch.equal(ours[0].weight.cpu(), network()[0].weight)


@pytest.mark.parametrize("precision, capability, dtype", [
    ("auto", (8, 0), torch.bfloat16), ("auto", (7, 5), torch.float32), ("float32", (8, 0), torch.float32),
    ("float16", (8, 0), torch.float32),
])  # fmt: skip
def test_the_iterations_are_in_bfloat16_where_the_recipe_computes_in_it(precision, capability, dtype):
    with fake_cuda(capability):
        assert make_optimizer(network("cuda"), replace(MUON, precision=precision)).defaults["dtype"] == dtype


def test_a_step_of_float16_that_overflows_is_left_out_and_others_do_not_depend_on_the_scale(synthetic):
    config, weights = replace(MUON, precision="float16"), {}
    images, labels = (torch.from_numpy(values[:32]) for values in (synthetic[0].images, synthetic[0].labels))
    for scale in (2.0**4, 2.0**8, 2.0**60):
        with fake_cuda((7, 5)):
            model = network("cuda")
            optimizer, scaler = make_optimizer(model, config), torch.amp.GradScaler("cuda", init_scale=scale)
            for _ in range(2):
                train_step(model, images, labels, optimizer, scaler, config, torch.device("cuda"))
            weights[scale] = [p.detach().cpu() for p in model.parameters()]
            buffers = [optimizer.state[p]["momentum_buffer"] for p in convolution_filters(model)]
            assert len(buffers) == 2 and all(bool(b.cpu().any()) == (scale < 2.0**60) for b in buffers)
    for low, high, overflowed, first in zip(*weights.values(), network().parameters(), strict=True):
        assert torch.equal(overflowed, first)
        torch.testing.assert_close(low, high, rtol=0.02, atol=0.002)
        assert not first.requires_grad or not torch.equal(low, first)


def test_filters_that_start_at_zero_are_trained(synthetic):
    model = network()
    nn.init.zeros_(model[4].weight)
    images, labels = (torch.from_numpy(values[:32]) for values in (synthetic[0].images, synthetic[0].labels))
    train_step(model, images, labels, make_optimizer(model, MUON), make_scaler(MUON, CPU), MUON, CPU)
    assert model[4].weight.isfinite().all() and model[4].weight.any()


def test_a_closure_is_called_once_and_a_copy_takes_the_same_steps(synthetic):
    images = normalize(torch.from_numpy(synthetic[0].images[:32]), CPU)
    labels = torch.from_numpy(synthetic[0].labels[:32])
    one = network()
    two, (other, copied) = deepcopy(one), deepcopy((one, make_optimizer(one, MUON)))
    losses = []
    for model, optimizer in ((one, make_optimizer(one, MUON)), (two, make_optimizer(two, MUON)), (other, copied)):

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            losses.append(loss)
            return loss

        for _ in range(2):
            if model is one:
                closure()
                optimizer.step()
            else:
                assert optimizer.step(closure) is losses[-1]
    assert len(losses) == 6 and losses[0] != losses[1]
    for p, q, r in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_filters_are_those_of_convolutions_once_and_not_computed_ones():
    shared = nn.Conv1d(4, 4, 3)
    with_norm = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(with_norm, shared, shared, nn.Conv3d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3), nn.Linear(3, 3))
    model.append(nn.Conv2d(4, 4, 3, groups=2))
    assert [p.shape for p in convolution_filters(model)] == [(4, 4, 3), (2, 2, 3, 3, 3)]
    optimizer = make_optimizer(model, MUON)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert isinstance(optimizer, Muon) and {*parameters} == {*model.parameters()} and len(parameters) == 12


def test_bad_input_a_network_without_filters(synthetic, tmp_path):
    message = "optimizer is 'muon', but Linear has no trainable convolution filters: set optimizer='sgd'"
    with pytest.raises(ValueError, match=message):
        run_folder(Linear(), *synthetic, MUON, "cpu")
    with pytest.raises(ValueError, match=message):
        fit(Linear(), *synthetic, MUON, "cpu", tmp_path / "run")
    frozen = TinyNetwork()
    for p in convolution_filters(frozen):
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="TinyNetwork has no trainable convolution filters"):
        make_optimizer(frozen, MUON)
    assert not [*tmp_path.rglob("*.pt")]
