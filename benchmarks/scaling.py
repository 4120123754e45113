"""Training in two processes, compared with one: `python -m benchmarks.scaling`.

One batch of fixed size is trained on by one process, with one thread and with two, and by two processes with one thread
each, which share it. The share of communication is the difference to a step without synchronisation. The throughput
below which several processes pay is calculated from the bytes that a step exchanges.
"""

import statistics
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import load_splits, ratio, read_options, report, subset, time_alternately
from model_AC import AdvancedCNN
from session8.config import Config
from session8.device import arithmetic, backend_flags, memory_format
from session8.optim import make_optimizer, make_scaler
from session8.training import train_step

LINKS = {  # bytes per second and direction
    "Ethernet, 1 Gbit/s": 0.125e9,
    "Ethernet, 10 Gbit/s": 1.25e9,
    "PCIe 3.0 x16, 12 GB/s": 12e9,
    "NVLink of an A100, 300 GB/s": 300e9,
}
BATCHES = (128, 1024, 8192)
WORLD_SIZE = 2


def exchanged_bytes(model):
    """Return the bytes of gradients and of buffers that a step exchanges."""
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return gradients, sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def least_step_seconds(n_bytes, bytes_per_second, processes=WORLD_SIZE, share=0.1):
    """Calculate above which computing time per step communication takes less than `share` of the step.

    A ring all-reduce sends 2 (p - 1) / p of the gradients per process. Latency and overlap are ignored.
    """
    communication = 2 * (processes - 1) / processes * n_bytes / bytes_per_second
    return communication * (1 - share) / share


def loops(split, config, device, steps, rank):
    """Return the functions to time by name: each takes `steps` steps, or nothing on a rank that it does not need."""
    torch.manual_seed(0)
    alone = AdvancedCNN().to(device, memory_format=memory_format(device)).train()
    shared = DistributedDataParallel(AdvancedCNN().to(device, memory_format=memory_format(device)).train())
    batch = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    share = [part.tensor_split(WORLD_SIZE)[rank] for part in batch]

    def take(model, images, labels, threads):
        optimizer, scaler = make_optimizer(model, config), make_scaler(config, device)

        def work():
            torch.set_num_threads(threads)
            with backend_flags(config):
                done = [train_step(model, images, labels, optimizer, scaler, config, device) for _ in range(steps)]
            return torch.stack([loss for loss, _ in done]).tolist()

        return work

    one, two = take(alone, *batch, 1), take(alone, *batch, 2)
    together = take(shared, *share, 1)

    def silent():
        with shared.no_sync():
            together()
        shared.zero_grad()

    return {
        "1 process, 1 thread": one if rank == 0 else None,
        "1 process, 2 threads": two if rank == 0 else None,
        "2 processes, 1 thread each": together,
        "the same without communication": silent,
    }


def measure(rank, options, split, store):
    """Time the loops in one of the processes; rank 0 reports."""
    # A process that waits for another must not give up before a long round ends.
    dist.init_process_group("gloo", f"file://{store}", timedelta(minutes=30), WORLD_SIZE, rank)
    config = Config(batch_size=options.batch_size)
    functions = loops(split, config, options.device, options.steps, rank)

    def together(work):
        def timed():
            dist.barrier()
            if work:
                work()
            dist.barrier()

        return timed

    times = time_alternately({name: together(work) for name, work in functions.items()}, options.rounds, options.device)
    dist.destroy_process_group()
    if rank > 0:
        return
    torch.set_num_threads(1)
    base = "1 process, 1 thread"
    images = options.steps * options.batch_size
    rows = [[name, images / statistics.median(times[name]), *ratio(times, base, name)] for name in times]
    quiet, loud = "the same without communication", "2 processes, 1 thread each"
    gradients, buffers = exchanged_bytes(AdvancedCNN())
    notes = {
        "arithmetic": arithmetic(config.precision, options.device),
        "share of communication": f"{1 - ratio(times, quiet, loud)[1]:.1%}",
        "gradients (bytes per step)": f"{gradients:,}",
        "statistics of batch norm (bytes per step)": f"{buffers:,}",
    }
    report("scaling", options, split, ["training", "images/s", "range", "speed / 1 thread"], rows, **notes)
    print(
        f"\nCalculated: images/s of a process below which communication takes less than 10 % ({WORLD_SIZE} processes)"
    )
    for link, speed in LINKS.items():
        least = least_step_seconds(gradients, speed)
        rates = "  ".join(f"batch {batch:,}: {batch / WORLD_SIZE / least:,.0f}" for batch in BATCHES)
        print(f"{link}: a step of at least {1000 * least:.2f} ms; {rates}")


def main(arguments=None):
    options = read_options(__doc__, arguments, steps=10, rounds=15, batch_size=128)
    if options.device.type != "cpu":
        raise SystemExit(f"device is {options.device}: this benchmark compares threads of a CPU; use --device cpu")
    split = subset(load_splits(options, options.batch_size)[0], options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (options, split, f"{folder}/store"), WORLD_SIZE)


if __name__ == "__main__":
    main()
