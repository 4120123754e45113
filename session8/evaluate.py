"""Test saved weights: `python -m session8.evaluate results/NAME.safetensors --data DIR`."""

import argparse

from session8.checkpoint import CheckpointError, load_model
from session8.config import Config
from session8.console import command_line, plural
from session8.data import load_cifar10
from session8.device import arithmetic, get_device
from session8.records import views_metric
from session8.training import VIEWS, accuracy_by_views


def evaluate(path, data=None, device=None):
    """Test the AdvancedCNN in a file of weights on CIFAR-10 with 1, 2 and 6 views, and compare with what it states.

    The precision is that of the recipe in the file. If it is "auto", the device decides: without bfloat16 in hardware,
    a CUDA GPU (a T4, for instance) computes in float16, other devices in float32, and a few images may change their
    class.

    data: folder with CIFAR-10, as in `load_cifar10`. Returns ({views: measured}, {views: stated in the file}), both in
    percent correct. Raises CheckpointError or FileNotFoundError as `load_model` does, DatasetUnavailable as
    `load_cifar10` does, and ValueError for a device that is not available.
    """
    device = get_device(device)
    model, about = load_model(path)
    try:
        config = Config(**about["config"])
    except TypeError as error:
        raise CheckpointError(f"'{path}' states a recipe that this version cannot read: {error}") from error
    _, split = load_cifar10(data)
    print(f"Testing '{path}' on {split.source}: {plural(len(split), 'image')}, {arithmetic(config.precision, device)}")
    measured = accuracy_by_views(model, split, config, device, VIEWS)
    metrics = about["metrics"]
    return measured, {views: metrics[views_metric(views)] for views in VIEWS if views_metric(views) in metrics}


def main(arguments=None):
    """Print the accuracies of a file of weights, and their differences from those it states."""
    parser = argparse.ArgumentParser(
        prog="python -m session8.evaluate",
        description="Test the AdvancedCNN in a file of weights on CIFAR-10, and compare with what the file states.",
    )
    parser.add_argument("weights", help="a file that `save_model` wrote")
    parser.add_argument("--data", help="folder with CIFAR-10; see `load_cifar10`")
    parser.add_argument("--device", help="cuda, mps or cpu; the first available if omitted")
    with command_line(CheckpointError):
        options = parser.parse_args(arguments)
        try:
            device = get_device(options.device)
        except ValueError as error:
            parser.error(str(error))
        measured, stated = evaluate(options.weights, options.data, device)
        for views, accuracy in stated.items():
            print(f"Views: {views}, stated: {accuracy:.2f} %, measured minus stated: {measured[views] - accuracy:+.2f}")


if __name__ == "__main__":
    main()
