"""Write the tables and figures of README.md from the records in this folder, and from nothing else: `make results`."""

import hashlib
import json
import statistics
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

from session8.config import RECIPES, Config
from session8.plots import BLUE, ORANGE

README = RESULTS.parent / "README.md"
MARKS = {
    name: (f"<!-- {name}: written by `make results` -->\n", f"<!-- end of {name} -->\n")
    for name in ("results", "benchmarks")
}
LOOKS = {"AdvancedCNN": (BLUE, {"test": "-", "train": ":"}), "ResNet20": (ORANGE, {"test": "--", "train": "-."})}


def read_records():
    """The published records, by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def read_benchmarks():
    """What the benchmarks measured, by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("benchmarks/*.json"))}


def recipe_name(record):
    """The name of the recipe that a record's configuration is, whatever its seed, epochs and batch size."""
    config = Config(**record["config"])
    for name in RECIPES:
        if config == Config.named(name, epochs=config.epochs, batch_size=config.batch_size, seed=config.seed):
            return name
    return "other"


def recipe_of(record):
    """A record's recipe in full, but for its seed, as text that is equal for equal recipes.

    A number that an older record does not have is the default's.
    """
    recipe = asdict(Config(**record["config"])) | {"seed": None, "batch_size": record["batch_size"]}
    return json.dumps(recipe, sort_keys=True)


def place_of(record):
    """What two runs must share to be compared, beside the recipe: images and device."""
    return record["data_fingerprint"], record["device"]


def accuracy_table(records):
    """A Markdown table: a row for all runs of one network, recipe, data and device, which differ in their seed."""

    def kind(record):
        network = record["model"], record["width"] or 1.0, record["parameters"], record["macs"]
        return recipe_name(record), recipe_of(record), *network, *place_of(record)

    rows = [
        "| network | recipe | batch | epochs | runs | test accuracy, last epoch | train | parameters "
        "| multiply-accumulates | median epoch | device |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for _, group in groupby(sorted(records.values(), key=kind), kind):
        runs = list(group)
        first = runs[0]
        test, train = ([run["history"][f"{split}_accuracy"][-1] for run in runs] for split in ("test", "train"))
        spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
        seconds = statistics.median(second for run in runs for second in run["history"]["seconds"])
        width = first["width"] or 1
        name = first["model"] if width == 1 else f"{first['model']}, width {width:g}"
        rows.append(
            f"| {name} | {recipe_name(first)} | {first['batch_size']} | {first['config']['epochs']} | {len(runs)} "
            f"| {statistics.mean(test):.2f} %{spread} | {statistics.mean(train):.2f} % "
            f"| {first['parameters'] / 1e6:.2f} M | {first['macs'] / 1e6:.1f} M | {seconds:.0f} s | {first['device']} |"
        )
    return "\n".join(rows) + "\n"


def leads(records, recipe):
    """Percentage points of test accuracy that AdvancedCNN, at width 1, is ahead of ResNet20: one number a pair.

    A pair has the same recipe, of this name, the same seed, images and device.
    """
    pairs = {}
    for record in records.values():
        if recipe_name(record) == recipe and (record["width"] or 1) == 1:
            pair = pairs.setdefault((recipe_of(record), record["config"]["seed"], *place_of(record)), {})
            pair[record["model"]] = record["history"]["test_accuracy"][-1]
    return [pair["AdvancedCNN"] - pair["ResNet20"] for pair in pairs.values() if {"AdvancedCNN", "ResNet20"} <= {*pair}]


def results_section(records):
    """What README.md says of accuracy."""
    sources = sorted({record["data"] for record in records.values()})
    parts = [accuracy_table(records), f"Data: {'; '.join(sources)}.\n"]
    for recipe in RECIPES:
        if ahead := leads(records, recipe):
            runs = "one run each" if len(ahead) == 1 else f"{len(ahead)} runs each"
            points = statistics.mean(ahead)
            parts.append(
                f"Recipe `{recipe}`: AdvancedCNN is {abs(points):.2f} points {'ahead of' if points >= 0 else 'behind'} "
                f"ResNet20, with the same seeds, images and device ({runs}).\n"
            )
    parts += [f"![{name}: test accuracy over the epochs](results/{name}.png)\n" for name in figures(records)]
    return "\n".join(parts)


def benchmark_tables(benchmarks):
    """What README.md says of speed: a Markdown table for each benchmark and device."""
    parts = []
    for record in benchmarks.values():
        options = [f"{key.replace('_', ' ')} {listed(value)}" for key, value in record["options"].items()]
        notes = [f"{key}: {value}" for key, value in record["notes"].items()]
        rows = [[cell if isinstance(cell, str) else f"{cell:,.2f}" for cell in row] for row in record["rows"]]
        table = [record["columns"], ["---:"] * len(record["columns"]), *rows]
        parts.append(
            f"`python benchmarks/{record['benchmark']}.py` on {record['device']}, PyTorch {record['versions']['torch']}"
            f" ({'; '.join([*options, *notes])}):\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table)
        )
    return "\n".join(parts)


def listed(value):
    return ", ".join(f"{number:,}" for number in value) if isinstance(value, list) else f"{value:,}"


def figures(records):
    """The records that each figure is made of: {figure's name: {file name: record}}, one figure a recipe."""
    made = {}
    for name, record in records.items():
        made.setdefault(f"accuracy_{recipe_name(record)}", {})[name] = record
    return dict(sorted(made.items()))


def plot_comparison(records, recipe):
    """Accuracy over the epochs of all runs with one recipe: test in thick lines, training in thin ones."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    for model, (color, styles) in LOOKS.items():
        histories = [record["history"] for record in records.values() if record["model"] == model]
        for split, width in (("test", 2), ("train", 1)):
            curves = [history[f"{split}_accuracy"] for history in histories]
            for number, curve in enumerate(curves):
                last = f"{model}, {split} (last: {', '.join(f'{values[-1]:.2f}' for values in curves)})"
                label = None if number else last
                ax.plot(range(1, len(curve) + 1), curve, styles[split], color=color, linewidth=width, label=label)
    sources = sorted({record["data"] for record in records.values()})
    ax.set_title(f"Accuracy with the recipe {recipe}: {'; '.join(sources)}", fontsize=12)
    ax.set_xlabel("epoch")
    ax.set_ylabel("accuracy (%), from 60")
    ax.set_ylim(bottom=60)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def fingerprint(names):
    """A SHA-256 over records, which the figure made of them carries as the text "Source"."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update((RESULTS / name).read_text(encoding="utf-8").encode())  # the same where git ends lines otherwise
    return digest.hexdigest()


def written(text, name):
    """The part of README.md between the marks of one section, and what stands before and after it."""
    begin, end = MARKS[name]
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


def main():
    records, benchmarks = read_records(), read_benchmarks()
    for old in RESULTS.glob("*.png"):
        old.unlink()
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
