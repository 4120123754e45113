"""The examples of docs/logging.md, where the packages that they need are installed."""

import re
from pathlib import Path

import pytest
import torch
from networks import TinyNetwork

import utils
from session8.config import Config
from session8.data import validation_split

PAGE = Path(__file__).parent.parent / "docs" / "logging.md"
TENSORBOARD, OPTUNA = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def notebook(synthetic, tmp_path, monkeypatch):
    """The names that the notebook has defined."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "validation_split", lambda split: validation_split(split, 50))
    names = {"train_split": synthetic[0], "test_split": synthetic[1], "DEVICE": torch.device("cpu")}
    return {**names, "utils": utils, "make_model": TinyNetwork, "config": Config(epochs=2, batch_size=50)}


def test_tensorboard(notebook, tmp_path):
    pytest.importorskip("tensorboard")
    exec(TENSORBOARD, notebook)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "runs").iterdir()))).Reload()
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(epoch, pytest.approx(value)) for epoch, value in enumerate(notebook["history"][name], 1)]


def test_optuna(notebook):
    optuna = pytest.importorskip("optuna")
    exec(OPTUNA, notebook)
    states = [trial.state for trial in notebook["study"].trials]
    assert len(states) == 20 and {*states} == {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    assert 0.003 <= notebook["study"].best_params["lr"] <= 0.3
