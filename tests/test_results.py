"""README.md and docs/ agree with the records in results/."""

import json
import re
from dataclasses import asdict

import build
import pytest
from PIL import Image
from publish import publish, published_name

from session8.checkpoint import load_model
from session8.config import Config
from session8.device import device_name
from session8.evaluate import evaluate
from session8.records import count_macs, final_metrics

README = (build.RESULTS.parent / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)  # without code


@pytest.mark.parametrize("name", build.SECTIONS)
def test_the_generated_sections_agree_with_the_records(name):
    assert build.split_section(name)[1] == build.sections()[name], "run `make results`"


def test_no_accuracy_is_claimed_outside_the_generated_section():
    before, _, after = build.split_section("results")
    assert not re.findall(r"\d\d\.\d+ ?%", before + after)


def test_the_commands_of_the_readme_are_in_fenced_blocks():
    assert not re.search(r"^    \S", PROSE, re.MULTILINE)


def test_links_and_files_of_the_readme_exist():
    linked = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"\"(results/[^\"]+)\"", README)
    files = [path for path in linked if not path.startswith("https://")]
    assert len(files) > 5 and all((build.RESULTS.parent / path).exists() for path in files)


def test_records_name_data_seed_device_versions_and_time():
    records = build.read_records()
    assert records
    for name, record in records.items():
        assert {"torch", "albumentations", "numpy"} <= set(record["versions"]) and record["device"]
        assert published_name(record) == name.removesuffix(".json")
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


def made_up(model="AdvancedCNN", recipe="default", seed=0, accuracy=90.0, minutes=(1.0, 2.0), **changes):
    """A record of two epochs, of the fields that the tables show; `changes` are to the recipe."""
    config = asdict(Config.named(recipe, seed=seed, batch_size=128, **changes))
    return {
        "model": model, "config": config, "batch_size": 128, "n_train": 50_000, "n_test": 10_000, "macs": 39_500_000,
        "parameters": 1_000_000, "pflop": 0.25, "data": "CIFAR-10", "data_fingerprint": "0", "device": "a CPU",
        "sources": {"trainer.py": "0"}, "versions": {"torch": "2.14.1"},
        "arithmetic": "float32" if config["precision"] == "float32" else "bfloat16", "commit": "0" * 40, "parts": [{}],
        "history": {"test_accuracy": [85.0, accuracy], "test_loss": [1.0, 0.5], "seconds": [60 * m for m in minutes]},
        "seconds": 60 * sum(minutes), "views": {"2": accuracy + 0.5, "6": accuracy + 0.75},
    }  # fmt: skip


def rows(table):
    """The cells of a Markdown table's rows, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_headline_is_the_mean_of_our_runs_per_recipe():
    runs = {str(seed): made_up(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((90.0, 91.0))}
    runs |= {"other network": made_up("ResNet20", accuracy=10.0), "float32": made_up(precision="float32")}
    runs |= {"without a part": made_up(recipe="fast", flip="random", accuracy=10.0)}
    runs |= {"other recipe": made_up(recipe="one_cycle", accuracy=95.0, minutes=(0.25, 0.5))}
    runs |= {"other device": {**made_up(accuracy=10.0), "device": "a CPU with fewer runs"}}
    assert build.headline(runs) == (
        "Accuracy on the 10,000 test images in one pass, after training on a CPU: "
        "90.50 % with the recipe `default` (2 runs, 3.0 minutes), "
        "95.00 % with the recipe `one_cycle` (1 run, 0.8 minutes).\n"
    )


def test_table_has_mean_and_spread_over_seeds_and_minutes_to_an_accuracy():
    runs = {str(seed): made_up(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((90.0, 91.0, 92.0))}
    first = rows(build.accuracy_table(runs))[0]
    assert first == [
        "AdvancedCNN", "default", "40", "39.5 M", "0.25", "91.00 ± 1.00 % (3)", "91.50 ± 1.00 %", "91.75 ± 1.00 %",
        "3.0", "1.0", "3.0", "a CPU, bfloat16",
    ]  # fmt: skip
    runs["3"] = made_up(seed=3, accuracy=89.0)
    assert rows(build.accuracy_table(runs))[0][9:11] == ["1.0", ""]  # not every run reached 90 %


def test_runs_are_averaged_only_if_they_differ_in_nothing_but_the_seed():
    runs = {
        "seed 0": made_up(),
        "seed 1": made_up(seed=1),
        "network": made_up("ResNet20"),
        "recipe": made_up(recipe="one_cycle"),
        "arithmetic": made_up(precision="float32"),
        "device": {**made_up(seed=2), "device": "another"},
        "data": {**made_up(seed=2), "data_fingerprint": "1"},
        "code": {**made_up(seed=2), "sources": {"trainer.py": "1"}},
        "versions": {**made_up(seed=2), "versions": {"torch": "2.9.0"}},
        "changed recipe, which is not in the table": made_up(lr=0.5),
    }
    found = [(row[0], row[1], row[5][-3:], row[11]) for row in rows(build.accuracy_table(runs)) if row[1] != "theirs"]
    assert sorted(found) == [
        *[("AdvancedCNN", "default", "(1)", "a CPU, bfloat16")] * 3,  # data, code, versions
        ("AdvancedCNN", "default", "(1)", "a CPU, float32"),
        ("AdvancedCNN", "default", "(1)", "another, bfloat16"),
        ("AdvancedCNN", "default", "(2)", "a CPU, bfloat16"),
        ("AdvancedCNN", "one_cycle", "(1)", "a CPU, bfloat16"),
        ("ResNet20", "default", "(1)", "a CPU, bfloat16"),
    ]


def test_each_part_of_fast_has_a_row_of_its_own():
    changes = {"small images": {"low_res_epochs": 0}, "width": {"width": 1.0}, "alternating flip": {"flip": "random"}}
    changes |= {"average of the weights": {"ema_decay": 0.0}, "scaled biases": {"bias_lr_scale": 1.0}}
    runs = {name: made_up(recipe="fast", **change) for name, change in changes.items()}
    runs |= {str(seed): made_up(recipe="fast", seed=seed, accuracy=94.0 + seed) for seed in (0, 1)}
    runs |= {"other": made_up(), "float32": made_up(recipe="fast", precision="float32")}
    runs |= {"network": made_up("ResNet20", recipe="fast")}
    runs |= {"device": {**made_up(recipe="fast", accuracy=94.0), "device": "another"}}
    whole, elsewhere, *parts = rows(build.parts_section(runs))
    assert whole == ["fast", "0.25", "94.50 ± 0.71 % (2)", "95.00 ± 0.71 %", "95.25 ± 0.71 %", "3.0", "a CPU"]
    assert elsewhere == ["fast", "0.25", "94.00 % (1)", "94.50 %", "94.75 %", "3.0", "another"]
    assert {row[0] for row in parts} == {f"fast without {name}" for name in changes} and len(parts) == len(changes)
    assert set(changes) == set(build.PARTS)


def test_the_figure_shows_the_histories_of_its_records_over_the_minutes():
    records = {"a": made_up(accuracy=91.0), "b": made_up("ResNet20", recipe="one_cycle", accuracy=90.5)}
    records |= {"float32": made_up(precision="float32"), "part": made_up(recipe="fast", flip="random")}
    (ax,) = build.plot_results(records).axes
    first, second = ax.lines
    assert first.get_label() == "AdvancedCNN, default: 91.00 % (1)"
    assert list(first.get_xdata()) == [1.0, 3.0] and list(first.get_ydata()) == [85.0, 91.0]
    assert second.get_label() == "ResNet20, one_cycle: 90.50 % (1)" and list(second.get_ydata()) == [85.0, 90.5]
    assert first.get_linestyle() != second.get_linestyle() and first.get_color() != second.get_color()


def test_the_figure_has_a_panel_per_device():
    records = {"a": made_up(), "b": {**made_up(accuracy=91.0), "device": "another"}}
    here, there = build.plot_results(records).axes
    assert [ax.get_xlabel() for ax in (here, there)] == ["minutes on a CPU", "minutes on another"]
    assert [list(line.get_ydata()) for line in here.lines] == [[85.0, 90.0]]
    assert [list(line.get_ydata()) for line in there.lines] == [[85.0, 91.0]]
    assert (here.get_xlim(), here.get_ylim()) == (there.get_xlim(), there.get_ylim())


# -- publishing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a run's folder with a changed record."""

    def write(**changes):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "record.json").write_text(json.dumps({**made_up(recipe="fast", epochs=2), **changes}))
        (folder / "model.safetensors").write_bytes(b"weights")
        return folder

    return write


def test_published_records_are_named_after_what_they_are():
    def name(**changes):
        record = made_up(**changes)
        record["history"]["seconds"] = [60] * record["config"]["epochs"]
        return published_name(record)

    assert name(recipe="fast") == "AdvancedCNN_fast_seed0_bfloat16"
    assert name(recipe="fast", ema_decay=0.0, seed=2) == (
        "AdvancedCNN_fast_without_average_of_the_weights_seed2_bfloat16"
    )
    assert name(model="ResNet20", precision="float32") == "ResNet20_default_seed0_float32"


def test_publishing_copies_the_record_and_never_replaces_one(run, tmp_path, monkeypatch):
    monkeypatch.setitem(build.NAMED, "fast", Config.named("fast", epochs=2))
    (tmp_path / "results").mkdir()
    copy = publish(run(), weights=True, results=tmp_path / "results")
    assert copy.name == "AdvancedCNN_fast_seed0_bfloat16.json"
    assert copy.read_bytes() == (tmp_path / "run" / "record.json").read_bytes()
    assert copy.with_suffix(".safetensors").read_bytes() == b"weights"
    with pytest.raises(ValueError, match="exists; delete it to replace it"):
        publish(run(), results=tmp_path / "results")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"config": asdict(Config(lr=0.5))}, "its recipe is not one of build.NAMED"),
        ({"model": "WideNet"}, "its network, WideNet, is not one of build.STYLES"),
        ({"data": "synthetic stand-in, NOT CIFAR-10"}, "images of synthetic"),
        ({"data": "CIFAR-100 coarse, class folders"}, "images of CIFAR-100"),
        ({"world_size": 2}, "trained by 2 processes"),
        ({"n_train": 45_000, "n_test": 5_000}, "45,000 and 5,000 images"),
        ({"batch_size": 64}, "batches of 64 images"),
        ({"history": {"seconds": [1.0], "test_accuracy": [90.0]}}, "not finished"),
        ({"parts": [{}, {}]}, "in 2 parts"),
        ({"commit": f"{'0' * 40}-dirty"}, "commit of its code is 0+-dirty"),
        ({"commit": None}, "commit of its code is none"),
        ({"views": {}}, "no accuracy with several views"),
    ],
)
def test_bad_input_runs_that_must_not_be_published(changes, reason, run, tmp_path, monkeypatch):
    monkeypatch.setitem(build.NAMED, "fast", Config.named("fast", epochs=2))
    with pytest.raises(ValueError, match=f"not published: .*{reason}"):
        publish(run(**changes), results=tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"answer": 42}', '{"config": {"future": 7}}', "{"])
def test_bad_input_foreign_records_are_not_published(text, run, tmp_path):
    folder = run()
    (folder / "record.json").write_text(text)
    with pytest.raises(ValueError, match="not published: not a record of this project"):
        publish(folder, results=tmp_path)


def test_benchmark_table_shows_the_record():
    record = {
        "benchmark": "clock", "device": "a machine", "columns": ["way", "ms"], "rows": [["ours", 1.234]],
        "options": {"rounds": 3, "images": [100, 2000]}, "notes": {"peak (GB)": 1.5}, "versions": {"torch": "9.9"},
    }  # fmt: skip
    assert build.benchmarks_section({"x": record}) == (
        "`python benchmarks/clock.py` on a machine, PyTorch 9.9 (rounds 3; images 100, 2,000; peak (GB): 1.5):\n\n"
        "| way | ms |\n| ---: | ---: |\n| ours | 1.23 |\n"
    )


WEIGHTS = sorted(build.RESULTS.glob("*.safetensors"))


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_published_weights_agree_with_their_record(path):
    record = json.loads(path.with_suffix(".json").read_text())
    model, about = load_model(path)
    assert about["metrics"] == final_metrics(record)
    assert about["config"] == record["config"] and count_macs(model) == record["macs"]


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_published_weights_reach_the_accuracy_of_their_record(path, real_root, capsys):
    record = json.loads(path.with_suffix(".json").read_text())
    accuracies, stated = evaluate(path, real_root, "cpu")
    here, there = (name.rpartition(",")[0] for name in (device_name("cpu"), record["device"]))
    expected = {1: record["history"]["test_accuracy"][-1], 2: record["views"]["2"], 6: record["views"]["6"]}
    assert stated == expected
    assert accuracies == (expected if here == there else pytest.approx(expected, abs=0.1))
