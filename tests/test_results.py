"""README.md says what the records in results/ say, and nothing else."""

import json
import re
from dataclasses import asdict

import build
import pytest
from PIL import Image

from model_AC import AdvancedCNN
from session8.analysis import collect_logits
from session8.checkpoint import count_macs, load_model
from session8.config import Config


@pytest.fixture(scope="module")
def readme():
    return build.README.read_text(encoding="utf-8")


def test_readme_and_records_agree(readme):
    _, results, _ = build.written(readme, "results")
    assert results == build.results_section(build.read_records()), "run `make results`"
    _, benchmarks, _ = build.written(readme, "benchmarks")
    assert benchmarks == build.benchmark_tables(build.read_benchmarks()), "run `make results`"


def test_no_accuracy_is_claimed_outside_the_table(readme):
    before, _, after = build.written(readme, "results")
    assert not re.findall(r"\d\d\.\d+ ?%", before + after)


def test_records_name_data_seed_device_versions_and_time():
    records = build.read_records()
    assert records
    for record in records.values():
        assert {"torch", "albumentations", "numpy"} <= set(record["versions"]) and record["device"]
        assert record["seconds"] > 0 and record["finished"] and record["commit"] and "seed" in record["config"]
        assert "synthetic" not in record["data"] and (record["n_train"], record["n_test"]) == (50_000, 10_000)
        assert {len(values) for values in record["history"].values()} == {record["config"]["epochs"]}


def test_every_figure_that_readme_shows_was_made_from_its_records(readme):
    shown = re.findall(r"!\[.*?\]\((.*?)\)", readme)
    made = build.figures(build.read_records())
    assert shown == [f"results/{name}.png" for name in made]
    for name, records in made.items():
        assert Image.open(build.RESULTS / f"{name}.png").text["Source"] == build.fingerprint(records)


def test_benchmarks_name_device_versions_and_time():
    benchmarks = build.read_benchmarks()
    assert {record["benchmark"] for record in benchmarks.values()} == {"input_pipeline", "train_step", "epoch"}
    for record in benchmarks.values():
        assert record["device"] and record["finished"] and "torch" in record["versions"]
        assert "synthetic" not in record["data"] and record["commit"]
        assert record["rows"] and {len(row) for row in record["rows"]} == {len(record["columns"])}


def made_up(model, seed, accuracy, recipe="default", **changes):
    """A record like the first published one, of another network, seed and accuracy."""
    record = next(iter(build.read_records().values()))
    history = {**record["history"], "test_accuracy": [*record["history"]["test_accuracy"][:-1], accuracy]}
    config = asdict(Config.named(recipe, seed=seed, batch_size=128, **changes))
    return {**record, "model": model, "config": config, "batch_size": 128, "history": history}


def test_leads_are_taken_between_runs_that_belong_together():
    records = [
        made_up("AdvancedCNN", 0, 91.0), made_up("AdvancedCNN", 1, 93.0), made_up("AdvancedCNN", 2, 50.0),
        made_up("ResNet20", 0, 90.5), made_up("ResNet20", 1, 90.0), made_up("ResNet20", 3, 10.0),
        made_up("ResNet20", 2, 10.0, epochs=5), made_up("ResNet20", 2, 10.0, recipe="one_cycle"),
        {**made_up("ResNet20", 2, 10.0), "device": "another"},
        {**made_up("ResNet20", 2, 10.0), "data_fingerprint": "0"}, {**made_up("AdvancedCNN", 3, 10.0), "width": 2.0},
    ]  # fmt: skip
    records = dict(enumerate(records))
    assert build.leads(records, "default") == [pytest.approx(0.5), pytest.approx(3.0)]
    assert build.leads(records, "one_cycle") == []


@pytest.mark.parametrize("ours, words", [(91.0, "0.50 points ahead of"), (90.0, "0.50 points behind")])
def test_the_lead_is_told_in_words(ours, words):
    section = build.results_section({"a": made_up("AdvancedCNN", 0, ours), "b": made_up("ResNet20", 0, 90.5)})
    assert f"Recipe `default`: AdvancedCNN is {words} ResNet20, with the same seeds" in section


def test_table_has_mean_and_spread_over_seeds():
    runs = {str(seed): made_up("AdvancedCNN", seed, accuracy) for seed, accuracy in enumerate((90.0, 91.0, 92.0))}
    (row,) = build.accuracy_table(runs).splitlines()[2:]
    assert "| 3 | 91.00 % ± 1.00 |" in row and "| default |" in row
    others = [made_up("AdvancedCNN", 0, 90.0, lr=0.5), {**made_up("AdvancedCNN", 0, 90.0), "device": "another"}]
    assert len(build.accuracy_table({**runs, "a": others[0], "b": others[1]}).splitlines()) == 2 + 3
    older = made_up("AdvancedCNN", 3, 90.0)
    del older["config"]["cutout"]
    assert "| 4 |" in build.accuracy_table({**runs, "older": older})


def test_figure_shows_the_histories_of_its_records():
    records = {"a": made_up("AdvancedCNN", 0, 91.0), "b": made_up("ResNet20", 0, 90.5)}
    (ax,) = build.plot_comparison(records, "default").axes
    drawn = {line.get_label(): (list(line.get_ydata()), line.get_linestyle()) for line in ax.lines}
    first = records["a"]["history"]
    assert drawn["AdvancedCNN, test (last: 91.00)"] == (first["test_accuracy"], "-")
    assert drawn[f"AdvancedCNN, train (last: {first['train_accuracy'][-1]:.2f})"] == (first["train_accuracy"], ":")
    assert drawn["ResNet20, test (last: 90.50)"][0][-1] == 90.5
    assert len({style for _, style in drawn.values()}) == 4  # told apart without their colours too


def test_benchmark_table_shows_the_record():
    record = {
        "benchmark": "clock", "device": "a machine", "columns": ["way", "ms"], "rows": [["ours", 1.234]],
        "options": {"rounds": 3, "images": [100, 2000]}, "notes": {"peak (GB)": 1.5}, "versions": {"torch": "9.9"},
    }  # fmt: skip
    assert build.benchmark_tables({"x": record}) == (
        "`python benchmarks/clock.py` on a machine, PyTorch 9.9 (rounds 3; images 100, 2,000; peak (GB): 1.5):\n\n"
        "| way | ms |\n| ---: | ---: |\n| ours | 1.23 |\n"
    )


@pytest.mark.parametrize("path", sorted(build.RESULTS.glob("*.pt")), ids=lambda path: path.stem)
def test_published_weights_fit_the_network_and_are_told_by_their_record(path):
    assert path.stat().st_size < 5e6
    record, model = json.loads(path.with_suffix(".json").read_text()), AdvancedCNN()
    about = load_model(path, model)
    assert about["metrics"] == {name: values[-1] for name, values in record["history"].items()}
    assert about["config"] == record["config"] and count_macs(model) == record["macs"]


@pytest.mark.parametrize("path", sorted(build.RESULTS.glob("*.pt")), ids=lambda path: path.stem)
def test_published_weights_are_as_good_as_their_record_says(path, real_splits):
    model = AdvancedCNN()
    last = load_model(path, model)["metrics"]
    logits = collect_logits(model, real_splits[1], Config(precision="float32"), "cpu")
    accuracy = 100 * (logits.argmax(1).numpy() == real_splits[1].labels).mean()
    assert accuracy == pytest.approx(last["test_accuracy"], abs=0.05)  # mixed precision, if it was used, rounds


def test_weights_named_in_the_readme_are_there():
    named = re.findall(r"results/\S+\.pt", build.README.read_text(encoding="utf-8"))
    assert named and all((build.README.parent / name).is_file() for name in named)
