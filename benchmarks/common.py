"""What the benchmarks share: the real images, a fair clock, and the saved record of what was measured."""

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from session8.checkpoint import device_name, package_versions, project_commit, write_file
from session8.config import get_device
from session8.data import DatasetUnavailable, Split, load_cifar10

SAVED = ROOT / "results" / "benchmarks"
HELP = {
    "rounds": "how many times each side is timed",
    "images": "how many training images",
    "steps": "steps of training in one round",
    "batch_size": "images in a batch",
    "epochs": "passes over the training images",
    "workers": "processes that load",
    "seeds": "one run for each, one after the other",
}


def whole(minimum):
    """A reader of whole numbers from the command line."""

    def read(text):
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return read


def _device(text):
    try:
        return get_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser(description, **numbers):
    """The options that every command here has, and its own `numbers` with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", help="folder with CIFAR-10, as DATA_ROOT in the notebook")
    parser.add_argument("--device", type=_device, default=get_device(), help="cuda, mps or cpu")
    for name, default in numbers.items():
        several = {"nargs": "+"} if isinstance(default, list) else {}
        reader = whole(0 if name in ("workers", "seeds") else 1)
        parser.add_argument(f"--{name.replace('_', '-')}", type=reader, default=default, help=HELP[name], **several)
    return parser


def make_benchmark_parser(description, **numbers):
    """`make_parser`, with --save."""
    parser = make_parser(description, **numbers)
    parser.add_argument("--save", action="store_true", help="publish what was measured in results/benchmarks/")
    return parser


def real_splits(options):
    """Both splits of CIFAR-10; ends the program where they are not to be had."""
    try:
        return load_cifar10(options.data)
    except DatasetUnavailable as error:
        sys.exit(str(error))


def training_images(options, needed):
    """The training split, of which `needed` images are used; ends the program when there are fewer.

    --save is refused for less than all of CIFAR-10.
    """
    split, _ = real_splits(options)
    if needed > len(split):
        sys.exit(f"{needed:,} training images are asked for, and '{split.source}' has {len(split):,}: ask for fewer")
    if options.save and len(split) != 50_000:
        sys.exit(f"'{split.source}' has {len(split):,} training images: only figures of all 50,000 are published")
    return split


def evenly(split, n):
    """n images of a split, evenly spread over it: class folders are in the order of their classes."""
    chosen = np.arange(n) * len(split) // n
    return Split(split.images[chosen], split.labels[chosen], split.source)


def synchronize(device):
    """Wait until `device` has done what it was given: a GPU's work is only queued when a call returns."""
    if device.type in ("cuda", "mps"):
        torch.cuda.synchronize(device) if device.type == "cuda" else torch.mps.synchronize()


def seconds(work, device):
    """How long `work()` takes, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def in_turn(sides, rounds, device, warm_up=True):
    """Time the sides A B C, A B C, ...: after one round of warming up, a list of seconds for each.

    In turn, so that a machine that becomes slower or faster does so for all of them.
    """
    for work in sides.values() if warm_up else ():
        work()
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            times[name].append(seconds(work, device))
    return times


def ratio(times, of, to):
    """The median over the rounds of how many times as long `of` took as `to` did."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def report(name, options, split, columns, rows, **more):
    """Print a table (rows of text and numbers) and `more` under the machine's name; publish it if --save was given."""
    print(f"\n{name} on {device_name(options.device)}, PyTorch {package_versions()['torch']}\n")
    rows = [[cell if isinstance(cell, str) else round(cell, 3) for cell in row] for row in rows]
    table = [[cell if isinstance(cell, str) else f"{cell:,.2f}" for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for key, value in more.items():
        print(f"{key}: {value}")
    if options.save:
        numbers = {key: value for key, value in vars(options).items() if key in HELP}
        record = {
            "benchmark": name,
            "device": device_name(options.device),
            "columns": columns,
            "rows": rows,
            "options": numbers,
            "notes": more,
            "data": split.source,
            "versions": package_versions(),
            "commit": project_commit(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        SAVED.mkdir(parents=True, exist_ok=True)
        write_file(SAVED / f"{name}_{options.device.type}.json", json.dumps(record, indent=1).encode())
