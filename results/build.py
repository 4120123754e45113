"""Write the tables and figures of README.md, MODEL_CARD.md and docs/ from the records and weights in this folder.

`make results` calls it. With a folder of CIFAR-10, it also draws the mistakes: `make results DATA_ROOT=DIR`.
"""

import hashlib
import json
import re
import statistics
import sys
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

from session8.analysis import misclassified
from session8.checkpoint import load_model
from session8.config import RECIPES, Config
from session8.data import load_cifar10
from session8.plots import plot_misclassified
from session8.training import collect_logits

# Where each generated section stands: {name: (file, first line, last line)}.
SECTIONS = {
    name: (RESULTS.parent / file, f"<!-- {name}: written by `make results` -->\n", f"<!-- end of {name} -->\n")
    for name, file in (
        ("results", "README.md"),
        ("weights", "results/MODEL_CARD.md"),
        ("parts of fast", "docs/design.md"),
        ("benchmarks", "docs/benchmarks.md"),
    )
}
WEIGHTS = RESULTS / "AdvancedCNN_fast_seed0_bfloat16.safetensors"  # whose mistakes are shown
FAST = Config.named("fast")
# The recipe `fast` without one of its parts.
PARTS = {
    "small images": replace(FAST, low_res_epochs=0),
    "average of the weights": replace(FAST, ema_decay=0.0),
    "scaled biases": replace(FAST, bias_lr_scale=1.0),
    "width": replace(FAST, width=1.0),
    "alternating flip": replace(FAST, flip="random"),
}
NAMED = {
    **{name: Config.named(name) for name in RECIPES},
    **{f"fast without {name}": part for name, part in PARTS.items()},
}
AIRBENCH = "https://github.com/KellerJordan/cifar10-airbench/tree/00e4a0a3cef82fc752c17453bab2435ddc1f7f1e"
# Published elsewhere: network, epochs, MACs, PFLOP, accuracy in one pass, with six views.
THEIRS = (
    ("[ResNet-20, He et al. 2015](https://arxiv.org/abs/1512.03385)", "164", "40.6 M", "1.99", "91.25 %", ""),
    (f"[airbench94, Jordan 2024]({AIRBENCH})", "9.9", "118 M", "0.36", "", "94.01 %"),
    (f"[airbench94_spectral, Jordan]({AIRBENCH})", "", "", "0.29", "", "94.05 %"),
)
COLORS = {"default": "C0", "one_cycle": "C1", "fast": "C2"}
STYLES = {"AdvancedCNN": "-", "ResNet20": "--"}


def read_records():
    """Return the published records by file name."""
    return {path.name: _read(path) for path in sorted(RESULTS.glob("*.json"))}


def read_benchmarks():
    """Return the saved benchmarks by file name."""
    return {path.name: _read(path) for path in sorted(RESULTS.glob("benchmarks/*.json"))}


def _read(path):
    return json.loads(re.sub(r"\b1 threads\b", "1 thread", path.read_text()))  # as older versions wrote


def recipe_name(record):
    """Return the name in NAMED of a record's recipe, whatever its seed, batch size and precision; None if none."""
    config = replace(Config(**record["config"]), seed=0, precision="auto", batch_size=None)
    return next((name for name, named in NAMED.items() if config == replace(named, batch_size=None)), None)


def published(records, recipes=RECIPES, precise=False):
    """Return the records of some recipes; without those in float32, unless `precise`."""
    chosen = [record for record in records.values() if recipe_name(record) in recipes]
    return [record for record in chosen if precise or record["arithmetic"] != "float32"]


def _row_key(record):
    """Return what the runs of one row of a table share, in the order of the rows."""
    recipe = list(NAMED).index(recipe_name(record)), record["batch_size"], record["data_fingerprint"]
    machine = record["arithmetic"] == "float32", record["arithmetic"], record["device"]  # float32 comes last
    code = json.dumps([record["sources"], record["versions"]], sort_keys=True)
    return record["model"], record["macs"], *recipe, *machine, code


def rows_of(records):
    """Return the runs of each row of a table, a list of lists of records."""
    return [list(group) for _, group in groupby(sorted(records, key=_row_key), _row_key)]


def mean_and_spread(values):
    """Return a mean, with the sample standard deviation if there are several values, as text in percent."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} %"


def test_accuracies(runs, views=1):
    return [run["history"]["test_accuracy"][-1] if views == 1 else run["views"][str(views)] for run in runs]


def minutes_of(run):
    """Return the minutes from the start to the test of each epoch."""
    return list(accumulate(second / 60 for second in run["history"]["seconds"]))


def minutes_to(accuracy, run):
    """Return the minutes of training, tests included, after which a test first reached an accuracy; None if none."""
    tested = zip(minutes_of(run), run["history"]["test_accuracy"], strict=True)
    return next((minutes for minutes, reached in tested if reached >= accuracy), None)


def on_main_device(records):
    """Return the records of the device that has the most; times are compared on one device only."""
    device = statistics.mode(record["device"] for record in records)
    return [record for record in records if record["device"] == device]


def mean_minutes(values):
    return "" if None in values else f"{statistics.mean(values):.1f}"


def minutes_of_training(runs):
    return mean_minutes([run["seconds"] / 60 for run in runs])


def accuracy_table(records):
    """Return a Markdown table with a row per network, recipe, arithmetic and device, whose runs differ in the seed."""
    rows = [
        "| network | recipe | epochs | MACs | PFLOP | one pass | 2 views | 6 views "
        "| minutes | to 82 % | to 90 % | device |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for runs in rows_of(published(records, precise=True)):
        first = runs[0]
        cells = [
            first["model"], recipe_name(first), str(first["config"]["epochs"]), f"{first['macs'] / 1e6:.1f} M",
            f"{first['pflop']:.2f}", f"{mean_and_spread(test_accuracies(runs))} ({len(runs)})",
            *(mean_and_spread(test_accuracies(runs, views)) for views in (2, 6)),
            minutes_of_training(runs),
            *(mean_minutes([minutes_to(accuracy, run) for run in runs]) for accuracy in (82, 90)),
            f"{first['device']}, {first['arithmetic']}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    for name, epochs, macs, pflop, one_pass, six_views in THEIRS:
        rows.append(f"| {name} | theirs | {epochs} | {macs} | {pflop} | {one_pass} | | {six_views} | | | | |")
    return "\n".join(rows) + "\n"


def headline(records):
    """Return the result in one sentence: the mean test accuracy of AdvancedCNN with each recipe, on one device."""
    ours = on_main_device([record for record in published(records) if record["model"] == "AdvancedCNN"])
    results = [
        f"{statistics.mean(test_accuracies(runs)):.2f} % with the recipe `{recipe_name(runs[0])}` "
        f"({len(runs)} run{'s' if len(runs) > 1 else ''}, {minutes_of_training(runs)} minutes)"
        for runs in rows_of(ours)
    ]
    return (
        f"Accuracy on the {ours[0]['n_test']:,} test images in one pass, after training on {ours[0]['device']}: "
        f"{', '.join(results)}.\n"
    )


def results_section(records):
    """Return the README's section on accuracy."""
    shown = published(records, precise=True)
    data, batches = ("; ".join(sorted({str(record[name]) for record in shown})) for name in ("data", "batch_size"))
    return (
        f"{headline(records)}\n![Test accuracy over the minutes of training](results/accuracy.png)\n\n"
        f"{accuracy_table(records)}\n"
        "Test accuracies of the last epoch: mean ± standard deviation over seeds (number of seeds). "
        f"Batches of {batches} (`default` on a CPU: `--batch-size 128`). Data: {data}.\n"
    )


def parts_section(records):
    """Return the table of what each part of the recipe `fast` is worth."""
    rows = [
        "| recipe | PFLOP | one pass | 2 views | 6 views | minutes | device |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    recipes = ["fast", *(f"fast without {name}" for name in PARTS)]
    order = {name: place for place, name in enumerate(recipes)}
    ours = [record for record in published(records, recipes) if record["model"] == "AdvancedCNN"]
    for runs in sorted(rows_of(ours), key=lambda runs: order[recipe_name(runs[0])]):
        accuracies = [mean_and_spread(test_accuracies(runs, views)) for views in (1, 2, 6)]
        accuracies[0] += f" ({len(runs)})"
        cells = [recipe_name(runs[0]), f"{runs[0]['pflop']:.2f}", *accuracies, minutes_of_training(runs)]
        rows.append(f"| {' | '.join([*cells, runs[0]['device']])} |")
    return "\n".join(rows) + "\n"


def weights_section(records):
    """Return the model card's table of the published weights."""
    rows = [
        "| file | recipe | parameters | MACs | one pass | 2 views | 6 views | NLL | commit |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for path in sorted(RESULTS.glob("*.safetensors")):
        record = records[path.with_suffix(".json").name]
        accuracies = " | ".join(f"{test_accuracies([record], views)[0]:.2f} %" for views in (1, 2, 6))
        rows.append(
            f"| `{path.name}` | {recipe_name(record)} | {record['parameters'] / 1e6:.2f} M "
            f"| {record['macs'] / 1e6:.1f} M | {accuracies} | {record['history']['test_loss'][-1]:.3f} "
            f"| {record['commit'][:8]} |"
        )
    return "\n".join(rows) + "\n"


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
    """Plot the test accuracy over the minutes, without float32: a panel per device, which has its own speed.

    Each recipe has a colour, each network a line style.
    """
    shown = rows_of(published(records))
    devices = sorted({runs[0]["device"] for runs in shown})
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, len(devices), sharex=True, sharey=True, squeeze=False)[0]
    panels = dict(zip(devices, axes, strict=True))
    for runs in shown:
        look = {"color": COLORS[recipe_name(runs[0])], "linestyle": STYLES[runs[0]["model"]]}
        label = f"{runs[0]['model']}, {recipe_name(runs[0])}: {mean_and_spread(test_accuracies(runs))} ({len(runs)})"
        for number, run in enumerate(runs):
            accuracy = run["history"]["test_accuracy"]
            panels[run["device"]].plot(minutes_of(run), accuracy, **look, label=None if number else label)
    figure.suptitle("Test accuracy over the minutes of training, tests included", fontsize=12)
    for device, ax in panels.items():
        ax.set_xlabel(f"minutes on {device}")
        ax.set_ylim(bottom=70)
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right", fontsize=9)
    panels[devices[0]].set_ylabel("accuracy (%), from 70")
    return figure


def plot_mistakes(data):
    """Plot the most confident mistakes of the published weights on the test images in the folder `data`."""
    _, test_split = load_cifar10(data)
    model, about = load_model(WEIGHTS)
    logits = collect_logits(model, test_split, Config(**about["config"]))
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


def sections():
    """Return the content of each generated section: {name: text}."""
    records = read_records()
    return {
        "results": results_section(records),
        "weights": weights_section(records),
        "parts of fast": parts_section(records),
        "benchmarks": benchmarks_section(read_benchmarks()),
    }


def main(data=None):
    source = {"Source": fingerprint(*RESULTS.glob("*.json"))}
    plot_results(read_records()).savefig(RESULTS / "accuracy.png", bbox_inches="tight", metadata=source)
    if data:
        source = {"Source": fingerprint(WEIGHTS)}
        plot_mistakes(data).savefig(RESULTS / "mistakes.png", bbox_inches="tight", metadata=source)
    for name, content in sections().items():
        before, _, after = split_section(name)
        SECTIONS[name][0].write_text(before + content + after, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
