"""State dicts: find them in training checkpoints, compare them with a model, load them into it."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asymswap.errors import SourceError, listed, near_names
from asymswap.fileformats.extra_state import is_extra

State = dict[str, Tensor]

NESTS = ("state_dict", "model_state_dict", "model", "net", "ema", "state_dict_ema", "model_ema", "network", "params")
"""Keys under which training scripts store the weights, the likeliest first."""

# What torch.compile and wrappers put anywhere in a key.
_WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# What holds tensors by name as well, and is no network.
_NO_NETWORKS = ("optim", "lr_sched", "sched", "scaler", "callback", "loop", "message_hub", "meta", "metric", "rng")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DEEPEST = 4


@dataclass(frozen=True)
class Found:
    """A state dict or whole module in a checkpoint file, its key there, notes, and the modules' extra state."""

    value: State | nn.Module
    key: str = ""
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def find_weights(value: Any, label: str, key: str | None = None) -> Found:
    """Return the likeliest state dict or module in a loaded checkpoint, or the one under `key`; raise SourceError."""
    found = list(_candidates(value if key is None else _at(value, key), key or "", 0))
    if not found and key is not None:
        return _behind(list(_candidates(value, "", 0)), key, label)
    if found:
        others = [other.key for other in found[1:] if _parts(other.value) != _parts(found[0].value)]
        note = f"other weights in {label}: {listed(others, 6)} (`key=…` chooses)"
        return replace(found[0], notes=(note,) if others else ())
    if not isinstance(value, Mapping):
        raise SourceError(f"{label} holds a {type(value).__name__}, neither a state_dict nor a module")
    keys = ", ".join(str(name) for name in list(value)[:6]) or "nothing"
    raise SourceError(f"{label} holds no state_dict: looked under {', '.join(NESTS)}; it holds {keys}")


def _at(value: Any, path: str) -> Any:
    """Return what is at a dotted path of nested dicts, whose keys may have dots themselves; None for nothing."""
    if not isinstance(value, Mapping):
        return None
    names = [name for name in value if isinstance(name, str) and f"{path}.".startswith(f"{name}.")]
    for name in sorted(names, key=len, reverse=True):
        found = value[name] if name == path else _at(value[name], path[len(name) + 1 :])
        if found is not None:
            return found
    return None


def _candidates(value: Any, key: str, depth: int) -> Iterator[Found]:
    """Yield every state dict and module in nested dicts, the likeliest first."""
    if isinstance(value, nn.DataParallel | nn.parallel.DistributedDataParallel):
        yield Found(value.module, key)
    elif isinstance(value, nn.Module):
        yield Found(value, key)
    elif isinstance(value, Mapping) and _as_state(value):
        stripped = strip_prefixes(dict(value))
        yield Found(_as_state(stripped), key, extra={name: item for name, item in stripped.items() if is_extra(name)})
    elif isinstance(value, Mapping) and depth < _DEEPEST:
        names = [name for name in NESTS if name in value]
        names += [n for n in value if isinstance(n, str) and n not in NESTS and not n.lower().startswith(_NO_NETWORKS)]
        for name in names:
            for found in _candidates(value[name], f"{key}.{name}" if key else name, depth + 1):
                # Elsewhere than in the usual places, tensors by name may be some statistics.
                state = {} if isinstance(found.value, nn.Module) else found.value
                if name in NESTS or not state or any(tensor.ndim >= 2 for tensor in state.values()):
                    yield found


def _as_state(value: Mapping[Any, Any]) -> State:
    """Return the mapping as a state dict, without anything beside tensors and arrays; empty where it is none."""
    state: State = {}
    others = []
    for name, item in value.items():
        if is_extra(str(name)):
            continue
        if isinstance(item, np.ndarray) and item.dtype.kind in "biuf":
            state[name] = torch.from_numpy(np.ascontiguousarray(item).reshape(item.shape))
        elif isinstance(item, Tensor):
            state[name] = item
        else:
            others.append(item)
    weights = not others or any(tensor.ndim >= 2 for tensor in state.values())
    # Numbers and text may be beside the weights: `{**state, "epoch": 3}`.
    remarks = all(item is None or isinstance(item, bool | int | float | str | np.generic) for item in others)
    return state if weights and remarks and all(isinstance(name, str) for name in state) else {}


def _parts(value: State | nn.Module) -> Any:
    """Return what is equal for the same weights under two keys."""
    return value if isinstance(value, nn.Module) else {key: id(tensor) for key, tensor in value.items()}


def _behind(found: list[Found], key: str, label: str) -> Found:
    """Return the part of a state dict whose keys begin with the end of a path; raise SourceError for none."""
    keys = [one.key for one in found if one.key]
    known = [*keys]
    for one in found:
        inside = f"{one.key}." if one.key else ""
        state = {} if isinstance(one.value, nn.Module) else one.value
        within = {f"{inside}{name}": tensor for name, tensor in state.items()}
        part = {name.removeprefix(f"{key}."): t for name, t in within.items() if name.startswith(f"{key}.")}
        if part:
            return Found(strip_prefixes(part), key)
        known += dict.fromkeys(inside + name.partition(".")[0] for name in state if "." in name)
    it_has = f"; it has {listed(known, 6)}" if known else "; it has no keys to choose from"
    hint = near_names(key, keys) or near_names(key, known) or it_has
    raise SourceError(f'{label} has no state_dict under `key="{key}"`{hint}')


def strip_prefixes(state: State) -> State:
    """Remove what DataParallel (`module.`), torch.compile (`_orig_mod.`) and FSDP put into every key."""
    unwrapped = {_WRAPPERS.sub(r"\1", key): tensor for key, tensor in state.items()}
    # Where two keys would become one, they are no wrappers but names of the network's own.
    state = unwrapped if len(unwrapped) == len(state) else state
    while True:
        # An AveragedModel is a `module.` too, with this counter beside it.
        keys = [key for key in state if key != "n_averaged"]
        if not keys or not all(key.startswith("module.") for key in keys):
            return state
        state = {key.removeprefix("module."): state[key] for key in keys}


@dataclass(frozen=True)
class Difference:
    """How a state dict differs from a model: keys that one of them lacks, and shapes that differ."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        both = (("missing", self.missing), ("unexpected", self.unexpected))
        parts = [f"{name}: {listed(keys, 2)}" for name, keys in both if keys]
        for key, *shapes in self.shapes[:2]:
            have, want = ("x".join(map(str, shape)) or "a scalar" for shape in shapes)
            parts.append(f"{key} is {have}, the model's {want}")
        if len(self.shapes) > 2:
            parts.append(f"{len(self.shapes) - 2} more shapes differ")
        return "; ".join(parts)


def compare(model: nn.Module, state: State) -> Difference:
    """Compare keys and shapes, extra state aside; counters of batches, which old files lack, may be missing."""
    own = own_tensors(model)
    return Difference(
        missing=tuple(key for key in own if key not in state and not key.endswith("num_batches_tracked")),
        unexpected=tuple(key for key in state if key not in own),
        shapes=tuple(
            (key, tuple(state[key].shape), tuple(tensor.shape))
            for key, tensor in own.items()
            if key in state and state[key].shape != tensor.shape
        ),
    )


def check_numbers(model: nn.Module) -> None:
    """Raise SourceError where a module has weights that are no numbers to compute with."""
    for key, tensor in own_tensors(model).items():
        _check_tensor(key, tensor, tensor)


def own_tensors(model: nn.Module) -> State:
    """Return every parameter and stored buffer of a model by all of its names, in the order of the state dict."""
    return {
        f"{prefix}.{key}" if prefix else key: value
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key, value in {**module._parameters, **module._buffers}.items()
        if value is not None and key not in module._non_persistent_buffers_set
    }


def stored_tensors(model: nn.Module) -> State:
    """Return the tensors of a model's state dict, extra state aside; raise SourceError if they could not be loaded.

    A hook or method of the user's own may rename entries, leave some out, or add what is no tensor.
    """
    own = own_tensors(model)
    state = {key: value for key, value in model.state_dict().items() if not is_extra(key)}
    for key, value in state.items():
        if not isinstance(value, Tensor) or key not in own:
            what = "no parameter or buffer" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise SourceError(f"the model's state dict has {key!r}, {what}, which could not be loaded again")
    for key in own:
        if key not in state:
            raise SourceError(f"the model's state dict leaves out {key!r}, so that it could not be loaded again")
    return state


def load_state_(model: nn.Module, state: State, take: bool = False) -> None:
    """Load a state dict that `compare` found fitting, in place, keeping the state's dtypes and the model's ties.

    `take`: the state's tensors may become the model's own instead of being copied, since nobody else holds model or
    state. Raises SourceError, before anything is changed, for tensors that are no weights to compute with.
    """
    tensors = own_tensors(model)
    heirs = defaultdict[int, set[int]](set)
    for key, tensor in state.items():
        _check_tensor(key, tensor, tensors[key])
        heirs[tensor.untyped_storage().data_ptr()].add(id(tensors[key]))
    with torch.no_grad():
        for key, tensor in state.items():
            own, memory = tensors[key], tensor.untyped_storage()
            # A part of a larger memory would keep all of it alive, and be written with all of it.
            whole = memory.nbytes() == tensor.nbytes and len(heirs[memory.data_ptr()]) == 1
            alike = tensor.stride() == own.stride() and tensor.device == own.device and own.is_floating_point()
            if take and whole and alike and type(tensor) in (Tensor, nn.Parameter):
                own.data = tensor.detach()
                continue
            if own.dtype != tensor.dtype and own.is_floating_point():
                own.data = torch.empty_like(own, dtype=tensor.dtype)
            own.copy_(tensor)
        for key in tensors.keys() - state.keys():
            # Old files lack these counters, and the model's own memory may be unset.
            if key.endswith("num_batches_tracked"):
                tensors[key].zero_()


def _check_tensor(key: str, tensor: Tensor, own: Tensor) -> None:
    """Raise SourceError for a tensor of a file that cannot become the model's `own`."""
    if tensor.layout is not torch.strided:
        reason = "is sparse"
    elif tensor.is_quantized or (own.is_floating_point() and tensor.dtype not in _FLOATS):
        reason = f"is of dtype {str(tensor.dtype).removeprefix('torch.')}"
    elif tensor.is_meta:
        reason = "is on the meta device and holds no numbers"
    else:
        return
    raise SourceError(f"{key!r} {reason}; save the state_dict of a model in float32, float16 or bfloat16")
