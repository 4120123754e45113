"""What stands between an epoch of training and the compute limit: `python benchmarks/epoch.py`.

The limit is the same number of steps, of the same sizes, on one batch that stays on the device. Also: how an epoch
grows with the number of images and of workers, and the peak memory of a training process.
"""

import contextlib
import io
import resource
import statistics
import subprocess
import sys

import torch
from common import evenly, in_turn, make_benchmark_parser, ratio, real_images, report

from config import Config
from model_AC import AdvancedCNN
from utils import fit, kernels, make_loader, make_optimizer, make_scaler, train, train_step


def sides_of(split, config, device, workers):
    """The limit and an epoch of `train` with each number of workers: functions to be timed, by name."""
    torch.manual_seed(0)
    model = AdvancedCNN().to(device, memory_format=torch.channels_last)
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

    return {"limit": limit, **{f"{n} workers": epoch(loader) for n, loader in loaders.items()}}


def peak_memory(options):
    """Train and test one epoch in a process of its own. Returns its peak resident set in GB, and the GPU's or None."""
    command = [sys.executable, __file__, "--only-memory", "--device", str(options.device)]
    if options.data:
        command += ["--data", options.data]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [float(number) if number != "None" else None for number in answer[-2:]]


def train_and_print_memory(options):
    splits = real_images(options)
    fit(AdvancedCNN(), *splits, Config(epochs=1, batch_size=options.batch_size), options.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = torch.cuda.max_memory_allocated() / 1e9 if options.device.type == "cuda" else None
    print(peak / 1e9, gpu)


def main():
    parser = make_benchmark_parser(__doc__.splitlines()[0], rounds=2, batch_size=128)
    parser.add_argument("--images", type=int, nargs="+", default=[12_500, 25_000, 50_000], help="sizes of the epoch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of workers")
    parser.add_argument("--only-memory", action="store_true", help="train one epoch, print peak memory")
    options = parser.parse_args()
    if options.only_memory:
        return train_and_print_memory(options)
    # First, while this process is small: on Linux, a new one's peak begins at that of the process which started it.
    memory, gpu_memory = peak_memory(options)
    train_split, _ = real_images(options)
    config = Config(batch_size=options.batch_size)
    rows = []
    few = evenly(train_split, min(20 * options.batch_size, len(train_split)))
    sides_of(few, config, options.device, [0])["0 workers"]()  # warms up
    for n in options.images:
        sides = sides_of(evenly(train_split, n), config, options.device, options.workers)
        times = in_turn(sides, options.rounds, options.device, warm_up=False)
        for name in times:
            rows.append([f"{n:,}", name, statistics.median(times[name]), ratio(times, name, "limit")])
    columns = ["images", "epoch", "seconds", "over the limit"]
    report(
        "epoch",
        options.device,
        options.save,
        columns,
        rows,
        rounds=options.rounds,
        peak_resident_set_GB=memory,
        peak_GPU_memory_GB=gpu_memory,
    )


if __name__ == "__main__":
    main()
