"""Train AdvancedCNN from the command line: `python train.py --recipe one_cycle --epochs 5 --data DIR`.

The run goes to runs/, where a repeated command resumes it. Several processes share the work under torchrun:
`torchrun --standalone --nproc-per-node=2 train.py --recipe one_cycle`. Saved weights are tested by
`python train.py --evaluate results/NAME.safetensors --data DIR`.
"""

import argparse
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

if __name__ == "__main__":
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:  # a background job ignores the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: end without a traceback

import torch

from model_AC import AdvancedCNN
from session8 import distributed
from session8.checkpoint import CheckpointError, load_model, save_model
from session8.config import RECIPES, Config
from session8.console import plural
from session8.data import CLASSES, load_cifar10, validation_split
from session8.device import arithmetic, get_device
from session8.evaluation import VIEWS, accuracy_by_views
from session8.records import describe_record, final_metrics, views_metric, write_record
from session8.start import run_folder
from session8.training import TrainingDiverged, fit


def read_options(arguments=None):
    """Read the command line. Returns (options, config): the options of this script, and the recipe as a Config.

    Exits with status 2 and a message if an option is wrong.
    """
    try:
        import tyro  # here, since notebooks do without it
    except ImportError:
        sys.exit("train.py needs tyro, which is not installed: pip install tyro")
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES, default="default", help="the recipe, whose values follow")
    parser.add_argument("--data", help="folder with CIFAR-10; see `load_cifar10`")
    parser.add_argument("--device", help="cuda, mps or cpu; the first available if omitted")
    parser.add_argument("--validation", action="store_true", help="hold out 5,000 training images, and test on them")
    parser.add_argument("--allow-synthetic", action="store_true", help="without CIFAR-10, train on the stand-in")
    parser.add_argument("--evaluate", metavar="FILE", help="test the saved weights in a file instead of training")
    options, rest = parser.parse_known_args(arguments)
    only_epochs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_epochs.add_argument("--epochs", type=int, default=argparse.SUPPRESS)
    try:
        get_device(options.device)
        recipe = Config.named(options.recipe, **vars(only_epochs.parse_known_args(rest)[0]))
        return options, tyro.cli(Config, prog="train.py", description=parser.format_help(), default=recipe, args=rest)
    except ValueError as error:  # a value out of range
        parser.error(str(error))


def train(make_model, options, config, device, runs="runs"):
    """Train the network that `make_model(config)` returns, and return the record; None on the ranks other than 0.

    Weights and record are written to the run's folder. Raises as `load_cifar10` and `fit` do; KeyboardInterrupt if
    training is interrupted.
    """
    with distributed.raise_together():
        splits = load_cifar10(options.data, options.allow_synthetic)
        splits = validation_split(splits[0]) if options.validation else splits
        torch.manual_seed(config.seed)
        model = make_model(config)
        folder = run_folder(model, *splits, config, device, runs)
    history = fit(model, *splits, config, device, checkpoint_dir=folder)
    if len(history["seconds"]) < config.epochs:
        raise KeyboardInterrupt("Interrupted: run the same command again to resume.")
    views = accuracy_by_views(model, splits[1], config, device) if distributed.rank() == 0 else {}
    if distributed.rank() > 0:
        return None
    record = write_record(folder / "record.json", model, *splits, config, history, device, views)
    save_model(folder / "model.safetensors", model, config, final_metrics(record), CLASSES)
    print(f"{describe_record(record)}\nRecord and weights: {folder}")
    return record


def evaluate(file, data, device):
    """Test the AdvancedCNN in a file of weights on CIFAR-10 with 1, 2 and 6 views, and compare with what it states.

    The precision is that of the recipe in the file. If it is "auto", the device decides, and a few images may change
    their class. Returns {views: percent correct}. Raises CheckpointError or FileNotFoundError as `load_model` does, and
    DatasetUnavailable as `load_cifar10` does.
    """
    model, about = load_model(file)
    try:
        config = Config(**about["config"])
    except TypeError as error:
        raise CheckpointError(f"'{file}' states a recipe that this version cannot read: {error}") from error
    _, split = load_cifar10(data)
    print(f"Testing '{file}' on {split.source}: {plural(len(split), 'image')}, {arithmetic(config.precision, device)}")
    measured = accuracy_by_views(model, split, config, device, VIEWS)
    for views, accuracy in measured.items():
        stated = about["metrics"].get(views_metric(views))
        if stated is not None:
            print(f"Views: {views}, stated: {stated:.2f} %, measured minus stated: {accuracy - stated:+.2f}")
    return measured


def main(make_model=lambda config: AdvancedCNN(dropout=config.dropout, width=config.width)):
    """Train, or test saved weights, as the command line says.

    Exits with a message and status 2 if an option is wrong, 1 if training is not possible, 130 if it is interrupted.
    Other exceptions than those that the package documents are faults of the code, and pass unchanged.
    """
    is_first_rank = os.environ.get("RANK", "0") == "0"  # which alone reports what all ranks have in common
    try:
        with open(os.devnull, "w") as nowhere:
            output, errors = (sys.stdout, sys.stderr) if is_first_rank else (nowhere, nowhere)
            with redirect_stdout(output), redirect_stderr(errors):
                options, config = read_options()
        if options.evaluate:
            evaluate(options.evaluate, options.data, get_device(options.device))
        else:
            with distributed.process_group(options.device) as device:
                train(make_model, options, config, device)
            distributed.leave_group()
        sys.stdout.flush()  # so that a closed pipe or a full disk is noticed here
    except KeyboardInterrupt as error:
        if is_first_rank:
            print(str(error) or "Interrupted.", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, CheckpointError, TrainingDiverged, distributed.RankError) as error:
        _give_up_output()
        of_all_ranks = isinstance(error, TrainingDiverged | distributed.RankError)
        if isinstance(error, BrokenPipeError) or (of_all_ranks and not is_first_rank):
            sys.exit(1)  # silently: the reader of the output has ended, as `head` does, or rank 0 reports the error
        sys.exit("\n".join([str(error), *getattr(error, "__notes__", [])]))


def _give_up_output():
    """Discard what standard output cannot take: Python would report it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # for characters in paths that its encoding lacks
    main()
