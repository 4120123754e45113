"""README.md says what the records in results/ say, and nothing else."""

import re

import build
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def readme():
    return build.README.read_text(encoding="utf-8")


def test_readme_and_records_agree(readme):
    written = readme.split(build.BEGIN)[1].split(build.END)[0]
    assert written == build.section(build.read_records()), "run `make results`"


def test_no_accuracy_is_claimed_outside_the_table(readme):
    outside = readme.split(build.BEGIN)[0] + readme.split(build.END)[1]
    assert not re.findall(r"\d\d\.\d+ ?%", outside)


def test_records_name_data_seed_device_versions_and_time():
    records = build.read_records()
    assert records
    for record in records.values():
        assert {"torch", "albumentations", "numpy"} <= set(record["versions"]) and record["device"]
        assert record["seconds"] > 0 and record["finished"] and record["commit"] and "seed" in record["config"]
        assert "synthetic" not in record["data"] and (record["n_train"], record["n_test"]) == (50_000, 10_000)
        assert {len(values) for values in record["history"].values()} == {record["config"]["epochs"]}


def test_every_figure_that_readme_shows_was_made_from_its_record(readme):
    figures = re.findall(r"!\[.*?\]\((.*?)\)", readme)
    assert figures == [f"results/{build.figure_name(name)}" for name in build.read_records()]
    for name in build.read_records():
        assert Image.open(build.RESULTS / build.figure_name(name)).text["Source"] == build.fingerprint(name)


def test_table_has_mean_and_spread_over_seeds():
    record = next(r for r in build.read_records().values() if build.recipe_name(r) == "default")
    runs = {}
    for seed, accuracy in enumerate((90.0, 91.0, 92.0)):
        history = {**record["history"], "test_accuracy": [*record["history"]["test_accuracy"][:-1], accuracy]}
        runs[str(seed)] = {**record, "config": {**record["config"], "seed": seed}, "history": history}
    (row,) = build.accuracy_table(runs).splitlines()[2:]
    assert "| 3 | 91.00 % ± 1.00 |" in row and "| default |" in row
    other = {**record, "config": {**record["config"], "lr": 0.5}}
    assert len(build.accuracy_table({**runs, "other": other}).splitlines()) == 2 + 2
