"""Write the tables and figures of README.md, results/ and docs/ from the records and weights in this folder.

`make results` runs `python -m results.build`.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from session8.config import RECIPES, Config
from session8.console import plural

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
# The file of each generated section.
SECTIONS = {
    "summary": ROOT / "README.md",
    "results": RESULTS / "README.md",
    "parts of fast": RESULTS / "README.md",
    "weights": RESULTS / "MODEL_CARD.md",
    "benchmarks": ROOT / "docs" / "benchmarks.md",
}
FAST = Config.named("fast")
# The named recipes, and `fast` without one of its parts, in the order of the tables.
NAMED = {
    **{name: Config.named(name) for name in RECIPES},
    # With what was tuned for SGD.
    "fast with SGD": replace(
        FAST,
        optimizer="sgd",
        batch_size=128,
        lr=0.1,
        momentum=0.9,
        lr_end=0.05,
        warmup=0.25,
        weight_decay=6e-4,
        bias_lr_scale=16.0,
        ema_decay=0.996,
    ),
    "fast without small images": replace(FAST, low_res_epochs=0),
    "fast without average of the weights": replace(FAST, ema_decay=0.0),
    "fast without scaled biases": replace(FAST, bias_lr_scale=1.0),
    "fast without width": replace(FAST, width=1.0),
    "fast without alternating flip": replace(FAST, flip="random"),
    "fast without label smoothing": replace(FAST, label_smoothing=0.0),
}
# Published elsewhere: accuracies in percent, MACs per image, and images seen in training. Their six views are the image
# and two shifts, each with its mirror image.
AIRBENCH = "https://github.com/KellerJordan/cifar10-airbench"
CHENYAOFO = "https://github.com/chenyaofo/pytorch-cifar-models"
HIVERGE = "https://github.com/hiverge/cifar10-speedrun"
COLUMNS = ["name", "source", "images", "MACs", "one pass", "6 views", "runs", "label"]
THEIRS = pd.DataFrame(
    [
        (
            "ResNet-20, He et al. 2015",
            "https://arxiv.org/abs/1512.03385",
            64_000 * 128,
            40.6e6,
            91.25,
            None,
            1,
            "right",
        ),
        ("ResNet-20, chenyaofo", CHENYAOFO, 200 * 50_000, 40.81e6, 92.60, None, 1, "right"),
        ("ResNet-56, chenyaofo", CHENYAOFO, 200 * 50_000, 125.75e6, 94.37, None, 1, "above"),
        ("airbench94_muon", AIRBENCH, 200 * 2_000, 118.15e6, None, 94.01, 200, "right"),
        ("airbench95", AIRBENCH, 15 * 48 * 1_024, 301.5e6, None, 95.01, 200, "right"),
        ("cifar10-speedrun, Hiverge", HIVERGE, 245 * 1_536, 118.15e6, 93.18, 94.01, 200, "below"),
    ],
    columns=COLUMNS,
)
THEIRS["PFLOP"] = 6 * THEIRS["MACs"] * THEIRS["images"] / 1e15
THEIRS["epochs"] = (THEIRS["images"] / 50_000).round(1)
COLORS = {"default": "C0", "one_cycle": "C1", "fast": "C2", "accurate": "C3"}
LABELS = {  # offset in points and alignment of a name on each side of its point
    "left": ((-6, 3), "right"), "right": ((7, -3), "left"), "above": ((0, 7), "center"), "below": ((0, -13), "center"),
}  # fmt: skip
STYLES = {"AdvancedCNN": ("-", ":"), "ResNet20": ("--", "-.")}  # lines of runs in other arithmetic, and in float32
# Runs that are equal in these columns differ in the seed only. Tables are sorted by them.
SAME = ["network", "recipe", "epochs", "MACs", "PFLOP", "batch_size", "data_fingerprint"]
SAME += ["arithmetic", "device", "sources", "versions"]
FORMATS = {
    "epochs": "{:g}".format,
    "MACs": lambda macs: f"{macs / 1e6:.3g} M",
    "parameters": lambda number: f"{number / 1e6:.2f} M",
    "PFLOP": "{:.3f}".format,
    "NLL": "{:.3f}".format,
    "commit": lambda commit: commit[:8],
}
# What README.md calls the devices whose names match a pattern.
PLACES = {"two CPU cores": ", 2 threads$", "an H100": "^NVIDIA H100 "}
TEXTS = ("network", "recipe", "device", "file", "commit")  # these columns are aligned to the left


def read_records(folder: Path = RESULTS) -> dict[str, dict]:
    """Return the records in a folder by file name without suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def recipe_name(record: dict) -> str | None:
    """Return the name in NAMED of a record's recipe, whatever its seed and precision; None if it has none."""
    config = replace(Config(**record["config"]), seed=0, precision="auto")
    return next((name for name, named in NAMED.items() if config == named), None)


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
    runs["seed"] = [config["seed"] for config in runs["config"]]
    for column in ("sources", "versions"):  # pandas groups by texts, not by dicts
        runs[column] = [json.dumps(value, sort_keys=True) for value in runs[column]]
    return runs[runs["recipe"].notna()]


def mean_and_spread(values: pd.Series) -> str:
    """Return a mean, with the sample standard deviation if there are several values, as text in percent."""
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread} %"


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per group of runs that differ in the seed only, with its means as text."""
    accuracies = dict.fromkeys(["one pass", "2 views", "6 views"], mean_and_spread)
    others = {
        "minutes": lambda values: f"{values.mean():.3g}",
        "seed": lambda seeds: ", ".join(map(str, sorted(seeds))),
    }
    table = runs.groupby(SAME, observed=True).agg(accuracies | others).reset_index()
    table["device"] += ", " + table["arithmetic"]
    return table.rename(columns={"seed": "seeds", "batch_size": "batch"})


def main_group(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the largest group of runs that differ in the seed only; of equally large groups, the fastest."""
    groups = (group for _, group in runs.groupby(SAME, observed=True))
    return max(groups, key=lambda group: (len(group), -group["minutes"].mean()))


def markdown(table: pd.DataFrame, columns: list[str]) -> str:
    """Return columns of a table in Markdown."""
    cells = [table[column].map(FORMATS.get(column, str), na_action="ignore").fillna("") for column in columns]
    lines = [columns, ["---" if column in TEXTS else "---:" for column in columns], *zip(*cells, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main_groups_by_place(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the largest group of runs on each of PLACES that has any."""
    there = {place: runs[runs["device"].str.contains(pattern)] for place, pattern in PLACES.items()}
    return {place: main_group(some) for place, some in there.items() if len(some)}


def fast_sentence(runs: pd.DataFrame) -> str:
    """Return README.md's sentence on runs of `fast`: accuracy and time on each of PLACES, operations, and others'."""
    reached = []
    for place, group in main_groups_by_place(runs).items():
        minutes, accuracy = group["minutes"].mean(), group["one pass"].mean()
        time = f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"
        reached.append(f"{accuracy:.2f} % in {time} on {place} ({plural(len(group), 'run')})")
    ours, theirs = main_group(runs), THEIRS[THEIRS["6 views"] >= 94].sort_values("PFLOP").iloc[0]
    return (
        f"`fast` reaches {', and '.join(reached)}. With six views, {plural(len(ours), 'run')} average "
        f"{ours['6 views'].mean():.2f} % after {ours['PFLOP'].iloc[0]:.3f} PFLOP of training; the published result "
        f"above 94 % with the fewest operations that we know takes {theirs['PFLOP']:.3f} by our count "
        f"([{theirs['name']}]({theirs['source']}))."
    )


def summary_section(runs: pd.DataFrame) -> str:
    """Return README.md's sentence and table: AdvancedCNN with each recipe, with the largest group's accuracies."""
    ours = runs[(runs["network"] == "AdvancedCNN") & runs["recipe"].isin(RECIPES)]
    rows = []
    for recipe, some in ours.groupby("recipe", observed=True):
        means, groups = main_group(some)[["one pass", "6 views"]].mean(), main_groups_by_place(some)
        minutes = [groups[place]["minutes"].mean() if place in groups else None for place in PLACES]
        cells = ["–" if mean is None else f"{mean:.2g}" if mean < 10 else f"{mean:.0f}" for mean in minutes]
        rows.append((f"`{recipe}`", *map("{:.2f} %".format, means), " / ".join(cells)))
    columns = ["recipe", "accuracy", "with six views", f"minutes: {' / '.join(PLACES)}"]
    table = markdown(pd.DataFrame(rows, columns=columns), columns)
    return f"{fast_sentence(ours[ours['recipe'] == 'fast'])}\n\n{table}"


def results_section(runs: pd.DataFrame) -> str:
    """Return the tables of results/README.md: our runs, then what others have published."""
    table = summary(runs[runs["recipe"].isin(RECIPES)])
    columns = ["network", "recipe", "epochs", "batch", "MACs", "PFLOP", "one pass", "2 views", "6 views"]
    theirs = THEIRS.assign(
        name=[f"[{name}]({url})" for name, url in zip(THEIRS["name"], THEIRS["source"], strict=True)]
    )
    for column in ("one pass", "6 views"):
        theirs[column] = theirs[column].map("{:.2f} %".format, na_action="ignore")
    theirs["runs"] = theirs["runs"].map("{:.0f}".format, na_action="ignore")
    theirs = theirs.rename(columns={"name": "network", "one pass": "one pass (theirs)", "6 views": "6 views (theirs)"})
    return (
        f"{markdown(table, [*columns, 'minutes', 'seeds', 'device'])}\n"
        f"Published by others:\n\n"
        f"{markdown(theirs, ['network', 'epochs', 'MACs', 'PFLOP', 'one pass (theirs)', '6 views (theirs)', 'runs'])}"
    )


def parts_section(runs: pd.DataFrame) -> str:
    """Return the table of what each part of the recipe `fast` is worth, on the device with most runs."""
    ours = runs[runs["recipe"].str.startswith("fast") & (runs["network"] == "AdvancedCNN")]
    device = ["device", "arithmetic"]
    ours = ours[(ours[device] == main_group(ours)[device].iloc[0]).all(axis="columns")]
    return markdown(summary(ours), ["recipe", "PFLOP", "one pass", "2 views", "6 views", "seeds", "device"])


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


def plot_minutes(runs: pd.DataFrame) -> Figure:
    """Plot the test accuracy over the minutes of training: a panel for each of PLACES.

    Each recipe has a colour, each network and arithmetic a line style. Lines of the second processor are pale.
    """
    runs = runs[runs["recipe"].isin(RECIPES)]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(1, len(PLACES), sharey=True)
    for (place, pattern), ax in zip(PLACES.items(), axes, strict=True):
        devices = sorted(runs["device"][runs["device"].str.contains(pattern)].unique())
        for _, group in runs[runs["device"].str.contains(pattern)].groupby(SAME, observed=True):
            network, recipe, arithmetic, device = group[["network", "recipe", "arithmetic", "device"]].iloc[0]
            words = [recipe, *([network] if network != "AdvancedCNN" else []), device.split(",")[0], arithmetic]
            label = f"{', '.join(words)}: {mean_and_spread(group['one pass'])} ({len(group)})"
            style = STYLES[network][arithmetic == "float32"]
            look = {"color": COLORS[recipe], "linestyle": style, "alpha": 1 if device == devices[0] else 0.5}
            for history in group["history"]:
                minutes = np.cumsum(history["seconds"]) / 60
                ax.plot(minutes, history["test_accuracy"], label=label, **look)
                label = None  # one entry in the legend
        ax.set_xlabel(f"minutes on {place}")
        ax.set_xlim(0, None)
        ax.grid(alpha=0.3)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8)  # below: it would cover lines
    figure.suptitle("Test accuracy over the minutes of training, tests included", fontsize=12)
    axes[0].set(ylim=(70, None), ylabel="accuracy (%), from 70")  # of both panels
    return figure


def plot_operations(runs: pd.DataFrame) -> Figure:
    """Plot the test accuracy over the operations of training: our recipes, and what others have published.

    Filled: the mean over six views of each image. Hollow: one pass. Ours are means over the `main_group` of runs.
    """
    figure = Figure(figsize=(9.5, 3.3), layout="constrained")
    ax = figure.subplots()
    runs = runs[runs["recipe"].isin(RECIPES)]
    for (network, recipe), group in runs.groupby(["network", "recipe"], observed=True):
        means, name = main_group(group)[["PFLOP", "one pass", "6 views"]].mean(), f"{recipe}, {network}"
        marker, label = ("o", "left") if network == "AdvancedCNN" else ("s", "right")
        _points(ax, means, name.removesuffix(", AdvancedCNN"), COLORS[recipe], marker, label)
    for _, row in THEIRS.iterrows():
        _points(ax, row, row["name"], "0.4", "D", row["label"])
    ax.set_xscale("log")
    ticks = [0.2, 0.5, 1, 2, 5, 10]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_yscale("function", functions=(lambda y: -np.log(100 - y), lambda y: 100 - np.exp(-y)))
    ax.set_yticks([86, 88, 90, 92, 93, 94, 95])
    ax.minorticks_off()
    ax.set(xlim=(0.17, 11), ylim=(85.5, 95.8))
    ax.set(xlabel="operations of training (PFLOP)", ylabel="test accuracy (%),\nlogarithmic in the error")
    ax.grid(alpha=0.3)
    ax.set_title("Filled: six views of each image. Hollow: one pass. Grey: published by others", fontsize=10)
    return figure


def _points(ax, row, name, color, marker, label):
    """Draw the accuracies of one training, and its name on a side of the upper one, or below the lower one."""
    accuracies = [(row["one pass"], "none"), (row["6 views"], color)]
    known = [(accuracy, face) for accuracy, face in accuracies if not pd.isna(accuracy)]
    ax.plot([row["PFLOP"]] * len(known), [accuracy for accuracy, _ in known], color=color, linewidth=0.8)
    for accuracy, face in known:
        ax.plot(row["PFLOP"], accuracy, marker, color=color, markerfacecolor=face)
    offset, align = LABELS[label]
    place = (row["PFLOP"], known[0 if label == "below" else -1][0])
    ax.annotate(name, place, offset, textcoords="offset points", ha=align, fontsize=8, color=color)


FIGURES = {"minutes.png": plot_minutes, "operations.png": plot_operations}


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
        "summary": summary_section(runs),
        "results": results_section(runs),
        "parts of fast": parts_section(runs),
        "weights": weights_section(runs),
        "benchmarks": benchmarks_section(read_records(RESULTS / "benchmarks")),
    }


def main():
    runs = table_of_runs(read_records())
    source = {"Source": fingerprint(*RESULTS.glob("*.json"))}
    for name, plot in FIGURES.items():
        plot(runs).savefig(RESULTS / name, bbox_inches="tight", metadata=source)
    for name, content in sections().items():
        before, _, after = split_section(name)
        SECTIONS[name].write_text(before + content + after, encoding="utf-8")


if __name__ == "__main__":
    main()
