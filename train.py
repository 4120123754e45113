"""Train AdvancedCNN from the command line: `python train.py --recipe one_cycle --epochs 5 --data DIR`.

The run goes to runs/, where a repeated command resumes it. Several processes share the work under torchrun:
`torchrun --standalone --nproc-per-node=2 train.py --recipe one_cycle`.
"""

import argparse
import os
import signal
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

if __name__ == "__main__":
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:  # a background job ignores the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: end without a traceback

import torch

from model_AC import AdvancedCNN
from session8 import distributed
from session8.checkpoint import CheckpointError, save_model
from session8.config import RECIPES, Config
from session8.console import command_line, is_first_rank
from session8.data import CLASSES, load_cifar10, validation_split
from session8.device import get_device
from session8.records import describe_record, final_metrics, write_record
from session8.trainer import fit, run_folder
from session8.training import TrainingDiverged, accuracy_by_views

ROOT = Path(__file__).resolve().parent


def read_options(arguments=None, prog="train.py"):
    """Read the command line. Returns (options, config): the options of this script, and the recipe as a Config.

    Exits with status 2 and a message if an option is wrong.
    """
    try:
        import tyro  # here, since notebooks do without it
    except ImportError:
        sys.exit(f"{prog} needs tyro, which is not installed: pip install tyro")
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
    try:
        get_device(options.device)
        recipe = Config.named(options.recipe, **vars(only_epochs.parse_known_args(rest)[0]))
        return options, tyro.cli(Config, prog=prog, description=parser.format_help(), default=recipe, args=rest)
    except ValueError as error:  # a value out of range
        parser.error(str(error))


def run(make_model, options, config, device, runs=ROOT / "runs"):
    """Train the network that `make_model(config)` returns, and return the record; None on the ranks other than 0.

    Weights and record are written to the run's folder. Raises as `load_cifar10` and `fit` do; ValueError, before
    training, if the run's folder is not the expected one; KeyboardInterrupt if training is interrupted.
    """
    with distributed.raise_together():
        splits = load_cifar10(options.data, options.allow_synthetic)
        splits = validation_split(splits[0]) if options.validation else splits
        torch.manual_seed(config.seed)
        model = make_model(config)
        folder = run_folder(model, *splits, config, device, runs)
        if options.expect_folder and Path(options.expect_folder).resolve() != folder.resolve():
            raise ValueError(
                f"the run's folder is '{folder}', not '{options.expect_folder}': network, data, device type or code "
                "differ from those of the program that expects it"
            )
    history = fit(model, *splits, config, device, checkpoint_dir=folder)
    if len(history["seconds"]) < config.epochs:
        raise KeyboardInterrupt("Interrupted: run the same command again to resume.")
    if distributed.rank() > 0:
        return None
    views = accuracy_by_views(model, splits[1], config, device)
    record = write_record(folder / "record.json", model, *splits, config, history, device, views)
    save_model(folder / "model.safetensors", model, config, final_metrics(record), CLASSES)
    print(f"{describe_record(record)}\nRecord and weights: {folder}")
    return record


def main(make_model=lambda config: AdvancedCNN(dropout=config.dropout, width=config.width)):
    """Train as the command line says.

    Exits with a message and status 2 if an option is wrong, 1 if training is not possible, 130 if it is interrupted.
    Of several processes, rank 0 alone reports what all have in common.
    """
    with command_line(CheckpointError, distributed.RankError, TrainingDiverged):
        with ExitStack() as silent:
            if not is_first_rank():
                nowhere = silent.enter_context(open(os.devnull, "w"))
                silent.enter_context(redirect_stdout(nowhere))
                silent.enter_context(redirect_stderr(nowhere))
            options, config = read_options()
        try:
            with distributed.process_group(options.device) as device:
                run(make_model, options, config, device)
        except (distributed.RankError, TrainingDiverged):
            if not is_first_rank():
                sys.exit(1)
            raise


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    main()
