"""Pickles read as data: bytes to plain values, records and references to tensors.

Nothing that a pickle names is imported and nothing that it calls is called. A global becomes a `Global`, a call or an
object a `Record` of name, arguments and contents, a tensor a `TensorRef` to a `StorageRef`; numbers, text, lists, dicts
and the like become what they are. `asymswap.fileformats.pickle_objects` makes tensors and modules of these.

All protocols from 0 to 5 are read. One `Reader` reads all pickles of a file, with one budget for everything in it: the
work (operations, and items that an operation copies), the bytes that calls make, the length of keys and names.
"""

from __future__ import annotations

import collections
import pathlib
import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch

from asymswap.fileformats.pickle_parts import (
    Global,
    MalformedError,
    Odd,
    Record,
    StorageRef,
    are_sizes,
    constants,
    described_tensor,
    global_name,
    key_of,
    storage_dtype,
)

OLD_MAGIC = 0x1950A86A20F9469CFC6C
"""The number that torch.save's old form begins with."""

MOST_OPERATIONS = 400_000
"""Operations of all pickles in a file; timm's largest networks need 57,000, and 300,000 with averages and optimizer."""

_MADE_BYTES = 64 * 2**20
"""Bytes that calls (decoding, joining names, copying storages) may make, beside four times the pickle's own size."""

_LONGEST_NAME, _LONGEST_NUMBER = 1000, 1024


_UNKNOWN: Any = object()


class Reader:
    """Reads the pickles of one file; `names` are all globals in them, `storages` all storages that they ask for."""

    def __init__(self, size: int) -> None:
        self.names: set[str] = set()
        self.storages: list[StorageRef] = []
        self._work = MOST_OPERATIONS
        self._bytes = _MADE_BYTES + 4 * size
        self.nested_bytes = 0
        self._inside, self._nested = False, 0
        self._data = b""
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._globals: dict[str, Any] = {}

    def read(self, data: bytes, start: int = 0) -> tuple[Any, int]:
        """What the pickle that begins at `start` holds, and where it ends; raises Odd or MalformedError."""
        self._data, self._at, self._stack, self._marks, self._memo = data, start, [], [], {}
        try:
            return self._run(), self._at
        except (Odd, MalformedError, MemoryError):
            raise
        except Exception as error:
            # A damaged pickle can go wrong in every way that a stack machine knows.
            raise MalformedError(" ".join(str(error).split())[:160] or type(error).__name__) from None

    def _run(self) -> Any:
        data, steps = self._data, _STEPS
        while True:
            if self._at >= len(data):
                raise MalformedError("a pickle in it ends too soon")
            code = data[self._at]
            self._at += 1
            self._spend(1)
            if code == _STOP:
                return self._stack.pop()
            step = steps.get(code)
            if step is None:
                raise MalformedError(f"operation 0x{code:02x} of a pickle has no place in a checkpoint")
            step(self)

    def _spend(self, work: int, made: int = 0) -> None:
        self._work -= work
        if self._work < 0:
            raise Odd(f"has more than {MOST_OPERATIONS:,} operations")
        self._bytes -= made
        if self._bytes < 0:
            raise Odd("makes far more bytes than it has")

    # Arguments of operations.

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if count < 0 or end > len(self._data):
            raise MalformedError("a pickle in it ends too soon")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _number(self, form: struct.Struct) -> Any:
        (number,) = form.unpack(self._take(form.size))
        return number

    def _line(self, encoding: str = "utf-8") -> str:
        line = self._take(self._data.index(b"\n", self._at) - self._at)
        self._at += 1
        return str(line, encoding)

    def _sized(self, form: struct.Struct) -> bytes:
        return self._take(self._number(form))

    # Steps. `_push` and those named after it leave one more value on the stack.

    def _push_text(self, form: struct.Struct) -> None:
        self._stack.append(str(self._sized(form), "utf-8", "surrogatepass"))

    def _push_ascii(self, form: struct.Struct) -> None:
        try:
            self._stack.append(self._sized(form).decode("ascii"))
        except UnicodeDecodeError:
            raise Odd("holds bytes as text, as Python 2 wrote them") from None

    def _push_quoted(self) -> None:
        line = self._line()
        if len(line) < 2 or line[0] not in "'\"" or line[-1] != line[0] or "\\" in line or not line.isascii():
            raise Odd("holds bytes as text, as Python 2 wrote them")
        self._stack.append(line[1:-1])

    def _push_int(self, text: str) -> None:
        self._stack.append({"00": False, "01": True}[text] if text in ("00", "01") else int(text.rstrip("L")))

    def _push_long(self, raw: bytes) -> None:
        if len(raw) > _LONGEST_NUMBER:
            raise Odd(f"holds a number of {len(raw):,} bytes")
        self._stack.append(int.from_bytes(raw, "little", signed=True))

    def _push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or len(module) + len(name) > _LONGEST_NAME:
            raise Odd("names what is no name")
        full = global_name(module, name)
        self._spend(0, len(full))
        if full not in self._globals:
            # "collections.OrderedDict" and "collections" + "OrderedDict" of protocol 4 are one and the same.
            self.names.add(full)
            self._globals[full] = constants().get(full) or Global(full)
        self._stack.append(self._globals[full])

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_global(module, name)

    def _since_mark(self) -> list[Any]:
        at = self._marks.pop()
        taken = self._stack[at:]
        del self._stack[at:]
        return taken

    def _push_tuple(self, length: int) -> None:
        if len(self._stack) < length:
            raise MalformedError("the stack of a pickle in it is empty")
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Record):
            target.elements.extend(values)
        elif type(target) is list:
            target.extend(values)
        else:
            raise Odd(f"puts items into {_called_text(target)}")

    def _set(self, flat: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Record):
            target = target.items
        elif not isinstance(target, dict):
            raise Odd(f"puts items into {_called_text(target)}")
        target.update(_paired(flat))

    def _add(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not set:
            raise Odd(f"puts items into {_called_text(target)}")
        target.update(map(key_of, values))

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Record):
            if target.state is not None:
                raise Odd(f"fills a {target.name} twice")
            target.state = state
        elif not isinstance(target, dict):
            raise Odd(f"fills {_called_text(target)} with attributes")
        elif type(target) is collections.OrderedDict and type(state) is dict:
            # What else hangs on a dict is no part of it.
            versions = state.get("_metadata")
            if isinstance(versions, dict) and all(map(_are_versions, versions.items())):
                target._metadata = versions  # type: ignore[attr-defined]  # as torch does

    def _call(self, made_by: str) -> None:
        arguments, what = self._stack.pop(), self._stack.pop()
        self._push_call(what, arguments, made_by)

    def _call_with_keywords(self) -> None:
        keywords, arguments, what = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._push_call(what, arguments if not keywords else (*arguments, keywords), "new")

    def _call_since_mark(self) -> None:
        what, *arguments = self._since_mark()
        self._push_call(what, tuple(arguments), "new")

    def _instance(self) -> None:
        self._push_global(self._line(), self._line())
        what = self._stack.pop()
        self._push_call(what, tuple(self._since_mark()), "new")

    def _push_call(self, what: Any, arguments: Any, made_by: str) -> None:
        if not isinstance(what, Global) or type(arguments) is not tuple:
            raise Odd("calls what is not named")
        if what.name == "copyreg._reconstructor":
            # What protocols 0 and 1 write for an object.
            match arguments:
                case (Global() as what, Global("builtins.object"), None):
                    arguments, made_by = (), "new"
                case (Global() as what, Global(), inside):
                    arguments, made_by = (inside,), "new"
        if what.name.startswith("torch.jit._pickle.") and arguments:
            # TorchScript's marks of a list's static type.
            self._stack.append(arguments[0])
            return
        if what.name not in _KNOWN_CALLS:
            self._stack.append(Record(what.name, arguments, made_by))
            return
        made = self._made_by(what.name, arguments)
        if made is _UNKNOWN:
            raise Odd(f"calls {what.name} in another way")
        self._stack.append(made)

    def _push_storage(self) -> None:
        match self._stack.pop():
            case ("storage", Global(kind), str(key), str(), int(count), *rest) if count >= 0 and rest in ([], [None]):
                storage = StorageRef(key, storage_dtype(kind), count)
            case ("storage", Global(kind), str(key), str(), int(count), (str(), int(start), int(size))):
                if not 0 <= start <= start + size <= count:
                    raise Odd(f"takes a part of the storage {key!r} that it does not have")
                storage = StorageRef(key, storage_dtype(kind), count, start, size)
            case ("module", Global() as what, *_):
                # The old form keeps the source code of a module's class beside it, which is not read.
                self._stack.append(what)
                return
            case _:
                raise Odd("asks for something else than a storage")
        self.storages.append(storage)
        self._stack.append(storage)

    def _made_by(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What a call of one of `_KNOWN_CALLS` makes; `_UNKNOWN` where pickle and torch.save do not write it so."""
        match name, arguments:
            case "collections.OrderedDict", ():
                return collections.OrderedDict()
            case "collections.OrderedDict", (list(pairs),):
                self._spend(len(pairs))
                if all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs):
                    return collections.OrderedDict((key_of(key), value) for key, value in pairs)
            case "collections.Counter", ():
                return collections.Counter()
            case "collections.Counter", (dict(counts),):
                self._spend(len(counts))
                made: collections.Counter[Any] = collections.Counter()
                dict.update(made, counts)
                return made
            case ("collections.defaultdict", () | (_,)) | ("builtins.dict", ()):
                return {}
            case "builtins.list", ():
                return []
            case "builtins.tuple", ():
                return ()
            case "builtins.bytes", ():
                return b""
            case "builtins.bytearray", ():
                return bytearray()
            case "builtins.bytearray", (bytes(raw),):
                self._spend(1, len(raw))
                return bytearray(raw)
            case "builtins.bytearray" | "_codecs.encode", (str(text), "latin-1" | "latin1"):
                self._spend(1, len(text))
                return text.encode("latin-1") if name == "_codecs.encode" else bytearray(text, "latin-1")
            case "builtins.set" | "builtins.frozenset", ():
                return set()
            case "builtins.set" | "builtins.frozenset", (list(values) | tuple(values),):
                self._spend(len(values))
                return set(map(key_of, values))
            case "builtins.complex", (real, imaginary) if type(real) is float and type(imaginary) is float:
                return complex(real, imaginary)
            case "torch.Size", (tuple(size) | list(size),) if are_sizes(size):
                return torch.Size(size)
            case "torch.device", (str(kind),) | (str(kind), None):
                return torch.device(kind)
            case "torch.device", (str(kind), int(index)) if 0 <= index < 2**15:
                return torch.device(kind, index)
            case "torch.serialization._get_layout", (str(layout),):
                found = getattr(torch, layout.removeprefix("torch."), None)
                return found if isinstance(found, torch.layout) else _UNKNOWN
            case "torch.storage._load_from_bytes", (bytes(raw),) if not self._inside:
                return self._storage_of_bytes(raw)
        if name in TENSOR_CALLS:
            described = described_tensor(arguments, typed=name.endswith("_v3"))
            if described is not None:
                self._spend(len(described.size))
                return described
        if name in _PATHS and all(type(part) is str for part in arguments):
            self._spend(len(arguments), 64 * sum(map(len, arguments)))
            return _PATHS[name](*arguments)
        return _UNKNOWN

    def _storage_of_bytes(self, raw: bytes) -> Any:
        """What `pickle.dump` writes for a storage: the bytes of a torch.save file of the old form, of one storage."""
        outside = (self._data, self._at, self._stack, self._marks, self._memo, self.storages)
        self._inside, self.storages = True, []
        try:
            found, keys, end = read_old(self, raw)
            places = old_places(keys, end, self.storages, lambda start, length: raw[start : start + length])
        finally:
            self._data, self._at, self._stack, self._marks, self._memo, self.storages = outside
            self._inside = False
        if not isinstance(found, StorageRef):
            return _UNKNOWN
        self._spend(1, found.claimed)
        start, length = places[found.key]
        if start + length > len(raw):
            raise MalformedError(f"its storage {found.key!r} is cut off")
        self._nested += 1
        self.nested_bytes += found.claimed
        found.key, found.data = f"{self._nested}/{found.key}", memoryview(raw)[start : start + length]
        return found


def read_old(reader: Reader, data: bytes) -> tuple[Any, list[str], int]:
    """The object of a torch.save file of the old form, the keys of its storages in order, and where these begin.

    Such a file is five pickles in a row (magic number, protocol, system, object, keys), then the storages.
    """
    values, end = [], 0
    for _ in range(5):
        value, end = reader.read(data, end)
        values.append(value)
    magic, protocol, system, found, keys = values
    if magic != OLD_MAGIC or protocol != 1001 or not isinstance(system, dict):
        raise MalformedError("it does not begin as torch.save's old form does")
    if system.get("little_endian") is not True:
        raise MalformedError("it was written on a big-endian machine, which cannot be read here")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise MalformedError("its list of storages is damaged")
    return found, keys, end


def old_places(
    keys: list[str], start: int, storages: Iterable[StorageRef], read: Callable[[int, int], bytes]
) -> dict[str, tuple[int, int]]:
    """Where the bytes of each storage of the old form stand, and how many they are; `read` takes a place and a length.

    Each storage is the number of its elements in eight bytes, then its bytes.
    """
    claimed: dict[str, StorageRef] = {}
    for storage in storages:
        first = claimed.setdefault(storage.key, storage)
        if first.claimed != storage.claimed:
            raise Odd(f"claims two sizes for the storage {storage.key!r}")
    places = {}
    for key in keys:
        if key not in claimed or key in places or len(read(start, 8)) != 8:
            raise MalformedError(f"its storage {key!r} is missing")
        if int.from_bytes(read(start, 8), "little", signed=True) != claimed[key].count:
            raise MalformedError(f"its storage {key!r} has another size than its pickle claims")
        places[key] = (start + 8, claimed[key].claimed)
        start += 8 + claimed[key].claimed
    if claimed.keys() - places.keys():
        raise MalformedError(f"its storage {min(claimed.keys() - places.keys())!r} is missing")
    return places


def _are_versions(item: tuple[Any, Any]) -> bool:
    """Whether these are a module's name and what a state dict says of its form."""
    name, versions = item
    return type(name) is str and type(versions) is dict and all(type(one) in (int, bool) for one in versions.values())


def _paired(flat: list[Any]) -> dict[Any, Any]:
    if len(flat) % 2:
        raise MalformedError("a key of a dict in it has no value")
    return dict(zip(map(key_of, flat[::2]), flat[1::2], strict=True))


def _called_text(value: Any) -> str:
    return f"a {value.name if isinstance(value, Global) else type(value).__name__}"


# Where pathlib keeps its classes depends on Python's version; a path is text, and never opened.
_PATHS = {
    f"{module}.{name}": kind
    for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    for name in (kind.__name__, kind.__name__.removeprefix("Pure"))
    for module in ("pathlib", "pathlib._local")
}
TENSOR_CALLS = frozenset(f"torch._utils._rebuild_tensor{end}" for end in ("", "_v2", "_v3"))
_KNOWN_CALLS = TENSOR_CALLS | _PATHS.keys() | {
    "collections.OrderedDict", "collections.Counter", "collections.defaultdict", "builtins.set", "builtins.frozenset",
    "builtins.complex", "builtins.bytes", "builtins.bytearray", "builtins.dict", "builtins.list", "builtins.tuple",
    "_codecs.encode", "torch.Size", "torch.device", "torch.serialization._get_layout", "torch.storage._load_from_bytes",
}  # fmt: skip
NAMES_READ = _KNOWN_CALLS | {"copyreg._reconstructor", "builtins.object"}
"""Names that the reader knows itself; it makes plain data of calls to them."""

_U1, _U2, _U4, _U8, _I4, _F8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q", "<i", ">d"))
_STOP = ord(".")


def _push(value: Callable[[Reader], Any]) -> Callable[[Reader], None]:
    return lambda r: r._stack.append(value(r))


def _put(index: Callable[[Reader], int]) -> Callable[[Reader], None]:
    return lambda r: r._memo.__setitem__(index(r), r._stack[-1])


_STEPS: dict[int, Callable[[Reader], object]] = {ord(code): step for code, step in {
    "\x80": lambda r: r._take(1),
    "\x95": lambda r: r._take(8),
    "N": _push(lambda _: None),
    "\x88": _push(lambda _: True),
    "\x89": _push(lambda _: False),
    "}": _push(lambda _: {}),
    "]": _push(lambda _: []),
    ")": _push(lambda _: ()),
    "\x8f": _push(lambda _: set()),
    "I": lambda r: r._push_int(r._line()),
    "J": _push(lambda r: r._number(_I4)),
    "K": _push(lambda r: r._number(_U1)),
    "M": _push(lambda r: r._number(_U2)),
    "L": lambda r: r._stack.append(int(r._line().rstrip("L"))),
    "\x8a": lambda r: r._push_long(r._sized(_U1)),
    "\x8b": lambda r: r._push_long(r._sized(_I4)),
    "F": _push(lambda r: float(r._line())),
    "G": _push(lambda r: r._number(_F8)),
    "S": lambda r: r._push_quoted(),
    "T": lambda r: r._push_ascii(_I4),
    "U": lambda r: r._push_ascii(_U1),
    "V": _push(lambda r: r._line("raw-unicode-escape")),
    "X": lambda r: r._push_text(_U4),
    "\x8c": lambda r: r._push_text(_U1),
    "\x8d": lambda r: r._push_text(_U8),
    "B": _push(lambda r: r._sized(_U4)),
    "C": _push(lambda r: r._sized(_U1)),
    "\x8e": _push(lambda r: r._sized(_U8)),
    "\x96": _push(lambda r: bytearray(r._sized(_U8))),
    "(": lambda r: r._marks.append(len(r._stack)),
    "0": lambda r: r._stack.pop(),
    "1": lambda r: r._since_mark(),
    "2": lambda r: r._stack.append(r._stack[-1]),
    "q": _put(lambda r: r._number(_U1)),
    "r": _put(lambda r: r._number(_U4)),
    "p": _put(lambda r: int(r._line())),
    "\x94": _put(lambda r: len(r._memo)),
    "h": _push(lambda r: r._memo[r._number(_U1)]),
    "j": _push(lambda r: r._memo[r._number(_U4)]),
    "g": _push(lambda r: r._memo[int(r._line())]),
    "t": _push(lambda r: tuple(r._since_mark())),
    "\x85": lambda r: r._push_tuple(1),
    "\x86": lambda r: r._push_tuple(2),
    "\x87": lambda r: r._push_tuple(3),
    "l": _push(lambda r: r._since_mark()),
    "d": _push(lambda r: _paired(r._since_mark())),
    "\x91": _push(lambda r: set(map(key_of, r._since_mark()))),
    "a": lambda r: r._extend([r._stack.pop()]),
    "e": lambda r: r._extend(r._since_mark()),
    "\x90": lambda r: r._add(r._since_mark()),
    "s": lambda r: r._set_one(),
    "u": lambda r: r._set(r._since_mark()),
    "c": lambda r: r._push_global(r._line(), r._line()),
    "\x93": lambda r: r._stack_global(),
    "R": lambda r: r._call("call"),
    "\x81": lambda r: r._call("new"),
    "\x92": lambda r: r._call_with_keywords(),
    "o": lambda r: r._call_since_mark(),
    "i": lambda r: r._instance(),
    "b": lambda r: r._build(),
    "Q": lambda r: r._push_storage(),
}.items()}  # fmt: skip
