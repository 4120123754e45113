"""evaluate.py: saved weights are tested as they were after training."""

import json
import re

import pytest
import torch
from fakes import class_folders
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from session8.evaluate import evaluate, main

from model_AC import AdvancedCNN
from session8 import training
from session8.checkpoint import load_model, save_model
from session8.config import Config
from session8.data import CLASSES, load_cifar10
from session8.loaders import make_loader
from session8.training import VIEWS

CONFIG = Config(precision="float32")


@pytest.fixture
def images(tmp_path):
    class_folders(tmp_path / "images", per_test=5)
    return tmp_path / "images"


@pytest.fixture
def saved(tmp_path, images):
    """Return the path of saved weights and their accuracies by views, which the file states."""
    torch.manual_seed(0)
    model = AdvancedCNN(width=0.5)
    loader = make_loader(load_cifar10(images)[1], 10, train=False)
    accuracies = {views: training.test(model, loader, CONFIG, "cpu", views)[1] for views in VIEWS}
    metrics = {"test_accuracy": accuracies[1], **{f"test_accuracy_{n}_views": accuracies[n] for n in (2, 6)}}
    save_model(tmp_path / "weights.safetensors", model, CONFIG, metrics, CLASSES)
    return tmp_path / "weights.safetensors", accuracies


def test_a_wrong_option_has_status_2(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "__doc__", None)  # as with python -OO
    for arguments in (["weights", "--device", "tpu"], ["weights", "--views", "3"], []):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    assert "error: device is 'tpu', which is unknown; available: " in capsys.readouterr().err


def test_saved_weights_have_the_accuracies_that_they_had(saved, images, capsys):
    path, accuracies = saved
    assert evaluate(path, images, "cpu") == (accuracies, accuracies)
    assert "50 images, float32" in capsys.readouterr().out


def test_a_difference_from_what_the_file_states_is_shown(saved, images, capsys):
    path, accuracies = saved
    model, about = load_model(path)
    metrics = {**about["metrics"], "test_accuracy_2_views": accuracies[2] + 4}
    save_model(path, model, CONFIG, metrics, CLASSES)
    main([str(path), "--data", str(images), "--device", "cpu"])
    log = capsys.readouterr().out
    assert f"Views: 1, stated: {accuracies[1]:.2f} %, measured minus stated: +0.00" in log
    assert f"Views: 2, stated: {accuracies[2] + 4:.2f} %, measured minus stated: -4.00" in log


def test_weights_without_stated_accuracies(tmp_path, images, capsys):
    save_model(tmp_path / "weights.safetensors", AdvancedCNN(width=0.5), CONFIG, {}, CLASSES)
    main([str(tmp_path / "weights.safetensors"), "--data", str(images)])
    log = capsys.readouterr().out
    assert "Test set, 6 views" in log and "minus" not in log


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.safetensors"], "'missing.safetensors' does not exist"),
        (["{weights}", "--data", "nowhere"], "nowhere"),
        (["{damaged}", "--data", "{images}"], "is not a safetensors file, or is damaged"),
        (["{newer}", "--data", "{images}"], "states a recipe that this version cannot read"),
    ],
)
def test_bad_input_is_one_message(arguments, message, saved, images, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(saved[0].read_bytes()[:100])
    newer, tensors = tmp_path / "newer.safetensors", load_file(saved[0])
    with safe_open(saved[0], "pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), "future": 7})
    save_file(tensors, newer, metadata)
    paths = {"weights": saved[0], "images": images, "damaged": damaged, "newer": newer}
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        main([argument.format(**paths) for argument in arguments])
    assert isinstance(error.value.code, str)
