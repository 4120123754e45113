"""Train a network and publish its record: `python benchmarks/train.py AdvancedCNN one_cycle --seed 0`.

The same `fit` that the notebook calls, at batch size 128 on every device. Run again after a cut, it goes on from the
last checkpoint in runs/. In the end the record lies in results/ and the weights in runs/.
"""

from pathlib import Path

import torch
from common import ROOT, make_parser, real_images
from resnet20 import ResNet20

import utils
from model_AC import AdvancedCNN

NETWORKS = {network.__name__: network for network in (AdvancedCNN, ResNet20)}


def publish(network, config, train_split, test_split, device, runs, results):
    """Train `network`, a class, as `config` says, with checkpoints in the folder `runs`.

    Writes the record to the folder `results` and returns it; None, and nothing is written, when training was
    interrupted.
    """
    torch.manual_seed(config.seed)
    model = network()
    folder = utils.run_folder(model, train_split, test_split, config, device, runs)
    history = utils.fit(model, train_split, test_split, config, device, folder)
    if len(history["seconds"]) < config.epochs:
        return None
    metrics = {name: values[-1] for name, values in history.items()}
    utils.save_model(folder / "model.pt", model, config, metrics, utils.CLASSES)
    recipe = "default" if config.schedule == "constant" else config.schedule
    name = f"{network.__name__}_{recipe}_seed{config.seed}_{device.type}.json"
    return utils.write_record(Path(results) / name, model, train_split, test_split, config, history, device)


def main():
    parser = make_parser(__doc__.splitlines()[0], epochs=40, batch_size=128)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("recipe", choices=("default", "one_cycle"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each, one after the other")
    options = parser.parse_args()
    splits = real_images(options)
    for seed in options.seeds:
        config = utils.Config.named(options.recipe, epochs=options.epochs, batch_size=options.batch_size, seed=seed)
        record = publish(NETWORKS[options.network], config, *splits, options.device, ROOT / "runs", ROOT / "results")
        print(utils.describe_record(record) if record else "Interrupted: nothing is published. Run again to go on.")


if __name__ == "__main__":
    main()
