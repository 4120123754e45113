"""AdvancedCNN: its stem, blocks, size and arguments."""

import pytest
import torch
from torch import nn

from model_AC import STEM_STD, AdvancedCNN
from session8.augment import normalize
from session8.network import count_macs


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AdvancedCNN()


@pytest.mark.parametrize("classes, width", [(10, 1.0), (2, 0.5), (100, 0.5)])
def test_returns_log_probabilities_of_each_class(classes, width):
    log_probs = AdvancedCNN(num_classes=classes, width=width)(torch.randn(4, 3, 32, 32))
    assert log_probs.shape == (4, classes) and log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(4))


def test_every_parameter_but_the_fixed_stem_gets_a_gradient(model):
    nn.functional.nll_loss(model(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == ["stem.0.weight"]


def test_the_stem_whitens_the_patches_of_real_images(model, real_splits):
    images = normalize(torch.from_numpy(real_splits[0].images[::25]), torch.device("cpu"))
    # The filters 0 to 11, without the bias, on every patch; 12 to 23 are the same turned around.
    responses = nn.functional.conv2d(images, model.stem[0].weight)
    assert torch.equal(responses[:, 12:], -responses[:, :12])
    flat = responses[:, :12].transpose(0, 1).flatten(1).double()
    variances = flat.square().mean(1)
    measured = torch.tensor(STEM_STD).flatten().double().square()
    torch.testing.assert_close(variances, measured / (measured + 5e-4), rtol=0.1, atol=0)
    assert variances.max() < 1.1 and variances.min() > 0.5  # of the raw pixels, the ratio is above a thousand
    assert (torch.corrcoef(flat) - torch.eye(12)).abs().max() < 0.35  # of the 12 values of a patch, 0.99


def test_convolutions_start_as_the_identity(model):
    for in_channels, block in zip((24, 32, 96), model.blocks, strict=True):
        first, *others = (layer for layer in block.modules() if isinstance(layer, nn.Conv2d))
        x = torch.randn(2, in_channels, 9, 9)
        torch.testing.assert_close(first(x)[:, :in_channels], x)
        assert first.weight[in_channels:].std() > 0.01  # the rest is random
        y = torch.randn(2, first.out_channels, 9, 9)
        for convolution in others:
            torch.testing.assert_close(convolution(y), y)


def test_a_block_has_a_shortcut_around_its_residual_branch(model):
    block, x = model.blocks[1].eval(), torch.randn(2, 32, 15, 15)
    nn.init.zeros_(block.residual[-1].weight)  # the last batch norm: nothing is added
    torch.testing.assert_close(block(x), nn.functional.gelu(block.downsample(x)))


def test_evaluation_is_deterministic_and_training_drops_out_at_each_place():
    images, model = torch.randn(4, 3, 32, 32), AdvancedCNN(dropout=0.5, width=0.5)
    assert model.dropout.p == 0.5 and [block.dropout.p for block in model.blocks] == [0.25] * 3
    places = [model.dropout, *(block.dropout for block in model.blocks)]
    for place in places:
        for other in places:
            other.p = 0.5 * (other is place)
        assert not torch.equal(model.train()(images), model(images))
        assert torch.equal(model.eval()(images), model(images))


def test_stays_within_its_budget_and_width_scales_it(model):
    assert count_macs(model) <= 42e6 and sum(p.numel() for p in model.parameters()) <= 1.3e6
    assert count_macs(AdvancedCNN(width=0.5)) < 0.4 * count_macs(model)


def test_the_last_grid_sees_the_whole_image(model):
    # The docstring's table says a receptive field of 79 pixels: more than the image is wide.
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    grid = image
    for module in model.modules():  # in the order of the image's way; the shortcuts see less
        if isinstance(module, nn.Conv2d):
            averaging = torch.full_like(module.weight, 1 / module.weight[0].numel())
            grid = nn.functional.conv2d(grid, averaging, padding=module.padding)
        elif isinstance(module, nn.MaxPool2d):
            grid = nn.functional.avg_pool2d(grid, module.kernel_size)
    assert grid.shape[2:] == (3, 3)
    for position in range(3):
        (gradient,) = torch.autograd.grad(grid[0, 0, position, position], image, retain_graph=True)
        assert (gradient[0, 0] > 0).float().mean() > (0.85 if position == 0 else 0.999)


def test_the_arguments_recreate_the_network():
    model = AdvancedCNN(num_classes=7, dropout=0.3, width=0.5)
    copy = AdvancedCNN(**model.arguments)
    assert copy.load_state_dict(model.state_dict()) and copy.dropout.p == 0.3 and copy.width == 0.5


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"num_classes": 1}, "num_classes is 1; expected at least 2"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 <= dropout < 1"),
        ({"dropout": -0.1}, "dropout is -0.1; expected 0 <= dropout < 1"),
        ({"width": 0}, "width is 0; expected a positive number"),
    ],
)
def test_bad_input_arguments(wrong, words):
    with pytest.raises(ValueError, match=words):
        AdvancedCNN(**wrong)
