"""Load what torch.save or pickle.dump wrote, without running anything of it.

| form | pickle | numbers |
| --- | --- | --- |
| torch.save | `data.pkl` in a zip archive | entries `data/KEY` |
| torch.save's old form | five pickles at the beginning of the file | behind them, in the order of the last pickle |
| pickle.dump | the file | in the pickle: an old form for each storage, or numpy's bytes |

`pickle_reader` reads the pickle, `pickle_objects` makes what it describes. Objects of other classes stay records; what
names something that runs code is refused. torch's own unpickler is called only with `trust_pickle`.
"""

import io
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from asymswap.errors import SourceError, listed, reason_of
from asymswap.fileformats import pickle_reader
from asymswap.fileformats.detect import FileKind
from asymswap.fileformats.pickle_objects import COMPILED, Builder, allowed_names, module_names, named_in
from asymswap.fileformats.pickle_reader import MalformedError, Odd, Reader, StorageRef
from asymswap.utils.tensors import allocated, copy_with

_INSTEAD = (
    "save model.state_dict() instead and give it with `arch=…`, or, if you trust the file, use `trust_pickle=True`"
)

LARGEST_PICKLE = 32 * 2**20
"""Bytes of a pickle that is larger than its archive, being compressed; others can't be larger."""
_PIECE, _UNPACKED, _UNPACKED_RATIO = 2**18, 64 * 2**20, 8
"""torch.save compresses nothing. What somebody compressed afterwards may be larger than this, and by this factor."""

# A file that names another one of these modules or names wants more than to store something, and is not read at all.
_TYPES = (bytearray, bytes, complex, dict, float, frozenset, int, list, object, range, set, slice, str, tuple)
_STORING = {f"builtins.{kind.__name__}" for kind in _TYPES} | {
    "copyreg._reconstructor", "types.SimpleNamespace", "_codecs.encode",
}  # fmt: skip
_STORING_MODULES = ("argparse", "collections", "datetime", "decimal", "fractions", "pathlib", "uuid", "zoneinfo")
_RUNS_CODE = (
    "torch.fx.graph_module.", "torch.jit.", "torch.package.", "torch.utils.cpp_extension.", "torch.hub.",
    "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save",
)  # fmt: skip


class Entries:
    """The entries of an archive, by their whole names; `sizes` are their numbers of bytes."""

    def __init__(self, archive: zipfile.ZipFile, size: int, verify: bool) -> None:
        self._archive, self.size, self._verify = archive, size, verify
        infos = [info for info in archive.infolist() if not info.is_dir()]
        self.sizes = {info.filename: info.file_size for info in infos}
        # torch ignores case where it looks an entry up.
        if len({info.filename.lower() for info in infos}) != len(infos):
            raise Odd("is an archive with two entries of one name")
        if min((info.header_offset for info in infos), default=0):
            # Python looks for the list of entries from the end, torch where the end says it is.
            raise Odd("is an archive with something before it, which two readers read in two ways")
        unpacked = sum(self.sizes.values())
        if unpacked > max(size * _UNPACKED_RATIO, _UNPACKED):
            raise Odd(f"is an archive of {size:,} bytes that would unpack to {unpacked:,}")
        if sum(info.file_size for info in infos if info.compress_type == zipfile.ZIP_STORED) > size:
            raise MalformedError("its entries claim more bytes than the file has")

    def find(self, *patterns: str) -> str | None:
        """Return the first entry whose name matches, from the right, as paths do."""
        return next((name for pattern in patterns for name in self.sizes if PurePosixPath(name).match(pattern)), None)

    def info(self, name: str) -> zipfile.ZipInfo:
        """Return what the archive says of an entry; raise MalformedError where it is missing."""
        if name not in self.sizes:
            raise MalformedError(f"entry {name} is missing")
        return self._archive.getinfo(name)

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry; raise MalformedError where it is missing."""
        return self._archive.read(self.info(name))

    def storage(self, name: str) -> torch.UntypedStorage:
        """Return the bytes of an entry as memory for tensors; raise MalformedError where it is missing."""
        info, found = self.info(name), 0
        memory = torch.empty_strided((info.file_size,), (1,), dtype=torch.uint8)
        place = memory.numpy().data
        with self._archive.open(info) as file:
            if info.compress_type == zipfile.ZIP_STORED and not self._verify:
                file._expected_crc = None  # type: ignore[attr-defined]
            # By pieces, so that the bytes are in memory once.
            for start in range(0, info.file_size, _PIECE):
                found += file.readinto(place[start : start + _PIECE])  # type: ignore[attr-defined]
        if found != info.file_size:
            raise MalformedError(f"entry {name} is cut off")
        return memory.untyped_storage()


@contextmanager
def opened(file: Path | BinaryIO, verify: bool) -> Iterator[Entries]:
    """Open an archive; whatever goes wrong within the block is a MalformedError.

    `verify`: compare the checksums of storages too, which torch does not; it takes half as long again as reading them.
    """
    with pickle_reader.damage_named(), zipfile.ZipFile(file) as archive:
        yield Entries(archive, file.stat().st_size if isinstance(file, Path) else file.seek(0, 2), verify)


@dataclass(frozen=True)
class RawFile:
    """What a file holds, before anything is made of it."""

    value: Any
    unread: tuple[str, ...] = ()  # the classes and types of what stayed records
    executed: bool = False  # it was unpickled without restriction, so code in it ran
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors file
    notes: tuple[str, ...] = ()


def load_object(file: Path | BinaryIO, kind: FileKind, trust_pickle: bool, label: str, instead: str = _INSTEAD) -> Any:
    """Return what is in a file, on the CPU, where all of it can be read; see `load`."""
    loaded = load(file, kind, trust_pickle, label, instead)
    if loaded.unread:
        raise refusal(loaded.unread, label, instead)
    return loaded.value


def load(file: Path | BinaryIO, kind: FileKind, trust_pickle: bool, label: str, instead: str = _INSTEAD) -> RawFile:
    """Return what torch.save or pickle.dump wrote into a file, on the CPU.

    Raises SourceError for a damaged file, for what torch.save does not write and for what runs code; `instead` is what
    it says to do. With `trust_pickle`, what is not read otherwise is unpickled, and code of the file may run.
    """
    try:
        loaded = _read(file, kind, label)
        if not trust_pickle and any(map(_wants_code, loaded.unread)):
            raise refusal(loaded.unread, label, instead)
        if not trust_pickle or not loaded.unread:
            return loaded
    except Odd as error:
        if not trust_pickle:
            strange = f"{error}, which torch.save never writes"
            raise SourceError(f"{label} {strange}; nothing of it was executed; {instead}") from None
    except MalformedError as error:
        raise SourceError(f"{label} is cut off or damaged: {error}") from None
    import_from_here()
    try:
        # torch warns of classes whose source has changed since; the weights are checked by their shapes instead.
        with warnings.catch_warnings(action="ignore"):
            return RawFile(torch.load(file, map_location="cpu", weights_only=False), executed=True)
    except Exception as error:  # any code may run, and may fail
        what = f"cannot be unpickled: {reason_of(error)}; code in it may have been executed (`trust_pickle=True`)"
        if isinstance(error, ImportError | AttributeError):
            what = f"needs code that cannot be imported here: {reason_of(error)}; run asymswap in its project"
        raise SourceError(f"{label} {what}") from error


def refusal(unread: Iterable[str], label: str, instead: str = _INSTEAD) -> SourceError:
    """Return the error for a file with classes that are not allowed."""
    needs = f"{listed(sorted(unread), 3)}, outside of the allowlist"
    return SourceError(f"{label} is a pickle that needs {needs}; nothing of it was executed; {instead}")


def _wants_code(name: str) -> bool:
    """True for a global of the kind that runs something, rather than stores something."""
    root = name.partition(".")[0]
    stores = name in _STORING or root in _STORING_MODULES
    return name.startswith(_RUNS_CODE) or (root in sys.stdlib_module_names and not stores)


def import_from_here() -> None:
    """Let the working directory count for imports, as with `python -m`, so that a project need not be installed."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def read_archive(entries: Entries, label: str, folder: str, scripted: bool = False) -> RawFile:
    """Return what `data.pkl` in a folder describes, `scripted` by TorchScript or not; raise Odd or MalformedError."""
    order = f"{folder}byteorder"
    if order in entries.sizes and entries.read(order) != b"little":
        raise MalformedError("it was written on a big-endian machine, which cannot be read here")
    length = entries.sizes.get(f"{folder}data.pkl", 0)
    if length > max(LARGEST_PICKLE, entries.size):
        raise Odd(f"holds {length:,} bytes beside its tensors, more than {LARGEST_PICKLE:,}")
    content = entries.read(f"{folder}data.pkl")
    reader = Reader(len(content))
    root = reader.read(io.BytesIO(content))
    for storage in reader.storages:
        held, claimed = entries.sizes.get(f"{folder}data/{storage.key}", -1), storage.claimed
        if held < claimed:
            raise Odd(f"claims {claimed:,} bytes for the storage {storage.key!r}, of which it holds {max(held, 0):,}")
    return _built(root, reader, label, lambda s: entries.storage(f"{folder}data/{s.key}"), scripted)


def _read(file: Path | BinaryIO, kind: FileKind, label: str) -> RawFile:
    if kind is FileKind.TORCH or not isinstance(file, Path):
        with opened(file, verify=False) as entries:
            roots = {name.partition("/")[0] for name in entries.sizes}
            if len(roots) != 1:
                raise Odd("is an archive with several roots")
            return read_archive(entries, label, f"{roots.pop()}/")
    places: dict[str, tuple[int, int]] = {}
    with file.open("rb") as stream:
        if kind is FileKind.PICKLE:
            content = stream.read()
            reader = Reader(len(content))
            root = reader.read(io.BytesIO(content))
            if reader.storages:
                raise Odd(f"asks for the storage {reader.storages[0].key!r}, which no pickle by itself holds")
        else:
            reader = Reader(min(LARGEST_PICKLE, file.stat().st_size))
            root, places = pickle_reader.read_old(reader, stream, LARGEST_PICKLE)

        def memory(storage: StorageRef) -> torch.UntypedStorage:
            start, length = places[storage.key]
            tensor = torch.empty_strided((length,), (1,), dtype=torch.uint8)
            stream.seek(start)
            if length and stream.readinto(tensor.numpy().data) != length:
                raise MalformedError(f"its storage {storage.key!r} is cut off")
            return tensor.untyped_storage()

        return _built(root, reader, label, memory)


def _built(
    root: Any, reader: Reader, label: str, memory: Callable[[StorageRef], torch.UntypedStorage], scripted: bool = False
) -> RawFile:
    """Return what a pickle describes, every storage of which has been checked."""
    held = sum({s.key: s.claimed for s in reader.storages}.values())
    names = named_in(root) if COMPILED in reader.names else reader.names
    unread = names - allowed_names() - pickle_reader.storage_dtypes().keys()
    if any(map(_wants_code, unread)) and not scripted:
        return RawFile(None, tuple(sorted(unread)))
    builder = Builder(memory, held + reader.nested_bytes, label, bool(unread))
    # The warnings are torch's own, of quantised and of sparse tensors.
    with pickle_reader.damage_named(), warnings.catch_warnings(action="ignore"):
        value = builder.build(root)
    return RawFile(value, tuple(sorted(unread | builder.unread)))


def to_structure(model: nn.Module) -> bytes | None:
    """Return what torch.save makes of a module with every tensor of its state dict on the meta device.

    None for one of classes outside of the allowlist, and where it holds anything that could not be read back.
    """
    if not all(f"{type(m).__module__}.{type(m).__qualname__}" in module_names() for m in model.modules()):
        return None
    stored = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    buffer = io.BytesIO()
    try:
        torch.save(copy_with(model, stored, lambda tensor: tensor.to("meta")), buffer)
        unread = _read(buffer, FileKind.TORCH, "the model's structure").unread
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, Odd, MalformedError, SourceError):
        # Hooks and other attributes of the user's own may not even be picklable.
        return None
    return None if unread else buffer.getvalue()


def from_structure(data: bytes) -> nn.Module:
    """Return the module of that structure, with unset weights on the CPU; raise SourceError for what is not allowed."""
    label = "the checkpoint's stored structure"
    module = load_object(io.BytesIO(data), FileKind.TORCH, trust_pickle=False, label=label)
    if not isinstance(module, nn.Module):
        raise SourceError(f"{label} is a {type(module).__name__}, not a module")
    return allocated(module)
