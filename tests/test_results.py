"""README.md and docs/ agree with the records in results/."""

import json
import re
from dataclasses import asdict

import build
import pytest
from PIL import Image

from session8.checkpoint import load_model
from session8.config import Config
from session8.records import count_macs
from session8.training import collect_logits

README = (build.RESULTS.parent / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)  # without code


def test_the_generated_sections_agree_with_the_records():
    assert build.split_section("results")[1] == build.results_section(build.read_records()), "run `make results`"
    assert build.split_section("benchmarks")[1] == build.benchmarks_section(build.read_benchmarks()), (
        "run `make results`"
    )


def test_no_accuracy_is_claimed_outside_the_generated_section():
    before, _, after = build.split_section("results")
    assert not re.findall(r"\d\d\.\d+ ?%", before + after)


def test_the_readme_has_at_most_1000_words_without_tables_and_code():
    lines = [line for line in PROSE.splitlines() if not line.startswith("|")]
    assert len(" ".join(lines).split()) <= 1000


def test_the_commands_of_the_readme_are_in_fenced_blocks():
    assert not re.search(r"^    \S", PROSE, re.MULTILINE)


def test_links_and_files_of_the_readme_exist():
    linked = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"\"(results/[^\"]+)\"", README)
    assert len(linked) > 5 and all((build.RESULTS.parent / path).exists() for path in linked)


def test_records_name_data_seed_device_versions_and_time():
    records = build.read_records()
    assert records
    for record in records.values():
        assert {"torch", "albumentations", "numpy"} <= set(record["versions"]) and record["device"]
        assert record["seconds"] > 0 and record["finished"] and record["commit"] and "seed" in record["config"]
        assert "synthetic" not in record["data"] and (record["n_train"], record["n_test"]) == (50_000, 10_000)
        assert {len(values) for values in record["history"].values()} == {record["config"]["epochs"]}


def test_the_figures_of_the_readme_were_made_from_the_records_and_weights():
    shown = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert shown == ["results/accuracy.png", "results/mistakes.png"]
    sources = build.fingerprint(*build.RESULTS.glob("*.json")), build.fingerprint(build.WEIGHTS)
    for name, source in zip(shown, sources, strict=True):
        assert Image.open(build.RESULTS.parent / name).text["Source"] == source, "run results/build.py"


def test_benchmarks_name_device_versions_and_time():
    benchmarks = build.read_benchmarks()
    assert {record["benchmark"] for record in benchmarks.values()} == {
        "input_pipeline",
        "train_step",
        "epoch",
        "scaling",
    }
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


def test_the_headline_is_the_mean_of_our_runs_per_recipe():
    runs = {str(seed): made_up("AdvancedCNN", seed, accuracy) for seed, accuracy in enumerate((90.0, 91.0))}
    runs["other network"] = made_up("ResNet20", 0, 10.0)
    runs["other width"] = {**made_up("AdvancedCNN", 0, 10.0), "width": 2.0}
    assert build.headline(runs).startswith(
        "Accuracy on the 10,000 test images: 90.50 % after 40 epochs with the recipe `default` ("
    )
    runs["other recipe"] = made_up("AdvancedCNN", 0, 95.0, recipe="one_cycle")
    assert "`default`, 95.00 % after 40 epochs with the recipe `one_cycle`" in build.headline(runs)


def test_table_has_mean_and_spread_over_seeds():
    runs = {str(seed): made_up("AdvancedCNN", seed, accuracy) for seed, accuracy in enumerate((90.0, 91.0, 92.0))}
    (row,) = build.accuracy_table(runs).splitlines()[2:]
    assert "| 3 | 91.00 % ± 1.00 |" in row and "| default |" in row
    others = [made_up("AdvancedCNN", 0, 90.0, lr=0.5), {**made_up("AdvancedCNN", 0, 90.0), "device": "another"}]
    assert len(build.accuracy_table({**runs, "a": others[0], "b": others[1]}).splitlines()) == 2 + 3
    older = made_up("AdvancedCNN", 3, 90.0)
    del older["config"]["cutout"]
    assert "| 4 |" in build.accuracy_table({**runs, "older": older})


def test_the_figure_shows_the_histories_of_its_records():
    records = {"a": made_up("AdvancedCNN", 0, 91.0), "b": made_up("ResNet20", 0, 90.5, recipe="one_cycle")}
    (ax,) = build.plot_results(records).axes
    drawn = {line.get_label(): (list(line.get_ydata()), line.get_linestyle(), line.get_color()) for line in ax.lines}
    first = drawn["AdvancedCNN, default (last: 91.00)"]
    second = drawn["ResNet20, one_cycle (last: 90.50)"]
    assert first[0] == records["a"]["history"]["test_accuracy"] and second[0][-1] == 90.5
    assert first[1] != second[1] and first[2] != second[2]


def test_benchmark_table_shows_the_record():
    record = {
        "benchmark": "clock", "device": "a machine", "columns": ["way", "ms"], "rows": [["ours", 1.234]],
        "options": {"rounds": 3, "images": [100, 2000]}, "notes": {"peak (GB)": 1.5}, "versions": {"torch": "9.9"},
    }  # fmt: skip
    assert build.benchmarks_section({"x": record}) == (
        "`python benchmarks/clock.py` on a machine, PyTorch 9.9 (rounds 3; images 100, 2,000; peak (GB): 1.5):\n\n"
        "| way | ms |\n| ---: | ---: |\n| ours | 1.23 |\n"
    )


@pytest.mark.parametrize("path", sorted(build.RESULTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_published_weights_agree_with_their_record(path):
    assert path.stat().st_size < 5e6
    record = json.loads(path.with_suffix(".json").read_text())
    model, about = load_model(path)
    assert about["metrics"] == {name: values[-1] for name, values in record["history"].items()}
    assert about["config"] == record["config"] and count_macs(model) == record["macs"]


@pytest.mark.parametrize("path", sorted(build.RESULTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_published_weights_reach_the_accuracy_of_their_record(path, real_splits):
    model, about = load_model(path)
    logits = collect_logits(model, real_splits[1], Config(precision="float32"), "cpu")
    accuracy = 100 * (logits.argmax(1).numpy() == real_splits[1].labels).mean()
    assert accuracy == pytest.approx(about["metrics"]["test_accuracy"], abs=0.05)  # 16-bit autocast, if used, rounds
