"""What modules store beside tensors (`get_extra_state`): read, written as plain data, and given back."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asymswap.errors import SourceError, reason_of

KEY = "_extra_state"
_DEEPEST = 64


def is_extra(key: str) -> bool:
    """True for the key of a module's extra state in a state dict."""
    return key == KEY or key.endswith(f".{KEY}")


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that keep extra state, by its keys in the state dict."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{name}.{KEY}" if name else KEY: one for name, one in modules if _overrides(one, "get_extra_state")}


def read(model: nn.Module) -> dict[str, Any]:
    """Return the extra state of every module that keeps some; raise SourceError for what cannot be restored."""
    found = {}
    for key, module in owners(model).items():
        named = _named(key, module)
        try:
            found[key] = module.get_extra_state()
        except Exception as error:
            raise SourceError(f"{named} cannot be read ({reason_of(f'{type(error).__name__}: {error}')})") from error
        if not _overrides(module, "set_extra_state"):
            raise SourceError(f"{named} has no set_extra_state that would restore it; define one")
        try:
            _plain(found[key], key, {})
        except TypeError as refused:
            raise SourceError(
                f"{named} holds {refused}; only tensors, numbers, text, and lists, tuples and dicts of them can be "
                "stored without pickle: let get_extra_state return these"
            ) from None
    return found


def load_(model: nn.Module, extra: Mapping[str, Any]) -> None:
    """Give the modules, in place, the extra state that `read` found; raise SourceError where one does not take it."""
    known = owners(model)
    for key, value in extra.items():
        try:
            known[key].set_extra_state(value)
        except Exception as error:
            reason = reason_of(f"{type(error).__name__}: {error}")
            raise SourceError(f"{_named(key, known[key])} is not taken ({reason})") from error


def to_text(extra: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Return extra state as JSON text, and the tensors in it by their names in the text."""
    tensors: dict[str, Tensor] = {}
    return json.dumps({key: _plain(value, key, tensors) for key, value in extra.items()}), tensors


def _plain(value: Any, key: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Return a value as JSON's types, its tensors put into `tensors`; raise TypeError, which says what it is."""
    kind = type(value)
    if depth > _DEEPEST:
        raise TypeError(f"values nested more than {_DEEPEST} deep")
    if isinstance(value, Tensor):
        ordinary = value.layout is torch.strided and not (value.is_meta or value.is_quantized)
        if kind not in (Tensor, nn.Parameter) or not ordinary:
            raise TypeError(f"a {kind.__name__} that is no ordinary tensor with numbers")
        name = key if key not in tensors else f"{key}.{len(tensors)}"
        tensors[name] = value.detach()
        return {"tensor": name}
    if kind in (list, tuple):
        items = [_plain(item, key, tensors, depth + 1) for item in value]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):
        for name in value:
            if not isinstance(name, str | int | float | bool | None):
                raise TypeError(f"a {type(name).__name__} as a key")
        pairs = [[_plain(part, key, tensors, depth + 1) for part in pair] for pair in value.items()]
        return {"dict" if kind is dict else "ordered": pairs}
    if kind not in (str, int, float, bool, type(None)):
        raise TypeError(f"a {kind.__name__}")
    return value


def from_text(text: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the extra state in a text of `to_text`, taking its tensors out of `tensors`; raise ValueError."""

    def made(data: dict[str, Any]) -> Any:
        if all(map(is_extra, data)):  # the outermost
            return data
        ((kind, content),) = data.items()
        kinds: dict[str, Any] = {"tensor": tensors.pop, "tuple": tuple, "dict": dict, "ordered": OrderedDict}
        return kinds[kind](content)

    try:
        return {str(key): value for key, value in json.loads(text, object_hook=made).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"extra state: {reason_of(f'{type(error).__name__}: {error}')}") from error


def _overrides(module: nn.Module, method: str) -> bool:
    return getattr(type(module), method, None) is not getattr(nn.Module, method) or method in vars(module)


def _named(key: str, module: nn.Module) -> str:
    name = key.removesuffix(KEY).removesuffix(".")
    return f"the extra state of {f'{name!r} ' if name else 'the model '}({type(module).__name__})"
