"""Write the tables and figures of README.md from the records in this folder, and from nothing else: `make results`."""

import hashlib
import json
import statistics
import sys
from itertools import groupby
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

from config import Config
from plots import plot_accuracy

README = RESULTS.parent / "README.md"
BEGIN, END = "<!-- results: written by `make results` -->\n", "<!-- end of results -->\n"


def read_records():
    """The published records, by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def recipe_name(record):
    """The name of the recipe that a record's configuration is, whatever its seed, epochs and batch size."""
    config = Config(**record["config"])
    for name in ("default", "one_cycle"):
        if config == Config.named(name, epochs=config.epochs, batch_size=config.batch_size, seed=config.seed):
            return name
    return "other"


def accuracy_table(records):
    """A Markdown table: a row for all runs of one network, data and device that differ in their seed alone."""

    def kind(record):
        network = record["model"], record["width"] or 1.0
        recipe = recipe_name(record), record["batch_size"], record["config"]["epochs"]
        rest = json.dumps({**record["config"], "seed": None}, sort_keys=True)
        return *network, *recipe, record["data"], record["device"], rest

    rows = [
        "| network | recipe | batch | epochs | runs | test accuracy, last epoch | train | parameters "
        "| multiply-accumulates | median epoch | device |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for key, group in groupby(sorted(records.values(), key=kind), kind):
        runs = list(group)
        model, width, recipe, batch, epochs, _, device, _ = key
        test, train = ([run["history"][f"{split}_accuracy"][-1] for run in runs] for split in ("test", "train"))
        spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
        seconds = statistics.median(second for run in runs for second in run["history"]["seconds"])
        name = model if width == 1 else f"{model}, width {width:g}"
        rows.append(
            f"| {name} | {recipe} | {batch} | {epochs} | {len(runs)} | {statistics.mean(test):.2f} %{spread} "
            f"| {statistics.mean(train):.2f} % | {runs[0]['parameters'] / 1e6:.2f} M | {runs[0]['macs'] / 1e6:.1f} M "
            f"| {seconds:.0f} s | {device} |"
        )
    return "\n".join(rows) + "\n"


def section(records):
    """The part of README.md between its two marks."""
    sources = sorted({record["data"] for record in records.values()})
    figures = [f"![{recipe_name(r)}: accuracy over the epochs](results/{figure_name(n)})\n" for n, r in records.items()]
    return f"{accuracy_table(records)}\nData: {'; '.join(sources)}.\n\n{''.join(figures)}"


def fingerprint(record_name):
    """The SHA-256 of a record, which its figure carries as the text "Source"."""
    return hashlib.sha256((RESULTS / record_name).read_bytes()).hexdigest()


def figure_name(record_name):
    return record_name.replace(".json", ".png")


def main():
    records = read_records()
    for name, record in records.items():
        figure = plot_accuracy(record["history"], f"{record['model']}, {recipe_name(record)}, {record['data']}")
        figure.savefig(RESULTS / figure_name(name), bbox_inches="tight", metadata={"Source": fingerprint(name)})
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + BEGIN + section(records) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
