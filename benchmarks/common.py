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

from checkpoint import device_name, package_versions
from cifar10 import Split, load_cifar10
from config import get_device

SAVED = ROOT / "results" / "benchmarks"


def positive(text):
    """A whole number of at least 1, read from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def make_parser(description, **numbers):
    """The options that every command here has, and its own `numbers` with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", help="folder with CIFAR-10, as DATA_ROOT in the notebook")
    parser.add_argument("--device", type=get_device, default=get_device(), help="cuda, mps or cpu")
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=default, help=" ")
    return parser


def make_benchmark_parser(description, **numbers):
    """`make_parser`, with --save."""
    parser = make_parser(description, **numbers)
    parser.add_argument("--save", action="store_true", help="write what was measured to results/benchmarks/")
    return parser


def real_images(options):
    """Both splits of CIFAR-10; raises DatasetUnavailable rather than measure anything else."""
    return load_cifar10(options.data)


def evenly(split, n):
    """n images of a split, evenly spread over it (class folders are in the order of their classes).

    Raises ValueError when it has fewer.
    """
    if n > len(split):
        raise ValueError(f"{n:,} images are asked for, and there are {len(split):,}: ask for fewer")
    chosen = np.arange(n) * len(split) // n
    return Split(split.images[chosen], split.labels[chosen], split.source)


def synchronize(device):
    """Wait until `device` has done what it was given: a GPU's work is only queued when a call returns."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


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


def report(name, device, save, columns, rows, **more):
    """Print a table (rows of text and numbers) and `more` under the machine's name.

    save: also write them as a record to results/benchmarks/.
    """
    print(f"\n{name} on {device_name(device)}, PyTorch {package_versions()['torch']}\n")
    table = [[cell if isinstance(cell, str) else f"{cell:,.2f}" for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for key, value in more.items():
        print(f"{key.replace('_', ' ')}: {value}")
    if save:
        record = {
            "benchmark": name,
            "device": device_name(device),
            "columns": columns,
            "rows": rows,
            **more,
            "versions": package_versions(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        SAVED.mkdir(parents=True, exist_ok=True)
        (SAVED / f"{name}_{device.type}.json").write_text(json.dumps(record, indent=1) + "\n")
