"""Time of one training step, compared with a plain loop: `python -m benchmarks.train_step`.

Both train the same network on the same uint8 batch. The plain loop normalises on the CPU to float32 NCHW, computes in
float32 and reads loss and accuracy after every step. Ours normalises on the device to channels_last and reads them
when the progress bar is refreshed; it is timed with precision="float32" and "auto".
"""

import statistics

import torch
import torch.nn.functional as F

from benchmarks.common import load_splits, ratio, read_options, report, subset, time_alternately
from model_AC import AdvancedCNN
from session8.config import Config
from session8.data import MEAN, STD
from session8.device import arithmetic, backend_flags, memory_format
from session8.optim import make_optimizer, make_scaler
from session8.training import train_step


def plain_loop(images, labels, device, steps):
    """Return (work, model): `work()` takes `steps` steps of a tutorial's loop on a batch of uint8 (B, 32, 32, 3)."""
    torch.manual_seed(0)
    model = AdvancedCNN().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    def work():
        for _ in range(steps):
            batch = (images.permute(0, 3, 1, 2).contiguous().float() / 255 - mean) / std
            data, target = batch.to(device), labels.to(device)
            optimizer.zero_grad()
            output = model(data)
            loss = F.nll_loss(output, target)
            loss.backward()
            optimizer.step()
            loss.item(), (output.argmax(1) == target).sum().item()

    return work, model


def our_loop(images, labels, device, steps, config):
    """Return (work, model): `work()` takes `steps` steps as in `fit`, and reads the results once."""
    torch.manual_seed(0)
    model = AdvancedCNN().to(device, memory_format=memory_format(device)).train()
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, device)

    def work():
        with backend_flags(config):
            done = [train_step(model, images, labels, optimizer, scaler, config, device) for _ in range(steps)]
        torch.stack([loss for loss, _ in done]).tolist(), torch.stack([correct for _, correct in done]).tolist()

    return work, model


def main(arguments=None):
    options = read_options(__doc__, arguments, steps=10, rounds=31, batch_size=128)
    batch = subset(load_splits(options, options.batch_size)[0], options.batch_size)
    images, labels = torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
    inputs = images, labels, options.device, options.steps
    loops = {
        "plain loop": plain_loop(*inputs)[0],
        "ours, float32": our_loop(*inputs, Config(precision="float32"))[0],
        "ours, auto": our_loop(*inputs, Config())[0],
    }
    times = time_alternately(loops, options.rounds, options.device)
    rows = [
        [name, 1000 * statistics.median(times[name]) / options.steps, *ratio(times, "plain loop", name)]
        for name in loops
    ]
    columns = ["loop", "ms per step", "range", "plain loop / this"]
    report("train_step", options, batch, columns, rows, auto=arithmetic("auto", options.device))


if __name__ == "__main__":
    main()
