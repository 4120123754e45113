"""Write the README's table and figures from the records and weights in this folder: `make results`.

With a folder of CIFAR-10 as argument, also the figure of mistakes: `python results/build.py DIR`.
"""

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

from session8.analysis import misclassified
from session8.checkpoint import load_model
from session8.config import RECIPES, Config
from session8.data import load_cifar10
from session8.plots import BLUE, ORANGE, plot_misclassified
from session8.training import collect_logits

# Where each generated section stands: {name: (file, first line, last line)}.
SECTIONS = {
    name: (RESULTS.parent / file, f"<!-- {name}: written by `make results` -->\n", f"<!-- end of {name} -->\n")
    for name, file in (("results", "README.md"), ("benchmarks", "docs/benchmarks.md"))
}
WEIGHTS = RESULTS / "AdvancedCNN_one_cycle_seed0_cpu.safetensors"  # whose mistakes are shown
COLORS = {"AdvancedCNN": BLUE, "ResNet20": ORANGE}
STYLES = {"default": "--", "one_cycle": "-"}


def read_records():
    """Return the published records by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def read_benchmarks():
    """Return the saved benchmarks by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("benchmarks/*.json"))}


def recipe_name(record):
    """Return the name of a record's recipe, ignoring seed, epochs and batch size; "other" if it has none."""
    config = Config(**record["config"])
    for name in RECIPES:
        if config == Config.named(name, epochs=config.epochs, batch_size=config.batch_size, seed=config.seed):
            return name
    return "other"


def recipe_key(record):
    """Return a record's recipe without its seed, as text. A field that an older record lacks has its default."""
    recipe = asdict(Config(**record["config"])) | {"seed": None, "batch_size": record["batch_size"]}
    return json.dumps(recipe, sort_keys=True)


def place_key(record):
    """Return what two runs must share to be compared, besides the recipe: data and device."""
    return record["data_fingerprint"], record["device"]


def accuracy_table(records):
    """Return a Markdown table with one row per network, recipe, data and device; the runs of a row differ in seed."""

    def key(record):
        network = record["model"], record["width"] or 1.0, record["parameters"], record["macs"]
        return recipe_name(record), recipe_key(record), *network, *place_key(record)

    rows = [
        "| network | recipe | batch | epochs | runs | test accuracy | train accuracy | parameters | MACs "
        "| median epoch | device |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for _, group in groupby(sorted(records.values(), key=key), key):
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


def headline(records):
    """Return the result in one sentence: the mean test accuracy of AdvancedCNN with each recipe."""
    ours = [record for record in records.values() if record["model"] == "AdvancedCNN" and (record["width"] or 1) == 1]
    results = []
    for recipe in RECIPES:
        runs = [record for record in ours if recipe_name(record) == recipe]
        if runs:
            accuracy = statistics.mean(record["history"]["test_accuracy"][-1] for record in runs)
            results.append(f"{accuracy:.2f} % after {runs[0]['config']['epochs']} epochs with the recipe `{recipe}`")
    size = f"{ours[0]['parameters'] / 1e6:.2f} M parameters, {ours[0]['macs'] / 1e6:.1f} M MACs per image"
    return f"Accuracy on the {ours[0]['n_test']:,} test images: {', '.join(results)} ({size}).\n"


def results_section(records):
    """Return the README's section on accuracy."""
    sources = sorted({record["data"] for record in records.values()})
    return (
        f"{headline(records)}\n![Test accuracy over the epochs](results/accuracy.png)\n\n{accuracy_table(records)}\n"
        f"Accuracies are those of the last epoch. Data: {'; '.join(sources)}.\n"
    )


def benchmarks_section(benchmarks):
    """Return the section on speed: one Markdown table per benchmark and device."""
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


def plot_results(records):
    """Plot the test accuracy of all records over the epochs, one colour per network and one line style per recipe."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    for model, color in COLORS.items():
        for recipe, style in STYLES.items():
            runs = [r for r in records.values() if r["model"] == model and recipe_name(r) == recipe]
            curves = [record["history"]["test_accuracy"] for record in runs]
            label = f"{model}, {recipe} (last: {', '.join(f'{values[-1]:.2f}' for values in curves)})"
            for number, curve in enumerate(curves):
                epochs = range(1, len(curve) + 1)
                ax.plot(epochs, curve, style, color=color, linewidth=2, label=None if number else label)
    sources = sorted({record["data"] for record in records.values()})
    ax.set_title(f"Test accuracy: {'; '.join(sources)}", fontsize=12)
    ax.set_xlabel("epoch")
    ax.set_ylabel("accuracy (%), from 60")
    ax.set_ylim(bottom=60)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def plot_mistakes(data):
    """Plot the most confident mistakes of the published weights on the test images in the folder `data`."""
    _, test_split = load_cifar10(data)
    model, _ = load_model(WEIGHTS)
    logits = collect_logits(model, test_split, Config(precision="float32"))
    return plot_misclassified(test_split, misclassified(logits, test_split.labels), rows=2)


def fingerprint(*paths):
    """Return a SHA-256 of files; a figure carries that of its sources as the text "Source"."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") if path.suffix == ".json" else path.read_bytes())
    return digest.hexdigest()


def split_section(name):
    """Return the text before, inside and after a generated section of its file."""
    path, begin, end = SECTIONS[name]
    before, rest = path.read_text(encoding="utf-8").split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


def main(data=None):
    records = read_records()
    source = {"Source": fingerprint(*RESULTS.glob("*.json"))}
    plot_results(records).savefig(RESULTS / "accuracy.png", bbox_inches="tight", metadata=source)
    if data:
        source = {"Source": fingerprint(WEIGHTS)}
        plot_mistakes(data).savefig(RESULTS / "mistakes.png", bbox_inches="tight", metadata=source)
    for name, content in (("results", results_section(records)), ("benchmarks", benchmarks_section(read_benchmarks()))):
        before, _, after = split_section(name)
        SECTIONS[name][0].write_text(before + content + after, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
