"""A run that was ended goes on as if nothing had happened; and what else is kept of a run."""

import importlib.util
import linecache
import re
import signal
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model_AC import AdvancedCNN
from session8 import checkpoint, loaders
from session8 import training as utils
from session8.checkpoint import CheckpointError, load_checkpoint, load_model, save_model
from session8.data import Split, synthetic_cifar10
from session8.training import Config, fit, run_folder

RECIPE = Config.one_cycle(epochs=3, batch_size=25, lr=0.02)  # 12 batches an epoch


class Interrupted(AdvancedCNN):
    """Ctrl-C in the given forward pass of training; the seed decides the weights, as in the notebook."""

    def __init__(self, at=None, seed=0, **sizes):
        torch.manual_seed(seed)
        super().__init__(width=0.5, **sizes)
        self.at, self.passes = at, 0

    def forward(self, x):
        self.passes += self.training
        if self.training and self.passes == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)


def without_times(history):
    return {name: values for name, values in history.items() if name != "seconds"}


def log_of(output):
    """The log lines, as a terminal leaves them: without what was overwritten, header, times and remarks."""
    lines = [line.rpartition("\r")[2] for line in output.split("\n")]
    return [re.sub(r"\[.*?\]", "[]", line) for line in lines if re.match("Epoch|Train:|Test set", line)]


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def unbroken(synthetic, tmp_path_factory):
    model = Interrupted()
    history = fit(model, *synthetic, RECIPE, "cpu", tmp_path_factory.mktemp("unbroken"))
    return model, history


@pytest.fixture
def every_step(monkeypatch):
    """A checkpoint after every step."""
    monkeypatch.setattr(utils, "REFRESH_SECONDS", 0)
    return {"checkpoint_minutes": 1e-9}


@pytest.mark.parametrize("at, workers", [(2, 0), (12, 0), (13, 0), (20, 0), (20, 2), (24, 0), (36, 0)])
def test_resume_is_equal_to_the_bit(unbroken, synthetic, tmp_path, every_step, capsys, at, workers):
    fit(Interrupted(at), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    capsys.readouterr()
    model = Interrupted(seed=99)  # its own weights do not matter
    history = fit(model, *synthetic, RECIPE, "cpu", tmp_path, num_workers=workers, **every_step)
    assert same_weights(model, unbroken[0])
    assert without_times(history) == without_times(unbroken[1])
    epoch, batch = divmod(at - 1, 12)
    assert f"epoch {epoch + 1}, batch {batch} of 12" in capsys.readouterr().out
    assert model.passes == 36 - (at - 1)


def test_resume_log_is_the_unbroken_one(synthetic, tmp_path, every_step, capsys):
    fit(Interrupted(), *synthetic, RECIPE, "cpu")
    expected = log_of(capsys.readouterr().out)
    fit(Interrupted(at=20), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    capsys.readouterr()
    fit(Interrupted(), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    assert log_of(capsys.readouterr().out) == expected and len(expected) == 9


def test_resume_from_within_an_epoch_only_when_asked(synthetic, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "REFRESH_SECONDS", 0)
    fit(Interrupted(at=20), *synthetic, RECIPE, "cpu", tmp_path, checkpoint_minutes=60)
    model = Interrupted()
    fit(model, *synthetic, RECIPE, "cpu", tmp_path, checkpoint_minutes=60)
    assert "epoch 2, batch 0 of 12" in capsys.readouterr().out and model.passes == 24


def test_resume_from_the_checkpoint_of_every_few_minutes(synthetic, tmp_path, monkeypatch, capsys):
    model = Interrupted(at=20)
    clock = SimpleNamespace(monotonic=lambda: 60 * model.passes, perf_counter=time.perf_counter)  # a minute a step
    monkeypatch.setattr(utils, "time", clock)
    fit(model, *synthetic, RECIPE, "cpu", tmp_path, checkpoint_minutes=5)
    fit(Interrupted(), *synthetic, RECIPE, "cpu", tmp_path)
    assert "epoch 2, batch 6 of 12" in capsys.readouterr().out  # more than 5 minutes after the end of epoch 1


def test_resume_of_a_finished_run_shows_it_without_training(unbroken, synthetic, tmp_path, capsys):
    fit(Interrupted(), *synthetic, RECIPE, "cpu", tmp_path)
    first = capsys.readouterr().out
    model = Interrupted(seed=99)
    history = fit(model, *synthetic, RECIPE, "cpu", tmp_path)
    again = capsys.readouterr().out
    assert "This run is finished" in again and model.passes == 0 and not model.training
    assert log_of(again) == log_of(first)
    assert same_weights(model, unbroken[0]) and without_times(history) == without_times(unbroken[1])


def test_resume_counts_the_seconds_before(synthetic, tmp_path, every_step):
    fit(Interrupted(at=20), *synthetic, RECIPE, "cpu", tmp_path, **every_step)
    state = load_checkpoint(tmp_path)
    before = state["progress"]["seconds"]
    state["progress"]["seconds"] = before + 100
    checkpoint.save_checkpoint(tmp_path, state)
    history = fit(Interrupted(), *synthetic, RECIPE, "cpu", tmp_path)
    assert 0 < before < 60 and history["seconds"][1] > 100 > history["seconds"][2]


def test_resume_tells_of_other_versions(synthetic, tmp_path, monkeypatch, capsys):
    fit(Interrupted(at=20), *synthetic, RECIPE, "cpu", tmp_path)
    monkeypatch.setattr(utils, "package_versions", lambda: {"torch": "99.0"})
    fit(Interrupted(), *synthetic, RECIPE, "cpu", tmp_path)
    assert f"torch {torch.__version__.partition('+')[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "what",
    ["lr", "seed", "dropout", "network", "forward", "data", "order", "augmentation", "normalisation", "optimizer"],
)
def test_resume_refuses_another_run_and_names_what_differs(synthetic, tmp_path, monkeypatch, what):
    fit(Interrupted(at=20), *synthetic, RECIPE, "cpu", tmp_path)
    model, (train, test), recipe = Interrupted(), synthetic, RECIPE
    if what == "lr":
        recipe, named = Config.one_cycle(epochs=3, batch_size=25, lr=0.03), "lr was 0.02 and is 0.03"
    elif what == "seed":
        recipe, named = Config.one_cycle(epochs=3, batch_size=25, lr=0.02, seed=1), "seed was 0 and is 1"
    elif what == "dropout":
        model, named = Interrupted(dropout=0.3), "network was"
    elif what == "network":
        model, named = AdvancedCNN(), "network was 'Interrupted, .* and is 'AdvancedCNN"
    elif what == "forward":

        class Interrupted_(Interrupted):
            def forward(self, x):
                return super().forward(x.flip(3))

        Interrupted_.__name__ = "Interrupted"
        model, named = Interrupted_(), "network's code was"
    elif what == "augmentation":
        file = tmp_path / "loaders.py"  # with another augmentation, and all else as it is
        file.write_text(
            Path(loaders.__file__).read_text().replace("A.HorizontalFlip(p=0.5)", "A.HorizontalFlip(p=0.1)")
        )
        spec = importlib.util.spec_from_file_location("loaders", file)
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        monkeypatch.setattr(utils, "loaders", changed)
        named = "code of loaders was"
    elif what == "normalisation":
        monkeypatch.setattr(utils, "STD", (0.2, 0.2, 0.2))
        named = "normalisation was .* and is .*0.2, 0.2, 0.2"
    elif what == "optimizer":
        monkeypatch.setattr(utils, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), lr=0.1))
        named = "code of make_optimizer was"
    elif what == "data":
        images = train.images.copy()
        images[0, 0, 0, 0] ^= 1
        train, named = Split(images, train.labels, train.source), "data was '.*' and is '"
    else:
        train, named = Split(train.images[::-1].copy(), train.labels[::-1].copy(), train.source), "data was"
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=f"(?s)is of another run: {named}"):
        fit(model, train, test, recipe, "cpu", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_resume_refuses_another_batch_size_of_the_device(synthetic, tmp_path, monkeypatch):
    recipe = Config(epochs=1)
    fit(Interrupted(), *synthetic, recipe, "cpu", tmp_path)
    monkeypatch.setattr(Config, "batch_size_on", lambda *_: 128)  # as an accelerator's would be
    with pytest.raises(CheckpointError, match="batch size on the device was 64 and is 128"):
        fit(Interrupted(), *synthetic, recipe, "cpu", tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is of another run: batch_size was None and is 64"):
        fit(Interrupted(), *synthetic, Config(epochs=1, batch_size=64), "cpu", tmp_path)


def test_checkpoints_are_two_small_files_of_plain_content(synthetic, tmp_path):
    fit(Interrupted(at=30), *synthetic, RECIPE, "cpu", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    last, previous = (torch.load(tmp_path / name, weights_only=True) for name in ("last.pt", "previous.pt"))
    assert (last["epoch"], previous["epoch"]) == (2, 1)
    weights = sum(value.numel() * value.element_size() for value in last["model"].values())
    assert (tmp_path / "last.pt").stat().st_size < 2.2 * weights + 100_000  # weights, momentum, random state


def test_one_seed_decides_the_result_for_any_number_of_workers(unbroken, synthetic):
    for workers in (0, 2):
        model = Interrupted()
        history = fit(model, *synthetic, RECIPE, "cpu", num_workers=workers)
        assert same_weights(model, unbroken[0]) and without_times(history) == without_times(unbroken[1])


def test_run_folder_is_named_after_configuration_network_and_data(synthetic):
    def name(model=None, splits=synthetic, **changes):
        return run_folder(model or Interrupted(seed=5), *splits, Config(**changes), "cpu", "runs")

    assert name() == name(Interrupted(seed=6)) and re.fullmatch(r"runs.[0-9a-f]{8}", str(name()))
    others = [name(lr=0.02), name(epochs=3), name(Interrupted(dropout=0.2)), name(AdvancedCNN()),
              name(splits=synthetic_cifar10(300, 99))]  # fmt: skip
    assert len({name(), *others}) == 6


CELL = """
class Block(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(x).BLOCK()

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(3, 10, 3)

    def forward(self, x):
        return self.block(x).NET((2, 3))
"""


def test_run_folder_knows_a_network_made_in_a_notebooks_cell_by_its_code(synthetic, monkeypatch):
    def name(cell, **changes):
        text = CELL
        for place, method in changes.items():
            text = text.replace(place, method)
        file = f"<ipython-input-{cell}>"  # a cell's text is kept where tracebacks look for it, and in no file
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
        space = {"__name__": "__main__", "torch": torch}
        exec(compile(text, file, "exec"), space)
        return run_folder(space["Net"](), *synthetic, Config(), "cpu")

    main = types.ModuleType("__main__")  # a notebook's, which has no file
    monkeypatch.setitem(sys.modules, "__main__", main)
    first = name(1, BLOCK="relu", NET="mean")
    assert name(2, BLOCK="relu", NET="mean") == first
    assert len({first, name(3, BLOCK="relu", NET="amax"), name(4, BLOCK="abs", NET="mean")}) == 3


def test_run_folder_knows_the_code_that_runs_and_not_what_was_written_since(synthetic, monkeypatch, tmp_path):
    file = tmp_path / "network_of_ones_own.py"
    text = "from model_AC import AdvancedCNN\n\nWIDTH = 0.5\n\nclass Net(AdvancedCNN):\n    pass\n"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which tells versions apart by size and second
    module = importlib.import_module(file.stem)
    monkeypatch.setitem(sys.modules, file.stem, module)  # taken out again after the test

    def name():
        return run_folder(module.Net(width=0.5), *synthetic, Config(), "cpu")

    first = name()
    file.write_text(text.replace("0.5", "0.25"))  # the class is the same, and what it is built of is not
    assert name() == first
    importlib.reload(module)
    assert name() != first


def test_resume_takes_the_optimizers_settings_from_the_recipe_and_an_enabled_scaler_from_the_file():
    # A run begun on a CPU may go on on a GPU, where SGD is fused and float16 needs a scaler.
    model = Interrupted()
    there = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9, foreach=False)
    here = torch.optim.SGD(model.parameters(), lr=2, momentum=0.9, foreach=True)
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    there.step()
    disabled, enabled = (torch.amp.GradScaler("cpu", enabled=on) for on in (False, True))
    checkpoint.restore(checkpoint.capture(model, there, disabled), model, here, enabled)
    assert here.param_groups[0]["lr"] == 2 and here.param_groups[0]["foreach"]
    buffers = [optimizer.state[model.dense.weight]["momentum_buffer"] for optimizer in (there, here)]
    assert torch.equal(*buffers)
    there = torch.amp.GradScaler("cpu", init_scale=2.0)
    there.scale(torch.ones(()))
    checkpoint.restore(checkpoint.capture(model, here, there), model, here, enabled)
    assert enabled.get_scale() == 2.0


def test_numbers_of_numpy_do_not_spoil_a_checkpoint(synthetic, tmp_path):
    recipe = Config(epochs=1, lr=np.float64(0.01))
    fit(Interrupted(), *synthetic, recipe, "cpu", tmp_path)
    assert load_checkpoint(tmp_path)["epoch"] == 1 and type(recipe.lr) is float
    save_model(tmp_path / "model.pt", Interrupted(), recipe, {"test_accuracy": np.float32(50)}, utils.CLASSES)
    assert load_model(tmp_path / "model.pt", Interrupted())["metrics"] == {"test_accuracy": 50.0}


def test_deterministic_kernels_are_asked_for_and_then_no_more(synthetic):
    class Asks(Interrupted):
        def forward(self, x):
            self.asked = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
            return super().forward(x)

    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    for deterministic in (True, False):
        model = Asks()
        fit(model, *synthetic, Config(epochs=1, deterministic=deterministic), "cpu")
        assert model.asked == (deterministic, not deterministic)
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before


# -- saved models --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = Interrupted()
    save_model(tmp_path / "new" / "model.pt", model, RECIPE, {"test_accuracy": 88.5}, utils.CLASSES)
    return model, tmp_path / "new" / "model.pt"


def test_a_saved_model_comes_back_with_what_was_saved_beside_it(saved):
    model, path = saved
    other = Interrupted(seed=1)
    about = load_model(path, other)
    assert same_weights(model, other) and not other.training
    assert about["metrics"] == {"test_accuracy": 88.5} and about["classes"] == list(utils.CLASSES)
    assert Config(**about["config"]) == RECIPE and about["network"] == "Interrupted"


def test_a_saved_model_that_does_not_fit_or_is_damaged_is_refused(saved, tmp_path):
    _, path = saved
    other = AdvancedCNN(width=0.5, num_classes=5)
    before = [value.clone() for value in other.state_dict().values()]
    with pytest.raises(CheckpointError, match=r"holds a Interrupted and does not fit this AdvancedCNN: 'dense.weight'"):
        load_model(path, other)
    assert all(torch.equal(a, b) for a, b in zip(before, other.state_dict().values(), strict=True))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model(path, Interrupted())
    with pytest.raises(FileNotFoundError, match="no saved model at"):
        load_model(tmp_path / "nowhere.pt", Interrupted())
