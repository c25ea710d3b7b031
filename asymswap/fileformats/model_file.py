"""Read a model file of any form: tensors and plain data, before anything is made of them. No code of it is executed.

| form | its weights |
| --- | --- |
| TorchScript | `data.pkl` describes the modules, `data/N` holds the numbers; `code/` is not opened |
| torch.export | `data/weights/` and a JSON list of names, sizes and strides; `models/` is not opened |
| index of shards | JSON, `{"weight_map": {key of the state dict: name of a file}}`, the files in the same folder |

Of an archive only entries are opened, by their whole names. A name in an index that leads out of the folder is refused.
A link is followed, since download caches keep links in the folder and the files elsewhere; an index cannot make one.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from asymswap.errors import SourceError, reason_of
from asymswap.fileformats.detect import FileKind, sha256, sniff
from asymswap.fileformats.pickle_objects import Builder
from asymswap.fileformats.pickle_reader import MalformedError, Odd, Record, StorageRef, TensorRef, are_sizes, key_of
from asymswap.fileformats.state_dict import State
from asymswap.fileformats.torch_files import Entries, RawFile, load, load_object, opened, read_archive

_LARGEST_INDEX = 64 * 2**20  # the largest known has some thousand entries of a hundred bytes
_MOST_PARTS = 200_000  # more than any network has: a module may be in a file once and be named a billion times
# What torch.export calls dtypes, by number.
_EXPORT_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


def read_raw(path: Path, trust_pickle: bool) -> RawFile:
    """Read a model file; raise SourceError where it is none, is damaged, or would have to run code to be read."""
    kind = sniff(path)
    try:
        if kind is FileKind.SAFETENSORS:
            # Not mapped into memory: a file that is cut off while it is mapped ends the process by a signal.
            with safetensors.safe_open(path, framework="pt", backend="pread") as file:
                state = {key_of(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return RawFile(state, metadata=file.metadata() or {})
        if kind in (FileKind.TORCHSCRIPT, FileKind.EXPORTED):
            scripted = kind is FileKind.TORCHSCRIPT
            unread = "code was not executed" if scripted else "graph was not read"
            with opened(path, verify=True) as entries:
                state = _scripted(entries, path) if scripted else _exported(entries, path)
            return RawFile(state, notes=(f"weights taken out of {kind.value}, whose {unread}",))
    except (safetensors.SafetensorError, OSError, ValueError, Odd, MalformedError) as error:
        raise SourceError(f"{path} is cut off or damaged: {error}") from None
    return _read_shards(path, trust_pickle) if kind is FileKind.SHARDS else load(path, kind, trust_pickle, str(path))


def _read_shards(index: Path, trust_pickle: bool) -> RawFile:
    weight_map, state, executed = _weight_map(index), State(), False
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if sniff(path) is FileKind.SHARDS:
            raise SourceError(f"{path} is an index of shards that an index names; give that one")
        raw = read_raw(path, trust_pickle)
        executed |= raw.executed
        if not isinstance(raw.value, Mapping):
            held = type(raw.value).__name__
            raise SourceError(f"{path} is no part of a state_dict, as {index} says; it holds a {held}")
        for key in [key for key, file in weight_map.items() if file == name]:
            if not isinstance(raw.value.get(key), Tensor):
                raise SourceError(f"{path} lacks {key!r}, which {index} says it holds; download both again")
            state[key] = raw.value[key]
    return RawFile(state, executed=executed)


def files_of(path: Path) -> list[Path]:
    """Return the file itself, and those that it names where it is an index of shards that can be read."""
    try:
        names = set(_weight_map(path).values()) if path.suffix == ".json" else ()
        return [path, *(path.parent / name for name in sorted(names))]
    except (SourceError, OSError):
        return [path]


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file; for an index of shards, of the list of its files' SHA-256, its own first."""
    each = [sha256(one) for one in files_of(path)]
    return each[0] if len(each) == 1 else hashlib.sha256("\n".join(each).encode()).hexdigest()


def _weight_map(index: Path) -> dict[str, str]:
    """Return the name of the file for each key; raise SourceError for one that leads elsewhere or to nothing."""
    if index.stat().st_size > _LARGEST_INDEX:
        raise SourceError(f"{index} is larger than any index of shards; give the checkpoint file itself")
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        what = 'it must be JSON with a "weight_map" of keys to files'
        raise SourceError(f"{index} is no index of shards: {what}") from None
    if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f'{index} is damaged: its "weight_map" must name a file for every key')
    for name in sorted(set(weight_map.values())):
        if {*"/\\\0"} & {*name} or name in ("", ".", ".."):
            raise SourceError(f"{index} names the file {name!r}, which leads out of its folder; nothing of it was read")
        if not os.path.isfile(index.parent / name):  # noqa: PTH113 (no name, however long, makes it raise)
            raise SourceError(f"{index} names {name}, which is not in {index.parent}; download it too")
    return weight_map


def _scripted(entries: Entries, path: Path) -> State:
    pickled = entries.find("data.pkl") or "data.pkl"
    root = read_archive(entries, str(path), pickled.removesuffix("data.pkl"), scripted=True).value
    if not isinstance(root, Record):
        raise SourceError(f"{path} is a TorchScript archive of a {type(root).__name__}, not of a module")
    state = dict(_tensors_below(root, str(path), scripted=True))
    if not state:
        what = "a TorchScript archive without named weights, as torch.jit.freeze leaves it"
        raise SourceError(f"{path} is {what}; give the archive from before freezing, or the state_dict")
    return state


def _exported(entries: Entries, path: Path) -> State:
    # Before torch 2.9 it was a torch.save file, which is read in the restricted way, trusted or not.
    older = entries.find("serialized_state_dict.pt", "data/weights/model.pt")
    if older is not None:
        instead = "save the program's state_dict and give it with `arch=…`"
        state = load_object(io.BytesIO(entries.read(older)), FileKind.TORCH, False, f"{path}, entry {older},", instead)
        if isinstance(state, Mapping):
            return {str(key): tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
        raise SourceError(f"{path} is damaged: its entry {older} holds a {type(state).__name__}, not a state_dict")
    listing = entries.find("*_weights_config.json")
    if listing is None:
        what = "a torch.export archive that holds no weights of its own (as AOTInductor packages do not)"
        raise SourceError(f"{path} is {what}; give the state_dict of the model")
    builder = Builder(lambda storage: entries.storage(storage.key), entries.size, str(path), foreign=False)
    found: State = {}
    try:
        for key, entry in json.loads(entries.read(listing))["config"].items():
            meta, name = entry["tensor_meta"], listing[: listing.rindex("/") + 1] + str(entry["path_name"])
            if entry["use_pickle"] or meta is None or meta["dtype"] not in _EXPORT_DTYPES:
                raise MalformedError(f"{name} is a tensor of another class or dtype than networks have")
            dtype, offset = _EXPORT_DTYPES[meta["dtype"]], int(meta["storage_offset"]["as_int"])
            size, stride = (tuple(int(part["as_int"]) for part in meta[which]) for which in ("sizes", "strides"))
            if not all(map(are_sizes, (size, stride, (offset,)))) or len(size) != len(stride):
                raise MalformedError(f"the sizes of {name} are not those of a tensor")
            storage = StorageRef(name, dtype, entries.info(name).file_size // dtype.itemsize)
            found[key_of(str(key))] = builder.tensor(TensorRef(storage, offset, size, stride))
        return found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MalformedError(f"{listing} is not what torch.export writes ({reason_of(error, 100)})") from None


def states_of_modules(value: Any, label: str) -> tuple[Any, tuple[str, ...]]:
    """Put state dicts in the place of modules that are records; return also their classes; raise SourceError."""
    if _is_module(value):
        return dict(_tensors_below(value, label)), (value.name,)
    modules = {key: part for key, part in value.items() if _is_module(part)} if isinstance(value, dict) else {}
    states = {key: dict(_tensors_below(part, label)) for key, part in modules.items()}
    return value | states if states else value, tuple(part.name for part in modules.values())


def modules_in(value: Any) -> list[Record]:
    """Return every module that is a record, at the top of a file or one level below, a moving average first."""
    parts = dict(sorted(value.items(), key=lambda item: item[0] != "ema")) if isinstance(value, dict) else {"": value}
    return [part for part in parts.values() if _is_module(part)]


def _is_module(value: Any) -> bool:
    """True for a record with the parts that every nn.Module has."""
    state = value.state if isinstance(value, Record) and isinstance(value.state, dict) else {}
    return all(isinstance(state.get(part), dict) for part in ("_parameters", "_buffers", "_modules"))


def _tensors_below(root: Record, label: str, scripted: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its dotted name, in order; raise SourceError where there is no end of modules.

    Of a module that is not `scripted`, these are parameters, persistent buffers, and what is in its children.
    """
    parts = 0

    def below(record: Record, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        nonlocal parts
        state = record.state if isinstance(record.state, dict) and (scripted or _is_module(record)) else {}
        if state and not scripted:
            passing = state.get("_non_persistent_buffers_set")
            passing = passing if isinstance(passing, set) else ()
            kept = {name: value for name, value in state["_buffers"].items() if name not in passing}
            state = {**state["_parameters"], **kept, **state["_modules"]}
        for name, value in state.items():
            # Each name is written out, with the whole prefix.
            parts += 1 + len(f"{prefix}{name}") // 256
            if parts > _MOST_PARTS or depth > 100:
                raise SourceError(f"{label} is cut off or damaged: it claims more modules than any network has")
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, nn.Module):
                yield from ((f"{prefix}{name}.{key}", tensor) for key, tensor in value.state_dict().items())
            elif isinstance(value, Record):
                yield from below(value, f"{prefix}{name}.", depth + 1)

    return below(root, "", 0)
