"""What a pickle would do, found out without doing any of it, and held against what torch.save writes.

torch's restricted unpickler looks up no name outside of an allowlist. But what is on the list it calls with whatever
arguments a file gives, and fills with whatever attributes: a file can claim a storage or a tensor larger than the
bytes that it holds, or a layer of a terabyte, so that memory is taken; it can overwrite a module's `forward` or its
hooks, give a module a name that becomes code where torch.fx generates code from it, and nest tuples so deeply that
hashing one overflows the stack. torch.save writes none of that. So the pickle is run here on symbols first, and
everything in it that torch.save does not write is a reason to refuse the file.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickletools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

DEEPEST = 150
"""Levels of nesting, three for each module in a module: copying and running use up several frames for each."""

_MOST_PARTS = 20_000_000
_MOST_EXPANDED = 2**28
"""Elements of all tensors together that have more elements than their storages."""

MOST_OPERATIONS = 400_000
"""Of all pickles in a file; timm's largest networks of convs have 57,000, and 300,000 with averages and optimizer."""


class Odd(Exception):  # noqa: N818 - not always an error: with --trust-pickle it is only told
    """A file holds what torch.save does not write; the text says what."""


class Old(Odd):
    """A file holds what torch.save no longer writes, and what can only be read by running code."""


@dataclass(eq=False, slots=True)
class Thing:
    """Something that a pickle makes: `how` is global, call, new, list, dict or storage; `name` that of the global.

    `states` are what it is filled with, `items` those of a list, or the keys and values of a dict, whenever set.
    """

    how: str
    name: str = ""
    args: tuple[Any, ...] = ()
    states: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)

    def is_(self, how: str, *names: str) -> bool:
        """Whether it was made in that way, by one of these names if any are given."""
        return self.how == how and (not names or self.name in names)


@dataclass(frozen=True)
class Rules:
    """What may be named besides torch's own: classes of modules, and classes and functions beside modules.

    `resolve` gives the object behind the name of a module class; `storage_bytes` how many bytes the file holds for a
    storage's key, None where only the sum of all storages is known, which is `total_bytes`.
    """

    modules: frozenset[str]
    helpers: Set[str]
    resolve: Callable[[str], Any]
    storage_bytes: Mapping[str, int] | None
    total_bytes: int


def global_name(argument: str) -> str:
    """The full name that a GLOBAL of a pickle stands for, in today's Python, as torch's unpickler reads it."""
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def operations(streams: Iterable[BinaryIO]) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """The operations of pickles, read in turn, with their arguments; raises Odd for more than a checkpoint needs.

    Each takes time and memory, however few bytes it takes in the file.
    """
    for number, (op, argument, _) in enumerate(itertools.chain.from_iterable(map(pickletools.genops, streams))):
        if number >= MOST_OPERATIONS:
            raise Odd(f"has more than {MOST_OPERATIONS:,} operations")
        yield op, argument


def audit(streams: Iterable[BinaryIO], rules: Rules) -> None:
    """Raise Odd where pickles, read in turn, do anything that torch.save does not write, or claim what is not there.

    Raises whatever comes of a damaged pickle as well: IndexError, KeyError, ValueError and the like.
    """
    machine = _Machine()
    results = [machine.run(stream) for stream in streams]
    _check_nesting([*results, *machine.made])
    for result in results:
        if isinstance(result, Thing) and result.how == "global":
            raise Odd(f"holds {result.name} itself")
    _Checker(rules).check(machine.made)


class _Machine:
    """A pickle machine that makes symbols; it knows the operations that torch's restricted unpickler knows."""

    def __init__(self) -> None:
        self.made: list[Thing] = []
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Read one pickle to its end, and give what it makes."""
        self.stack, self.marked, self.memo = [], [], {}
        for op, argument in operations([stream]):
            if op.name == "STOP":
                return self.stack.pop()
            if op.name in _PUSHED:
                self.stack.append(argument)
            elif op.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[op.name])
            elif op.name in _STEPS:
                _STEPS[op.name](self, argument)
            else:
                raise Odd(f"has the operation {op.name}")
        raise EOFError("the pickle has no end")

    def make(self, how: str, name: str = "", args: tuple[Any, ...] = ()) -> Thing:
        thing = Thing(how, name, args)
        self.made.append(thing)
        return thing

    def begin(self, how: str) -> None:
        self.stack.append(self.make(how))

    def top(self) -> Thing:
        top = self.stack[-1]
        if not isinstance(top, Thing):
            raise Odd(f"fills a {type(top).__name__}")
        return top

    def look_up(self, argument: str) -> None:
        self.stack.append(self.make("global", global_name(argument)))

    def apply(self, how: str) -> None:
        args = self.stack.pop()
        function = self.top()
        if function.how != "global" or not isinstance(args, tuple):
            raise Odd("calls what is not named")
        self.stack[-1] = self.make(how, function.name, args)

    def build(self) -> None:
        state = self.stack.pop()
        self.top().states.append(state)

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pack_to_mark(self) -> None:
        items = tuple(self.to_mark())
        self.stack.append(items)

    def pack(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack has run out")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def fill(self, items: list[Any], how: Sequence[str]) -> None:
        top = self.top()
        if top.how not in how and not (top.is_("call", *_DICTS) and "dict" in how):
            raise Odd(f"puts items into a {top.name or top.how}")
        top.items += items

    def set_pairs(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise IndexError("a key has no value")
        self.fill(items, ("dict",))

    def take(self, count: int) -> list[Any]:
        if len(self.stack) <= count:
            raise IndexError("the stack has run out")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def store(self) -> None:
        args = self.stack[-1]
        if not isinstance(args, tuple):
            raise Odd("asks for something else than a storage")
        if args[:1] == ("module",):
            raise Old("holds a module and its source code, in torch.save's old form, which cannot be read safely")
        self.stack[-1] = self.make("storage", args=args)

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


_PUSHED = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True, "EMPTY_TUPLE": ()}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda _, version: None,  # noqa: ARG005
    "GLOBAL": lambda m, name: m.look_up(name),
    "REDUCE": lambda m, _: m.apply("call"),
    "NEWOBJ": lambda m, _: m.apply("new"),
    "BUILD": lambda m, _: m.build(),
    "EMPTY_LIST": lambda m, _: m.begin("list"),
    "EMPTY_DICT": lambda m, _: m.begin("dict"),
    "MARK": lambda m, _: m.mark(),
    "TUPLE": lambda m, _: m.pack_to_mark(),
    "TUPLE1": lambda m, _: m.pack(1),
    "TUPLE2": lambda m, _: m.pack(2),
    "TUPLE3": lambda m, _: m.pack(3),
    "APPEND": lambda m, _: m.fill(m.take(1), ("list",)),
    "APPENDS": lambda m, _: m.fill(m.to_mark(), ("list",)),
    "SETITEM": lambda m, _: m.set_pairs(m.take(2)),
    "SETITEMS": lambda m, _: m.set_pairs(m.to_mark()),
    "BINPERSID": lambda m, _: m.store(),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "BINPUT": lambda m, index: m.put(index),
    "LONG_BINPUT": lambda m, index: m.put(index),
}  # fmt: skip
_DICTS = ("collections.OrderedDict", "collections.Counter")


def _parts(value: Any) -> tuple[list[Any], int]:
    """The symbols and tuples that a symbol or tuple holds directly, and of how many parts it consists in all."""
    held = value if isinstance(value, tuple) else (*value.args, *value.states, *value.items)
    return [part for part in held if isinstance(part, tuple | Thing)], len(held)


def _check_nesting(roots: Sequence[Any]) -> None:
    """Refuse what is nested too deeply, or holds itself, or holds the same so often that walking through takes forever.

    What a checkpoint holds is walked through as the tree that it seems to be.
    """
    depth: dict[int, int] = {}
    parts: dict[int, int] = {}
    above: set[int] = set()
    path: list[tuple[Any, list[Any], int, Iterator[Any]]] = []

    def enter(value: Any) -> None:
        held, count = _parts(value)
        if held:
            above.add(id(value))
            path.append((value, held, count, iter(held)))
        else:
            depth[id(value)], parts[id(value)] = 1, 1 + count

    for root in roots:
        if isinstance(root, tuple | Thing) and id(root) not in depth:
            enter(root)
        while path:
            value, held, count, rest = path[-1]
            child = next((part for part in rest if id(part) not in depth), None)
            if child is not None:
                if id(child) in above:
                    raise Odd("holds something that holds itself")
                if len(path) >= DEEPEST:
                    raise Odd(f"is nested more than {DEEPEST} levels deep")
                enter(child)
                continue
            path.pop()
            above.discard(id(value))
            depth[id(value)] = 1 + max(depth[id(one)] for one in held)
            parts[id(value)] = 1 + count - len(held) + sum(parts[id(one)] for one in held)
            if depth[id(value)] > DEEPEST:
                raise Odd(f"is nested more than {DEEPEST} levels deep")
            if parts[id(value)] > _MOST_PARTS:
                raise Odd(f"holds the same things again and again, more than {_MOST_PARTS:,} in all")


class _Checker:
    """Holds what a pickle makes against what torch.save writes."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.expanded = 0
        self.claimed: dict[str, int] = {}

    def check(self, made: Sequence[Thing]) -> None:
        """Raise Odd for the first thing that torch.save does not write."""
        for thing in made:
            if thing.how == "storage":
                self._check_storage(thing)
        for thing in made:
            self._check_values(thing)
            if thing.how == "call":
                self._check_call(thing)
            elif thing.how == "new":
                self._check_new(thing)
            elif thing.states:
                raise Odd(f"fills a {thing.name or thing.how} with attributes")

    def _check_values(self, thing: Thing) -> None:
        """A function is there to be called; as a value it could end where a module calls it."""
        inside = [*thing.states, *thing.items, *([] if thing.how in ("call", "storage") else thing.args)]
        while inside:
            value = inside.pop()
            if isinstance(value, tuple):
                inside += value
            elif isinstance(value, Thing) and value.how == "global" and not self._is_value(value.name):
                raise Odd(f"keeps {value.name} itself as a value")

    def _is_value(self, name: str) -> bool:
        return name in self.rules.modules or name in self.rules.helpers or name in _constants()

    def _check_storage(self, thing: Thing) -> None:
        match thing.args:
            case (str("storage"), Thing(how="global") as kind, str(key), str(), int(count), *view) if count >= 0:
                claimed = count * _element_size(kind.name)
            case _:
                raise Odd("asks for something else than a storage")
        match view:
            case [] | [None]:
                pass
            case [(str(), int(offset), int(size))] if 0 <= offset <= offset + size <= count:
                pass
            case _:
                raise Odd(f"takes a part of the storage {key!r} that it does not have")
        if self.rules.storage_bytes is not None:
            held = self.rules.storage_bytes.get(key)
            if held is None or held < claimed:
                raise Odd(f"claims {claimed:,} bytes for the storage {key!r}, of which it holds {held or 0:,}")
        self.claimed[key] = max(claimed, self.claimed.get(key, 0))
        if sum(self.claimed.values()) > self.rules.total_bytes and self.rules.storage_bytes is None:
            raise EOFError(f"its tensors take {sum(self.claimed.values()):,} bytes, more than it has")

    def _check_call(self, thing: Thing) -> None:
        known = _CALLS.get(thing.name)
        if known is None or not known(self, thing.args):
            raise Odd(f"calls {thing.name} in another way")
        if thing.name == "functools.partial":
            self._check_partial(thing)
        elif thing.states and not all(_STATES.get(thing.name, _no_state)(state) for state in thing.states):
            raise Odd(f"fills a {thing.name} in another way")

    def _check_partial(self, thing: Thing) -> None:
        """Only what makes a layer, with numbers and words given in advance.

        Nothing calls it: torch's unpickler calls what it looked up by name alone, and no `forward` of torchvision calls
        what a model keeps to make layers with. Called, it would make a layer.
        """
        (target,) = thing.args
        for state in thing.states:
            match state:
                case (Thing(how="global", name=name), (), keywords, None) if name == target.name:
                    pairs = [] if keywords is None else _pairs(keywords)
                case _:
                    pairs = None
            if pairs is None or not all(_is_word(key) and _is_plain(value) for key, value in pairs):
                raise Odd("fills a functools.partial in another way")

    def _check_new(self, thing: Thing) -> None:
        is_module = thing.name in self.rules.modules
        if thing.args or not (is_module or thing.name in self.rules.helpers or thing.name == "argparse.Namespace"):
            raise Odd(f"makes a {thing.name} in another way")
        for state in thing.states:
            pairs = _pairs(state)
            if pairs is None or not all(_may_be_filled(key, value) for key, value in pairs):
                raise Odd(f"fills a {thing.name} in another way")
            if is_module:
                for key, value in pairs:
                    self._check_attribute(thing.name, key, value)

    def _check_attribute(self, owner: str, key: str, value: Any) -> None:
        """What a module keeps must be data: no method of another making, no hook, no child that is no module."""
        if key in ("_modules", "_parameters", "_buffers"):
            fits = self._is_module if key == "_modules" else _is_tensor
            pairs = _pairs(value)
            if pairs is None or not all(part is None or fits(part) for _, part in pairs):
                raise Odd(f"has other things than such in the {key} of a {owner}")
            for name, _ in pairs:
                if not isinstance(name, str) or not is_safe_name(name):
                    raise Odd(f"has {name!r} for a name in the {key} of a {owner}")
        elif key.endswith("_hooks") and _pairs(value) != []:
            raise Odd(f"has hooks on a {owner}")
        elif key == "_compiled_call_impl" or callable(getattr(self.rules.resolve(owner), key, None)):
            raise Odd(f"puts another {key} into a {owner}")

    def _is_module(self, value: Any) -> bool:
        return isinstance(value, Thing) and value.is_("new") and value.name in self.rules.modules

    def fits(self, storage: Any, offset: Any, size: Any, stride: Any, element: int | None = None) -> bool:
        """Whether a tensor of these sizes is a view of its storage; raises Odd with the sizes where it is not."""
        sizes, strides = _numbers(size), _numbers(stride)
        if not isinstance(storage, Thing) or storage.how != "storage" or not _is_count(offset):
            return False
        if sizes is None or strides is None or len(sizes) != len(strides):
            return False
        _, kind, key, _, count, *view = storage.args
        own = _element_size(kind.name)
        held = (view[0][2] if view and view[0] else count) * own
        total = math.prod(sizes)
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) if total else -1
        shape = "x".join(map(str, sizes))
        if (last + 1) * (element or own) > held:
            raise Odd(f"has a tensor of {shape} that reaches beyond the {held:,} bytes of its storage {key!r}")
        self.expanded += max(0, total - held // own)
        if self.expanded > _MOST_EXPANDED:
            raise Odd(f"has a tensor of {shape} expanded from the {held:,} bytes of its storage {key!r}")
        return True


def is_safe_name(name: str) -> bool:
    """Whether a module may have this name.

    torch writes names into the Python code that it generates, as they are; and a child called `__deepcopy__` is what
    copying calls.
    """
    return name.isprintable() and not set("\"'\\.") & set(name) and not name.startswith("__")


@functools.cache
def _constants() -> frozenset[str]:
    """Names of values that run nothing: dtypes and quantisation schemes."""
    kinds = (torch.dtype, torch.qscheme)
    return frozenset(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, kinds))


@functools.cache
def _element_size(storage_type: str) -> int:
    """Bytes of one element of a storage type such as torch.FloatStorage."""
    module, _, name = storage_type.rpartition(".")
    if name == "UntypedStorage" and module in ("torch.storage", "torch"):
        return 1
    try:
        if module not in ("torch", "torch.cuda"):
            raise KeyError(storage_type)
        return int(torch.serialization.StorageType(name).dtype.itemsize)
    except KeyError:
        raise Odd(f"has a storage of the type {storage_type}") from None


def _pairs(value: Any) -> list[tuple[Any, Any]] | None:
    """Keys and values of a dict or an OrderedDict, or None for anything else."""
    if not isinstance(value, Thing) or not (value.how == "dict" or value.is_("call", _DICTS[0])):
        return None
    given = [tuple(_listed(pair) or ()) for pair in _listed(value.args[0]) or ()] if value.args else []
    if not all(len(pair) == 2 for pair in given):
        return None
    return [*((key, item) for key, item in given), *zip(value.items[::2], value.items[1::2], strict=True)]


def _may_be_filled(key: Any, value: Any) -> bool:
    # torch.jit.script leaves an empty `__overloads__` on every module that it has been given.
    plain = isinstance(key, str) and not key.startswith("__")
    return plain or (key == "__overloads__" and _pairs(value) == [])


def _listed(value: Any) -> Sequence[Any] | None:
    """The items of a list or tuple, or None for anything else."""
    if isinstance(value, tuple):
        return value
    return value.items if isinstance(value, Thing) and value.how == "list" else None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _numbers(value: Any) -> tuple[int, ...] | None:
    """Sizes or strides, or None where they are none."""
    if isinstance(value, Thing) and value.is_("call", "torch.Size"):
        value = value.args[0]
    return value if isinstance(value, tuple) and all(map(_is_count, value)) else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Thing) and value.is_("call", *_TENSORS)


def _is_named(value: Any, *names: str) -> bool:
    return isinstance(value, Thing) and value.is_("global", *names)


def _is_made(value: Any, *names: str) -> bool:
    return isinstance(value, Thing) and value.is_("call", *names)


def _no_hooks(value: Any) -> bool:
    return value is None or _pairs(value) == []


def _is_bytes(value: Any) -> bool:
    return isinstance(value, str) or _is_made(value, "_codecs.encode")


def _rebuilt(checker: _Checker, args: tuple[Any, ...]) -> bool:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    match args:
        case (storage, offset, size, stride):
            return checker.fits(storage, offset, size, stride)
        case (storage, offset, size, stride, bool(), hooks, *rest) if _no_hooks(hooks):
            return all(_pairs(one) is not None for one in rest) and checker.fits(storage, offset, size, stride)
    return False


def _rebuilt_as(checker: _Checker, args: tuple[Any, ...]) -> bool:
    """torch._utils._rebuild_tensor_v3: the dtype is given, the storage is of bytes."""
    match args:
        case (storage, offset, size, stride, bool(), hooks, Thing(how="global", name=name), *rest) if _no_hooks(hooks):
            dtype = getattr(torch, name.removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype) and all(_pairs(one) is not None for one in rest):
                return checker.fits(storage, offset, size, stride, dtype.itemsize)
    return False


def _rebuilt_quantised(checker: _Checker, args: tuple[Any, ...]) -> bool:
    match args:
        case (storage, offset, size, stride, tuple(scheme), bool(), hooks) if _no_hooks(hooks) and scheme:
            plain = all(_is_plain(one) or _is_tensor(one) or _listed(one) is not None for one in scheme[1:])
            return _is_named(scheme[0]) and plain and checker.fits(storage, offset, size, stride)
    return False


def _rebuilt_sparse(_: _Checker, args: tuple[Any, ...]) -> bool:
    match args:
        case (layout, tuple(parts)):
            return _is_made(layout, "torch.serialization._get_layout") and all(
                _is_tensor(part) or _numbers(part) is not None or part is None or isinstance(part, bool)
                for part in parts
            )
    return False


def _rebuilt_with_attributes(checker: _Checker, args: tuple[Any, ...]) -> bool:
    """torch._tensor._rebuild_from_type_v2: what a tensor or parameter with attributes of its own is written as."""
    match args:
        case (Thing(how="global", name=function), kind, tuple(inner), state) if function in _TENSORS:
            own = _is_named(kind, "torch.Tensor", "torch.nn.parameter.Parameter") and function != _FROM_TYPE
            return own and _is_tensor_state(state) and _CALLS[function](checker, inner)
    return False


def _is_tensor_state(state: Any) -> bool:
    """Attributes that a tensor does not have by itself; two dicts of them where its class has slots."""
    if isinstance(state, tuple):
        return len(state) == 2 and all(map(_is_tensor_state, state)) and not any(isinstance(s, tuple) for s in state)
    pairs = [] if state is None else _pairs(state)
    return pairs is not None and all(_is_word(key) and not hasattr(Tensor, key) for key, _ in pairs)


_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_PARAMETER = "torch.nn.parameter.Parameter"
_TENSORS = (
    _FROM_TYPE,
    _PARAMETER,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
)

# How each function that may be called at all is called in what torch.save writes. Not here, although torch's unpickler
# would call them: tensors without storage, nested tensors, and classes of layers, which are filled and never called.
_CALLS: dict[str, Callable[[_Checker, tuple[Any, ...]], bool]] = {
    "collections.OrderedDict": lambda _, a: not a or (len(a) == 1 and _listed(a[0]) is not None),
    "collections.Counter": lambda _, a: len(a) == 1 and _pairs(a[0]) is not None,
    "builtins.set": lambda _, a: len(a) == 1 and _listed(a[0]) is not None,
    "builtins.complex": lambda _, a: len(a) == 2 and all(type(one) is float for one in a),
    "builtins.bytearray": lambda _, a: not a or _is_bytes(a[0]),
    "_codecs.encode": lambda _, a: len(a) == 2 and type(a[0]) is str and a[1] == "latin1",
    "functools.partial": lambda c, a: len(a) == 1 and _is_named(a[0]) and a[0].name in c.rules.modules,
    "torch.Size": lambda _, a: len(a) == 1 and _numbers(a[0]) is not None,
    "torch.device": lambda _, a: bool(a) and type(a[0]) is str and all(map(_is_count, a[1:])),
    "torch.serialization._get_layout": lambda _, a: len(a) == 1 and type(a[0]) is str,
    _FROM_TYPE: _rebuilt_with_attributes,
    _PARAMETER: lambda _, a: len(a) in (1, 2) and _is_tensor(a[0]) and all(type(one) is bool for one in a[1:]),
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_tensor_v3": _rebuilt_as,
    "torch._utils._rebuild_qtensor": _rebuilt_quantised,
    "torch._utils._rebuild_sparse_tensor": _rebuilt_sparse,
    "torch._utils._rebuild_parameter": lambda _, a: len(a) == 3 and _is_tensor(a[0]) and _no_hooks(a[2]),
    "torch._utils._rebuild_parameter_with_state": lambda _, a: (
        len(a) == 4 and _is_tensor(a[0]) and _no_hooks(a[2]) and _is_tensor_state(a[3])
    ),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda _, a: (
        len(a) == 4 and _is_named(a[0]) and _numbers(a[1]) is not None and _numbers(a[2]) is not None
    ),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda _, a: len(a) == 4 and _is_tensor(a[0]),
    "numpy.dtype": lambda _, a: len(a) == 3 and type(a[0]) is str,
    "numpy.core.multiarray.scalar": lambda _, a: len(a) == 2 and _is_made(a[0], "numpy.dtype") and _is_bytes(a[1]),
    "numpy.core.multiarray._reconstruct": lambda _, a: len(a) == 3 and _is_named(a[0], "numpy.ndarray"),
    **dict.fromkeys(
        ("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath"),
        lambda _, a: all(type(one) is str for one in a),
    ),
}  # fmt: skip
_CALLS |= {re.sub(r"^numpy\.core", "numpy._core", name): call for name, call in _CALLS.items()}


def _no_state(_: Any) -> bool:
    return False


def _is_metadata(state: Any) -> bool:
    """A state dict carries the versions of its modules as an attribute."""
    pairs = _pairs(state)
    return pairs is not None and all(key == "_metadata" and _pairs(value) is not None for key, value in pairs)


def _is_old_parameter(state: Any) -> bool:
    """`requires_grad`, `volatile` and hooks, as before torch 0.4."""
    match state:
        case (bool(), bool(), hooks):
            return _no_hooks(hooks)
    return False


_STATES: dict[str, Callable[[Any], bool]] = {
    "collections.OrderedDict": _is_metadata,
    _PARAMETER: _is_old_parameter,
    # What these two are filled with is checked by the functions that stand for numpy's own.
    "numpy.dtype": lambda state: isinstance(state, tuple),
    "numpy.core.multiarray._reconstruct": lambda state: isinstance(state, tuple),
    "numpy._core.multiarray._reconstruct": lambda state: isinstance(state, tuple),
}
