"""Train AdvancedCNN from the command line: `python train.py --recipe one_cycle --epochs 5 --data DIR`.

The run goes to runs/, where a repeated command resumes it.
"""

import argparse
import sys
from pathlib import Path

import torch
import tyro

from model_AC import AdvancedCNN
from session8.checkpoint import save_model
from session8.config import RECIPES, Config
from session8.data import CLASSES, DatasetUnavailable, load_cifar10
from session8.device import get_device
from session8.records import describe_record, write_record
from session8.training import fit, run_folder

ROOT = Path(__file__).resolve().parent


def read_options(arguments=None, prog="train.py"):
    """Read the command line. Returns (options, config): the options of this script, and the recipe as a Config."""
    parser = argparse.ArgumentParser(prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES, default="default", help="the recipe, whose values follow")
    parser.add_argument("--data", help="folder with CIFAR-10; see `load_cifar10`")
    parser.add_argument("--device", help="cuda, mps or cpu; the first available if omitted")
    parser.add_argument("--publish", action="store_true", help="also write the record to results/")
    options, rest = parser.parse_known_args(arguments)
    recipe = Config.named(options.recipe)
    try:
        return options, tyro.cli(Config, prog=prog, description=parser.format_help(), default=recipe, args=rest)
    except ValueError as error:  # a value out of range, which older releases of tyro pass on
        parser.error(str(error))


def run(make_model, options, config, runs=ROOT / "runs", results=ROOT / "results"):
    """Train the network that `make_model(config)` returns. Returns its record, or None if training was interrupted.

    Weights and record are written to the run's folder; with --publish, the record also to `results`. Exits with a
    message if the data or the device are not available, or if the record is published already.
    """
    try:
        device = get_device(options.device)
        splits = load_cifar10(options.data)
    except (DatasetUnavailable, ValueError) as error:
        sys.exit(str(error))
    torch.manual_seed(config.seed)
    model = make_model(config)
    published = Path(results) / f"{type(model).__name__}_{options.recipe}_seed{config.seed}_{device.type}.json"
    if options.publish and published.exists():
        sys.exit(f"'{published}' exists: choose another seed, or delete it to replace it")
    free = {name: getattr(config, name) for name in ("epochs", "batch_size", "precision", "seed")}
    if options.publish and config != Config.named(options.recipe, **free):
        sys.exit(f"--publish is for the recipe {options.recipe!r} as it is; only {', '.join(free)} may differ")
    folder = run_folder(model, *splits, config, device, runs)
    history = fit(model, *splits, config, device, checkpoint_dir=folder)
    if len(history["seconds"]) < config.epochs:
        return None
    metrics = {name: values[-1] for name, values in history.items() if name != "parts"}
    save_model(folder / "model.safetensors", model, config, metrics, CLASSES)
    record = write_record(folder / "record.json", model, *splits, config, history, device)
    if options.publish:
        write_record(published, model, *splits, config, history, device)
    print(f"{describe_record(record)}\nRecord and weights: {folder}")
    return record


def main(make_model=lambda config: AdvancedCNN(dropout=config.dropout)):
    """Train as the command line says; exits with status 1 if training was interrupted."""
    options, config = read_options()
    if run(make_model, options, config) is None:
        sys.exit("Interrupted: run the same command again to resume.")


if __name__ == "__main__":
    main()
