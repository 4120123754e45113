"""Time of a training epoch, compared with computing alone: `python benchmarks/epoch.py`.

The limit is the same number of steps, of the same sizes, on one batch that stays on the device. An epoch is timed with
albumentations and with the batched augmentation on the device. Also measures the peak memory of a training process;
--images and --workers take several numbers.
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys

import torch
from common import load_splits, load_training_split, make_parser, ratio, report, subset, time_alternately

from model_AC import AdvancedCNN
from session8.augment import as_batch_augmentation, train_transforms
from session8.config import Config
from session8.console import plural
from session8.device import arithmetic, backend_flags, memory_format
from session8.loaders import DeviceLoader, make_loader
from session8.trainer import fit
from session8.training import make_optimizer, make_scaler, train, train_step


def make_functions(split, config, device, workers):
    """Return functions to time, by name: the limit, and an epoch of `train` for each way of loading.

    The loaders are albumentations with each number of workers, and DeviceLoader. The workers are started, and the
    kernels of each batch size are selected.
    """
    torch.manual_seed(0)
    model = AdvancedCNN().to(device, memory_format=memory_format(device))
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, device)
    loaders = {
        "ours" if n == 0 else f"ours, {plural(n, 'worker')}": make_loader(
            split, config.batch_size, num_workers=n, device="cpu"
        )
        for n in workers
    }
    augmentation = as_batch_augmentation(train_transforms(config.cutout))
    loaders["ours (device)"] = DeviceLoader(split, config.batch_size, augmentation, config.seed, device)
    images, labels = next(iter(loaders["ours (device)"]))
    images, labels = images.to(device), labels.to(device)
    sizes = [len(batch) for batch in torch.arange(len(split)).split(config.batch_size)]

    def limit(sizes=sizes):
        model.train()
        with backend_flags(config):
            for n in sizes:
                train_step(model, images[:n], labels[:n], optimizer, scaler, config, device)

    def epoch(loader):
        def work():
            with contextlib.redirect_stdout(io.StringIO()):
                train(model, loader, optimizer, config, device, scaler=scaler)

        return work

    for loader in loaders.values():
        next(iter(loader))
    limit([*set(sizes)] * 5)
    return {"limit": limit, **{name: epoch(loader) for name, loader in loaders.items()}}


def peak_memory(options):
    """Train and test one epoch in a new process. Returns its peak resident set and the GPU's peak, in GB.

    None for what the platform does not report.
    """
    command = [sys.executable, __file__, "--only-memory", "--device", str(options.device)]
    command += ["--batch-size", str(options.batch_size)]
    if options.data:
        command += ["--data", options.data]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # its message is on standard error
    return json.loads(done.stdout.splitlines()[-1])


def train_and_print_memory(options):
    fit(AdvancedCNN(), *load_splits(options), Config(epochs=1, batch_size=options.batch_size), options.device)
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
    parser = make_parser(__doc__, rounds=5, batch_size=128, images=[50_000], workers=[0])
    parser.add_argument("--only-memory", action="store_true", help="train one epoch and print the peak memory")
    options = parser.parse_args()
    if options.only_memory:
        return train_and_print_memory(options)
    split = load_training_split(options, max(options.images))
    # First: on Linux a new process inherits the peak of the process that starts it, which is small now.
    memory, gpu_memory = peak_memory(options)
    config = Config(batch_size=options.batch_size)
    rows = []
    for n in options.images:
        functions = make_functions(subset(split, n), config, options.device, options.workers)
        times = time_alternately(functions, options.rounds, options.device, warm_up=False)
        rows += [[f"{n:,}", name, statistics.median(times[name]), *ratio(times, name, "limit")] for name in times]
    notes = {"peak resident set (GB)": memory, "peak GPU memory (GB)": gpu_memory}
    notes["arithmetic"] = arithmetic(config.precision, options.device)
    columns = ["images", "epoch", "seconds", "range", "time / limit"]
    report("epoch", options, split, columns, rows, **{key: value for key, value in notes.items() if value})


if __name__ == "__main__":
    main()
