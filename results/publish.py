"""Publish finished runs: `python -m results.publish runs/HASH ...`, with --weights their weights too.

Copies the record of each run to this folder, under a name that says what it is. `make results` then writes the tables.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from results.build import NAMED, RESULTS, STYLES, recipe_name
from session8.console import plural
from session8.evaluation import VIEWS
from session8.records import EDITED


def published_name(record: dict) -> str:
    """Return the file name, without suffix, under which a record is published.

    Raises ValueError if it must not be: only whole runs of a named recipe on all training images of CIFAR-10, from
    start to end in one process with the code of one commit, from new weights and with the recipe's augmentation, are
    published.
    """
    # Records of earlier versions list the parts of a run; one part is an unbroken run.
    resumed = len(record["parts"]) - 1 if "parts" in record else record["resumed"]
    recipe, commit, processes = recipe_name(record), record.get("commit") or "none", record.get("world_size", 1)
    images = f"{record['n_train']:,} and {record['n_test']:,} images of {record['data']}"
    checks = {
        f"its network is {record['model']}, not one of {', '.join(STYLES)}": record["model"] in STYLES,
        f"its recipe is not one of {', '.join(NAMED)}": recipe is not None,
        f"its data are {images}": re.fullmatch("50,000 and 10,000 images of CIFAR-10(,.*)?", images),
        "it is not finished": len(record["history"]["seconds"]) == record["config"]["epochs"],
        f"it was resumed {plural(resumed, 'time')}; only unbroken runs are": resumed == 0,
        f"it was trained by {processes} processes, not one": processes == 1,
        f"the commit of its code is {commit}": re.fullmatch("[0-9a-f]{40}", commit),
        "it has no accuracy with several views": set(record["views"]) == {str(n) for n in VIEWS[1:]},
        f"its augmentation is {record.get('transform')}": record.get("transform") is None,
        "its network had been trained before": not record.get("trained_before"),
        "a source file was edited since the import": EDITED not in record["sources"].values(),
    }
    for reason, passed in checks.items():
        if not passed:
            raise ValueError(f"not published: {reason}")
    return "_".join([record["model"], *recipe.split(), f"seed{record['config']['seed']}", record["arithmetic"]])


def publish(run: str | Path, weights: bool = False, results: Path = RESULTS) -> Path:
    """Copy the record of the run in a folder, and its weights if asked for. Returns the path of the copy."""
    run = Path(run)
    try:
        name = published_name(json.loads((run / "record.json").read_text(encoding="utf-8")))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not published: not a record of this project ({type(error).__name__}: {error})") from error
    copy = results / f"{name}.json"
    if copy.exists():
        raise ValueError(f"not published: '{copy}' exists; delete it to replace it")
    if weights:
        shutil.copyfile(run / "model.safetensors", copy.with_suffix(".safetensors"))
    shutil.copyfile(run / "record.json", copy)
    return copy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--weights", action="store_true", help="also copy the weights")
    options = parser.parse_args()
    for run in options.runs:
        try:
            print(publish(run, options.weights))
        except (OSError, ValueError) as error:
            sys.exit(f"'{run}': {error}")
