"""Shared by the benchmarks: options, data, timing and reports."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from session8.checkpoint import write_file
from session8.console import plural
from session8.data import DatasetUnavailable, Split, load_cifar10
from session8.device import device_name, get_device, synchronize
from session8.records import package_versions, project_commit

SAVED = Path(__file__).resolve().parent.parent / "results" / "benchmarks"
HELP = {
    "rounds": "repetitions of each measurement",
    "images": "number of training images",
    "steps": "training steps per repetition",
    "batch_size": "images per batch",
    "workers": "also time albumentations with these numbers of worker processes",
}


def read_options(description: str, arguments: list[str] | None = None, **numbers) -> argparse.Namespace:
    """Read the options of every benchmark, and its own `numbers`, given with their defaults.

    Exits with a message and status 2 if an option is wrong.
    """
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", help="folder with CIFAR-10")
    parser.add_argument("--device", default=get_device(), help="cuda, mps or cpu")
    parser.add_argument("--save", action="store_true", help="write the result to results/benchmarks/")
    for name, default in numbers.items():
        nargs = {"nargs": "+"} if isinstance(default, list) else {}
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=HELP[name], **nargs)
    options = parser.parse_args(arguments)
    for name, default in numbers.items():
        values, least = getattr(options, name), 0 if name == "workers" else 1
        if min(values if isinstance(default, list) else [values], default=least) < least:
            parser.error(f"--{name.replace('_', '-')} is {values}; expected at least {least}")
    try:
        options.device = get_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    return options


def load_splits(options: argparse.Namespace, needed: int = 1) -> tuple[Split, Split]:
    """Return both splits of CIFAR-10.

    Exits with a message if there are none or fewer than `needed` training images, or if --save needs all.
    """
    try:
        train_split, test_split = load_cifar10(options.data)
    except DatasetUnavailable as error:
        sys.exit(str(error))
    source, n = train_split.source, len(train_split)
    if needed > n:
        sys.exit(f"{plural(needed, 'training image')} needed, but '{source}' has {n:,}: use fewer")
    if options.save and n != 50_000:
        sys.exit(f"'{source}' has {plural(n, 'training image')}: --save needs all 50,000")
    return train_split, test_split


def subset(split: Split, n: int) -> Split:
    """Return n evenly spaced images of a split, since class folders are sorted by class."""
    chosen = np.arange(n) * len(split) // n
    return Split(split.images[chosen], split.labels[chosen], split.source)


def time_alternately(functions: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time functions A B C, A B C, ... after one round of warm-up, with the device idle before and after each.

    Alternating makes a change in the machine's speed affect all of them. A function that has a set-up returns the
    seconds that count. Returns {name: [seconds, ...]}.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, work in functions.items():
            synchronize(device)
            started = time.perf_counter()
            seconds = work()
            synchronize(device)
            times[name].append(time.perf_counter() - started if seconds is None else seconds)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> tuple[str, float]:
    """Compute the ratio of two times in each round. Returns ("min to max", median)."""
    ratios = [a / b for a, b in zip(times[numerator], times[denominator], strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}", statistics.median(ratios)


def report(name: str, options: argparse.Namespace, split: Split, columns: list[str], rows: list[list], **notes) -> None:
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
            "options": {key: value for key, value in vars(options).items() if key in HELP and value != []},
            "notes": notes,
            "data": split.source,
            "versions": package_versions(),
            "commit": project_commit(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_file(SAVED / f"{name}_{options.device.type}.json", json.dumps(record, indent=1).encode())
