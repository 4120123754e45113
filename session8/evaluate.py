"""Test saved weights: `python -m session8.evaluate results/NAME.safetensors --data DIR`."""

import argparse
import sys

from session8.checkpoint import CheckpointError, load_model
from session8.config import Config
from session8.data import DatasetUnavailable, load_cifar10
from session8.device import arithmetic, get_device
from session8.loaders import make_loader
from session8.training import TEST_BATCH_SIZE, VIEWS, test


def evaluate(path, data=None, device=None):
    """Test the AdvancedCNN in a file of weights on the test images of CIFAR-10, with 1, 2 and 6 views, and print both
    these accuracies and those that the file states.

    The arithmetic is that of the recipe in the file, on this device. data: folder with CIFAR-10, as in `load_cifar10`.

    Returns {views: percent correct}. Raises CheckpointError or FileNotFoundError as `load_model` does,
    DatasetUnavailable as `load_cifar10` does, and ValueError for a device that is not available.
    """
    device = get_device(device)
    model, about = load_model(path)
    _, split = load_cifar10(data)
    config = Config(**about["config"])
    model.to(device)
    print(f"Testing '{path}' on {split.source}: {len(split):,} images, {arithmetic(config.precision, device)}")
    loader = make_loader(split, TEST_BATCH_SIZE, train=False, device=device)
    accuracies = {views: test(model, loader, config, device, views)[1] for views in VIEWS}
    names = {"test_accuracy": "1 view", **{f"test_accuracy_{views}_views": f"{views} views" for views in VIEWS[1:]}}
    stated = [f"{about['metrics'][name]:.2f} % ({views})" for name, views in names.items() if name in about["metrics"]]
    print(f"The file states {', '.join(stated)}." if stated else "The file states no test accuracy.")
    return accuracies


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m session8.evaluate", description=evaluate.__doc__.split("\n\n")[0])
    parser.add_argument("weights", help="a file that `save_model` wrote")
    parser.add_argument("--data", help="folder with CIFAR-10; see `load_cifar10`")
    parser.add_argument("--device", help="cuda, mps or cpu; the first available if omitted")
    options = parser.parse_args(arguments)
    try:
        evaluate(options.weights, options.data, options.device)
    except (CheckpointError, DatasetUnavailable, OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
