"""How many training images a second each way of loading delivers: `python benchmarks/input_pipeline.py`.

Ours beside the usual notebook way, torchvision's transforms, and whole-batch tensor indexing as the limit; all end in
the same normalised float batch on the training device (see sides.py).
"""

import statistics

from common import evenly, in_turn, make_benchmark_parser, ratio, report, training_images
from sides import SIDES


def measure(sides, train_split, batch_size, num_workers, rounds, device):
    """Time one epoch of each side, in turn. Returns {name: [seconds, ...]}."""

    def one_epoch(side):
        def work():
            for _ in side:
                pass

        return work

    made = {name: make(train_split, batch_size, num_workers, device) for name, make in sides.items()}
    return in_turn({name: one_epoch(side) for name, side in made.items()}, rounds, device)


def main():
    options = make_benchmark_parser(__doc__.splitlines()[0], images=10_000, rounds=7, batch_size=128).parse_args()
    split = training_images(options, options.images)
    some = evenly(split, options.images)
    rows = []
    for num_workers in (0, 2):
        sides = {name: side for name, side in SIDES.items() if num_workers == 0 or name != "limit"}
        times = measure(sides, some, options.batch_size, num_workers, options.rounds, options.device)
        for name in sides:
            speed = len(some) / statistics.median(times[name])
            rows.append([name, str(num_workers), f"{speed:,.0f}", ratio(times, name, "ours")])
    report("input_pipeline", options, split, ["way", "workers", "images/s", "time over ours"], rows)


if __name__ == "__main__":
    main()
