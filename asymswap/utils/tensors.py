"""Helpers for nested values of tensors, whole modules, random numbers and threads."""

import copy
import dataclasses
import hashlib
import itertools
import mmap
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from asymswap.errors import AsymswapError

_HARMLESS = {"_is_hf_initialized", "_is_full_backward_hook", "_padding_repeated_twice", "_backend"}
"""Attributes that transformers and earlier torch versions leave on modules and weights; they do nothing."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Rebuild lists, tuples, dicts and dataclasses with `change` applied to every tensor in them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not dataclasses.replace: a dataclass's own __post_init__ may fail the second time.
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                object.__setattr__(changed, field.name, map_tensors(getattr(value, field.name), change))
        return changed
    return value


def list_tensors(value: Any) -> list[Tensor]:
    """Return every tensor of a nested value, in order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def to_meta(value: Any) -> Any:
    """Return the nested value with every tensor on the meta device."""
    return map_tensors(value, lambda tensor: tensor.to("meta"))


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a module that keeps each module's mode, and everything in a GraphModule."""
    memo = {} if memo is None else memo
    # A GraphModule's own `__deepcopy__` builds it again from one graph, in train mode: it loses hooks, modules that it
    # does not call, and the second graph of torchvision's feature extractors.
    # From the inside out: a copy is found in the memo by the modules that hold it.
    for module in reversed([*model.modules()]):
        if isinstance(module, fx.GraphModule) and id(module) not in memo:
            new = memo[id(module)] = type(module).__new__(type(module))
            type(new).__name__ = type(module).__name__
            new.__dict__.update(copy.deepcopy(vars(module), memo))
            new.graph = new.graph  # compiles the forward, which belongs to the class
    return copy.deepcopy(model, memo)


def copy_with(model: nn.Module, tensors: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a deep copy with `change(tensor)` for the given tensors; sharing, parameters and `requires_grad` stay."""
    memo: dict[int, Any] = {}
    for tensor in tensors:
        new = change(tensor.detach())
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return deep_copy(model, memo)


def loose_tensors(model: nn.Module) -> list[Tensor]:
    """Return tensors that modules hold as plain attributes, neither parameter nor buffer (as weight_norm does)."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def find_device(name: str) -> torch.device:
    """Return the device of this name; raise AsymswapError where it is none, or not there."""
    counts = {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    counts["mps"] = int(torch.backends.mps.is_available())
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    number = device.index or 0
    if number >= counts.get(device.type, 0):
        there = [kind if count == 1 else f"{kind}:{n}" for kind, count in counts.items() for n in range(count)]
        raise AsymswapError(f"`device={name}` is not there; this machine has {', '.join(there)}")
    return torch.device(device.type) if device.type == "cpu" else torch.device(device.type, number)


def device_of(model: nn.Module) -> torch.device:
    """Return where the first parameter or buffer of a model is."""
    every = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in every), torch.device("cpu"))


@contextmanager
def exact_convs() -> Iterator[None]:
    """Let GPUs compute convs in float32 while the block lasts, and not in TF32, as they do unless told otherwise."""
    cudnn: Any = torch.backends.cudnn
    with ExitStack() as ending:
        for part in (cudnn.conv, cudnn.rnn) if torch.cuda.is_available() else ():  # torch wants the two alike
            ending.callback(setattr, part, "fp32_precision", part.fp32_precision)
            part.fp32_precision = "ieee"
        yield


def store_(target: Tensor, numbers: Tensor) -> None:
    """Copy numbers into a tensor, in place, clamped to the range of its dtype."""
    limits = torch.finfo(target.dtype)
    target.copy_(numbers.clamp(limits.min, limits.max))


def is_channels_last(tensor: Tensor) -> bool:
    """Return True for a tensor of four dimensions in this memory format, and not in the default one as well."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def additions(module: nn.Module, fresh: nn.Module) -> str | None:
    """Describe hooks, attributes, methods or parameters that a `fresh` module of the class lacks; None for nothing."""
    own = vars(fresh)
    added = [key for key in vars(module) if key not in own and key not in _HARMLESS]
    for key in added:
        if callable(getattr(type(module), key, None)):
            return f"has its {key} replaced on the instance"
    for key, value in own.items():
        if isinstance(value, dict | set):
            more = [str(item) for item in getattr(module, key, ()) if item not in value]
            if more and "hooks" in key:
                return "has hooks (weight_norm, spectral_norm, pruning or your own)"
            added += more
    if added:
        return f"has an attribute of yours ({added[0]})"
    for name, parameter in module.named_parameters(recurse=False):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"has a hook on its {name}"
        if extra := [key for key in vars(parameter) if key not in _HARMLESS]:
            return f"has an attribute of yours on its {name} ({extra[0]})"
        if type(parameter) is not nn.Parameter:
            return f"has a {type(parameter).__name__} as its {name}"
    return None


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy with all tensors on the meta device: the structure without the numbers."""
    every = itertools.chain(model.parameters(), model.buffers(), loose_tensors(model))
    return copy_with(model, every, lambda tensor: tensor.to("meta"))


def allocated(model: nn.Module) -> nn.Module:
    """Return a deep copy with unset memory on the CPU for every parameter and buffer on the meta device.

    The system hands it out when it is written to: a module that takes over the tensors of a file never takes any.
    malloc would come to take it from its heap, where feature maps of many sizes leave holes as large as the weights.
    """

    def unset(ghost: Tensor) -> Tensor:
        size = ghost.untyped_storage().nbytes()
        if not size or torch.empty_like(ghost.new_empty(0), device="cpu").is_meta:  # within WithoutMemory
            return torch.empty_like(ghost, device="cpu")
        try:
            memory = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"{size} bytes are not available") from error
        return torch.frombuffer(memory, dtype=ghost.dtype).as_strided(ghost.shape, ghost.stride())

    ghosts = [tensor for tensor in itertools.chain(model.parameters(), model.buffers()) if tensor.is_meta]
    return copy_with(model, ghosts, unset)


class WithoutMemory(TorchFunctionMode):
    """Make functions of torch (`torch.empty` makes all weights of layers) use the meta device while it lasts.

    Tensors without numbers are not filled: torch would take most of the time of building a network for it.
    """

    _fills = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_, Tensor.fill_, Tensor.zero_)

    def __init__(self, *functions: Callable[..., Any]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._functions:
            kwargs["device"] = "meta"
        elif func in self._fills or getattr(func, "__module__", None) == nn.init.__name__:
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


class WithinMemory(TorchFunctionMode):
    """Limit the bytes of `torch.empty`, with which every layer makes its weights, to a gigabyte; MemoryError beyond."""

    _most, _taken = 2**30, 0  # a file may claim any arguments

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            self._taken += func(*args, **{**kwargs, "device": "meta", "pin_memory": False}).nbytes
            if self._taken > self._most:
                raise MemoryError(f"its weights take more than {self._most:,} bytes")
        return func(*args, **kwargs)


def first_not_finite(model: nn.Module) -> tuple[str, str] | None:
    """Return the first parameter or buffer with a NaN or an infinity, and which of the two; None if all are finite."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        has_numbers = tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0
        # The extremes pass on a NaN or an infinity, without a second tensor of the same size.
        if has_numbers and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            return name, "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
    return None


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor row by row, without a copy if they are already in that order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def on_disk(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU with its numbers in a temporary file; the tensor itself where the disk is full.

    The system reads such numbers when they are needed, and drops them when memory is short.
    """
    if tensor.device.type != "cpu" or not tensor.numel():
        return tensor
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes_of(tensor))
            file.flush()
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:
        return tensor
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names and numbers; nothing else would show a flipped bit."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def number_for(*words: object) -> int:
    """Return a number of 63 bits that depends on the words alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8], "big") >> 1


def generator_for(*words: object) -> torch.Generator:
    """Return a generator that depends on the words alone, not on other random numbers."""
    return torch.Generator().manual_seed(number_for(*words))


def seeded(seed: int) -> torch.Generator:
    """Return a generator for a user's seed; raise AsymswapError for one that torch does not take."""
    try:
        return torch.Generator().manual_seed(seed)
    except ValueError:
        raise AsymswapError(f"the seed {seed} is out of range; give one from 0 to {2**63 - 1}") from None


def seed_(*words: object) -> None:
    """Seed Python's, NumPy's and torch's global generators, on all devices, by the words."""
    number = number_for(*words)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the caller's global random states at the end of the block."""
    with ExitStack() as ending, torch.random.fork_rng(range(torch.cuda.is_initialized() and torch.cuda.device_count())):
        ending.callback(random.setstate, random.getstate())
        ending.callback(np.random.set_state, np.random.get_state())
        yield


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode while the block lasts, then each module back into its own mode."""
    with ExitStack() as ending:
        for model in models:
            for module in model.modules():
                ending.callback(setattr, module, "training", module.training)
            model.eval()
        yield


class StopForward(BaseException):
    """Ends a forward pass where a hook raises it; no `except Exception` in a model's code catches it."""


@contextmanager
def hooked(
    model: nn.Module,
    names: Iterable[str],
    *,
    before: Callable[..., None] = lambda *_: None,
    after: Callable[..., None] = lambda *_: None,
) -> Iterator[None]:
    """Call `before(name, args, kwargs)` and `after(name, args, kwargs, output)` at every run of the named modules."""
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            enter = lambda _, *given, name=name: before(name, *given)  # noqa: E731
            leave = lambda _, *given, name=name: after(name, *given)  # noqa: E731
            hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        yield


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Let torch use a number of threads while the block lasts.

    Give LAPACK's eigensolvers one: more save a third at most, and wait for ever where a core is busy.
    """
    with ExitStack() as ending:
        ending.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(number)
        yield


def side_by_side(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    step: Callable[[int], None] = lambda _: None,
    alone: Callable[[_Item], bool] = lambda _: False,
) -> list[_Result]:
    """Return `function` of every item, in order; two run at once if torch has two threads, each on one thread.

    Two eigensolvers on one thread each take little more than half the time of two on two threads, with the same bits.
    Items that are `alone` take too much memory to run beside another: they come first. `step` gets the number of items
    done. The first exception in this order is raised once running items have ended; the rest are not begun. The
    function must not draw from torch's global generator, nor rely on a mode that was set in this thread.
    """
    results: dict[int, _Result] = {}
    solitary = [number for number, item in enumerate(items) if alone(item)]
    # No more than two: each layer holds float64 copies of its kernel and covariance meanwhile.
    workers = min(torch.get_num_threads(), 2)
    with on_threads(1), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for number in solitary:
            results[number] = function(items[number])
            step(len(results))
        others = [number for number in range(len(items)) if number not in results]
        # At its end, also by an exception, what has not begun is cancelled.
        with closing(pool.map(function, [items[number] for number in others])) as found:  # type: ignore[type-var]
            for number, result in zip(others, found, strict=True):
                results[number] = result
                step(len(results))
    return [results[number] for number in range(len(items))]
