"""Write the tables and figures of README.md from the records in this folder, and from nothing else: `make results`."""

import hashlib
import json
import statistics
import sys
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

from config import Config
from plots import BLUE, GREEN, ORANGE

README = RESULTS.parent / "README.md"
MARKS = {
    name: (f"<!-- {name}: written by `make results` -->\n", f"<!-- end of {name} -->\n")
    for name in ("results", "benchmarks")
}
COLOURS = {"AdvancedCNN": BLUE, "ResNet20": ORANGE}


def read_records():
    """The published records, by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def read_benchmarks():
    """What the benchmarks measured, by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("benchmarks/*.json"))}


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


def lead(records, recipe):
    """Percentage points of test accuracy that AdvancedCNN is ahead of ResNet20, over the seeds that both have.

    Of runs with this recipe, 40 epochs and batch size 128; None if no seed has both.
    """
    accuracy = {}
    for record in records.values():
        config = record["config"]
        if (recipe_name(record), record["batch_size"], config["epochs"]) == (recipe, 128, 40):
            accuracy[record["model"], config["seed"]] = record["history"]["test_accuracy"][-1]
    leads = [
        accuracy["AdvancedCNN", seed] - accuracy["ResNet20", seed]
        for model, seed in accuracy
        if model == "ResNet20" and ("AdvancedCNN", seed) in accuracy
    ]
    return statistics.mean(leads) if leads else None


def results_section(records):
    """What README.md says of accuracy."""
    sources = sorted({record["data"] for record in records.values()})
    parts = [accuracy_table(records), f"Data: {'; '.join(sources)}.\n"]
    for recipe in ("default", "one_cycle"):
        if (points := lead(records, recipe)) is not None:
            parts.append(
                f"With the recipe `{recipe}`, AdvancedCNN is {points:.2f} points ahead of ResNet20 at equal seeds.\n"
            )
    parts += [f"![{name}: test accuracy over the epochs](results/{name}.png)\n" for name in figures(records)]
    return "\n".join(parts)


def benchmark_tables(benchmarks):
    """What README.md says of speed: a Markdown table for each benchmark and device."""
    parts = []
    for record in benchmarks.values():
        known = ("benchmark", "device", "columns", "rows", "versions", "finished")
        more = [f"{key.replace('_', ' ')}: {value}" for key, value in record.items() if key not in known and value]
        rows = [[cell if isinstance(cell, str) else f"{cell:,.2f}" for cell in row] for row in record["rows"]]
        table = [record["columns"], ["---:"] * len(record["columns"]), *rows]
        parts.append(
            f"`python benchmarks/{record['benchmark']}.py` on {record['device']}, PyTorch {record['versions']['torch']}"
            f" ({'; '.join(more)}):\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table)
        )
    return "\n".join(parts)


def figures(records):
    """The records that each figure is made of: {figure's name: {file name: record}}, one figure a recipe."""
    made = {}
    for name, record in records.items():
        made.setdefault(f"accuracy_{recipe_name(record)}", {})[name] = record
    return dict(sorted(made.items()))


def plot_comparison(records, recipe):
    """Test accuracy over the epochs of all runs with one recipe, with that of training as a thin line."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    labelled = set()
    for record in sorted(records.values(), key=lambda record: record["model"]):
        history, model = record["history"], record["model"]
        color = COLOURS.get(model, GREEN)
        epochs = range(1, len(history["seconds"]) + 1)
        for split, width, style in (("test", 2, "-"), ("train", 1, ":")):
            values = history[f"{split}_accuracy"]
            label = None if model in labelled else f"{model}, {split} (last: {values[-1]:.2f} %)"
            ax.plot(epochs, values, style, color=color, linewidth=width, label=label)
        labelled.add(model)
    ax.set_title(f"Accuracy with the recipe {recipe}: {record['data']}", fontsize=12)
    ax.set_xlabel("epoch")
    ax.set_ylabel("accuracy (%)")
    ax.set_ylim(bottom=60)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def fingerprint(names):
    """A SHA-256 over records, which the figure made of them carries as the text "Source"."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update((RESULTS / name).read_bytes())
    return digest.hexdigest()


def written(text, name):
    """The part of README.md between the marks of one section, and what stands before and after it."""
    begin, end = MARKS[name]
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


def main():
    records, benchmarks = read_records(), read_benchmarks()
    for name, of in figures(records).items():
        figure = plot_comparison(of, name.removeprefix("accuracy_"))
        figure.savefig(RESULTS / f"{name}.png", bbox_inches="tight", metadata={"Source": fingerprint(of)})
    text = README.read_text(encoding="utf-8")
    for name, content in (("results", results_section(records)), ("benchmarks", benchmark_tables(benchmarks))):
        before, _, after = written(text, name)
        text = before + content + after
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
