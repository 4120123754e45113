"""The device, its precision and PyTorch's global flags."""

import pytest
import torch
from networks import CPU, EXACT, Linear

from session8.config import Config
from session8.device import amp_dtype, autocast, available_cores, backend_flags, get_device, memory_format, to_device
from session8.inference import predict
from session8.training import fit


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # no bfloat16


def test_the_default_device_is_the_first_available(cpu_only, monkeypatch):
    assert get_device() == get_device("cpu") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert get_device().type == "mps" and get_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert get_device().type == "cuda" and get_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="device is 'cuda:1', which is not available; available: cuda, mps, cpu"):
        get_device("cuda:1")


def test_the_dtype_follows_the_hardware_unless_it_is_named(monkeypatch):
    capabilities = {torch.device("cuda:0"): (8, 0), torch.device("cuda:1"): (7, 5)}  # the second is a T4
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    assert [amp_dtype("auto", f"cuda:{index}") for index in (0, 1)] == [torch.bfloat16, torch.float16]
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD
    assert amp_dtype("auto", "cuda:1") is torch.bfloat16
    for found, expected in (
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16), ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, None), ({}, None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert amp_dtype("auto", CPU) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # older releases do not have it
    assert amp_dtype("auto", CPU) is amp_dtype("auto", "mps") is None
    for device in ("cpu", "cuda"):  # a named precision is used on any hardware
        assert amp_dtype("float32", device) is None and amp_dtype("bfloat16", device) is torch.bfloat16
    assert amp_dtype("float16", "cuda") is torch.float16


def test_autocast_computes_in_the_dtype_of_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    weight = torch.ones(3, 3)
    for precision, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        with autocast(precision, "cpu"):
            assert (weight @ weight).dtype == dtype


def test_bfloat16_without_hardware_runs_with_a_warning(synthetic, cpu_only, monkeypatch):
    config = Config(epochs=1, precision="bfloat16", batch_size=100)
    with pytest.warns(UserWarning, match="cpu has no bfloat16 instructions: precision='auto' may be faster"):
        history = fit(Linear(), *synthetic, config, "cpu")
    assert history["run"]["arithmetic"] == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    fit(Linear(), *synthetic, config, "cpu")  # a warning would fail


def test_networks_are_channels_last_but_not_on_mps_whose_batch_norm_is_wrong_in_it():
    assert memory_format("mps") == torch.contiguous_format and memory_format("cuda") == torch.channels_last
    conv = to_device(torch.nn.Conv2d(3, 10, 3), "cpu")
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_available_cores_are_those_of_the_process_and_not_of_the_host(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5})
    assert available_cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")  # macOS and Windows
    assert available_cores() == 64


BAD = [
    (lambda: get_device("gpu"), "device is 'gpu', which is unknown; available: cpu"),
    (lambda: get_device(""), "device is '', which is unknown; available: cpu"),
    (lambda: get_device("cuda"), "device is 'cuda', which is not available; available: cpu"),
    (lambda: get_device("meta"), "device is 'meta', which is not available; available: cpu"),
    (lambda: amp_dtype("float16", "cpu"), "precision is 'float16', which needs CUDA; expected 'auto' on cpu"),
    (lambda: amp_dtype("float16", "mps"), "precision is 'float16', which needs CUDA; expected 'auto' on mps"),
]


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input_device_and_precision(call, words, cpu_only):
    with pytest.raises(ValueError, match=f"{words}$"):
        call()


def test_bad_input_device_and_precision_are_refused_before_training(synthetic, cpu_only):
    model = AsksForFlags()
    for config, device in ((EXACT, "cuda"), (Config(epochs=1, precision="float16"), "cpu")):
        with pytest.raises(ValueError, match=r"not available; available: cpu|which needs CUDA"):
            fit(model, *synthetic, config, device)
    assert not model.seen  # no forward pass


# -- flags -------------------------------------------------------------------------------------------------------------


class AsksForFlags(Linear):
    """Notes PyTorch's flags in each forward pass. Networks may read and set the older ones of cuDNN."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, x):
        self.seen.add((*flags()[:2], torch.backends.cudnn.allow_tf32))
        with torch.backends.cudnn.flags(enabled=True):
            pass
        return super().forward(x)


def flags():
    cudnn = torch.backends.cudnn
    tf32 = cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else cudnn.allow_tf32
    return torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, tf32


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_flags_are_set_while_a_network_computes_and_restored(synthetic, deterministic, precision):
    """On NVIDIA GPUs since Ampere cuDNN computes float32 convolutions in TF32 by default."""
    before, model = flags(), AsksForFlags()
    fit(model, *synthetic, Config(epochs=1, deterministic=deterministic, precision=precision), "cpu")
    assert model.seen == {(deterministic, not deterministic, precision == "auto")} and flags() == before
    model.seen.clear()
    predict(model, synthetic[1].images[0], device="cpu")
    assert model.seen == {(False, True, False)} and flags() == before


def test_flags_are_restored_after_an_error():
    before = flags()
    with pytest.raises(KeyError), backend_flags(Config(precision="float32", deterministic=True)):
        assert flags()[:2] == (True, False) and flags()[2] in ("ieee", False)
        raise KeyError
    assert flags() == before and before[2] in ("tf32", True)
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
