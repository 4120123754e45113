"""What one training step costs: ours beside the plain loop, `python benchmarks/train_step.py`.

Both train the same network on the same uint8 batch. The plain loop normalises on the CPU to float32 NCHW, computes in
float32, and reads loss and accuracy after every step; ours normalises on the device to channels_last, computes in 16
bits where that pays, and reads them when the bar is refreshed.
"""

import statistics

import torch
import torch.nn.functional as F
from common import evenly, in_turn, make_benchmark_parser, ratio, report, training_images

from model_AC import AdvancedCNN
from session8.config import Config, memory_format, mixed_precision
from session8.data import MEAN, STD
from session8.training import kernels, make_optimizer, make_scaler, train_step


def plain_loop(images, labels, device, steps):
    """The steps of a tutorial, on batches of uint8 (B, 32, 32, 3): a function that does `steps` of them."""
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
    """The steps of `utils.train`, read once at the end: a function that does `steps` of them."""
    torch.manual_seed(0)
    model = AdvancedCNN().to(device, memory_format=memory_format(device)).train()
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, device)

    def work():
        with kernels(config):
            done = [train_step(model, images, labels, optimizer, scaler, config, device) for _ in range(steps)]
        torch.stack([loss for loss, _ in done]).tolist(), torch.stack([hits for _, hits in done]).tolist()

    return work, model


def main():
    options = make_benchmark_parser(__doc__.splitlines()[0], steps=10, rounds=31, batch_size=128).parse_args()
    split = training_images(options, options.batch_size)
    batch = evenly(split, options.batch_size)
    images, labels = torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
    config = Config(batch_size=options.batch_size)
    sides = {
        "plain loop": plain_loop(images, labels, options.device, options.steps)[0],
        "ours, float32": our_loop(images, labels, options.device, options.steps, Config(precision="float32"))[0],
    }
    if mixed_precision(config, options.device):
        sides["ours"] = our_loop(images, labels, options.device, options.steps, config)[0]
    times = in_turn(sides, options.rounds, options.device)
    rows = [
        [name, 1000 * statistics.median(times[name]) / options.steps, ratio(times, "plain loop", name)]
        for name in sides
    ]
    report("train_step", options, split, ["loop", "ms a step", "plain loop over this"], rows)


if __name__ == "__main__":
    main()
