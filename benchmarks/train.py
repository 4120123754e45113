"""Train a network and publish its record: `python benchmarks/train.py AdvancedCNN one_cycle --seeds 0`.

The same `fit` that the notebook calls, at batch size 128 on every device. Run again after a cut, it goes on from the
last checkpoint in runs/, where the weights and the record are left as well. A run of 40 epochs on all of CIFAR-10 is
published: its record is copied to results/.
"""

import shutil
import sys
from pathlib import Path

import torch
from common import ROOT, make_parser, real_splits
from resnet20 import ResNet20

from model_AC import AdvancedCNN
from session8 import training as utils

PUBLISHED = 40, 128, 50_000, 10_000  # epochs, batch size, training and test images of a run that is published
NETWORKS = {
    "AdvancedCNN": lambda config: AdvancedCNN(dropout=config.dropout),
    "ResNet20": lambda config: ResNet20(),  # which has no dropout
}


def record_path(results, network, recipe, seed, device):
    """Where the record of a run of the network of that name is published."""
    return Path(results) / f"{network}_{recipe}_seed{seed}_{device.type}.json"


def run(network, config, train_split, test_split, device, runs):
    """Train the network of that name as `config` says, in a folder of its own in `runs`.

    Returns that folder, in which its checkpoints, weights and record lie; None when training was interrupted.
    """
    torch.manual_seed(config.seed)
    model = NETWORKS[network](config)
    folder = utils.run_folder(model, train_split, test_split, config, device, runs)
    history = utils.fit(model, train_split, test_split, config, device, folder)
    if len(history["seconds"]) < config.epochs:
        return None
    metrics = {name: values[-1] for name, values in history.items()}
    utils.save_model(folder / "model.pt", model, config, metrics, utils.CLASSES)
    record = utils.write_record(folder / "record.json", model, train_split, test_split, config, history, device)
    print(utils.describe_record(record))
    return folder


def main(results=ROOT / "results", runs=ROOT / "runs"):
    parser = make_parser(__doc__.splitlines()[0], epochs=40, batch_size=128, seeds=[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("recipe", choices=utils.RECIPES)
    parser.add_argument("--replace", action="store_true", help="publish in place of a record that is there already")
    options = parser.parse_args()
    splits = real_splits(options)
    sizes = options.epochs, options.batch_size, *map(len, splits)
    published = sizes == PUBLISHED
    paths = {
        seed: record_path(results, options.network, options.recipe, seed, options.device) for seed in options.seeds
    }
    if published and not options.replace and (there := [str(path) for path in paths.values() if path.exists()]):
        sys.exit(f"There is a record already: {', '.join(there)}. Name another seed, or say --replace.")
    for seed, path in paths.items():
        config = utils.Config.named(options.recipe, epochs=options.epochs, batch_size=options.batch_size, seed=seed)
        folder = run(options.network, config, *splits, options.device, runs)
        if folder is None:
            sys.exit("Interrupted: nothing is published. Run again to go on.")
        if published:
            shutil.copyfile(folder / "record.json", path)
            if (weights := path.with_suffix(".pt")).exists():  # published with the record that is replaced
                shutil.copyfile(folder / "model.pt", weights)
        print(f"Record: {path if published else folder / 'record.json'}")


if __name__ == "__main__":
    main()
