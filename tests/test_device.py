"""The device, its precision and PyTorch's global flags."""

import pytest
import torch
from networks import CPU, EXACT, Linear
from session8.trainer import Trainer, fit

from session8.config import Config
from session8.device import amp_dtype, arithmetic, autocast, available_cores, backend_flags, get_device, memory_format
from session8.inference import predict


def test_the_default_device_is_the_first_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert get_device() == get_device("cpu") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert get_device().type == "mps" and get_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert get_device().type == "cuda"
    with pytest.raises(ValueError, match="device is 'cuda:1', which is not available; available: cuda, mps, cpu"):
        get_device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "cuda", "meta", ""])
def test_bad_input_device(name, monkeypatch, synthetic):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"device is '{name}', which is (unknown|not available); available: cpu$"):
        fit(Linear(), *synthetic, EXACT, name)


def test_the_dtype_of_autocast_follows_the_hardware(monkeypatch):
    capabilities = {torch.device("cuda:0"): (8, 0), torch.device("cuda:1"): (7, 5)}  # the second is a T4
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    assert [amp_dtype("auto", f"cuda:{index}") for index in (0, 1)] == [torch.bfloat16, torch.float16]
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD
    assert amp_dtype("auto", "cuda:1") is torch.bfloat16
    for capabilities, expected in (
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16), ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, None), ({}, None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert amp_dtype("auto", CPU) is expected
        assert arithmetic("auto", "cpu") == ("bfloat16" if expected else "float32")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # older releases do not have it
    assert amp_dtype("auto", CPU) is amp_dtype("auto", "mps") is None


def test_a_named_precision_is_used_on_any_hardware(monkeypatch):
    assert amp_dtype("float32", CPU) is amp_dtype("float32", "cuda") is None
    assert amp_dtype("bfloat16", CPU) is amp_dtype("bfloat16", "cuda") is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert amp_dtype("float16", "cuda") is torch.float16


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_bad_input_float16_without_cuda(device):
    with pytest.raises(ValueError, match=f"precision is 'float16', which needs CUDA; expected 'auto' on {device}"):
        amp_dtype("float16", device)


def test_bad_input_float16_is_refused_before_training(synthetic):
    model = AsksForFlags()
    with pytest.raises(ValueError, match="precision is 'float16', which needs CUDA"):
        fit(model, *synthetic, Config(epochs=1, precision="float16"), "cpu")
    assert not hasattr(model, "flags")  # no forward pass


def test_bfloat16_without_hardware_runs_with_a_warning(synthetic, monkeypatch, capsys):
    config = Config(epochs=1, precision="bfloat16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    with pytest.warns(UserWarning, match="cpu has no bfloat16 instructions: precision='auto' may be faster"):
        fit(Linear(), *synthetic, config, "cpu")
    assert "bfloat16 on cpu" in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    history = fit(Linear(), *synthetic, config, "cpu")  # a warning would fail
    assert history["parts"][0]["arithmetic"] == "bfloat16"


def test_autocast_computes_in_that_dtype(monkeypatch):
    weight = torch.ones(3, 3)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    for precision, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        with autocast(precision, "cpu"):
            assert (weight @ weight).dtype == dtype


def test_mps_gets_no_channels_last_in_which_its_batch_norm_is_wrong(synthetic, monkeypatch):
    assert memory_format("mps") == torch.contiguous_format and memory_format("cuda") == torch.channels_last
    monkeypatch.setattr("session8.trainer.memory_format", lambda _: torch.contiguous_format)
    conv = torch.nn.Conv2d(3, 10, 32).to(memory_format=torch.channels_last)
    Trainer(torch.nn.Sequential(conv, torch.nn.Flatten()), *synthetic, EXACT, CPU)
    assert conv.weight.is_contiguous()


class AsksForFlags(Linear):
    """Notes PyTorch's flags in each forward pass. Networks may read and set the older ones of cuDNN."""

    def forward(self, x):
        self.flags = flags()
        self.allows_tf32 = torch.backends.cudnn.allow_tf32
        with torch.backends.cudnn.flags(enabled=True):
            pass
        return super().forward(x)


def flags():
    cudnn = torch.backends.cudnn
    tf32 = cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else cudnn.allow_tf32
    return torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, tf32


IEEE = "ieee" if hasattr(torch.backends.cudnn, "conv") else False


def test_deterministic_kernels_are_set_during_training_only(synthetic):
    before = flags()
    for deterministic in (True, False):
        model = AsksForFlags()
        fit(model, *synthetic, Config(epochs=1, deterministic=deterministic), "cpu")
        assert model.flags[:2] == (deterministic, not deterministic)
        assert flags() == before


def test_float32_turns_tf32_off_in_training_testing_and_predict(synthetic):
    """On NVIDIA GPUs since Ampere cuDNN computes float32 convolutions in TF32 by default."""
    before = flags()
    assert before[2] != IEEE
    model = AsksForFlags()
    fit(model, *synthetic, Config(epochs=1, precision="float32"), "cpu")  # the last forward pass is of the test
    assert model.flags[2] == IEEE and flags() == before and not model.allows_tf32
    model.train()
    model.flags = None
    predict(model, synthetic[1].images[0], device="cpu")
    assert model.flags[2] == IEEE and flags() == before
    fit(model, *synthetic, Config(epochs=1), "cpu")
    assert model.flags[2] == before[2]


def test_flags_are_restored_after_an_error():
    before = flags()
    with pytest.raises(KeyError), backend_flags(Config(precision="float32", deterministic=True)):
        assert flags() != before
        raise KeyError
    assert flags() == before
    assert torch.backends.cudnn.allow_tf32  # reading it raises an error if the old and the new flags disagree


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="newer releases have flags per operator")
def test_flags_per_operator_of_the_caller_are_restored():
    cudnn, before = torch.backends.cudnn, flags()
    try:
        cudnn.conv.fp32_precision = "ieee"  # which alone makes reading allow_tf32 an error
        with backend_flags(Config(precision="float32")):
            assert cudnn.conv.fp32_precision == "ieee" and not cudnn.allow_tf32
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")
    finally:
        cudnn.conv.fp32_precision = before[2]
    assert flags() == before


def test_available_cores_are_those_of_the_process_and_not_of_the_host(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5}, raising=False)
    assert available_cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")  # macOS and Windows
    assert available_cores() == 64
