"""What a GPU would show, on a stand-in for CUDA (see `fake_cuda`).

Tests of other modules run on it too, by the fixture `device`.
"""

from collections import Counter

import pytest
import torch
from fake_cuda import fake_cuda
from networks import EXACT, Linear, same_weights, small_network
from session8.trainer import Trainer, fit

from model_AC import AdvancedCNN
from session8 import trainer, training
from session8.augment import as_batch_augmentation, normalize
from session8.checkpoint import load_checkpoint, load_model, save_checkpoint, save_model
from session8.config import RECIPES, Config
from session8.data import CLASSES, synthetic_cifar10
from session8.loaders import DeviceLoader
from session8.lr_finder import estimate_seconds

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


def count(events):
    """Count the events of training steps, and of refreshes, by (kind, operator, whether the host waits)."""
    steps = Counter(e[:3] for e in events if "train" in e.functions and "_update" not in e.functions)
    return steps, Counter(e[:3] for e in events if "_update" in e.functions)


@pytest.mark.parametrize("arithmetic", CAPABILITIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_copies_and_reads_nothing_outside_the_refresh(recipe, arithmetic, few, monkeypatch):
    monkeypatch.setattr(training, "REFRESH_SECONDS", 1e9)  # once per epoch
    config = Config.named(recipe, epochs=2, batch_size=20)
    with fake_cuda(CAPABILITIES[arithmetic]) as events:
        history = fit(AdvancedCNN(width=0.25), *few, config, "cuda")
        steps, refreshes = count(events)
    assert history["parts"][0]["arithmetic"] == arithmetic
    # Per epoch of three steps: the plan of the batches, from pinned memory; and the losses and the numbers of hits.
    assert steps == {("to device", "to(60, 6)", False): 2}
    assert refreshes == {("read", "tolist", True): 4}


def test_a_step_that_reads_a_value_is_noticed(synthetic, monkeypatch):
    step = training.train_step

    def reading(*arguments):
        nll, hits = step(*arguments)
        return nll, hits + 0 * int(nll.item())

    monkeypatch.setattr(training, "train_step", reading)
    with fake_cuda() as events:
        fit(Linear(), *synthetic, Config(epochs=1, batch_size=100), "cuda")
        assert count(events)[0][("read", "_local_scalar_dense", True)] == 3


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_in_float32_equals_one_on_the_cpu(recipe, synthetic, monkeypatch, tmp_path):
    """With the same batches: those of the device, on both."""
    config = Config.named(recipe, epochs=2, batch_size=100, precision="float32", dropout=0.0)

    def on_device(split, batch_size, train=True, seed=0, transform=None, device=None, padding="zeros", **options):
        alternate = options.get("flip") == "alternate"
        augmentation = as_batch_augmentation(transform, options["crop_padding"], alternate) if train else None
        return DeviceLoader(split, batch_size, augmentation, seed, device, padding)

    monkeypatch.setattr(trainer, "make_loader", on_device)

    def run(device):
        torch.manual_seed(0)
        model = AdvancedCNN(width=0.25, dropout=0)
        history = fit(model, *synthetic, config, device)
        return model.cpu(), [history["train_loss"], history["test_loss"], history["test_accuracy"]]

    model, expected = run("cpu")
    with fake_cuda():
        fake, history = run("cuda")
    assert history[2] == expected[2] and history[:2] == [pytest.approx(values, rel=1e-5) for values in expected[:2]]
    for ours, theirs in zip(fake.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arithmetic", CAPABILITIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_time_is_estimated_for_each_recipe(recipe, arithmetic, few):
    """AveragedModel divided integers here: \"Integer division of tensors using addcdiv\"."""
    config = Config.named(recipe, epochs=2, batch_size=30)
    with fake_cuda(CAPABILITIES[arithmetic]) as events:
        assert estimate_seconds(AdvancedCNN(width=0.25), *few, config, "cuda") > 0
        assert not [event for event in events if {"train_one", "step", "train_step"} & set(event.functions)]


FAST = Config.named("fast", epochs=2, batch_size=100, precision="float32")


@pytest.mark.parametrize("first, second", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_an_interrupted_run_resumes_on_any_device(first, second, synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "REFRESH_SECONDS", 0)
    step, steps = training.train_step, []

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == 5:  # in the second epoch
            raise KeyboardInterrupt
        return step(*arguments)

    results = []
    for folder in ("unbroken", "broken"):
        with fake_cuda():
            if folder == "broken":
                monkeypatch.setattr(training, "train_step", interrupted)
                fit(small_network(), *synthetic, FAST, first, tmp_path / folder, checkpoint_seconds=0)
                monkeypatch.setattr(training, "train_step", step)
            model = small_network(seed=len(results))
            device = first if folder == "unbroken" else second
            history = fit(model, *synthetic, FAST, device, tmp_path / folder, checkpoint_seconds=0)
            results.append((model.cpu(), history["test_loss"]))
            save_model(tmp_path / "weights.safetensors", model, FAST, {}, CLASSES)
    assert len(steps) == 5 and len(results[1][1]) == 2
    if first == second:
        assert same_weights(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert same_weights(load_model(tmp_path / "weights.safetensors", small_network())[0], results[1][0])


def test_a_checkpoint_from_before_the_first_step_survives_an_overflow_in_it(few, tmp_path, monkeypatch):
    """A fused step that overflows leaves new momentum buffers uninitialised: here they would be NaN."""
    config, empty_like = Config(epochs=1, batch_size=30), torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(trainer, "_identity", lambda *_: None)
    with fake_cuda((7, 5)):
        too_large = torch.amp.GradScaler("cuda", init_scale=2.0**60)
        monkeypatch.setattr(trainer, "make_scaler", lambda *_: too_large)
        state = Trainer(small_network(), *few, config, "cuda").state_dict()
        save_checkpoint(tmp_path, {**state, "optimizer": {}})  # as written on a CPU by earlier versions
        fit(small_network(), *few, config, "cuda", tmp_path)
        assert too_large.get_scale() < 2.0**60  # it overflowed
    buffers = [entry["momentum_buffer"] for entry in load_checkpoint(tmp_path)["optimizer"].values()]
    assert buffers and all(buffer.isfinite().all() for buffer in buffers)


def test_constants_follow_the_current_gpu():
    """ "cuda" names another GPU after a change of the current one."""
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with fake_cuda(gpus=2):
        for index in (0, 1):
            torch.cuda.set_device(f"cuda:{index}")
            assert normalize(images, torch.device("cuda")).device == torch.device("cuda", index)


def test_checks_before_training_run_on_the_device(synthetic):
    with fake_cuda(), pytest.raises(ValueError, match=r"Sequential returns \(2, 1000\)"):
        fit(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 1000)), *synthetic, EXACT, "cuda")
