"""Images per second of several input pipelines: `python benchmarks/input_pipeline.py`.

Compares ours with albumentations, ours on the device, the usual notebook pipeline, torchvision's v2 transforms on
tensors, and indexing of whole batches as the limit. All end in normalised float batches on the device (pipelines.py).
"""

import statistics

from common import load_training_split, make_parser, ratio, report, subset, time_alternately
from pipelines import PIPELINES, WITHOUT_WORKERS


def measure(pipelines, split, batch_size, num_workers, rounds, device):
    """Time one epoch of each pipeline, alternating. Returns {name: [seconds, ...]}."""

    def one_epoch(pipeline):
        def work():
            for _ in pipeline:
                pass

        return work

    made = {name: make(split, batch_size, num_workers, device) for name, make in pipelines.items()}
    return time_alternately({name: one_epoch(pipeline) for name, pipeline in made.items()}, rounds, device)


def main():
    options = make_parser(__doc__, images=10_000, rounds=7, batch_size=128).parse_args()
    split = subset(load_training_split(options, options.images), options.images)
    rows = []
    for num_workers in (0, 2):
        pipelines = {name: make for name, make in PIPELINES.items() if num_workers == 0 or name not in WITHOUT_WORKERS}
        times = measure(pipelines, split, options.batch_size, num_workers, options.rounds, options.device)
        for name in pipelines:
            speed = len(split) / statistics.median(times[name])
            rows.append([name, str(num_workers), f"{speed:,.0f}", *ratio(times, name, "ours")])
    report("input_pipeline", options, split, ["pipeline", "workers", "images/s", "range", "time / ours"], rows)


if __name__ == "__main__":
    main()
