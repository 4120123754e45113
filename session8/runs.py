"""Runs side by side: what sets them apart, and what they reached."""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd

from session8.config import RECIPES, Config
from session8.console import printable
from session8.records import short_hash


def read_runs(base: Path | str = "runs") -> list[dict]:
    """Read the records of all runs in a folder, as `write_record` makes them, with three more entries each.

    `folder`: its name. `label`: the recipe, and what sets the run apart, such as "fast, lr 0.05, seed 1"; with the
    folder's name if another run has the same. `group`: the label without the seed, equal for runs that differ in the
    seed only. A damaged or foreign record is skipped, and its path is printed.
    """
    runs = []
    for path in sorted(Path(base).glob("*/record.json")):
        try:
            run = {**json.loads(path.read_text(encoding="utf-8")), "folder": path.parent.name}
            _settings(run), _results(run)  # raise if an entry is missing or of another type
            runs.append(run)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"'{printable(path)}' is skipped: not a record of this project ({type(error).__name__}: {error})")
    rows = [_settings(run) for run in runs]
    names = _differing(rows)
    labels = [_label(row, names) for row in rows]
    for run, row, label in zip(runs, rows, labels, strict=True):
        run["group"] = _label(row, [name for name in names if name != "seed"])
        run["label"] = label if labels.count(label) == 1 else f"{label}, {run['folder']}"
    return runs


def runs_table(runs: list[dict]) -> pd.DataFrame:
    """Return one row per run, from `read_runs`: the settings that differ, then the results.

    Accuracies are percentages of the last epoch, with one and with several views of each image. If runs differ in
    recipe and seed, `table.groupby("recipe")["accuracy"].agg(["mean", "std", "count"])` gives the mean over seeds. The
    column `code` appears if runs with the same settings have other source files or package versions.
    """
    rows = [_settings(run) for run in runs]
    names = [name for name in _differing(rows) if name != "device"]  # which is among the results
    settings = [{name: row.get(name) for name in names} for row in rows]
    return pd.DataFrame([{**chosen, **_results(run)} for chosen, run in zip(settings, runs, strict=True)])


def _settings(run):
    """Return what may set a run apart: {name: value}, with the name of the recipe that is nearest to its config."""
    config = {**asdict(Config()), **run["config"]}  # a field newer than the record had its default
    recipe = min(RECIPES, key=lambda name: len(_changed_fields(config, name)))
    seed = config.pop("seed")
    del config["precision"]  # `arithmetic` is what it led to
    return {
        "model": run["model"],
        "recipe": recipe,
        **config,
        "batch_size": run["batch_size"],
        "transform": short_hash(run["transform"]) if run.get("transform") else None,
        "data": run["data"] + f" ({run['data_fingerprint'][:8]})",
        "arithmetic": run["arithmetic"],
        "world_size": run.get("world_size", 1),
        "trained_before": run.get("trained_before", False),
        "device": run["device"],
        "code": short_hash([run.get("sources"), run.get("versions")]),
        "seed": seed,
    }


def _changed_fields(config, recipe):
    """Return the names of the fields in which a config differs from a recipe with the same number of epochs."""
    named = {**asdict(Config.named(recipe, epochs=config["epochs"])), "epochs": Config.named(recipe).epochs}
    return [name for name, value in named.items() if config.get(name) != value]


def _implied(row):
    """Return the names of the settings that the name of a run's recipe implies."""
    return {field.name for field in fields(Config)} - {"seed", *_changed_fields(row, row["recipe"])}


def _differing(rows):
    """Return the names of the settings in which runs differ, without those that the recipe's name implies in all."""
    implied = [_implied(row) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in names if len({str(row.get(name)) for row in rows}) > 1]
    names = [name for name in names if not all(name in each for each in implied)]
    # The code matters where nothing else differs: another network, for instance, is another file.
    others = [str([row.get(name) for name in names if name not in ("code", "seed")]) for row in rows]
    if len({(other, row["code"]) for other, row in zip(others, rows, strict=True)}) == len(set(others)):
        names = [name for name in names if name != "code"]
    return names


def _label(row, names):
    """Return a run's recipe, and those of the named settings that it does not imply."""
    parts = [row["model"], row["recipe"]] if "model" in names else [row["recipe"]]
    left_out = {"model", "recipe", *_implied(row)}
    parts += [f"{name} {row[name]}" for name in names if name not in left_out and row.get(name) is not None]
    return ", ".join(parts)


def _results(run):
    """Return the results of a run: {name: value}."""
    accuracy = [float(value) for value in run["history"]["test_accuracy"]]
    seconds = [float(value) for value in run["history"]["seconds"]]
    return {
        "epochs done": len(accuracy),
        "accuracy": accuracy[-1] if accuracy else math.nan,
        **{f"{number} views": float(value) for number, value in run["views"].items()},
        "minutes": round(sum(seconds) / 60, 1),
        "device": run["device"],
        "folder": run["folder"],
    }
