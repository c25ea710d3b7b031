"""State dicts: found inside of training checkpoints, compared with a model, loaded into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asymswap.errors import SourceError

State = dict[str, Tensor]

NESTS = ("state_dict", "model_state_dict", "model", "net", "ema", "state_dict_ema", "model_ema", "network", "params")
"""Keys under which training scripts store the weights, the likeliest first."""

_PREFIXES = ("module.", "_orig_mod.")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Found:
    """What a checkpoint file holds: a state dict or a whole module, and the key under which it was found."""

    value: State | nn.Module
    key: str = ""


def find_weights(value: Any, label: str) -> Found:
    """The state dict or module inside of a loaded checkpoint; raises SourceError where there is none."""
    found = _search(value, "")
    if found is not None:
        return found
    if not isinstance(value, Mapping):
        raise SourceError(f"{label} holds a {type(value).__name__}, neither a state_dict nor a module")
    keys = ", ".join(str(name) for name in list(value)[:6]) or "nothing"
    raise SourceError(f"{label} holds no state_dict: looked under {', '.join(NESTS)}; it holds {keys}")


def _search(value: Any, key: str) -> Found | None:
    if isinstance(value, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return Found(value.module, key)
    if isinstance(value, nn.Module):
        return Found(value, key)
    if not isinstance(value, Mapping) or not value:
        return None
    if all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items()):
        return Found(strip_prefixes(dict(value)), key)
    nested = (_search(value[name], f"{key}.{name}" if key else name) for name in NESTS if name in value)
    return next((found for found in nested if found is not None), None)


def strip_prefixes(state: State) -> State:
    """Remove what DataParallel (`module.`) and torch.compile (`_orig_mod.`) put before every key.

    An `AveragedModel`, as moving averages are kept, is a `module.` too, with a counter `n_averaged` beside it.
    """
    while True:
        keys = [key for key in state if key != "n_averaged"]
        prefix = next((p for p in _PREFIXES if keys and all(key.startswith(p) for key in keys)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): state[key] for key in keys}


@dataclass(frozen=True)
class Difference:
    """How a state dict differs from a model: keys that one of them lacks, and shapes that differ."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        """The first few differences of each sort, for a message."""
        parts = [
            f"{name}: {', '.join(keys[:2])}" + (f" and {len(keys) - 2} more" if len(keys) > 2 else "")
            for name, keys in (("missing", self.missing), ("unexpected", self.unexpected))
            if keys
        ]
        parts += [f"{key} is {_text(have)}, the model's {_text(want)}" for key, have, want in self.shapes[:2]]
        if len(self.shapes) > 2:
            parts.append(f"{len(self.shapes) - 2} more shapes differ")
        return "; ".join(parts)


def compare(model: nn.Module, state: State) -> Difference:
    """Compare keys and shapes; counters of batches, which old files lack, may be missing."""
    own = model.state_dict()
    return Difference(
        missing=tuple(key for key in own if key not in state and not key.endswith("num_batches_tracked")),
        unexpected=tuple(key for key in state if key not in own),
        shapes=tuple(
            (key, tuple(state[key].shape), tuple(tensor.shape))
            for key, tensor in own.items()
            if key in state and state[key].shape != tensor.shape
        ),
    )


def load_state_(model: nn.Module, state: State, take: bool = False) -> None:
    """Load a state dict that `compare` found fitting, in place, keeping the state's dtypes and the model's ties.

    With `take` the state's tensors become the model's own instead of being copied, wherever nothing else could notice:
    for a model and a state that nobody else holds. Raises SourceError, before anything is changed, for tensors that are
    no weights to compute with.
    """
    # Under every name, for a tied tensor has several.
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for key, tensor in state.items():
        reason = _refuse(tensor, tensors[key])
        if reason:
            raise SourceError(f"{key!r} {reason}; save the state_dict of a model in float32, float16 or bfloat16")
    heirs = defaultdict[int, set[int]](set)
    for key, tensor in state.items():
        heirs[tensor.untyped_storage().data_ptr()].add(id(tensors[key]))
    with torch.no_grad():
        for key, tensor in state.items():
            own = tensors[key]
            if take and len(heirs[tensor.untyped_storage().data_ptr()]) == 1 and _can_become(tensor, own):
                own.data = tensor.detach()
                continue
            if own.dtype != tensor.dtype and own.is_floating_point():
                own.data = torch.empty_like(own, dtype=tensor.dtype)
            own.copy_(tensor)


def _can_become(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor of a file can take the place of the model's `own`, so that only its numbers are others."""
    # A part of a larger memory would keep all of it alive, and be written with all of it.
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    alike = tensor.stride() == own.stride() and tensor.device == own.device and own.is_floating_point()
    return whole and alike and type(tensor) in (Tensor, nn.Parameter)


def _refuse(tensor: Tensor, own: Tensor) -> str | None:
    """Why a tensor of a file cannot become the model's `own`, or None where it can."""
    if tensor.is_meta:
        return "is on the meta device and holds no numbers"
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout})"
    if own.is_floating_point() and tensor.dtype not in _FLOATS:
        return f"is of dtype {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
