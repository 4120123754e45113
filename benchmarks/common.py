"""Shared by the benchmarks: options, data, timing and reports."""

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

from session8.checkpoint import write_file
from session8.console import plural
from session8.data import DatasetUnavailable, Split, load_cifar10
from session8.device import device_name, get_device, synchronize
from session8.records import package_versions, project_commit

SAVED = ROOT / "results" / "benchmarks"
HELP = {
    "rounds": "repetitions of each measurement",
    "images": "number of training images",
    "steps": "training steps per repetition",
    "batch_size": "images per batch",
    "workers": "numbers of loader processes",
}


def integer(minimum):
    """Return an argparse type: integers of at least `minimum`."""

    def read(text):
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return int(text)

    return read


def device(text):
    """An argparse type: a device that is available."""
    try:
        return get_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser(description, **numbers):
    """Return a parser with the options of every benchmark, and its own `numbers` with their defaults."""
    parser = argparse.ArgumentParser(
        description=description and description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", help="folder with CIFAR-10")
    parser.add_argument("--device", type=device, default=get_device(), help="cuda, mps or cpu")
    parser.add_argument("--save", action="store_true", help="write the result to results/benchmarks/")
    for name, default in numbers.items():
        kind = integer(0 if name == "workers" else 1)
        nargs = {"nargs": "+"} if isinstance(default, list) else {}
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=HELP[name], **nargs)
    return parser


def load_splits(options):
    """Return both splits of CIFAR-10. Exits with a message if they are not available."""
    try:
        return load_cifar10(options.data)
    except DatasetUnavailable as error:
        sys.exit(str(error))


def load_training_split(options, needed):
    """Return the training split. Exits if it has fewer than `needed` images, or if --save needs all of CIFAR-10."""
    split, _ = load_splits(options)
    if needed > len(split):
        sys.exit(f"{plural(needed, 'training image')} needed, but '{split.source}' has {len(split):,}: use fewer")
    if options.save and len(split) != 50_000:
        sys.exit(f"'{split.source}' has {len(split):,} training images: --save needs all 50,000")
    return split


def subset(split, n):
    """Return n evenly spaced images of a split, since class folders are sorted by class."""
    chosen = np.arange(n) * len(split) // n
    return Split(split.images[chosen], split.labels[chosen], split.source)


def elapsed(work, device):
    """Return how many seconds `work()` takes, with the device idle before and after."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def time_alternately(functions, rounds, device, warm_up=True):
    """Time functions A B C, A B C, ... after one round of warm-up. Returns {name: [seconds, ...]}.

    Alternating makes a change in the machine's speed affect all of them.
    """
    for work in functions.values() if warm_up else ():
        work()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, work in functions.items():
            times[name].append(elapsed(work, device))
    return times


def ratio(times, numerator, denominator):
    """Compute the ratio of two times in each round. Returns ("min to max", median)."""
    ratios = [a / b for a, b in zip(times[numerator], times[denominator], strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}", statistics.median(ratios)


def report(name, options, split, columns, rows, **notes):
    """Print a table (rows of text and numbers) and notes, with the device's name; save them if --save was given."""
    print(f"\n{name} on {device_name(options.device)}, PyTorch {package_versions()['torch']}\n")
    rows = [[cell if isinstance(cell, str) else round(cell, 3) for cell in row] for row in rows]
    table = [[cell if isinstance(cell, str) else f"{cell:,.2f}" for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for key, value in notes.items():
        print(f"{key}: {value}")
    if options.save:
        record = {
            "benchmark": name,
            "device": device_name(options.device),
            "columns": columns,
            "rows": rows,
            "options": {key: value for key, value in vars(options).items() if key in HELP},
            "notes": notes,
            "data": split.source,
            "versions": package_versions(),
            "commit": project_commit(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        SAVED.mkdir(parents=True, exist_ok=True)
        write_file(SAVED / f"{name}_{options.device.type}.json", json.dumps(record, indent=1).encode())
