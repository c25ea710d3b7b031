"""Weights out of zip archives that hold more than weights, with nothing in them executed.

| archive | its weights |
| --- | --- |
| TorchScript | `data.pkl` describes the modules, `data/N` holds the numbers; `code/` is not opened |
| torch.export | `data/weights/` and a JSON list of names, sizes and strides; `models/` is not opened |
| torch.save with classes of the user's own | as TorchScript; see `asymswap.sources.inert` |

Only entries of the archive are ever opened, by their whole names.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from asymswap.errors import SourceError
from asymswap.sources import inert
from asymswap.sources.inert import MalformedError, Record, StorageRef, TensorRef
from asymswap.sources.zipped import LARGEST_PICKLE

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
    with _opened(path) as archive:
        root = archive.pickle()
        if not isinstance(root, Record):
            raise SourceError(f"{path} is a TorchScript archive of a {type(root).__name__}, not of a module")
        state = {name: archive.tensor(ref) for name, ref in _script_tensors(root)}
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
    with _opened(path) as archive:
        older = archive.ending("serialized_state_dict.pt", "data/weights/model.pt")
        if older is not None:
            state = load_pickle(io.BytesIO(archive.bytes(older)), f"{path}, entry {older},")
            if isinstance(state, Mapping):
                return {str(key): tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
            raise SourceError(f"{path} is damaged: its entry {older} holds a {type(state).__name__}, not a state_dict")
        listed = archive.ending("_weights_config.json")
        if listed is None:
            raise SourceError(
                f"{path} is a torch.export archive that holds no weights of its own (as AOTInductor packages do not); "
                f"give the state_dict of the model"
            )
        folder = listed[: listed.rindex("/") + 1]
        try:
            config = json.loads(archive.bytes(listed))["config"]
            return {str(name): archive.exported_tensor(folder, entry) for name, entry in config.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise MalformedError(
                f"{listed} is not what torch.export writes ({' '.join(str(error).split())[:100]})"
            ) from None


def read_described(path: Path) -> Any:
    """What a torch.save file holds, with real tensors, and objects of other classes as records; raises SourceError."""
    with _opened(path) as archive:
        value = archive.pickle()
        if isinstance(value, dict):
            # An optimizer's moments are twice the weights, and nobody asks for them here.
            value = {key: part for key, part in value.items() if not str(key).startswith("optimizer")}
        return _with_tensors(value, archive.tensor)


def states_of_modules(value: Any) -> tuple[Any, tuple[str, ...]]:
    """The same with every module that is there as a record replaced by its state dict, and their classes' names.

    Raises MalformedError for a module inside of itself, or one named without end.
    """
    if is_module(value):
        return {name: part for name, part in _module_tensors(value) if isinstance(part, Tensor)}, (value.name,)
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
def _opened(path: Path) -> Iterator[_Archive]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield _Archive(archive, path.stat().st_size)
    except SourceError:
        raise
    except Exception as error:
        # What is damaged can make zipfile and torch raise about anything.
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise SourceError(f"{path} is cut off or damaged: {reason}") from None


class _Archive:
    """The entries of an archive, and tensors of the numbers in them; a storage is read once."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._infos = {info.filename: info for info in archive.infolist()}
        self._storages: dict[str, torch.UntypedStorage] = {}
        # Torch compresses no numbers, so that all that is read from an archive can't be larger than the archive.
        stored = (info for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED)
        if sum(info.file_size for info in stored) > size:
            raise MalformedError("its entries claim more bytes than the file has")
        pickled = self.ending("data.pkl")
        self._folder = "" if pickled is None else pickled.removesuffix("data.pkl")
        order = self._infos.get(f"{self._folder}byteorder")
        if order is not None and self.bytes(order.filename) != b"little":
            raise MalformedError("it was written on a big-endian machine, which cannot be read here")

    def ending(self, *suffixes: str) -> str | None:
        """The first entry whose name ends so, at the border of a part of its name."""
        for suffix in suffixes:
            for name in self._infos:
                if name == suffix or name.endswith(suffix if suffix.startswith("_") else f"/{suffix}"):
                    return name
        return None

    def bytes(self, name: str) -> bytes:
        return self._archive.read(self._info(name))

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._infos:
            raise MalformedError(f"entry {name} is missing")
        if self._infos[name].compress_type != zipfile.ZIP_STORED:
            raise MalformedError(f"entry {name} is compressed, which torch does to none with weights; save it again")
        return self._infos[name]

    def pickle(self) -> Any:
        name = f"{self._folder}data.pkl"
        if self._info(name).file_size > LARGEST_PICKLE:
            raise MalformedError(f"entry {name} has more than {LARGEST_PICKLE:,} bytes beside the tensors")
        return inert.read(io.BytesIO(self.bytes(name)))

    def tensor(self, ref: TensorRef) -> Tensor:
        return self._view(f"{self._folder}data/{ref.storage.key}", ref)

    def exported_tensor(self, folder: str, entry: Mapping[str, Any]) -> Tensor:
        """A tensor as torch.export lists it; one that was pickled is of a class that no network here has."""
        meta, name = entry["tensor_meta"], folder + str(entry["path_name"])
        if entry["use_pickle"] or meta is None or meta["dtype"] not in _EXPORT_DTYPES:
            raise MalformedError(f"{name} is a tensor of another class or dtype than networks have")
        dtype = _EXPORT_DTYPES[meta["dtype"]]
        size, stride = (tuple(int(part["as_int"]) for part in meta[key]) for key in ("sizes", "strides"))
        count = self._info(name).file_size // dtype.itemsize
        offset = int(meta["storage_offset"]["as_int"])
        return self._view(name, TensorRef(StorageRef(name, dtype, count), offset, size, stride))

    def _view(self, name: str, ref: TensorRef) -> Tensor:
        if len(ref.size) != len(ref.stride) or min((*ref.size, *ref.stride, ref.offset), default=0) < 0:
            raise MalformedError(f"the sizes of {name} are not those of a tensor")
        last = ref.offset + sum((size - 1) * stride for size, stride in zip(ref.size, ref.stride, strict=True))
        numbers = math.prod(ref.size)
        if numbers and (last >= ref.storage.count or numbers > ref.storage.count):
            raise MalformedError(f"a tensor claims more numbers than its storage {name} has")
        flat = torch.empty(0, dtype=ref.storage.dtype)
        if numbers == 0:
            return flat.reshape(ref.size)
        return flat.set_(self._storage(name, ref.storage), ref.offset, ref.size, ref.stride)

    def _storage(self, name: str, ref: StorageRef) -> Any:
        wanted = ref.count * ref.dtype.itemsize
        info = self._info(name)
        if info.file_size < wanted:
            raise MalformedError(f"entry {name} is shorter than its {wanted} bytes")
        if name not in self._storages:
            content = bytearray(info.file_size)
            with self._archive.open(info) as file:
                # The bytes are read into their place, so that they are in memory once; the end is where zipfile checks.
                if cast(io.BufferedIOBase, file).readinto(content) != len(content) or file.read(1):
                    raise MalformedError(f"entry {name} is cut off")
            self._storages[name] = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
        return self._storages[name]


def _script_tensors(root: Record) -> Iterator[tuple[str, TensorRef]]:
    return _tensors_below(root, lambda record: record.state if isinstance(record.state, dict) else {})


def _module_tensors(root: Record) -> Iterator[tuple[str, Any]]:
    def attributes(record: Record) -> dict[str, Any]:
        if not is_module(record):
            return {}
        state = record.state
        passing = state.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set) else set()
        kept = {name: value for name, value in state["_buffers"].items() if name not in passing}
        return {**state["_parameters"], **kept, **state["_modules"]}

    return _tensors_below(root, attributes)


def _tensors_below(root: Record, attributes: Callable[[Record], dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every tensor under its dotted name, in order; raises MalformedError for a module inside of itself."""
    parts = 0

    def below(record: Record, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
        nonlocal parts
        if id(record) in above:
            raise MalformedError("a module contains itself")
        for name, value in attributes(record).items():
            parts += 1
            if parts > _MOST_PARTS or len(above) > 100:
                raise MalformedError("it claims more modules than any network has")
            if isinstance(value, TensorRef | Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Record):
                yield from below(value, f"{prefix}{name}.", (*above, id(record)))

    return below(root, "", ())


def _with_tensors(value: Any, tensor: Callable[[TensorRef], Tensor]) -> Any:
    """The same with every reference to a tensor replaced by the tensor, in place where that can be."""
    made: dict[int, Any] = {}
    for part in inert.walk(value):
        holders = (part,) if isinstance(part, dict | list) else ()
        if isinstance(part, Record):
            holders = (part.items, part.elements, *((part.state,) if isinstance(part.state, dict) else ()))
        for holder in holders:
            for key, item in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                if isinstance(item, TensorRef):
                    if id(item) not in made:
                        made[id(item)] = (tensor(item), item)
                    holder[key] = made[id(item)][0]
    return tensor(value) if isinstance(value, TensorRef) else value
