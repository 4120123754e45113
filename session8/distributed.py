"""Several processes under torchrun: the process group, what the ranks tell each other, and errors that end all ranks.

Outside torchrun, and without a process group of the caller's, a process is rank 0 of 1 and nothing here communicates.
"""

import contextlib
import itertools
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist

from session8.console import plural
from session8.device import get_device

_groups = itertools.count()  # how many process groups this process has joined
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # which torchrun sets


class RankError(RuntimeError):
    """An error of one rank, raised on all ranks. The message names the rank."""


def world_size():
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Return the index of this process. Rank 0 prints, and writes checkpoints and records."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def process_group(device=None):
    """Join the process group that torchrun describes, and leave it at the end. Yields this rank's torch.device.

    CUDA tensors travel through NCCL, others through Gloo. On CUDA each process uses the GPU of its LOCAL_RANK. A group
    that exists already is used as it is, and is not left. Standard output of the ranks other than 0 is discarded.

    device: as in `get_device`. Raises ValueError if it is not available, or if torchrun's variables are incomplete or
    do not allow restarts; RankError, with several processes, if a rank cannot use its device.
    """
    joined, leave = False, True
    if not (dist.is_available() and dist.is_initialized()) and any(name in os.environ for name in VARIABLES[:3]):
        _join_torchrun(device)
        joined = True
    try:
        with contextlib.ExitStack() as stack:
            with raise_together():
                device = _own_device(device, joined) if world_size() > 1 else get_device(device)
            if rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield device
    except RankError:
        raise
    except BaseException:
        leave = False  # NCCL would wait for ranks that wait for this one; the end of the process releases them
        raise
    finally:
        if joined and leave:
            dist.destroy_process_group()


def _join_torchrun(device):
    environment = os.environ
    if missing := [name for name in VARIABLES if name not in environment]:
        raise ValueError(
            f"rank {environment.get('RANK', '?')}: {', '.join(missing)} not set, but other variables of torchrun are: "
            f"start the processes with torchrun, or unset {', '.join(VARIABLES)}"
        )
    store, restarts = None, environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Every group of every restart meets in this store. With equal keys, a process would find the addresses of
        # processes that have ended, and hang (pytorch/pytorch#135712). Each torchrun counts its own restarts, so the
        # count is a common key for one torchrun only.
        if environment.get("GROUP_WORLD_SIZE") != "1" and environment.get("TORCHELASTIC_MAX_RESTARTS") != "0":
            raise ValueError(
                "--max-restarts on several machines needs the environment variable "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for each torchrun, without which a restart may hang"
            )
        store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart {restarts}, group {next(_groups)}", store)
    on_cuda = torch.cuda.is_available() and get_device(device).type == "cuda"
    ranks = {"rank": int(environment["RANK"]), "world_size": int(environment["WORLD_SIZE"])}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=store, **ranks)


def _own_device(device, joined):
    found = get_device(device)
    if found.type == "mps":
        if device is not None:
            raise ValueError(f"device is {device!r}, which is one GPU for {world_size()} processes: use one process")
        return torch.device("cpu")
    if found.type == "cuda":
        n, local = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
        local = torch.cuda.current_device() if local is None else int(local)
        if found.index is not None and joined:
            raise ValueError(f"device is {device!r}, but each process uses the GPU of its LOCAL_RANK: use 'cuda'")
        if found.index is None and local >= n:
            raise ValueError(
                f"LOCAL_RANK is {local}, but this machine has {plural(n, 'GPU')}: use --nproc-per-node={n}"
            )
        found = torch.device("cuda", local if found.index is None else found.index)
        torch.cuda.set_device(found)
    return found


# -- what the ranks tell each other ---------------------------------------------------------------------------------


def sum_over_ranks(tensor):
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


def broadcast(value):
    """Return the value of rank 0 on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def broadcast_buffers(model):
    """Give every rank the buffers of rank 0's model, which are batch norm's running statistics."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


# -- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def raise_together():
    """Raise RankError on every rank if the block fails on any. The block must not communicate.

    With one process, errors pass unchanged.
    """
    failure = None
    try:
        yield
    except (Exception, SystemExit) as error:
        if world_size() == 1:
            raise
        failure = error
    for index, message in enumerate(gather(None if failure is None else f"{type(failure).__name__}: {failure}")):
        if message is not None:
            raise RankError(f"rank {index} of {world_size()}: {message.removeprefix('SystemExit: ')}") from failure


def rank_0_first(function):
    """Call a function on rank 0, then on the others, and return its result. It must not communicate.

    An error on any rank is raised on all.
    """
    for mine in (rank() == 0, rank() > 0):
        with raise_together():
            if mine:
                result = function()
    return result
