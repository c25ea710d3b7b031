"""Weights out of zip archives that hold more than weights, with nothing in them executed.

| archive | its weights |
| --- | --- |
| TorchScript | `data.pkl` describes the modules, `data/N` holds the numbers; `code/` is not opened |
| torch.export | `data/weights/` and a JSON list of names, sizes and strides; `models/` is not opened |

Only entries of the archive are ever opened, by their whole names.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asymswap.errors import SourceError
from asymswap.fileformats.pickle_objects import Builder
from asymswap.fileformats.pickle_parts import MalformedError, Odd, Record, StorageRef, described_tensor
from asymswap.fileformats.torch_files import read_archive
from asymswap.fileformats.zip_entries import Entries, opened

State = dict[str, Tensor]

# More modules and tensors than any network has: a module may stand in a file once and be named a billion times.
_MOST_PARTS = 200_000

# What torch.export calls dtypes, by number.
_EXPORT_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


def read_torchscript(path: Path) -> State:
    """The parameters and buffers of a TorchScript archive by their names; raises SourceError."""
    with _opened(path) as entries:
        pickled = entries.ending("data.pkl") or "data.pkl"
        root = read_archive(entries, str(path), pickled.removesuffix("data.pkl"), scripted=True).value
        if not isinstance(root, Record):
            raise SourceError(f"{path} is a TorchScript archive of a {type(root).__name__}, not of a module")
        state = dict(_tensors_below(root, lambda record: record.state if isinstance(record.state, dict) else {}))
    if not state:
        raise SourceError(
            f"{path} is a TorchScript archive without named weights, as torch.jit.freeze leaves it; "
            f"give the archive from before freezing, or the state_dict"
        )
    return state


def read_exported(path: Path, load_pickle: Callable[[io.BytesIO, str], Any]) -> State:
    """The parameters and buffers of a torch.export archive; raises SourceError.

    Archives of torch before 2.9 hold a torch.save file of them, which `load_pickle` reads in the restricted way.
    """
    with _opened(path) as entries:
        older = entries.ending("serialized_state_dict.pt", "data/weights/model.pt")
        if older is not None:
            state = load_pickle(io.BytesIO(entries.read(older)), f"{path}, entry {older},")
            if isinstance(state, Mapping):
                return {str(key): tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
            raise SourceError(f"{path} is damaged: its entry {older} holds a {type(state).__name__}, not a state_dict")
        listed = entries.ending("_weights_config.json")
        if listed is None:
            raise SourceError(
                f"{path} is a torch.export archive that holds no weights of its own (as AOTInductor packages do not); "
                f"give the state_dict of the model"
            )
        folder = listed[: listed.rindex("/") + 1]
        try:
            config = json.loads(entries.read(listed))["config"]
            return {str(name): _exported_tensor(entries, folder, entry) for name, entry in config.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise MalformedError(
                f"{listed} is not what torch.export writes ({' '.join(str(error).split())[:100]})"
            ) from None


def states_of_modules(value: Any) -> tuple[Any, tuple[str, ...]]:
    """The same with every module that is there as a record replaced by its state dict, and their classes' names.

    Raises MalformedError for a module inside of itself, or one named without end.
    """
    if is_module(value):
        return dict(_tensors_below(value, _module_attributes)), (value.name,)
    if not isinstance(value, dict):
        return value, ()
    changed = {key: states_of_modules(part) if is_module(part) else (part, ()) for key, part in value.items()}
    return {key: part for key, (part, _) in changed.items()}, tuple(n for _, names in changed.values() for n in names)


def is_module(value: Any) -> bool:
    """Whether a record has the parts that every nn.Module has."""
    state = value.state if isinstance(value, Record) else None
    return isinstance(state, dict) and all(
        isinstance(state.get(part), dict) for part in ("_parameters", "_buffers", "_modules")
    )


@contextmanager
def _opened(path: Path) -> Iterator[Entries]:
    try:
        with opened(path, verify=True) as entries:
            yield entries
    except (Odd, MalformedError) as error:
        raise SourceError(f"{path} is cut off or damaged: {error}") from None


def _exported_tensor(entries: Entries, folder: str, entry: Mapping[str, Any]) -> Tensor:
    """A tensor as torch.export lists it; one that was pickled is of a class that no network here has."""
    meta, name = entry["tensor_meta"], folder + str(entry["path_name"])
    if entry["use_pickle"] or meta is None or meta["dtype"] not in _EXPORT_DTYPES:
        raise MalformedError(f"{name} is a tensor of another class or dtype than networks have")
    dtype = _EXPORT_DTYPES[meta["dtype"]]
    size, stride = (tuple(int(part["as_int"]) for part in meta[key]) for key in ("sizes", "strides"))
    storage = StorageRef(name, dtype, (entries.length(name) or 0) // dtype.itemsize)
    ref = described_tensor((storage, int(meta["storage_offset"]["as_int"]), size, stride))
    if ref is None:
        raise MalformedError(f"the sizes of {name} are not those of a tensor")
    entries.storage(name, storage.claimed)
    return Builder(lambda s: entries.storage(s.key, s.claimed), storage.claimed, name, foreign=False).tensor(ref)


def _module_attributes(record: Record) -> dict[str, Any]:
    """What the state dict of a module has: its parameters, its buffers but for passing ones, its children's."""
    if not is_module(record):
        return {}
    state = record.state
    passing = state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, set) else set()
    kept = {name: value for name, value in state["_buffers"].items() if name not in passing}
    return {**state["_parameters"], **kept, **state["_modules"]}


def _tensors_below(root: Record, attributes: Callable[[Record], dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its dotted name, in order; raises MalformedError for a module inside of itself."""
    parts = 0

    def below(record: Record, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
        nonlocal parts
        if id(record) in above:
            raise MalformedError("a module contains itself")
        for name, value in attributes(record).items():
            # Each name is written out, with all that stands before it.
            parts += 1 + len(f"{prefix}{name}") // 256
            if parts > _MOST_PARTS or len(above) > 100:
                raise MalformedError("it claims more modules than any network has")
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, nn.Module):
                yield from ((f"{prefix}{name}.{key}", tensor) for key, tensor in value.state_dict().items())
            elif isinstance(value, Record):
                yield from below(value, f"{prefix}{name}.", (*above, id(record)))

    return below(root, "", ())
