"""A stand-in for CUDA GPUs: tensors that say they are on `cuda:0` and compute on the CPU.

Under `fake_cuda`, an operator raises if its tensors are on different devices, as on a GPU. Copies between host and
device, and reads of values, are noted with the functions of the project that made them. C++ code still sees CPU
tensors: kernels, autocast and memory formats are the CPU's.
"""

import collections
import contextlib
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

PROJECT = str(Path(__file__).resolve().parent.parent)
# Each of these makes the host wait: the size of the result depends on values.
DATA_DEPENDENT = ("nonzero", "masked_select", "_unique2", "is_nonzero", "unique_dim", "unique_consecutive")

Event = collections.namedtuple("Event", "kind operator waits functions")  # functions: the project's, outermost first
events = []


def note(kind, operator, waits=True):
    stack = traceback.extract_stack()
    functions = tuple(frame.name for frame in stack if frame.filename.startswith(f"{PROJECT}/session8"))
    events.append(Event(kind, operator, waits, functions))


def as_cuda(device):
    """Return the fake device that a value names, or None."""
    if isinstance(device, torch.device | str) and torch.device(device).type == "cuda":
        return torch.device("cuda", torch.device(device).index or torch.cuda.current_device())
    return None


class CudaTensor(torch.Tensor):
    """A tensor on a fake GPU: `host` holds its values."""

    @staticmethod
    def __new__(cls, host, where):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, host.shape, device="cpu", **layout)

    def __init__(self, host, where):
        self.host, self.where = host, where

    device = property(lambda self: self.where)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def is_pinned(self, *_):
        return False

    def __repr__(self, **_):
        return f"CudaTensor({self.host}, {self.where})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = CudaTensor(self.host.clone(), self.where)
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        note("to host", "pickle")
        return self.host.__reduce_ex__(protocol)

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {self.where} device type tensor to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        plain = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        if name == "copy_":
            if plain:
                waits = not (kwargs.get("non_blocking") and getattr(plain[0], "pinned", False))
                note("to device" if isinstance(args[0], CudaTensor) else "to host", name, waits)
        elif len({tensor.where for tensor in fakes}) > 1 or any(tensor.ndim for tensor in plain):
            raise RuntimeError(f"Expected all tensors to be on the same device: {function} of {tensors}")
        elif name == "_local_scalar_dense":
            note("read", name)
        elif name in DATA_DEPENDENT or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            note("size of the result", name)
        known = {id(tensor.host): tensor for tensor in fakes}

        def unwrap(value):
            return value.host if isinstance(value, CudaTensor) else value

        def wrap(value):
            if not isinstance(value, torch.Tensor) or isinstance(value, CudaTensor):
                return value
            return known[id(value)] if id(value) in known else CudaTensor(value, fakes[0].where)

        return tree_map(wrap, function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


class _Transfers(TorchFunctionMode):
    """Moves tensors between the host and fake GPUs, and creates tensors on fake GPUs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self.move(function, first, list(args[1:]), kwargs)
        if function is torch.Tensor.pin_memory:
            pinned = first.clone()
            pinned.pinned = True
            return pinned
        if function is torch.Tensor.is_pinned:
            return getattr(first, "pinned", False)
        if function is torch.Tensor.tolist and isinstance(first, CudaTensor):
            note("read", "tolist")
            return first.host.tolist()
        if (where := as_cuda(kwargs.get("device"))) is None:
            return function(*args, **kwargs)
        if function is torch.as_tensor and isinstance(first, CudaTensor):
            return first
        if function in (torch.tensor, torch.as_tensor):
            note("to device", function.__name__)
        result = function(*args, **{**kwargs, "device": "cpu"})
        return CudaTensor(result, where) if type(result) is torch.Tensor else result

    def move(self, function, tensor, rest, kwargs):
        target, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        non_blocking = kwargs.pop("non_blocking", False)
        if function is not torch.Tensor.to:
            target = function.__name__
        for value in rest:
            if isinstance(value, torch.Tensor):
                target, dtype = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, bool):
                non_blocking = value
            elif value is not None:
                target = value
        kwargs["dtype"] = dtype or tensor.dtype
        where, fake = as_cuda(target), isinstance(tensor, CudaTensor)
        if target is None or (fake and where == tensor.where) or (not fake and where is None):
            return torch.Tensor.to(tensor, **kwargs)
        kind = "to host" if where is None else "between devices" if fake else "to device"
        note(kind, f"to{tuple(tensor.shape)}", waits=not (non_blocking and getattr(tensor, "pinned", False)))
        host = (tensor.host if fake else tensor).detach().to(**{**kwargs, "copy": True})
        return host if where is None else CudaTensor(host, where).requires_grad_(tensor.requires_grad and not fake)


def _by_device_and_dtype(lists, with_indices=False):
    """What PyTorch's function of nearly this name does, which is written in C++ and sees CPU tensors."""
    groups = {}
    for index in range(len(lists[0])):
        row = [values[index : index + 1] for values in lists]  # a list of momentum buffers may be empty
        tensor = next(value for values in row for value in values if value is not None)
        group, indices = groups.setdefault((tensor.device, tensor.dtype), ([[] for _ in lists], []))
        for chosen, values in zip(group, row, strict=True):
            chosen += values
        indices.append(index)
    return groups


class _Autocast(torch.autocast):
    def __init__(self, device_type, dtype=None, **options):
        super().__init__("cpu" if device_type == "cuda" else device_type, dtype, **options)


@contextlib.contextmanager
def fake_cuda(capability=(8, 0), gpus=1):
    """Have this process believe in GPUs of a compute capability, until the end of the block. Yields the list of events.

    8.0 computes in bfloat16; 7.5, a T4, only in float16.
    """
    current = [0]
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: gpus,
        "current_device": lambda: current[0],
        "set_device": lambda device: current.__setitem__(0, torch.device(device).index),
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "Fake GPU",
        "get_device_properties": lambda device=None: SimpleNamespace(major=capability[0], minor=capability[1]),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "manual_seed_all": lambda seed: None,
        "_lazy_init": lambda: None,
    }
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    events.clear()
    with contextlib.ExitStack() as stack:
        for name, replacement in cuda.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", replacement))
        stack.enter_context(mock.patch("torch.autocast", _Autocast))
        for module in ("torch.optim.swa_utils", "torch.optim.optimizer"):
            name = "_group_tensors_by_device_and_dtype"
            stack.enter_context(mock.patch.object(sys.modules[module], name, _by_device_and_dtype))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        stack.enter_context(_Transfers())
        yield events
