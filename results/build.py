"""Write the tables and figures of README.md, MODEL_CARD.md and docs/ from the records and weights in this folder.

`make results` runs `python -m results.build`. With a folder of CIFAR-10, it also draws the mistakes:
`make results DATA_ROOT=DIR`.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from session8.analysis import misclassified
from session8.checkpoint import load_model
from session8.config import RECIPES, Config
from session8.data import load_cifar10
from session8.evaluation import collect_logits
from session8.plots import plot_misclassified

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
# The file of each generated section.
SECTIONS = {
    "results": ROOT / "README.md",
    "weights": RESULTS / "MODEL_CARD.md",
    "parts of fast": ROOT / "docs" / "design.md",
    "benchmarks": ROOT / "docs" / "benchmarks.md",
}
WEIGHTS = RESULTS / "AdvancedCNN_fast_seed0_bfloat16.safetensors"  # whose mistakes are shown
FAST = Config.named("fast")
# The named recipes, and `fast` without one of its parts, in the order of the tables.
NAMED = {
    **{name: Config.named(name) for name in RECIPES},
    "fast without small images": replace(FAST, low_res_epochs=0),
    "fast without average of the weights": replace(FAST, ema_decay=0.0),
    "fast without scaled biases": replace(FAST, bias_lr_scale=1.0),
    "fast without width": replace(FAST, width=1.0),
    "fast without alternating flip": replace(FAST, flip="random"),
}
AIRBENCH = "https://github.com/KellerJordan/cifar10-airbench/tree/00e4a0a3cef82fc752c17453bab2435ddc1f7f1e"
# Published elsewhere, in the columns of the table in README.md.
THEIRS = f"""\
| [ResNet-20, He et al. 2015](https://arxiv.org/abs/1512.03385) | theirs | 164 | 40.6 M | 1.99 | 91.25 % | |  | | | | |
| [airbench94, Jordan 2024]({AIRBENCH}) | theirs | 9.9 | 118 M | 0.36 |  | | 94.01 % | | | | |
| [airbench94_spectral, Jordan]({AIRBENCH}) | theirs |  |  | 0.29 |  | | 94.05 % | | | | |
"""
COLORS = {"default": "C0", "one_cycle": "C1", "fast": "C2"}
STYLES = {"AdvancedCNN": "-", "ResNet20": "--"}
# Runs that are equal in these columns differ in the seed only. Tables are sorted by them.
SAME = ["network", "recipe", "epochs", "MACs", "PFLOP", "batch_size", "data_fingerprint"]
SAME += ["arithmetic", "device", "sources", "versions"]
FORMATS = {
    "MACs": lambda macs: f"{macs / 1e6:.1f} M",
    "parameters": lambda number: f"{number / 1e6:.2f} M",
    "PFLOP": "{:.2f}".format,
    "NLL": "{:.3f}".format,
    "commit": lambda commit: commit[:8],
}
TEXTS = ("network", "recipe", "device", "file", "commit")  # these columns are aligned to the left


def read_records(folder: Path = RESULTS) -> dict[str, dict]:
    """Return the records in a folder by file name without suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def recipe_name(record: dict) -> str | None:
    """Return the name in NAMED of a record's recipe, whatever its seed, batch size and precision; None if none."""
    config = replace(Config(**record["config"]), seed=0, precision="auto", batch_size=None)
    return next((name for name, named in NAMED.items() if config == replace(named, batch_size=None)), None)


def table_of_runs(records: dict[str, dict]) -> pd.DataFrame:
    """Return a row per record, with the record's fields and the columns of the tables; accuracies are in percent.

    Records of recipes that have no name are left out.
    """
    runs = pd.DataFrame.from_dict(records, orient="index")
    runs = runs.rename(columns={"model": "network", "macs": "MACs", "pflop": "PFLOP"})
    runs["recipe"] = pd.Categorical([recipe_name(record) for record in records.values()], list(NAMED), ordered=True)
    runs["epochs"] = [config["epochs"] for config in runs["config"]]
    runs["one pass"] = [history["test_accuracy"][-1] for history in runs["history"]]
    for number in (2, 6):
        runs[f"{number} views"] = [views[str(number)] for views in runs["views"]]
    runs["NLL"] = [history["test_loss"][-1] for history in runs["history"]]
    runs["minutes"] = runs["seconds"] / 60
    for goal in (82, 90):
        runs[f"to {goal} %"] = [minutes_to(goal, history) for history in runs["history"]]
    for column in ("sources", "versions"):  # pandas groups by texts, not by dicts
        runs[column] = [json.dumps(value, sort_keys=True) for value in runs[column]]
    return runs[runs["recipe"].notna()]


def minutes_to(goal: float, history: dict) -> float:
    """Return the minutes of training, tests included, after which a test first reached an accuracy; NaN if none."""
    reached = np.array(history["test_accuracy"]) >= goal
    return np.cumsum(history["seconds"])[reached.argmax()] / 60 if reached.any() else np.nan


def mean_and_spread(values: pd.Series) -> str:
    """Return a mean, with the sample standard deviation if there are several values, as text in percent."""
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread} %"


def mean_minutes(values: pd.Series) -> str:
    """Return a mean as text; an empty one if a run did not reach the accuracy."""
    return "" if values.isna().any() else f"{values.mean():.1f}"


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per group of runs that differ in the seed only, with its means as text."""
    accuracies = dict.fromkeys(["one pass", "2 views", "6 views"], mean_and_spread)
    minutes = dict.fromkeys(["minutes", "to 82 %", "to 90 %"], mean_minutes)
    groups = runs.groupby(SAME, observed=True)
    table = groups.agg(accuracies | minutes)
    table["one pass"] += " (" + groups.size().astype(str) + ")"
    return table.reset_index()


def markdown(table: pd.DataFrame, columns: list[str]) -> str:
    """Return columns of a table in Markdown."""
    cells = [table[column].map(FORMATS.get(column, str)) for column in columns]
    lines = [columns, ["---" if column in TEXTS else "---:" for column in columns], *zip(*cells, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def headline(runs: pd.DataFrame) -> str:
    """Return the result in one sentence: AdvancedCNN with each recipe, on the device that has the most runs."""
    ours = runs[(runs["network"] == "AdvancedCNN") & (runs["arithmetic"] != "float32")]
    device = ours["device"].mode()[0]
    groups = ours[ours["device"] == device].groupby(SAME, observed=True)
    results = [
        f"{group['one pass'].mean():.2f} % with the recipe `{group['recipe'].iloc[0]}` "
        f"({len(group)} run{'s' if len(group) > 1 else ''}, {group['minutes'].mean():.1f} minutes)"
        for _, group in groups
    ]
    return f"Accuracy on the 10,000 test images in one pass, after training on {device}: {', '.join(results)}.\n"


def results_section(runs: pd.DataFrame) -> str:
    """Return README.md's section on accuracy."""
    runs = runs[runs["recipe"].isin(RECIPES)]
    table = summary(runs)
    table["device"] += ", " + table["arithmetic"]
    columns = ["network", "recipe", "epochs", "MACs", "PFLOP", "one pass", "2 views", "6 views"]
    columns += ["minutes", "to 82 %", "to 90 %", "device"]
    batches, data = ("; ".join(sorted(runs[column].astype(str).unique())) for column in ("batch_size", "data"))
    return (
        f"{headline(runs)}\n![Test accuracy over the minutes of training](results/accuracy.png)\n\n"
        f"{markdown(table, columns)}{THEIRS}\n"
        "Test accuracies of the last epoch: mean ± standard deviation over seeds (number of seeds). "
        f"Batches of {batches} (`default` on a CPU: `--batch-size 128`). Data: {data}.\n"
    )


def parts_section(runs: pd.DataFrame) -> str:
    """Return the table of what each part of the recipe `fast` is worth."""
    fast = runs["recipe"].str.startswith("fast")
    ours = runs[fast & (runs["network"] == "AdvancedCNN") & (runs["arithmetic"] != "float32")]
    return markdown(summary(ours), ["recipe", "PFLOP", "one pass", "2 views", "6 views", "minutes", "device"])


def weights_section(runs: pd.DataFrame) -> str:
    """Return the model card's table of the published weights."""
    files = sorted(RESULTS.glob("*.safetensors"))
    table = runs.loc[[path.stem for path in files]].assign(file=[f"`{path.name}`" for path in files])
    accuracies = ["one pass", "2 views", "6 views"]
    table[accuracies] = table[accuracies].map("{:.2f} %".format)
    return markdown(table, ["file", "recipe", "parameters", "MACs", *accuracies, "NLL", "commit"])


def benchmarks_section(benchmarks: dict[str, dict]) -> str:
    """Return the section on speed: one Markdown table per benchmark and device."""
    parts = []
    for record in benchmarks.values():
        options = []
        for key, value in record["options"].items():
            values = value if isinstance(value, list) else [value]
            options.append(f"{key.replace('_', ' ')} {', '.join(f'{number:,}' for number in values)}")
        options += [f"{key}: {value}" for key, value in record["notes"].items()]
        table = pd.DataFrame(record["rows"], columns=record["columns"])
        table = table.map(lambda cell: cell if isinstance(cell, str) else f"{cell:,.2f}")
        parts.append(
            f"`python -m benchmarks.{record['benchmark']}` on {record['device']}, PyTorch {record['versions']['torch']}"
            f" ({'; '.join(options)}):\n\n{markdown(table, record['columns'])}"
        )
    return "\n".join(parts)


def plot_results(runs: pd.DataFrame) -> Figure:
    """Plot the test accuracy over the minutes, without float32: a panel per device, which has its own speed.

    Each recipe has a colour, each network a line style.
    """
    runs = runs[runs["recipe"].isin(RECIPES) & (runs["arithmetic"] != "float32")]
    devices = sorted(runs["device"].unique())
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, len(devices), sharex=True, sharey=True, squeeze=False)[0]
    for device, ax in zip(devices, axes, strict=True):
        for _, group in runs[runs["device"] == device].groupby(SAME, observed=True):
            network, recipe = group[["network", "recipe"]].iloc[0]
            label = f"{network}, {recipe}: {mean_and_spread(group['one pass'])} ({len(group)})"
            for history in group["history"]:
                minutes = np.cumsum(history["seconds"]) / 60
                ax.plot(minutes, history["test_accuracy"], color=COLORS[recipe], linestyle=STYLES[network], label=label)
                label = None  # one entry in the legend
        ax.set_xlabel(f"minutes on {device}")
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right", fontsize=9)
    figure.suptitle("Test accuracy over the minutes of training, tests included", fontsize=12)
    axes[0].set(xlim=(0, None), ylim=(70, None), ylabel="accuracy (%), from 70")  # of all panels
    return figure


def plot_mistakes(data: str) -> Figure:
    """Plot the most confident mistakes of the published weights on the test images in the folder `data`."""
    _, test_split = load_cifar10(data)
    model, about = load_model(WEIGHTS)
    logits = collect_logits(model, test_split, Config(**about["config"]))
    return plot_misclassified(test_split, misclassified(logits, test_split.labels), rows=2)


def fingerprint(*paths: Path) -> str:
    """Return a SHA-256 of files; a figure carries that of its sources as the text "Source"."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def split_section(name: str) -> tuple[str, str, str]:
    """Return the text before, inside and after a generated section of its file, the marks not inside."""
    begin, end = f"<!-- {name}: written by `make results` -->\n", f"<!-- end of {name} -->\n"
    before, rest = SECTIONS[name].read_text(encoding="utf-8").split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


def sections() -> dict[str, str]:
    """Return the content of each generated section by its name."""
    runs = table_of_runs(read_records())
    return {
        "results": results_section(runs),
        "weights": weights_section(runs),
        "parts of fast": parts_section(runs),
        "benchmarks": benchmarks_section(read_records(RESULTS / "benchmarks")),
    }


def main(data: str | None = None):
    source = {"Source": fingerprint(*RESULTS.glob("*.json"))}
    figure = plot_results(table_of_runs(read_records()))
    figure.savefig(RESULTS / "accuracy.png", bbox_inches="tight", metadata=source)
    if data:
        source = {"Source": fingerprint(WEIGHTS)}
        plot_mistakes(data).savefig(RESULTS / "mistakes.png", bbox_inches="tight", metadata=source)
    for name, content in sections().items():
        before, _, after = split_section(name)
        SECTIONS[name].write_text(before + content + after, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
