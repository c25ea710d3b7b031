"""A pickle read as data: what it names is never looked up, what it calls is never called.

The opcodes are those that `pickletools` lists; a global becomes its name, a call or an object becomes a `Record` of
name, arguments and contents, and a tensor becomes a `TensorRef` to a storage. So a file may name any class at all, a
user's or a training framework's, and its weights can be read. Nothing is imported, and no memory is taken but for what
stands in the file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from asymswap.sources.audit import Odd, global_name, operations

# A file that names one of these wants more than to store something, and is not read at all.
_STORING = {
    "builtins": ("bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
                 "slice", "str", "tuple"),
    "copyreg": ("_reconstructor",),
    "types": ("SimpleNamespace",),
    "_codecs": ("encode",),
}  # fmt: skip
_STORING_MODULES = ("argparse", "collections", "datetime", "decimal", "fractions", "pathlib", "uuid", "zoneinfo")
_RUNS_CODE = (
    "torch.fx.graph_module.", "torch.jit.", "torch.package.", "torch.utils.cpp_extension.", "torch.hub.",
    "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save",
)  # fmt: skip

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


_MOST_IN_A_KEY = 100


class MalformedError(Exception):
    """The bytes are no pickle, or one that no writer of checkpoints makes; the text says why."""


@dataclass(frozen=True)
class Name:
    """A global that a pickle names, in full, as text."""

    full: str


@dataclass(eq=False)
class Record:
    """An object or a call that was written down: of which class or function, with what arguments and contents."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class StorageRef:
    """A storage by its key in the archive, the dtype of its numbers and how many they are."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class TensorRef:
    """A view of a storage: offset, sizes and strides in numbers."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def wants_code(name: str) -> bool:
    """Whether a global is of the kind that runs something, rather than stores something."""
    module, _, attribute = name.rpartition(".")
    root = module.partition(".")[0]
    if name.startswith(_RUNS_CODE):
        return True
    if root not in sys.stdlib_module_names:
        return False
    return attribute not in _STORING.get(module, ()) and root not in _STORING_MODULES


def read(stream: BinaryIO) -> Any:
    """The object that one pickle describes; raises MalformedError."""
    machine = _Machine()
    try:
        for op, argument in operations([stream]):
            if op.name == "STOP":
                return machine.stack.pop()
            machine.step(op.name, argument)
    except MalformedError:
        raise
    except Odd as error:
        raise MalformedError(f"it {error}") from None
    except Exception as error:
        # A damaged pickle can go wrong in every way that a stack machine knows.
        raise MalformedError(" ".join(str(error).split())[:160] or type(error).__name__) from None
    raise MalformedError("it ends too soon")


def walk(value: Any) -> Iterator[Any]:
    """Everything inside of a value, each object once."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, dict):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set):
            todo += list(part)
        elif isinstance(part, Record):
            todo += [part.arguments, part.state, part.items, part.elements]


# Opcodes whose argument is the very thing that they push.
_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}


class _Machine:
    """The stack, the marks in it, and the memo of a pickle that is being read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, op: str, argument: Any) -> None:
        if op in _CONSTANTS:
            self.stack.append(argument)
        elif op in _FIXED:
            self.stack.append(_FIXED[op]())
        elif op in ("GLOBAL", "INST"):
            name = Name(global_name(str(argument)))
            self.stack.append(name if op == "GLOBAL" else _called(name, self._since_mark()))
        else:
            act = getattr(self, f"_{op.lower()}", None)
            if act is None:
                raise MalformedError(f"opcode {op} has no place in a checkpoint")
            act(argument)

    def _since_mark(self) -> list[Any]:
        at = self.marks.pop()
        taken = self.stack[at:]
        del self.stack[at:]
        return taken

    def _proto(self, _: int) -> None:
        pass

    def _frame(self, _: int) -> None:
        pass

    def _mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def _pop(self, _: None) -> None:
        self.stack.pop()

    def _pop_mark(self, _: None) -> None:
        self._since_mark()

    def _dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def _binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _long_binput = _put = _binput

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _long_binget = _get = _binget

    def _stack_global(self, _: None) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Name(f"{module}.{attribute}"))

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: None) -> None:
        self._tuple_of(1)

    def _tuple2(self, _: None) -> None:
        self._tuple_of(2)

    def _tuple3(self, _: None) -> None:
        self._tuple_of(3)

    def _tuple_of(self, length: int) -> None:
        if len(self.stack) < length:
            raise MalformedError("the stack is empty")
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def _list(self, _: None) -> None:
        self.stack.append(self._since_mark())

    def _dict(self, _: None) -> None:
        self.stack.append(_paired(self._since_mark()))

    def _frozenset(self, _: None) -> None:
        self.stack.append(set(_flat(self._since_mark())))

    def _append(self, _: None) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.elements if isinstance(target, Record) else target).extend(values)

    def _additems(self, _: None) -> None:
        values = self._since_mark()
        self.stack[-1].update(_flat(values))

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self, _: None) -> None:
        self._set(self._since_mark())

    def _set(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Record) else target).update(_paired(flat))

    def _newobj(self, _: None) -> None:
        arguments = self.stack.pop()
        self.stack.append(_called(self.stack.pop(), arguments))

    _reduce = _newobj

    def _newobj_ex(self, _: None) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        record = _called(self.stack.pop(), arguments)
        if isinstance(record, Record):
            record.items.update(keywords)
        self.stack.append(record)

    def _build(self, _: None) -> None:
        state = self.stack.pop()
        # What hangs on a dict, a state dict's `_metadata` for one, is not part of it.
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def _binpersid(self, _: None) -> None:
        match self.stack.pop():
            case ("storage", Name(full), str(key), _, int(count)) if full.rpartition(".")[2] in _DTYPES:
                self.stack.append(StorageRef(key, _DTYPES[full.rpartition(".")[2]], count))
            case other:
                self.stack.append(Record("a storage of another kind", (other,)))


def _paired(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(_flat(flat[::2]), flat[1::2], strict=True))


def _flat(keys: list[Any]) -> list[Any]:
    """The same keys; raises MalformedError for tuples in tuples in tuples: their hash would overflow the stack."""
    inside = [key for key in keys if isinstance(key, tuple)]
    for _ in range(_MOST_IN_A_KEY + len(keys)):
        if not inside:
            return keys
        inside += [part for part in inside.pop() if isinstance(part, tuple)]
    raise MalformedError("a key is nested too deeply")


def _called(what: Any, arguments: Any) -> Any:
    """What a call makes, where that is plain data or a tensor; a record of the call otherwise."""
    if not isinstance(what, Name):
        raise MalformedError("it calls what is no name")
    given = tuple(arguments)
    match (what.full, given):
        case ("collections.OrderedDict", ()):
            return {}
        case ("collections.OrderedDict", (list(pairs),)):
            return dict(zip(_flat([key for key, _ in pairs]), [value for _, value in pairs], strict=True))
        case ("builtins.set" | "builtins.frozenset", (list(values),)):
            return set(_flat(values))
        case ("torch.Size", (tuple(size),)):
            return size
        case ("torch._utils._rebuild_parameter", (TensorRef() as tensor, *_)):
            return tensor
        case ("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", (StorageRef() as storage, int(offset),
              tuple(size), tuple(stride), *_)):  # fmt: skip
            return TensorRef(storage, offset, _whole(size), _whole(stride))
        case (name, (value, *_)) if name.startswith("torch.jit._pickle."):
            # TorchScript's marks of a list's static type.
            return value
    return Record(what.full, given)


def _whole(numbers: tuple[Any, ...]) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise MalformedError("a tensor's sizes are no whole numbers")
    return tuple(numbers)
