"""What is published agrees with the records in results/: tables, figures, weights, and the notebook's outputs."""

import json
import re
from dataclasses import asdict
from importlib.util import find_spec
from statistics import mean, stdev

import nbformat
import pytest
from PIL import Image

from results import build
from results.publish import publish, published_name
from session8.checkpoint import load_model
from session8.config import Config
from session8.device import device_name
from session8.network import count_macs
from session8.records import final_metrics
from train import evaluate

RECORDS = build.read_records()
BENCHMARKS = build.read_records(build.RESULTS / "benchmarks")
WEIGHTS = sorted(build.RESULTS.glob("*.safetensors"))


def rows(text):
    """The rows of a Markdown table, each as {column: cell}."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


# -- tables and figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", build.SECTIONS)
def test_the_generated_sections_are_up_to_date(name):
    assert build.split_section(name)[1] == build.sections()[name], "run `make results`"


def percent(values):
    return f"{mean(values):.2f}{f' ± {stdev(values):.2f}' if len(values) > 1 else ''} %"


@pytest.mark.parametrize(
    "section, files",
    [("results", r"\w+_(default|one_cycle|fast)_seed\w+"), ("parts of fast", r"AdvancedCNN_fast\w*_bfloat16")],
)
def test_the_published_rows_are_means_over_the_records(section, files):
    """A row's runs are found by the names of their files."""
    shown = 0
    for row in rows(build.split_section(section)[1]):
        kind = f"{row.get('network', 'AdvancedCNN')}_{row['recipe'].replace(' ', '_')}_seed"
        runs = [record for name, record in RECORDS.items() if name.startswith(kind) and re.fullmatch(files, name)]
        runs = [run for run in runs if row["device"] in (run["device"], f"{run['device']}, {run['arithmetic']}")]
        if row["recipe"] == "theirs":
            continue
        shown += len(runs)
        assert row["one pass"] == f"{percent([run['history']['test_accuracy'][-1] for run in runs])} ({len(runs)})"
        assert row["2 views"] == percent([run["views"]["2"] for run in runs])
        assert row["6 views"] == percent([run["views"]["6"] for run in runs])
        assert row["minutes"] == f"{mean(sum(run['history']['seconds']) / 60 for run in runs):.1f}"
        for goal in (82, 90):
            minutes = []
            for history in (run["history"] for run in runs):
                tests = [epoch for epoch, accuracy in enumerate(history["test_accuracy"], 1) if accuracy >= goal]
                minutes += [sum(history["seconds"][: tests[0]]) / 60] if tests else []
            expected = f"{mean(minutes):.1f}" if len(minutes) == len(runs) else ""
            assert row.get(f"to {goal} %", expected) == expected
    assert shown == sum(bool(re.fullmatch(files, name)) for name in RECORDS)


def test_the_table_of_weights_shows_the_record_beside_each_file():
    table = rows(build.split_section("weights")[1])
    assert [row["file"] for row in table] == [f"`{path.name}`" for path in WEIGHTS]
    for path, row in zip(WEIGHTS, table, strict=True):
        record = RECORDS[path.stem]
        assert row["one pass"] == f"{record['history']['test_accuracy'][-1]:.2f} %"
        assert row["NLL"] == f"{record['history']['test_loss'][-1]:.3f}" and record["commit"].startswith(row["commit"])


def test_the_page_of_benchmarks_shows_their_records():
    tables = re.split(r"`python -m (benchmarks\.\w+)`", build.split_section("benchmarks")[1])
    assert len(tables) == 1 + 2 * len(BENCHMARKS)
    for record, command, text in zip(BENCHMARKS.values(), tables[1::2], tables[2::2], strict=True):
        assert command == f"benchmarks.{record['benchmark']}" and find_spec(command)
        assert f" on {record['device']}, PyTorch {record['versions']['torch']} (" in text
        shown = [list(row.values()) for row in rows(text)]
        assert shown == [[f"{x:,.2f}" if isinstance(x, float) else x for x in row] for row in record["rows"]]


def test_the_figures_were_made_from_the_present_records_and_weights():
    sources = {"accuracy.png": build.RESULTS.glob("*.json"), "mistakes.png": [build.WEIGHTS]}
    for name, files in sources.items():
        assert Image.open(build.RESULTS / name).text["Source"] == build.fingerprint(*files), "run `make results`"


def test_records_name_data_seed_device_versions_and_commit():
    for name, record in RECORDS.items():
        assert published_name(record) == name  # which refuses other data, unfinished runs and unknown code
        assert record["seconds"] > 0 and record["finished"] and record["device"] and "seed" in record["config"]
        assert {len(values) for values in record["history"].values()} == {record["config"]["epochs"]}
    for record in BENCHMARKS.values():
        assert record["device"] and record["finished"] and "synthetic" not in record["data"]
        assert {len(row) for row in record["rows"]} == {len(record["columns"])}
    for record in [*RECORDS.values(), *BENCHMARKS.values()]:
        assert {"torch", "albumentations", "numpy"} <= record["versions"].keys() and record["commit"]


def test_the_notebook_was_committed_with_the_run_of_its_record():
    record = json.loads((build.RESULTS / "notebook" / "record.json").read_text(encoding="utf-8"))
    cells = nbformat.read(build.ROOT / "Session_8.ipynb", as_version=4).cells
    text = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))
    tested = [f"{accuracy:.2f}" for accuracy in record["history"]["test_accuracy"]]
    assert re.findall(r"^Test set: .*\((.*)%\)$", text, re.MULTILINE) == tested
    assert f", {record['device']}, in {record['seconds'] / 60:.1f} minutes: train " in text
    assert f" test {tested[-1]} %\n" in text


# -- made-up records -----------------------------------------------------------------------------------------------


def made_up(model="AdvancedCNN", recipe="default", seed=0, accuracy=90.0, minutes=(1.0, 2.0), **changes):
    """A record of two epochs, of the fields that the tables show; `changes` are to the recipe."""
    config = asdict(Config.named(recipe, seed=seed, batch_size=128, **changes))
    return {
        "model": model, "config": config, "batch_size": 128, "n_train": 50_000, "n_test": 10_000, "macs": 39_500_000,
        "parameters": 1_000_000, "pflop": 0.25, "data": "CIFAR-10", "data_fingerprint": "0", "device": "a CPU",
        "sources": {"training.py": "0"}, "versions": {"torch": "2.14.1"}, "resumed": 0,
        "arithmetic": "float32" if config["precision"] == "float32" else "bfloat16", "commit": "0" * 40,
        "history": {"test_accuracy": [85.0, accuracy], "test_loss": [1.0, 0.5], "seconds": [60 * m for m in minutes]},
        "seconds": 60 * sum(minutes), "views": {"2": accuracy + 0.5, "6": accuracy + 0.75},
    }  # fmt: skip


def table_of(*records):
    return build.table_of_runs({f"record {number}": record for number, record in enumerate(records)})


def test_runs_are_averaged_only_if_they_differ_in_nothing_but_the_seed():
    runs = table_of(
        made_up(),
        made_up(seed=1),
        made_up("ResNet20"),
        made_up(recipe="one_cycle"),
        made_up(precision="float32"),
        {**made_up(seed=2), "device": "another"},
        {**made_up(seed=2), "data_fingerprint": "1"},
        {**made_up(seed=2), "sources": {"training.py": "1"}},
        {**made_up(seed=2), "versions": {"torch": "2.9.0"}},
        made_up(lr=0.5),  # a changed recipe is not in the table
    )
    table = [row for row in rows(build.results_section(runs)) if row["recipe"] != "theirs"]
    assert sorted((row["network"], row["recipe"], row["one pass"][-3:], row["device"]) for row in table) == [
        *[("AdvancedCNN", "default", "(1)", "a CPU, bfloat16")] * 3,  # data, code, versions
        ("AdvancedCNN", "default", "(1)", "a CPU, float32"),
        ("AdvancedCNN", "default", "(1)", "another, bfloat16"),
        ("AdvancedCNN", "default", "(2)", "a CPU, bfloat16"),
        ("AdvancedCNN", "one_cycle", "(1)", "a CPU, bfloat16"),
        ("ResNet20", "default", "(1)", "a CPU, bfloat16"),
    ]


def test_the_headline_is_of_our_network_in_16_bits_on_the_device_with_most_runs():
    runs = table_of(
        made_up(accuracy=90.0),
        made_up(seed=1, accuracy=91.0),
        made_up("ResNet20", accuracy=10.0),
        made_up(precision="float32", accuracy=10.0),
        made_up(recipe="one_cycle", accuracy=95.0, minutes=(0.25, 0.5)),
        {**made_up(accuracy=10.0), "device": "a CPU with fewer runs"},
    )
    assert build.headline(runs) == (
        "Accuracy on the 10,000 test images in one pass, after training on a CPU: "
        "90.50 % with the recipe `default` (2 runs, 3.0 minutes), "
        "95.00 % with the recipe `one_cycle` (1 run, 0.8 minutes).\n"
    )


def test_the_figure_shows_the_histories_over_the_minutes_in_a_panel_per_device():
    runs = table_of(
        made_up(accuracy=91.0),
        made_up("ResNet20", recipe="one_cycle", accuracy=90.5),
        {**made_up(accuracy=92.0), "device": "another"},
        made_up(precision="float32"),  # this run and the next one are not shown
        made_up(recipe="fast", flip="random"),
    )
    here, there = build.plot_results(runs).axes
    lines = [[list(zip(*line.get_data(), strict=True)) for line in ax.lines] for ax in (here, there)]
    assert lines == [[[(1.0, 85.0), (3.0, 91.0)], [(1.0, 85.0), (3.0, 90.5)]], [[(1.0, 85.0), (3.0, 92.0)]]]
    assert here.lines[0].get_label() == "AdvancedCNN, default: 91.00 % (1)"
    assert here.get_xlabel() == "minutes on a CPU" and there.get_xlabel() == "minutes on another"
    assert (here.get_xlim(), here.get_ylim()) == (there.get_xlim(), there.get_ylim())


# -- publishing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that writes a run's folder, with changes to its record or with another text in its place."""
    monkeypatch.setitem(build.NAMED, "fast", Config.named("fast", epochs=2))

    def write(changes):
        folder = tmp_path / "run"
        folder.mkdir()
        record = changes if isinstance(changes, str) else json.dumps({**made_up(recipe="fast", epochs=2), **changes})
        (folder / "record.json").write_text(record)
        (folder / "model.safetensors").write_bytes(b"weights")
        return folder

    return write


def test_publishing_copies_the_record_and_never_replaces_one(run, tmp_path):
    folder, results = run({}), tmp_path / "results"
    results.mkdir()
    copy = publish(folder, weights=True, results=results)
    assert copy.name == "AdvancedCNN_fast_seed0_bfloat16.json"
    assert copy.read_bytes() == (folder / "record.json").read_bytes()
    assert copy.with_suffix(".safetensors").read_bytes() == b"weights"
    with pytest.raises(ValueError, match="exists; delete it to replace it"):
        publish(folder, results=results)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config": asdict(Config(lr=0.5))}, "its recipe is not one of default, "),
        ({"model": "WideNet"}, "its network is WideNet, not one of AdvancedCNN, "),
        ({"data": "synthetic stand-in, NOT CIFAR-10"}, "images of synthetic"),
        ({"data": "CIFAR-100 coarse, class folders"}, "images of CIFAR-100"),
        ({"world_size": 2}, "trained by 2 processes"),
        ({"n_train": 45_000, "n_test": 5_000}, "45,000 and 5,000 images"),
        ({"batch_size": 64}, "batches of 64 images"),
        ({"history": {"seconds": [1.0], "test_accuracy": [90.0]}}, "not finished"),
        ({"resumed": 2}, "resumed 2 times; only unbroken"),
        ({"parts": [{}, {}]}, "resumed 1 time; only unbroken"),  # as older versions wrote
        ({"commit": f"{'0' * 40}-dirty"}, "commit of its code is 0+-dirty"),
        ({"commit": None}, "commit of its code is none"),
        ({"views": {}}, "no accuracy with several views"),
        ({"config": {"future": 7}}, "not a record of this project"),
        ("[]", "not a record of this project"),
        ('{"answer": 42}', "not a record of this project"),
        ("{", "not a record of this project"),
    ],
)
def test_bad_input_runs_that_must_not_be_published(changes, words, run, tmp_path):
    with pytest.raises(ValueError, match=f"not published: .*{words}"):
        publish(run(changes), results=tmp_path)
    assert not list(tmp_path.glob("*.json"))


# -- published weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_published_weights_agree_with_their_record(path):
    model, about = load_model(path)
    record = RECORDS[path.stem]
    assert about["metrics"] == final_metrics(record)
    assert about["config"] == record["config"] and count_macs(model) == record["macs"]


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_published_weights_reach_the_accuracy_of_their_record(path, real_root):
    record = RECORDS[path.stem]
    measured = evaluate(path, real_root, "cpu")
    here, there = (name.rpartition(",")[0] for name in (device_name("cpu"), record["device"]))
    expected = {1: record["history"]["test_accuracy"][-1], 2: record["views"]["2"], 6: record["views"]["6"]}
    assert measured == (expected if here == there else pytest.approx(expected, abs=0.1))
