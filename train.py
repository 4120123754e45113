"""Train AdvancedCNN from the command line: `python train.py --recipe one_cycle --epochs 5 --data DIR`.

The run goes to runs/, where a repeated command resumes it. Several processes share the work under torchrun:
`torchrun --standalone --nproc-per-node=2 train.py --recipe one_cycle`.
"""

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import tyro

from model_AC import AdvancedCNN
from session8 import distributed
from session8.checkpoint import save_model
from session8.config import RECIPES, Config
from session8.data import CLASSES, DatasetUnavailable, load_cifar10, validation_split
from session8.records import describe_record, final_metrics, write_record
from session8.trainer import fit, run_folder
from session8.training import TrainingDiverged, accuracy_by_views

ROOT = Path(__file__).resolve().parent


def read_options(arguments=None, prog="train.py"):
    """Read the command line. Returns (options, config): the options of this script, and the recipe as a Config."""
    parser = argparse.ArgumentParser(prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES, default="default", help="the recipe, whose values follow")
    parser.add_argument("--data", help="folder with CIFAR-10; see `load_cifar10`")
    parser.add_argument("--device", help="cuda, mps or cpu; the first available if omitted")
    parser.add_argument("--validation", action="store_true", help="hold out 5,000 training images, and test on them")
    parser.add_argument("--allow-synthetic", action="store_true", help="without CIFAR-10, train on the stand-in")
    parser.add_argument("--expect-folder", help="exit unless this is the folder of the run")
    options, rest = parser.parse_known_args(arguments)
    only_epochs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_epochs.add_argument("--epochs", type=int, default=argparse.SUPPRESS)
    recipe = Config.named(options.recipe, **vars(only_epochs.parse_known_args(rest)[0]))
    try:
        return options, tyro.cli(Config, prog=prog, description=parser.format_help(), default=recipe, args=rest)
    except ValueError as error:  # a value out of range, which older releases of tyro pass on
        parser.error(str(error))


def run(make_model, options, config, device, runs=ROOT / "runs"):
    """Train the network that `make_model(config)` returns, and return the record; None on the ranks other than 0.

    Weights and record are written to the run's folder. Exits with a message, before training, if an option is not
    possible, and if training is interrupted.
    """
    with distributed.raise_together():
        try:
            splits = load_cifar10(options.data, options.allow_synthetic)
            splits = validation_split(splits[0]) if options.validation else splits
        except (DatasetUnavailable, ValueError) as error:
            sys.exit(str(error))
        torch.manual_seed(config.seed)
        model = make_model(config)
        folder = run_folder(model, *splits, config, device, runs)
        if options.expect_folder and Path(options.expect_folder).resolve() != folder.resolve():
            sys.exit(
                f"the run's folder is '{folder}', not '{options.expect_folder}': network, data, device type or code "
                "differ from those of the program that expects it"
            )
    history = fit(model, *splits, config, device, checkpoint_dir=folder)
    if len(history["seconds"]) < config.epochs:
        sys.exit("Interrupted: run the same command again to resume." if distributed.rank() == 0 else 1)
    if distributed.rank() > 0:
        return None
    views = accuracy_by_views(model, splits[1], config, device)
    record = write_record(folder / "record.json", model, *splits, config, history, device, views)
    save_model(folder / "model.safetensors", model, config, final_metrics(record), CLASSES)
    print(f"{describe_record(record)}\nRecord and weights: {folder}")
    return record


def main(make_model=lambda config: AdvancedCNN(dropout=config.dropout, width=config.width)):
    """Train as the command line says. Exits with status 1 and a message if it is not possible or was interrupted."""
    options, config = read_options()
    try:
        with ExitStack() as stack:
            try:
                device = stack.enter_context(distributed.process_group(options.device))
            except ValueError as error:
                sys.exit(str(error))
            run(make_model, options, config, device)
    except (distributed.RankError, TrainingDiverged) as error:  # the same on every rank: rank 0 reports it
        message = "\n".join([str(error), *getattr(error, "__notes__", [])])
        sys.exit(message if os.environ.get("RANK", "0") == "0" else 1)


if __name__ == "__main__":
    main()
