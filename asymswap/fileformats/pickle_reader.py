"""Read pickles as data: bytes to plain values, records and references to tensors.

Nothing that a pickle names is imported and nothing that it calls is called. A global becomes a `Global`, a call or an
object a `Record`, a tensor a `TensorRef` to a `StorageRef`, of which `pickle_objects` makes tensors and modules. All
protocols from 0 to 5 are read. One `Reader` reads all pickles of a file, with one budget for everything in it: the work
(operations, and items that an operation copies), the bytes that calls make, the length of keys and names.
"""

import collections
import functools
import io
import pathlib
import pickletools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING
from torch.storage import _storage_type_to_dtype_map

from asymswap.errors import SourceError, reason_of

MOST_OPERATIONS = 400_000
"""Operations of all pickles in a file; timm's largest networks need 57,000, and 300,000 with averages and optimizer."""
_MADE_BYTES = 64 * 2**20
"""Bytes that calls (decoding, joining names, copying storages) may make, beside four times the pickle's own size."""
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_LONGEST_NAME, _LONGEST_NUMBER, _LONGEST_KEY, _MOST_DIMENSIONS = 1000, 1024, 4096, 64
_PYTHON_2 = "holds bytes as text, as Python 2 wrote them"


class Odd(Exception):  # noqa: N818 - not always an error: with `trust_pickle` it is only reported
    """A pickle holds what torch.save does not write; the text says what."""


class MalformedError(Exception):
    """The bytes are no pickle, or not the file that they claim to be; the text says why."""


@contextmanager
def damage_named() -> Iterator[None]:
    """Make a MalformedError of whatever goes wrong: damage can make pickles, zipfile and torch raise about anything."""
    try:
        yield
    except (SourceError, Odd, MalformedError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, UnicodeDecodeError) and error.encoding == "ascii":
            raise Odd(_PYTHON_2) from None
        raise MalformedError(reason_of(error)) from None


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names."""

    name: str


@dataclass(eq=False, slots=True)
class Record:
    """An object (`made_by` is "new") or a call ("call"): its class or function, arguments and contents."""

    name: str
    arguments: tuple[Any, ...] = ()
    made_by: str = "call"
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class StorageRef:
    """A storage of `count` elements; tensors may use `length` of them from `start` on (the old form has views)."""

    key: str
    dtype: torch.dtype
    count: int
    start: int = 0
    length: int = -1
    data: memoryview | None = None  # where they are in the pickle itself
    claimed: int = field(init=False)  # bytes that the file must hold

    def __post_init__(self) -> None:
        self.length = self.count if self.length < 0 else self.length
        self.claimed = self.count * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class TensorRef:
    """A view of a storage: offset, sizes and strides in elements; `dtype` only where it is not the storage's."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    metadata: dict[str, bool] = field(default_factory=dict)
    dtype: torch.dtype | None = None


class Reader:
    """Reads the pickles of one file; `names` are all globals in them, `storages` all storages that they ask for."""

    def __init__(self, size: int) -> None:
        self.names: set[str] = set()
        self.storages: list[StorageRef] = []
        self.nested_bytes = 0
        self._work, self._bytes = MOST_OPERATIONS, _MADE_BYTES + 4 * size
        self._inside = False

    @damage_named()
    def read(self, stream: BinaryIO) -> Any:
        """Return what the pickle at the place of a stream holds; raise Odd or MalformedError."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        pop, push = stack.pop, stack.append

        def pop_to_mark() -> list[Any]:
            at = marks.pop()
            taken = stack[at:]
            del stack[at:]
            return taken

        while code := stream.read(1):
            self._spend(1)
            name, read = _OPERATIONS.get(code, ("", None))
            argument: Any = read(stream) if read else None
            if isinstance(argument, int) and argument.bit_length() > 8 * _LONGEST_NUMBER:
                raise Odd(f"holds a number of {argument.bit_length() // 8:,} bytes")
            match name:
                case "BINPUT" | "LONG_BINPUT" | "PUT" | "MEMOIZE":
                    memo[len(memo) if name == "MEMOIZE" else key_of(argument)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    push(memo[argument])
                case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE" | "BININT1" | "BININT2" | "BININT":
                    push(argument)
                case "INT" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                    push(argument)
                case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                    push(argument)
                case "STRING" | "BINSTRING" | "SHORT_BINSTRING":
                    if not argument.isascii():
                        raise Odd(_PYTHON_2)
                    push(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                    push(_PUSHED[name]())
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    length = int(name[-1])
                    if len(stack) < length:
                        raise MalformedError("the stack of a pickle in it is empty")
                    stack[-length:] = [tuple(stack[-length:])]
                case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                    push(_OF_ITEMS[name](pop_to_mark()))
                case "GLOBAL":
                    push(self._global(*argument))
                case "STACK_GLOBAL":
                    attribute, module = pop(), pop()
                    push(self._global(module, attribute))
                case "REDUCE" | "NEWOBJ":
                    arguments, what = pop(), pop()
                    push(self._call(what, arguments, "call" if name == "REDUCE" else "new"))
                case "NEWOBJ_EX":
                    keywords, arguments, what = pop(), pop(), pop()
                    push(self._call(what, (*arguments, keywords) if keywords else arguments, "new"))
                case "OBJ":
                    what, *listed = pop_to_mark()
                    push(self._call(what, tuple(listed), "new"))
                case "INST":
                    push(self._call(self._global(*argument), tuple(pop_to_mark()), "new"))
                case "APPEND" | "APPENDS":
                    values = [pop()] if name == "APPEND" else pop_to_mark()
                    _contents(stack[-1], list).extend(values)
                case "SETITEM" | "SETITEMS":
                    pairs = _paired([pop(), pop()][::-1] if name == "SETITEM" else pop_to_mark())
                    _contents(stack[-1], dict).update(pairs)
                case "ADDITEMS":
                    values = pop_to_mark()
                    _contents(stack[-1], set).update(map(key_of, values))
                case "BUILD":
                    state = pop()
                    _fill(stack[-1], state)
                case "BINPERSID":
                    push(self._persistent(pop()))
                case "POP":
                    pop()
                case "POP_MARK":
                    pop_to_mark()
                case "DUP":
                    push(stack[-1])
                case "STOP":
                    return pop()
                case "PROTO" | "FRAME":
                    pass
                case _:
                    raise MalformedError(f"operation 0x{code.hex()} of a pickle has no place in a checkpoint")
        raise MalformedError("a pickle in it ends too soon")

    def _spend(self, work: int, made: int = 0) -> None:
        self._work -= work
        if self._work < 0:
            raise Odd(f"has more than {MOST_OPERATIONS:,} operations")
        self._bytes -= made
        if self._bytes < 0:
            raise Odd("makes far more bytes than it has")

    def _global(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str or len(module) + len(name) > _LONGEST_NAME:
            raise Odd("names what is no name")
        # As it is called in today's Python.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        self._spend(0, len(full))
        if full != "builtins.getattr":  # it depends on how it is called
            self.names.add(full)
        return constants().get(full) or Global(full)

    def _persistent(self, reference: Any) -> Any:
        match reference:
            case ("module", Global() as what, *_):
                # The old form keeps the source code of a module's class beside it, which is not read.
                return what
            case ("storage", Global(kind), str(key), str(), int(count), (str(), int(start), int(length))):
                pass
            case ("storage", Global(kind), str(key), str(), int(count), *rest) if rest in ([], [None]):
                start, length = 0, count
            case _:
                raise Odd("asks for something else than a storage")
        if kind not in storage_dtypes():
            raise Odd(f"has a storage of the type {kind}")
        if not 0 <= start <= start + length <= count:
            raise Odd(f"takes a part of the storage {key!r} that it does not have")
        self.storages.append(StorageRef(key, storage_dtypes()[kind], count, start, length))
        return self.storages[-1]

    def _call(self, what: Any, arguments: Any, made_by: str) -> Any:
        """Return what a call makes; raise Odd where pickle and torch.save do not write it so."""
        if not isinstance(what, Global) or type(arguments) is not tuple:
            raise Odd("calls what is not named")
        match what.name, arguments:
            # What protocols 0 and 1 write for an object.
            case "copyreg._reconstructor", (Global(name), Global(base), inside):
                arguments, made_by = () if base == "builtins.object" and inside is None else (inside,), "new"
            case "builtins.getattr", (Record(owner, made_by="new"), str(method)) if method.isidentifier():
                # A method of an object in the file, as an attribute: nobody calls it, so its name will do.
                self._spend(1, len(owner) + len(method))
                return f"{owner}.{method}"
            case "builtins.getattr" as name, _:
                self.names.add(name)
            case name, _:
                pass
        if name.startswith("torch.jit._pickle.") and arguments:
            # TorchScript's marks of a list's static type.
            return arguments[0]
        if name not in _KNOWN_CALLS:
            return Record(name, arguments, made_by)
        if not arguments and name in _EMPTY:
            return _EMPTY[name]()
        match name, arguments:
            case "collections.OrderedDict", (list(pairs),):
                self._spend(len(pairs))
                if all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs):
                    return collections.OrderedDict((key_of(key), value) for key, value in pairs)
            case "collections.Counter", (dict(counts),):
                self._spend(len(counts))
                return collections.Counter(counts)
            case "collections.defaultdict", (_,):
                return {}
            case "builtins.bytearray", (bytes(raw),):
                self._spend(1, len(raw))
                return bytearray(raw)
            case "builtins.bytearray" | "_codecs.encode", (str(text), "latin-1" | "latin1"):
                self._spend(1, len(text))
                return text.encode("latin-1") if name == "_codecs.encode" else bytearray(text, "latin-1")
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
                return layout
            case "torch.storage._load_from_bytes", (bytes(raw),) if not self._inside:
                return self._storage_of_bytes(raw)
        if name in TENSOR_CALLS:
            described = described_tensor(name, arguments)
            self._spend(len(described.size))
            return described
        if name in _PATHS and all(type(part) is str for part in arguments):
            self._spend(len(arguments), 64 * sum(map(len, arguments)))
            return _PATHS[name](*arguments)
        raise Odd(f"calls {name} in another way")

    def _storage_of_bytes(self, raw: bytes) -> StorageRef:
        """Return what `pickle.dump` writes for a storage: a torch.save file of the old form, of one storage."""
        outside, self.storages, self._inside = self.storages, [], True
        try:
            found, places = read_old(self, io.BytesIO(raw), len(raw))
        finally:
            self.storages, self._inside = outside, False
        if not isinstance(found, StorageRef):
            raise Odd("has other bytes than those of a storage")
        self._spend(1, found.claimed)
        start, length = places[found.key]
        self.nested_bytes += found.claimed
        found.data = memoryview(raw)[start : start + length]
        return found


def read_old(reader: Reader, stream: BinaryIO, most: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Return what a torch.save file of the old form holds, and the place and length of each storage's bytes.

    Such a file is five pickles in a row (magic number, protocol, system, object, keys), all in the first `most` bytes,
    then the storages in the order of the keys: the number of the elements in eight bytes, then their bytes.
    """
    head = io.BytesIO(stream.read(most))
    magic, protocol, system, found, keys = (reader.read(head) for _ in range(5))
    if magic != _OLD_MAGIC or protocol != 1001 or not isinstance(system, dict):
        raise MalformedError("it does not begin as torch.save's old form does")
    if system.get("little_endian") is not True:
        raise MalformedError("it was written on a big-endian machine, which cannot be read here")
    claimed: dict[str, StorageRef] = {}
    for storage in reader.storages:
        if claimed.setdefault(storage.key, storage).claimed != storage.claimed:
            raise Odd(f"claims two sizes for the storage {storage.key!r}")
    if keys != sorted(claimed):
        raise MalformedError("its list of storages is damaged")
    start, total = head.tell(), sum(8 + storage.claimed for storage in claimed.values())
    if start + total > stream.seek(0, io.SEEK_END):
        raise MalformedError(f"its tensors take {total:,} bytes, more than it has")
    places = {}
    for key in keys:
        stream.seek(start)
        if int.from_bytes(stream.read(8), "little", signed=True) != claimed[key].count:
            raise MalformedError(f"its storage {key!r} has another size than its pickle claims")
        places[key] = (start + 8, claimed[key].claimed)
        start += 8 + claimed[key].claimed
    return found, places


@functools.cache
def constants() -> dict[str, Any]:
    """Return torch's dtypes and quantisation schemes by name: values that run nothing."""
    kinds = (torch.dtype, torch.qscheme)
    return {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, kinds)}


@functools.cache
def storage_dtypes() -> dict[str, torch.dtype]:
    """Return the dtypes of the types of storages, such as torch.FloatStorage, by name."""
    typed = {f"{module}.{n}": t for module in ("torch", "torch.cuda") for n, t in _storage_type_to_dtype_map().items()}
    return typed | {"torch.UntypedStorage": torch.uint8, "torch.storage.UntypedStorage": torch.uint8}


def described_tensor(name: str, arguments: tuple[Any, ...]) -> TensorRef:
    """Return the tensor that a call makes which torch.save wrote; raise Odd for one that it does not write.

    In calls that end in `_v3` the storage is of bytes, and the dtype is given.
    """
    typed, dtype = name.endswith("_v3"), None
    if typed and len(arguments) > 6:
        dtype, arguments = arguments[6], (*arguments[:6], *arguments[7:])
    # The first four are always there: a flag, hooks and flags by their names may follow.
    match (*arguments, *(False, None, None)[len(arguments) - 4 :]):
        case (StorageRef() as storage, offset, size, stride, bool(requires_grad), hooks, dict() | None as flags):
            fits = all(map(are_sizes, (size, stride, (offset,)))) and len(size) == len(stride)
            named = all(type(key) is str and type(flag) is bool for key, flag in (flags or {}).items())
            if fits and named and not hooks and isinstance(dtype, torch.dtype) == typed:
                return TensorRef(storage, offset, tuple(size), tuple(stride), requires_grad, flags or {}, dtype)
    raise Odd(f"calls {name} in another way")


def are_sizes(value: Any) -> bool:
    """True for what can be the sizes or strides of a tensor."""
    short = isinstance(value, tuple | list) and len(value) <= _MOST_DIMENSIONS
    return short and all(type(n) is int and 0 <= n < 2**63 for n in value)


def key_of(key: Any) -> Any:
    """Return the key of a dict or item of a set; raise Odd for one whose hash or comparison could take long.

    Text and bytes are hashed with a secret of the process; numbers are not, and a file could give all the same hash.
    """
    kind = type(key)
    if kind in (str, bytes) and len(key) > _LONGEST_KEY:
        raise Odd(f"has a key of {len(key):,} characters")
    if kind is int:
        plain = -(2**53) <= key <= 2**53
    elif kind is tuple:
        small = (-(2**31) <= part <= 2**31 for part in key if isinstance(part, int))
        short = (type(part) is str and len(part) <= _LONGEST_KEY for part in key if not isinstance(part, int | None))
        plain = len(key) <= 4 and all(small) and all(short)
    else:
        plain = kind in (str, bytes, float) or isinstance(key, _PLAIN_KEYS)
    if not plain:
        raise Odd("has a key that is neither text nor a small number")
    return key


def _two_lines(stream: BinaryIO) -> list[str]:
    lines = [stream.readline(), stream.readline()]
    if not all(line.endswith(b"\n") for line in lines):
        raise MalformedError("a pickle in it ends too soon")
    return [str(line[:-1], "utf-8") for line in lines]


def _paired(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(key_of, flat[::2]), flat[1::2], strict=True))


def _contents(value: Any, kind: type) -> Any:
    """Return the list, dict or set that a pickle may put items into; a record has a list and a dict."""
    if isinstance(value, Record) and kind is not set:
        return value.elements if kind is list else value.items
    if not isinstance(value, kind):
        raise Odd(f"puts items into a {type(value).__name__}")
    return value


def _fill(target: Any, state: Any) -> None:
    if isinstance(target, Record):
        if target.state is not None:
            raise Odd(f"fills a {target.name} twice")
        target.state = state
    elif not isinstance(target, dict):
        raise Odd(f"fills a {type(target).__name__} with attributes")
    elif type(target) is collections.OrderedDict and type(state) is dict:
        # The versions of the modules' forms, by their names; anything else that hangs on a dict is no part of it.
        versions = state.get("_metadata")
        if isinstance(versions, dict) and all(
            type(name) is str and type(one) is dict and all(type(number) in (int, bool) for number in one.values())
            for name, one in versions.items()
        ):
            target._metadata = versions  # type: ignore[attr-defined]  # as torch does


_OF_ITEMS: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple, "LIST": list, "DICT": _paired, "FROZENSET": lambda items: set(map(key_of, items)),
}  # fmt: skip
_PUSHED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": bool,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
_READERS: dict[str, Any] = {one.name: one.arg.reader for one in pickletools.opcodes if one.arg}
_READERS |= {"GLOBAL": _two_lines, "INST": _two_lines}
_OPERATIONS = {one.code.encode("latin-1"): (one.name, _READERS.get(one.name)) for one in pickletools.opcodes}
_PLAIN_KEYS = (bool, type(None), Global, Record, pathlib.PurePath, torch.dtype, torch.device)

# Made empty where they are called without arguments. Frozen sets become sets, dicts with defaults become dicts.
_EMPTY: dict[str, Callable[[], Any]] = {
    "collections.OrderedDict": collections.OrderedDict, "collections.Counter": collections.Counter,
    "collections.defaultdict": dict, "builtins.dict": dict, "builtins.list": list, "builtins.tuple": tuple,
    "builtins.bytes": bytes, "builtins.bytearray": bytearray, "builtins.set": set, "builtins.frozenset": set,
}  # fmt: skip
# Where pathlib keeps its classes depends on Python's version; a path is text, and never opened.
_PATHS = {
    f"{module}.{name}": kind
    for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    for name in (kind.__name__, kind.__name__.removeprefix("Pure"))
    for module in ("pathlib", "pathlib._local")
}
TENSOR_CALLS = frozenset(f"torch._utils._rebuild_tensor{end}" for end in ("", "_v2", "_v3"))
_KNOWN_CALLS = TENSOR_CALLS | _PATHS.keys() | _EMPTY.keys() | {
    "builtins.complex", "_codecs.encode", "torch.Size", "torch.device", "torch.serialization._get_layout",
    "torch.storage._load_from_bytes",
}  # fmt: skip
NAMES_READ = _KNOWN_CALLS | {"copyreg._reconstructor", "builtins.object"}
"""Names that the reader knows itself; it makes plain data of calls to them."""
