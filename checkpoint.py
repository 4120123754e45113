"""Losing nothing: the record that every run leaves behind."""

import json
import os
import platform
import subprocess
from copy import deepcopy
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model):
    """Multiply-accumulates of one forward pass on one (3, 32, 32) image: convolutions and matrix products."""
    # A copy on the CPU in evaluation mode: the count must move neither batch-norm statistics nor random states.
    copy = deepcopy(model).cpu().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def device_name(device):
    """What the device is called: the GPU's name, or the processor's with the number of threads PyTorch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {'GPU (MPS)' if device.type == 'mps' else f'{torch.get_num_threads()} threads'}"


def write_record(path, model, train_split, test_split, config, history, device):
    """Write the record of one run as JSON, all or nothing, and return it as a dict.

    Its fields: `model` (class name), `width`, `parameters` and `macs` (of one image) of the network; `data` (the
    source, which says so if it is synthetic), `n_train`, `n_test`; `config` (every number of the recipe); `history`
    (what `fit` returned, accuracies in percent); `device` (its name); `versions` (of Python and the
    packages that shape the numbers); `commit` (of the project, "-dirty" if files had changed; null outside git);
    `seconds` (of the whole training, tests included); `finished` (UTC).
    """
    record = {
        "model": type(model).__name__,
        "width": getattr(model, "width", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(model),
        "data": test_split.source,
        "n_train": len(train_split),
        "n_test": len(test_split),
        "config": asdict(config),
        "history": history,
        "device": device_name(device),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchvision", "albumentations", "numpy")},
        },
        "commit": _commit(),
        "seconds": round(sum(history["seconds"]), 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON has no words for NaN and infinity: they become null.
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=1))
    os.replace(part, path)
    return record


def describe_record(record):
    """One line that sums up a record: epochs, device, time, and the last epoch's accuracies."""
    history = record["history"]
    last = [f"{history[name][-1]:.2f} %" if history[name] else "none" for name in ("train_accuracy", "test_accuracy")]
    return (
        f"{len(history['seconds'])} of {record['config']['epochs']} epochs on {record['data']}, "
        f"{record['device']}, in {record['seconds'] / 60:.1f} minutes: train {last[0]}, test {last[1]}"
    )


def _commit():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        folder = Path(__file__).resolve().parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return None
