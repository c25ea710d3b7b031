"""Small helpers on nested values of tensors and on modules as a whole."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from asymswap.errors import AsymswapError

_AT_ONCE = 2
"""Items that `side_by_side` has at work: each layer holds float64 copies of its kernel and covariance meanwhile."""

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
    if _is_record(value):
        # Not dataclasses.replace: what a dataclass does when it is made may go wrong a second time.
        changed = copy.copy(value)
        for name, item in _fields(value).items():
            object.__setattr__(changed, name, map_tensors(item, change))
        return changed
    return value


def list_tensors(value: Any) -> list[Tensor]:
    """Every tensor of a nested value, in order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(record: Any) -> dict[str, Any]:
    """What a dataclass holds, those fields left out that are not set."""
    names = [field.name for field in dataclasses.fields(record)]
    return {name: getattr(record, name) for name in names if hasattr(record, name)}


def to_meta(value: Any) -> Any:
    """The same nested value with every tensor on the meta device."""
    return map_tensors(value, lambda tensor: tensor.to("meta"))


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy` of a module that keeps what torch's own loses: each module's mode, all that a GraphModule holds.

    A GraphModule's own `__deepcopy__` builds it again from one graph, in train mode: torchvision's feature extractors
    then lose their other graph, and every graph its hooks and what the graph does not call.
    """
    memo = {} if memo is None else memo
    given = set(memo)
    # From the inside out: what is copied first is found in the memo by all that holds it.
    for module in reversed(list(model.modules())):
        if isinstance(module, fx.GraphModule) and id(module) not in memo:
            new = type(module).__new__(type(module))
            type(new).__name__ = type(module).__name__
            memo[id(module)] = new
            new.__dict__.update(copy.deepcopy(vars(module), memo))
            new.graph = new.graph  # compiles the forward, which belongs to the class
    result = copy.deepcopy(model, memo)
    for module in model.modules():
        if id(module) in memo and id(module) not in given:
            memo[id(module)].training = module.training
    return result


def copy_with(model: nn.Module, tensors: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of a module in which each of the given tensors of it is replaced by `change(tensor)`.

    What was shared stays shared, a parameter stays a parameter and keeps its `requires_grad`.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors:
        new = change(tensor.detach())
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return deep_copy(model, memo)


def loose_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold as plain attributes, neither parameter nor buffer (weight_norm's weight is one)."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def store_(target: Tensor, numbers: Tensor) -> None:
    """Copy numbers into a tensor, in place; those beyond the range of its dtype become the last ones within."""
    limits = torch.finfo(target.dtype)
    target.copy_(numbers.clamp(limits.min, limits.max))


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor of four dimensions has that memory format, and could not as well have the usual one."""
    fits = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return fits and not tensor.is_contiguous()


_HARMLESS = {"_is_hf_initialized", "_is_full_backward_hook", "_padding_repeated_twice", "_backend"}
"""Attributes that transformers and earlier torch versions leave on modules and weights; nothing computes with them."""


def additions(module: nn.Module, fresh: nn.Module) -> str | None:
    """What was added to a module that a `fresh` one of its class lacks, in words; None for nothing.

    That is whatever a module that takes its place would drop: hooks, methods replaced on the instance, attributes,
    further parameters and buffers, and hooks and attributes of its parameters.
    """
    own = vars(fresh)
    added = [key for key in vars(module) if key not in own and key not in _HARMLESS]
    methods = [key for key in added if callable(getattr(type(module), key, None))]
    if methods:
        return f"has its {methods[0]} replaced on the instance"
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
        extra = [key for key in vars(parameter) if key not in _HARMLESS]
        if extra:
            return f"has an attribute of yours on its {name} ({extra[0]})"
        if type(parameter) is not nn.Parameter:
            return f"has a {type(parameter).__name__} as its {name}"
    return None


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose tensors are on the meta device: the structure without the numbers."""
    every = itertools.chain(model.parameters(), model.buffers(), loose_tensors(model))
    return copy_with(model, every, lambda tensor: tensor.to("meta"))


def allocated(model: nn.Module) -> nn.Module:
    """A deep copy with unset memory on the CPU for every parameter and buffer on the meta device.

    The system hands memory out as it is written to: what gets its numbers from a file by taking its tensors over never
    takes any.
    """
    ghosts = [tensor for tensor in itertools.chain(model.parameters(), model.buffers()) if tensor.is_meta]
    return copy_with(model, ghosts, _unset)


def _unset(ghost: Tensor) -> Tensor:
    """A tensor like it on the CPU, in memory of its own from the system.

    Not from malloc: once it is given a block of megabytes back, it takes all smaller ones from its heap, where feature
    maps of ever other sizes leave holes, in a DenseNet as large as its weights.
    """
    size = ghost.untyped_storage().nbytes()
    nothing = torch.empty_like(ghost.new_empty(0), device="cpu")
    if not size or nothing.is_meta:  # WithoutMemory is at work
        return torch.empty_like(ghost, device="cpu")
    try:
        memory = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{size} bytes cannot be had") from error
    return torch.frombuffer(memory, dtype=ghost.dtype).as_strided(ghost.shape, ghost.stride())


class WithoutMemory(TorchFunctionMode):
    """While it lasts, what the given functions of torch make is on the meta device.

    `torch.device("meta")` would take everything, and some networks compute their sizes with tensors. With `torch.empty`
    it takes all weights of layers, and nothing else.
    """

    def __init__(self, *functions: Callable[..., Any]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._functions:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class WithinMemory(TorchFunctionMode):
    """While it lasts, what `torch.empty` makes, as every layer makes its weights, is at most so many bytes together.

    MemoryError is raised instead of taking more.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._taken = most, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            self._taken += func(*args, **{**kwargs, "device": "meta", "pin_memory": False}).nbytes
            if self._taken > self._most:
                raise MemoryError(f"its weights take more than {self._most:,} bytes")
        return func(*args, **kwargs)


def first_not_finite(model: nn.Module) -> tuple[str, str] | None:
    """The first parameter or buffer that holds a NaN or an infinity, and which of the two; None where there is none."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        # The extremes carry a NaN or an infinity along, and need no tensor of the same size to hold the answers.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            return name, "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
    return None


def bytes_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory, row by row."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and numbers: a flipped bit of a number would show nowhere else."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(bytes_of(tensors[key]))
    return digest.hexdigest()


def number_for(*words: object) -> int:
    """A number of 63 bits that depends on the words alone."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(*words: object) -> torch.Generator:
    """Random numbers that depend on the words alone: not on what was drawn before, nor on who else draws."""
    return torch.Generator().manual_seed(number_for(*words))


def seeded(seed: int) -> torch.Generator:
    """Random numbers by a seed that was given; raises AsymswapError where torch takes none so large."""
    try:
        return torch.Generator().manual_seed(seed)
    except ValueError:
        raise AsymswapError(f"the seed {seed} is out of range; give one from 0 to {2**63 - 1}") from None


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then each module's own former mode, for frozen batch norms differ from the rest."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep LAPACK's eigensolvers to one thread.

    They meet the other threads thousands of times for little work each: that gains a sixth to a third of the time on
    idle cores, and costs ten to a hundred times as much where another program keeps one of the cores busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    step: Callable[[int], None] = lambda _: None,
    alone: Callable[[_Item], bool] = lambda _: False,
) -> list[_Result]:
    """`function` of every item, in their order; two at once where torch has two threads, each on one thread.

    Eigensolvers on a thread each take little more than half the time of one after the other on two, and every result
    is the same to the bit however many there are. What `alone` says of an item is that it takes too much memory to have
    company; these come first. `step` is told how many are done. Of several exceptions the first in this order is raised
    once those at work have ended; what was not begun is left. The function may run in other threads: it must not draw
    from torch's global generator, nor count on a mode (`torch.no_grad`) that was set here.
    """
    results: dict[int, _Result] = {}

    def keep(number: int, result: _Result) -> None:
        results[number] = result
        step(len(results))

    solitary = [number for number, item in enumerate(items) if alone(item)]
    workers = min(torch.get_num_threads(), _AT_ONCE)
    with one_thread():
        for number in solitary:
            keep(number, function(items[number]))
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            others = [number for number in range(len(items)) if number not in results]
            futures = [pool.submit(function, items[number]) for number in others]
            try:
                for number, future in zip(others, futures, strict=True):
                    keep(number, future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [results[number] for number in range(len(items))]
