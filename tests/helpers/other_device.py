"""A CUDA device that is none: its tensors lie in ordinary memory, but refuse to meet those of the processor.

PyTorch has no second device on a machine without an accelerator, and code that forgets to move a tensor runs there
without an error. In the block of `pretended_cuda`, tensors whose device is asked to be `cuda` are remembered by the
memory that they take, say so, and raise as on a GPU where they meet others, or are read by NumPy.
"""

import contextlib
import time
import weakref
from collections.abc import Iterator
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CUDA = torch.device("cuda", 0)
_CROSSING = {Tensor.copy_, Tensor.to, Tensor.cpu, Tensor.cuda, torch.bincount}
_ASIDE = {
    "_parse_to",
    "_has_compatible_shallow_copy_type",
    "data_ptr",
    "untyped_storage",
    "__len__",
    "dim",
    "size",
    "stride",
}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__, torch.repeat_interleave}


class PretendedCuda(TorchFunctionMode):
    """Follows which memory is on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.held: set[int] = set()
        self.calls = 0

    def on_device(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage().data_ptr() in self.held

    def mark(self, value: Any, held: bool) -> Any:
        for tensor in _tensors(value):
            if tensor.is_meta or not (place := tensor.untyped_storage().data_ptr()) or held == (place in self.held):
                continue
            if held:
                self.held.add(place)
                weakref.finalize(tensor.untyped_storage(), self.held.discard, place)
            else:
                self.held.discard(place)
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [one for one in _tensors((args, kwargs)) if not one.is_meta]
        ours = [one for one in given if self.on_device(one)]
        name, read = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if read is Tensor.device and name == "__get__":
            return _CUDA if ours else func(*args, **kwargs)
        if ours and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in _ASIDE or name == "__set__":
            return func(*args, **kwargs)
        if name == "register_hook" and ours:
            tensor, hook = args
            return func(tensor, lambda gradient: hook(self.mark(gradient, True)))
        here, args, kwargs = _asked(func, args, kwargs)
        others = [one for one in given if not self.on_device(one) and one.dim()]
        crossing = func in _CROSSING or (func in _INDEXING and self.on_device(args[0]))
        crossing = crossing or (name == "__setitem__" and not [*_tensors(args[1])])  # which copies into a view
        if ours and others and not crossing:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        self.calls += bool(ours)
        if here is None and func is Tensor.copy_:
            return func(*args, **kwargs)  # stays where it is
        if here is not None and func in _CROSSING and here != bool(ours):
            # To the other device, and so a copy in any case.
            kwargs = {**kwargs, "copy": True} if func is Tensor.to else kwargs
            return self.mark(func(*args, **kwargs) if func is Tensor.to else args[0].clone(), here)
        result = func(*args, **kwargs)
        inplace = name.endswith("_") and not name.endswith("__")
        if not inplace and name not in ("__setitem__", "__set__", "item", "tolist"):
            self.mark(result, bool(ours) if here is None else here)
        return result


def _asked(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[bool | None, Any, dict[str, Any]]:
    """Return whether the call asks for the device or for the processor, and the call for the processor alone."""
    if func is Tensor.cpu:
        return False, args, kwargs
    if func is Tensor.cuda:
        return True, args[:1], {}
    found: list[torch.device] = []

    def replaced(value: Any) -> Any:
        device = value
        if isinstance(value, str) and func is Tensor.to:
            device = torch.device(value)
        if isinstance(device, torch.device):
            found.append(device)
            return torch.device("cpu") if device.type == "cuda" else device
        return value

    if isinstance(kwargs.get("device"), str):
        kwargs["device"] = torch.device(kwargs["device"])
    args, kwargs = tuple(map(replaced, args)), {key: replaced(value) for key, value in kwargs.items()}
    if not found or found[0].type == "meta":
        return None, args, kwargs
    return found[0].type == "cuda", args, kwargs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "_Event") -> float:
        return 1e3 * (other.at - self.at)


class _InTurn:
    """Stands for an executor: in other threads nothing would follow the memory."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Any, items: Any) -> Iterator[Any]:
        yield from map(function, items)


@contextlib.contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """Let there be a CUDA device while the block lasts."""
    with (
        PretendedCuda() as mode,
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "device_count", lambda: 1),
        patch.object(torch.cuda, "current_device", lambda: 0),
        patch.object(torch.cuda, "synchronize", lambda *_: None),
        patch.object(torch.cuda, "get_device_name", lambda *_: "a pretended GPU"),
        patch.object(torch.cuda, "Event", _Event),
        patch.object(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None),
        patch("asymswap.utils.tensors.ThreadPoolExecutor", _InTurn),
    ):
        yield mode
