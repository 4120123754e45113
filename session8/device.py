"""The device to compute on, and how: precision, memory format and kernel settings."""

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from session8.config import Config
from session8.console import plural


def get_device(device: torch.device | str | None = None) -> torch.device:
    """Return the torch.device to use: `device` if given, else the first available of CUDA, MPS and CPU.

    device: a torch.device or its name, for instance "cuda:1". Raises ValueError if it is unknown or not available.
    """
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, there in usable.items() if there]
    if device is None:
        return torch.device(available[0])
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, which is unknown; available: {', '.join(available)}") from error
    if found.type not in available or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device is {device!r}, which is not available; available: {', '.join(available)}")
    return found


def amp_dtype(precision: str, device: torch.device | str) -> torch.dtype | None:
    """Return the dtype that autocast uses on `device`, or None for float32 throughout.

    precision "auto": bfloat16 on CUDA GPUs and CPUs that compute in it (AMX or AVX-512 BF16), float16 on other CUDA
    GPUs, float32 elsewhere. "float32", "bfloat16" or "float16": that type. Weights and optimizer state are float32 in
    every case. Raises ValueError for float16 on another device than CUDA.
    """
    device = torch.device(device)
    if precision == "float16" and device.type != "cuda":
        raise ValueError(f"precision is 'float16', which needs CUDA; expected 'auto' on {device.type}")
    if precision != "auto":
        return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if computes_in_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def computes_in_bfloat16(device: torch.device | str) -> bool:
    """Return whether PyTorch reports instructions for bfloat16, without which it is slower than float32."""
    device = torch.device(device)
    if device.type == "cuda":  # AMD's GPUs all report it
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # missing in older releases
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def autocast(precision: str, device: torch.device | str) -> AbstractContextManager:
    """Return the context of a forward pass in `amp_dtype(precision, device)`."""
    dtype = amp_dtype(precision, device)
    return torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()


def memory_format(device: torch.device | str) -> torch.memory_format:
    """Return the memory format of image batches on `device`: channels_last, except on MPS.

    On MPS the gradients of batch norm are wrong with channels_last in several releases (pytorch/pytorch#175189).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def to_device(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a network to a device, in the memory format of its image batches, and return it."""
    return model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]


@contextmanager
def backend_flags(config: Config) -> Iterator[None]:
    """Set PyTorch's global flags as `config` asks, and restore them on exit.

    precision="float32" turns TF32 off in cuDNN. deterministic=True selects deterministic kernels; an operation without
    one warns and runs. Otherwise cuDNN benchmarks its kernels. The environment variable CUBLAS_WORKSPACE_CONFIG, which
    cuBLAS reads once, stays set.
    """
    cudnn = torch.backends.cudnn
    benchmark, deterministic = cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.benchmark = not config.deterministic
        with _without_tf32() if config.precision == "float32" else nullcontext():
            yield
    finally:
        cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _without_tf32():
    cudnn = torch.backends.cudnn
    operators = [cudnn.conv, cudnn.rnn] if hasattr(cudnn, "conv") else []  # missing in older releases
    before = [operator.fp32_precision for operator in operators]
    try:
        allowed = cudnn.allow_tf32
    except RuntimeError:  # the caller has set the operators' flags, and with them made this one unreadable
        allowed = True
    try:
        # All of them: if they disagree, reading allow_tf32 in a network raises an error (pytorch/pytorch#179445).
        cudnn.allow_tf32 = False
        for operator in operators:
            operator.fp32_precision = "ieee"
        yield
    finally:
        cudnn.allow_tf32 = allowed
        for operator, precision in zip(operators, before, strict=True):
            operator.fp32_precision = precision


def arithmetic(precision: str, device: torch.device | str) -> str:
    """Return in words how convolutions are computed, for logs and records: "bfloat16", "float32", ..."""
    dtype = amp_dtype(precision, device)
    return str(dtype or torch.float32).removeprefix("torch.")


def device_name(device: torch.device | str) -> str:
    """Return the name of the GPU, or of the processor with the number of threads that PyTorch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # on Linux platform.processor() is empty
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {'GPU (MPS)' if device.type == 'mps' else plural(torch.get_num_threads(), 'thread')}"


def fork_rng(device: torch.device | str) -> AbstractContextManager:
    """Return a context manager that restores the random states of the CPU and of `device` on exit."""
    device = torch.device(device)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has finished its queued work."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def available_cores() -> int:
    """Return the number of cores that this process may use, which in a container can be fewer than the host's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
