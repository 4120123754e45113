"""Training and testing: one step, one epoch, one pass over the test images."""

import numpy as np
import pytest
import torch
from networks import CPU, EXACT, Linear, small_network
from session8.trainer import fit

from model_AC import AdvancedCNN
from session8 import training
from session8.augment import normalize, train_transforms
from session8.config import Config
from session8.data import Split
from session8.inference import predict
from session8.loaders import make_loader
from session8.training import collect_logits

# -- one step ------------------------------------------------------------------------------------------------------


def test_the_default_optimizer_is_the_seed_projects():
    optimizer = training.make_optimizer(AdvancedCNN(), Config())
    assert type(optimizer) is torch.optim.SGD
    assert all(g["lr"] == 0.01 and g["momentum"] == 0.9 and g["weight_decay"] == 0 for g in optimizer.param_groups)


def test_weight_decay_is_on_weights_only():
    optimizer = training.make_optimizer(AdvancedCNN(), Config.named("one_cycle"))
    decayed, spared, biases = optimizer.param_groups
    assert decayed["weight_decay"] == 5e-4 and spared["weight_decay"] == biases["weight_decay"] == 0
    assert decayed["nesterov"] and spared["nesterov"]
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in [*spared["params"], *biases["params"]]} == {1}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(AdvancedCNN().parameters()))


def test_batch_norms_biases_are_a_group_of_their_own_if_their_rate_is_scaled(synthetic, monkeypatch):
    model = AdvancedCNN(width=0.5)
    *_, biases = training.make_optimizer(model, Config(bias_lr_scale=16.0)).param_groups
    named = {id(p) for name, p in model.named_parameters() if name.endswith(".bias") and p.ndim == 1}
    named -= {id(model.stem[0].bias), id(model.head.bias)}
    assert {id(p) for p in biases["params"]} == named and len(named) == 9 and biases["weight_decay"] == 0
    rates, step = [], training.train_step

    def watched(model, images, labels, optimizer, *rest):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(model, images, labels, optimizer, *rest)

    monkeypatch.setattr(training, "train_step", watched)
    fit(small_network(), *synthetic, Config(epochs=1, batch_size=150, lr=0.001, bias_lr_scale=16.0), "cpu")
    assert rates == [pytest.approx([0.001, 0.001, 0.016])] * 2


def test_images_are_scaled_down_with_antialiasing():
    images = torch.rand(2, 3, 32, 32)
    assert training.scale_down(images, 32) is images
    small = training.scale_down(images, 16)
    # A triangle of width 4 around each pixel's centre, as Pillow's: weights 1, 3, 3, 1 of 8 in each direction.
    weights = torch.tensor([1.0, 3, 3, 1]) / 8
    rows = images[:, :, 9:13, 9:13]  # around pixel 5 of the small image
    torch.testing.assert_close(small[:, :, 5, 5], torch.einsum("bcij,i,j->bc", rows, weights, weights))


def test_a_step_in_float16_equals_one_in_float32_up_to_rounding(synthetic, monkeypatch):
    """The CPU computes in float16 too, slowly: what GPUs without bfloat16 use."""
    images, labels = torch.from_numpy(synthetic[0].images[:32]), torch.from_numpy(synthetic[0].labels[:32])
    config, weights, types = Config(lr=0.5, momentum=0), [], []
    for dtype in (torch.float32, torch.float16):
        for module in ("session8.device", "session8.training"):
            half = dtype if dtype is torch.float16 else None
            monkeypatch.setattr(f"{module}.amp_dtype", lambda *_, half=half: half)
        model, scaler = Linear(), training.make_scaler(config, CPU)
        assert scaler.is_enabled() == (dtype is torch.float16)
        model.head.register_forward_hook(lambda _, __, output: types.append(output.dtype))
        nll, _ = training.train_step(model, images, labels, training.make_optimizer(model, config), scaler, config, CPU)
        assert nll.dtype == torch.float32
        training.test(model, make_loader(synthetic[1], 100, train=False), config, CPU)
        weights.append(model.head.weight.detach() - Linear().head.weight.detach())
    assert types == [torch.float32] * 2 + [torch.float16] * 2
    largest = weights[0].abs().max()
    assert largest > 0.01
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0.01 * largest.item())


def test_label_smoothing_is_the_cross_entropy_with_smoothed_targets(synthetic, device):
    images, labels = torch.from_numpy(synthetic[0].images[:32]), torch.from_numpy(synthetic[0].labels[:32])
    config = Config(lr=0.5, momentum=0, label_smoothing=0.3, precision="float32")
    ours, other = Linear().to(device), Linear()
    scaler = training.make_scaler(config, device)
    nll, _ = training.train_step(ours, images, labels, training.make_optimizer(ours, config), scaler, config, device)
    scores = other.head(normalize(images, CPU).flatten(1))
    torch.nn.functional.cross_entropy(scores, labels, label_smoothing=0.3).backward()
    expected = other.head.weight - 0.5 * other.head.weight.grad
    torch.testing.assert_close(ours.head.weight.cpu(), expected)
    torch.testing.assert_close(nll.cpu(), torch.nn.functional.cross_entropy(scores, labels))  # without smoothing


def test_one_batch_can_be_overfitted(synthetic):
    torch.manual_seed(0)
    model, config = AdvancedCNN(width=0.5, dropout=0), Config(lr=0.05, precision="float32")
    images, labels = torch.from_numpy(synthetic[0].images[:32]), torch.from_numpy(synthetic[0].labels[:32])
    optimizer, scaler = training.make_optimizer(model, config), torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(30):
        nll, hits = training.train_step(model, images, labels, optimizer, scaler, config, CPU)
    assert nll < 0.05 and hits == 32


# -- one epoch -----------------------------------------------------------------------------------------------------


def test_the_results_of_training_agree_with_an_independent_computation(synthetic, device):
    split = Split(synthetic[0].images[:70], synthetic[0].labels[:70], "70 images: the last batch of 32 is partial")
    model, loader = Linear().to(device), make_loader(split, 32, seed=4, device=device)
    standing_still = Config(epochs=1, lr=1e-30, momentum=0, precision="float32")
    optimizer = training.make_optimizer(model, standing_still)
    loss, accuracy = training.train(model, loader, optimizer, standing_still, device)
    images, labels = (torch.cat(part).cpu().numpy() for part in zip(*loader, strict=True))
    model = model.cpu()
    log_probs = model.by_hand(images)
    nll = -log_probs[np.arange(70), labels]
    assert loss == pytest.approx(nll.mean(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (log_probs.argmax(1) == labels).mean())
    of_batches = np.mean([nll[:32].mean(), nll[32:64].mean(), nll[64:].mean()])
    assert loss != pytest.approx(of_batches, rel=1e-4)  # the usual mistake would be noticed


def test_the_results_of_testing_agree_with_an_independent_computation(synthetic, device):
    test_split, model = synthetic[1], Linear().to(device)
    loss, accuracy = training.test(model, make_loader(test_split, 32, train=False, device=device), EXACT, device)
    log_probs = Linear().by_hand(test_split.images)
    assert loss == pytest.approx(-log_probs[np.arange(100), test_split.labels].mean(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (log_probs.argmax(1) == test_split.labels).mean())


def test_collected_logits_agree_with_an_independent_computation(synthetic, device):
    test_split = synthetic[1]
    logits = collect_logits(Linear(), test_split, EXACT, device)
    assert logits.dtype == torch.float32 and logits.shape == (100, 10)
    np.testing.assert_allclose(logits.numpy(), Linear().by_hand(test_split.images), atol=1e-4)
    network = small_network().train()  # dropout and batch norm must behave as in testing
    logits = collect_logits(network, test_split, EXACT, device)
    with torch.no_grad():
        expected = network.cpu().eval()(normalize(torch.from_numpy(test_split.images), CPU))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def shifted(images, rows, columns):
    """Shift images (N, 32, 32, 3) by up to one pixel, with a reflected border."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    return padded[:, 1 - rows : 33 - rows, 1 - columns : 33 - columns]


@pytest.mark.parametrize("views", [2, 6])
def test_views_are_the_mean_probability_of_the_image_its_mirror_image_and_shifts(synthetic, views, capsys, device):
    test_split, model = synthetic[1], Linear()
    images = [test_split.images]
    if views == 6:
        images += [shifted(test_split.images, -1, -1), shifted(test_split.images, 1, 1)]
    images += [view[:, :, ::-1] for view in images]
    assert len(images) == views
    probabilities = np.mean([np.exp(model.by_hand(view)) for view in images], axis=0)
    logits = collect_logits(Linear(), test_split, EXACT, device, views=views)
    np.testing.assert_allclose(logits.exp().numpy(), probabilities, atol=2e-5)
    assert not np.allclose(probabilities, np.exp(model.by_hand(test_split.images)), atol=1e-2)
    loader = make_loader(test_split, 32, train=False, device=device)
    loss, accuracy = training.test(Linear().to(device), loader, EXACT, device, views=views)
    assert loss == pytest.approx(-np.log(probabilities[np.arange(100), test_split.labels]).mean(), rel=1e-4)
    assert accuracy == pytest.approx(100 * (probabilities.argmax(1) == test_split.labels).mean())
    assert f"Test set, {views} views: Average loss: {loss:.4f}" in capsys.readouterr().out


def test_accuracies_by_views_are_those_of_each_test(synthetic):
    model = small_network()
    loader = make_loader(synthetic[1], 32, train=False)
    expected = {views: training.test(model, loader, EXACT, CPU, views=views)[1] for views in (2, 6)}
    assert training.accuracy_by_views(model.train(), synthetic[1], EXACT, "cpu") == expected


def test_views_of_a_network_with_logits_are_averaged_as_probabilities(synthetic):
    class Scores(Linear):
        def forward(self, x):
            return 3 + self.head(x.flatten(1))

    one, other = (collect_logits(network, synthetic[1], EXACT, "cpu", views=2) for network in (Linear(), Scores()))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("views", [0, 3, 12, "6", None])
def test_bad_input_views(synthetic, views):
    message = f"views is {views!r}; expected one of 1, 2, 6"
    for call in (
        lambda: training.test(Linear(), make_loader(synthetic[1], 32, train=False), EXACT, CPU, views=views),
        lambda: collect_logits(Linear(), synthetic[1], EXACT, "cpu", views=views),
        lambda: predict(Linear(), synthetic[1].images[0], device="cpu", views=views),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_each_step_uses_the_rate_at_its_middle_and_each_epoch_has_batches_of_its_own(synthetic, monkeypatch):
    rates, batches, step = [], [], training.train_step

    def watched(model, images, labels, optimizer, *rest):
        rates.extend({group["lr"] for group in optimizer.param_groups})
        batches.append(images)
        return step(model, images, labels, optimizer, *rest)

    monkeypatch.setattr(training, "train_step", watched)
    config = Config(schedule="one_cycle", epochs=2, batch_size=100, cutout=8, seed=7)
    fit(Linear(), *synthetic, config, "cpu")
    # 3 steps per epoch, 6 in all: the middle of step k is at (k + 1/2) / 6, and the peak at 1/4.
    middles = [(k + 0.5) / 6 for k in range(6)]
    assert rates == pytest.approx([0.01 * min(m / 0.25, (1 - m) / 0.75) for m in middles])
    assert min(rates) > 0  # a first step at a rate of 0 would do nothing
    loader = make_loader(synthetic[0], 100, seed=7, transform=train_transforms(config.cutout))
    for epoch, part in enumerate((batches[:3], batches[3:])):
        loader.set_epoch(epoch)
        assert all(torch.equal(one, other) for one, (other, _) in zip(part, loader, strict=True))
    assert not torch.equal(batches[0], batches[3])
