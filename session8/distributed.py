"""Several processes under torchrun: the process group, and what the ranks tell each other.

Outside torchrun, and without a process group of the caller's, a process is rank 0 of 1 and nothing here communicates.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from session8.console import plural
from session8.device import get_device

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # which torchrun sets


class RankError(RuntimeError):
    """An error of one rank, raised on all ranks. The message names the rank."""


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process. Rank 0 prints, and reads and writes checkpoints and records."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def process_group(device: torch.device | str | None = None) -> Iterator[torch.device]:
    """Join the process group that torchrun describes, if the process is in none. Yields this rank's torch.device.

    On CUDA each process uses the GPU of its LOCAL_RANK. Standard output of the ranks other than 0 is discarded. The
    process stays in the group at the end: see `leave_group`.

    device: as in `get_device`. Raises ValueError if it is not available, or if torchrun's variables are incomplete or
    do not allow restarts; RankError, with several processes, if a rank cannot use its device.
    """
    joins = any(name in os.environ for name in VARIABLES[:3]) and not (dist.is_available() and dist.is_initialized())
    if joins:
        _check_variables()
        on_cuda = torch.cuda.is_available() and get_device(device).type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    with contextlib.ExitStack() as stack:
        with raise_together():
            device = _own_device(device, joins) if world_size() > 1 else get_device(device)
        if rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield device


def leave_group() -> None:
    """Leave the process group at the end of a program, as NCCL asks.

    Not before: the next group would find the addresses of this one in torchrun's store, and fail or hang. Nor after an
    error: NCCL would wait for ranks that wait for this one.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _check_variables():
    environment = os.environ
    if missing := [name for name in VARIABLES if name not in environment]:
        raise ValueError(
            f"rank {environment.get('RANK', '?')}: {', '.join(missing)} not set, but other variables of torchrun are: "
            f"start the processes with torchrun, or unset {', '.join(VARIABLES)}"
        )
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Restarted processes would find the addresses of ended ones in torchrun's store (pytorch/pytorch#135712).
        raise ValueError(
            f"--max-restarts is {restarts}, after which a restart may hang: set the environment variable "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
        )


def _own_device(device, joins):
    found = get_device(device)
    if found.type == "mps":
        if device is not None:
            raise ValueError(f"device is {device!r}, which is one GPU for {world_size()} processes: use one process")
        return torch.device("cpu")
    if found.type == "cuda":
        n, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        if found.index is not None and joins:
            raise ValueError(f"device is {device!r}, but each process uses the GPU of its LOCAL_RANK: use 'cuda'")
        if found.index is None and local >= n:
            raise ValueError(
                f"LOCAL_RANK is {local}, but this machine has {plural(n, 'GPU')}: use --nproc-per-node={n}"
            )
        found = torch.device("cuda", local if found.index is None else found.index)
        torch.cuda.set_device(found)
    return found


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its sum over the ranks, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """Return the values of all ranks, plain or tensors, as a list on every rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def from_rank_0(value):
    """Return the value of rank 0, plain or with tensors, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def share_buffers(model: torch.nn.Module) -> None:
    """Give every rank the buffers of rank 0's model, which are batch norm's running statistics."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@contextmanager
def raise_together() -> Iterator[None]:
    """Raise RankError on every rank if the block fails on any. The block must not communicate.

    With one process, errors pass unchanged.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        failure = error
    for index, message in enumerate(gather(None if failure is None else f"{type(failure).__name__}: {failure}")):
        if message is not None:
            raise RankError(f"rank {index} of {world_size()}: {message}") from failure
