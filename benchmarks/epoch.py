"""What stands between an epoch of training and the compute limit: `python benchmarks/epoch.py`.

The limit is the same number of steps, of the same sizes, on one batch that stays on the device. Also: how an epoch
grows with the number of images and of workers, and the peak memory of a training process.
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys

import torch
from common import evenly, in_turn, make_benchmark_parser, ratio, real_splits, report, training_images

from model_AC import AdvancedCNN
from session8.config import Config, memory_format
from session8.training import fit, kernels, make_loader, make_optimizer, make_scaler, train, train_step


def sides_of(split, config, device, workers):
    """The limit and an epoch of `train` with each number of workers: functions to be timed, by name.

    All is warm: the workers run, and a step of each size has been taken, so that its kernels are chosen.
    """
    torch.manual_seed(0)
    model = AdvancedCNN().to(device, memory_format=memory_format(device))
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, device)
    loaders = {n: make_loader(split, config.batch_size, num_workers=n) for n in workers}
    images, labels = next(iter(make_loader(split, config.batch_size, num_workers=0)))
    images, labels = images.to(device), labels.to(device)
    sizes = [len(batch) for batch in torch.arange(len(split)).split(config.batch_size)]

    def limit():
        model.train()
        with kernels(config):
            for n in sizes:
                train_step(model, images[:n], labels[:n], optimizer, scaler, config, device)

    def epoch(loader):
        def work():
            with kernels(config), contextlib.redirect_stdout(io.StringIO()):
                train(model, loader, optimizer, config, device, scaler=scaler)

        return work

    for loader in loaders.values():
        next(iter(loader))
    model.train()
    with kernels(config):
        for n in [*{*sizes}] * 5:
            train_step(model, images[:n], labels[:n], optimizer, scaler, config, device)
    return {"limit": limit, **{f"{n} workers": epoch(loader) for n, loader in loaders.items()}}


def peak_memory(options):
    """Train and test one epoch in a process of its own. Returns its peak resident set and the GPU's peak, in GB.

    None for what the platform cannot tell. Without loader workers, which are processes of their own.
    """
    command = [sys.executable, __file__, "--only-memory", "--device", str(options.device)]
    command += ["--batch-size", str(options.batch_size)]
    if options.data:
        command += ["--data", options.data]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # what is wrong stands on standard error already
    return json.loads(done.stdout.splitlines()[-1])


def train_and_print_memory(options):
    fit(AdvancedCNN(), *real_splits(options), Config(epochs=1, batch_size=options.batch_size), options.device)
    try:
        import resource  # not on Windows
    except ImportError:
        peak = None
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
    gpu = torch.cuda.max_memory_allocated(options.device) / 1e9 if options.device.type == "cuda" else None
    print(json.dumps([peak, gpu and round(gpu, 2)]))


def main():
    sizes = {"images": [12_500, 25_000, 50_000], "workers": [0, 1, 2]}
    parser = make_benchmark_parser(__doc__.splitlines()[0], rounds=2, batch_size=128, **sizes)
    parser.add_argument("--only-memory", action="store_true", help="train one epoch, print peak memory")
    options = parser.parse_args()
    if options.only_memory:
        return train_and_print_memory(options)
    split = training_images(options, max(options.images))
    # Soon, while this process is small: on Linux, a new one's peak begins at that of the process which started it.
    memory, gpu_memory = peak_memory(options)
    config = Config(batch_size=options.batch_size)
    rows = []
    for n in options.images:
        sides = sides_of(evenly(split, n), config, options.device, options.workers)
        times = in_turn(sides, options.rounds, options.device, warm_up=False)
        rows += [[f"{n:,}", name, statistics.median(times[name]), ratio(times, name, "limit")] for name in times]
    notes = {"peak resident set (GB)": memory, "peak GPU memory (GB)": gpu_memory}
    columns = ["images", "epoch", "seconds", "over the limit"]
    report("epoch", options, split, columns, rows, **{key: value for key, value in notes.items() if value})


if __name__ == "__main__":
    main()
