"""hubconf.py: the network by torch.hub."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

import hubconf
from session8.config import Config

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("weights", hubconf.WEIGHTS)
def test_torch_hub_loads_the_published_weights(weights):
    model = torch.hub.load(str(ROOT), "advanced_cnn", weights=weights, source="local")
    recipe = Config.named(weights)
    assert model.width == recipe.width and not model.training
    (path,) = (ROOT / "results").glob(f"AdvancedCNN_{weights}_seed0_*.safetensors")
    saved = safetensors.torch.load_file(path)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_torch_hub_lists_one_entry():
    assert [name for name, value in vars(hubconf).items() if callable(value) and name[0] != "_"] == ["advanced_cnn"]


def test_torch_hub_makes_a_new_network():
    model = torch.hub.load(str(ROOT), "advanced_cnn", source="local", num_classes=7, width=0.5)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7) and model.width == 0.5


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"weights": "best"}, "weights is 'best'; expected one of 'fast', 'accurate', or None"),
        ({"weights": "fast", "width": 2.0}, "weights='fast' fixes the network: leave out width"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        hubconf.advanced_cnn(**arguments)
