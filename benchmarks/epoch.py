"""Time of a training epoch, compared with computing alone: `python -m benchmarks.epoch`.

An epoch is timed as `fit` trains it, with a test of few images. The limit is the same number of steps, of the same
sizes, on one batch that stays on the device. Also measures the peak memory of a process that trains and tests one epoch
on all images. Runs on Linux and macOS.
"""

import contextlib
import multiprocessing
import os
import resource
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.common import load_splits, ratio, read_options, report, subset, time_alternately
from model_AC import AdvancedCNN
from session8.augment import train_transforms
from session8.config import Config
from session8.console import plural
from session8.device import arithmetic, backend_flags, memory_format
from session8.optim import make_optimizer, make_scaler
from session8.training import fit, train_step

TESTED = 100  # images


def limit(split, config, device):
    """Return a function that takes the steps of an epoch on one batch on the device."""
    torch.manual_seed(0)
    model = AdvancedCNN().to(device, memory_format=memory_format(device)).train()
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, device)
    images = torch.from_numpy(split.images[: config.batch_size]).to(device)
    labels = torch.from_numpy(split.labels[: config.batch_size]).to(device)
    sizes = [len(batch) for batch in torch.arange(len(split)).split(config.batch_size)]

    def work():
        with backend_flags(config):
            for n in sizes:
                train_step(model, images[:n], labels[:n], optimizer, scaler, config, device)

    return work


def epoch(split, test_split, config, device, **loading):
    """Return a function that trains an epoch with `fit`, and returns its seconds. loading: arguments of `fit`."""

    def work():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return fit(AdvancedCNN(), split, test_split, config, device, **loading)["seconds"][0]

    return work


def peak_memory(options):
    """Train and test one epoch. Returns the peak resident set of this process, and the GPU's peak or None, in GB."""
    epoch(*load_splits(options), Config(epochs=1, batch_size=options.batch_size), options.device)()
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    gpu = torch.cuda.max_memory_allocated(options.device) if options.device.type == "cuda" else None
    return round(peak / 1e9, 2), gpu and round(gpu / 1e9, 2)


def main(arguments=None):
    options = read_options(__doc__, arguments, rounds=5, batch_size=128, images=[50_000], workers=[])
    # First: on Linux a new process inherits the peak of the process that starts it, which is small now.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as new_process:
        memory, gpu_memory = new_process.submit(peak_memory, options).result()
    train_split, test_split = load_splits(options, max(options.images))
    config = Config(epochs=1, batch_size=options.batch_size)
    rows = []
    for n in options.images:
        splits = subset(train_split, n), subset(test_split, min(TESTED, len(test_split)))
        run = *splits, config, options.device
        functions = {"limit": limit(splits[0], config, options.device), "ours": epoch(*run)}
        for number in options.workers:
            name = f"albumentations, {plural(number, 'worker')}"
            functions[name] = epoch(*run, transform=train_transforms(config), num_workers=number)
        times = time_alternately(functions, options.rounds, options.device)
        rows += [[f"{n:,}", name, statistics.median(times[name]), *ratio(times, name, "limit")] for name in times]
    notes = {"peak resident set (GB)": memory, "peak GPU memory (GB)": gpu_memory}
    notes["arithmetic"] = arithmetic(config.precision, options.device)
    columns = ["images", "epoch", "seconds", "range", "time / limit"]
    report("epoch", options, train_split, columns, rows, **{key: value for key, value in notes.items() if value})


if __name__ == "__main__":
    main()
