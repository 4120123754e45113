"""What a GPU would show, on a stand-in for CUDA (see `fake_cuda`).

Tests of other modules run on it too, by the fixture `device`.
"""

from collections import Counter

import albumentations as A
import pytest
import torch
from fake_cuda import fake_cuda
from networks import TinyNetwork, in_step, interrupt, same_weights

from model_AC import AdvancedCNN
from session8 import state, training
from session8.augment import normalize
from session8.checkpoint import load_checkpoint, load_model, save_model
from session8.config import RECIPES, Config
from session8.data import CLASSES, synthetic_cifar10
from session8.training import fit

CAPABILITIES = {"bfloat16": (8, 0), "float16": (7, 5)}


@pytest.fixture(scope="session")
def few():
    return synthetic_cifar10(60, 20)  # a CPU is slow in float16


# -- the stand-in itself -------------------------------------------------------------------------------------------


def test_the_stand_in_refuses_to_mix_devices_and_notes_what_makes_the_host_wait():
    with fake_cuda(gpus=2) as events:
        one, other = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
        assert (one.device, other.device) == (torch.device("cuda:0"), torch.device("cuda:1"))
        for foreign in (torch.ones(3), other):
            with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
                one + foreign
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            one.numpy()
        assert torch.equal((2 * one).cpu(), torch.full((3,), 2.0))
        events.clear()
        for waits in (
            lambda: one.sum().item(), lambda: one.tolist(), lambda: bool(one[0] > 0), lambda: one.cpu(),
            lambda: torch.ones(3).to("cuda"), lambda: torch.tensor([1.0], device="cuda"), lambda: one[one > 0],
            lambda: one.nonzero(), lambda: one.copy_(torch.ones(3)), lambda: one.to("cuda:1"),
        ):  # fmt: skip
            waits()
            assert [event.waits for event in events] == [True]
            events.clear()
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert [event.waits for event in events] == [False]
        events.clear()
        (one * 2 + one).sum()
        torch.zeros(3, device="cuda")
        assert not events
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != "Fake GPU"


# -- copies and reads ----------------------------------------------------------------------------------------------


def in_epochs(events):
    """Count the events of epochs, tests and checkpoints aside, by (kind, operator, whether the host waits)."""
    other = {"prepare", "test", "is_finite", "save", "state_dict", "load_state_dict"}
    return Counter(event[:3] for event in events if "fit" in event.functions and not other & set(event.functions))


@pytest.mark.parametrize("arithmetic", CAPABILITIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_is_copied_or_read_outside_the_refresh(recipe, arithmetic, few, monkeypatch):
    monkeypatch.setattr(training, "REFRESH_STEPS", 4)
    config = Config.named(recipe, epochs=2, batch_size=10)
    with fake_cuda(CAPABILITIES[arithmetic]) as events:
        network = AdvancedCNN(width=0.25) if arithmetic == "bfloat16" else TinyNetwork()
        run = fit(network, *few, config, "cuda")["run"]
        # Per epoch of six steps: the plan of the batches, from pinned memory; and two refreshes.
        assert in_epochs(events) == {("to device", "to(60, 6)", False): 2, ("read", "tolist", True): 4}
    assert (run["arithmetic"], run["augmentation"]) == (arithmetic, "batched on cuda")


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_in_float32_equals_one_on_the_cpu(recipe, synthetic):
    """With the same batches, from albumentations."""
    config = Config.named(recipe, epochs=2, batch_size=100, precision="float32")
    results, transform = [], A.Compose([A.RandomCrop(32, 32)])
    for device in ("cpu", "cuda"):
        with fake_cuda():
            model = TinyNetwork()
            history = fit(model, *synthetic, config, device, transform=transform, num_workers=0)
            results.append((model.cpu().state_dict(), history))
    (expected, expected_history), (weights, history) = results
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert history[name] == pytest.approx(expected_history[name], rel=1e-5)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first, second, arithmetic", [
    ("cuda", "cuda", "bfloat16"), ("cuda", "cuda", "float16"), ("cuda", "cpu", "bfloat16"), ("cpu", "cuda", "float16"),
])  # fmt: skip
def test_an_interrupted_run_resumes_on_any_device(first, second, arithmetic, few, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "REFRESH_STEPS", 4)
    if arithmetic == "float16":  # overflows in the first steps, which are skipped, until the scale is small enough
        monkeypatch.setattr(state, "make_scaler", lambda _, device: torch.amp.GradScaler(device, init_scale=2.0**24))
    config = Config.named("fast", epochs=2, batch_size=10)

    def train(model, folder, device):
        with fake_cuda(CAPABILITIES[arithmetic]):
            history = fit(model, *few, config, device, tmp_path / folder, checkpoint_seconds=0)
            save_model(tmp_path / "weights.safetensors", model, config, {}, CLASSES)
            return model.cpu(), history

    train(TinyNetwork(in_step(11, interrupt)), "broken", first)
    model, history = train(TinyNetwork(seed=9), "broken", second)
    assert model.passes == 2 and len(history["test_loss"]) == 2 and history["run"]["resumed"] == 1
    assert same_weights(load_model(tmp_path / "weights.safetensors", TinyNetwork())[0], model)
    if first == second:
        unbroken, expected = train(TinyNetwork(), "unbroken", first)
        assert same_weights(model, unbroken) and history["train_loss"] == expected["train_loss"]
        assert not torch.equal(model[-1].weight, TinyNetwork()[-1].weight)


def test_a_first_step_of_float16_that_overflows_leaves_no_uninitialised_momentum(few, tmp_path, monkeypatch):
    """A fused step that overflows leaves new momentum buffers uninitialised: here they would be NaN."""
    empty_like, too_large = torch.empty_like, []
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))

    def make_scaler(*_):
        too_large.append(torch.amp.GradScaler("cuda", init_scale=2.0**60))
        return too_large[-1]

    monkeypatch.setattr(state, "make_scaler", make_scaler)
    with fake_cuda((7, 5)):
        fit(TinyNetwork(), *few, Config(epochs=1, batch_size=30), "cuda", tmp_path)
        assert too_large[0].get_scale() == 2.0**58  # both steps overflowed
    buffers = [entry["momentum_buffer"] for entry in load_checkpoint(tmp_path)["optimizer"].values()]
    assert buffers and all(buffer.isfinite().all() for buffer in buffers)


def test_constants_follow_the_current_gpu():
    """ "cuda" names another GPU after a change of the current one."""
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with fake_cuda(gpus=2):
        for index in (0, 1):
            torch.cuda.set_device(f"cuda:{index}")
            assert normalize(images, torch.device("cuda")).device == torch.device("cuda", index)
