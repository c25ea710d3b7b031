"""Make tensors, arrays and modules of what `pickle_reader` read, without running anything of theirs.

A module's class comes from `allowlist.txt` (made by benchmarks/make_allowlist.py), `__new__` makes it, and its
attributes are checked before they are set. What is of other classes stays a `Record`; nothing of it is imported.
"""

import functools
import importlib
import math
import re
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from asymswap.errors import SourceError
from asymswap.fileformats import pickle_reader
from asymswap.fileformats.pickle_reader import Global, MalformedError, Odd, Record, StorageRef, TensorRef, are_sizes

DEEPEST = 150
"""Levels of nesting, three for each module in a module: copying and running use up several frames for each."""
MOST_PARTS = 1_000_000
"""Items of all lists and dicts, as often as one meets them; a long key counts for each 32 characters."""
_MOST_VIEWED, _VIEWS = 2**28, 64
"""Bytes of all tensors together, however few their storages hold; or as many times what these hold."""
_LONGEST_ATTRIBUTE = 200

# What torchvision's detectors and RAFT keep beside modules: holders of a few numbers, and functions of tensors alone.
_SAMPLERS = ("BalancedPositiveNegativeSampler", "BoxCoder", "BoxLinearCoder", "Matcher", "SSDMatcher")
HELPERS = frozenset(f"torchvision.models.detection._utils.{name}" for name in _SAMPLERS) | {
    "torchvision.models.optical_flow.raft._pass_through_h",
    "torchvision.ops.boxes.box_iou",
}
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
"""What torch.compile puts around a module; the module inside is taken."""

_CLASSES = frozenset(["torch.Tensor", "numpy.ndarray", "numpy.dtype", "argparse.Namespace", COMPILED])
"""Named as arguments of calls that are known, and made here."""

# Attributes that later versions of torch added, which their `__setstate__` adds to modules of older files.
_ADDED: dict[type[nn.Module] | tuple[type[nn.Module], ...], dict[str, Any]] = {
    nn.modules.conv._ConvNd: {"padding_mode": "zeros"},
    nn.Upsample: {"recompute_scale_factor": True},
    nn.MultiheadAttention: {"_qkv_same_embed_dim": True},
    nn.RNNBase: {"proj_size": 0},
    (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer): {"activation": nn.functional.relu},
}

# `numpy.core` is where numpy kept them before version 2.
ARRAY_CALLS = frozenset(
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
)
_NUMPY_CODE = re.compile(r"[biufc][1-9]\d?|[?bBhHiIlLqQefdgFDG]|[SU]\d{1,9}")

_PARAMETER = "torch.nn.parameter.Parameter"
_REBUILT = ("parameter", "parameter_with_state", "qtensor", "sparse_tensor", "meta_tensor_no_storage")
_CALLS = frozenset(f"torch._utils._rebuild_{name}" for name in (*_REBUILT, "device_tensor_from_cpu_tensor")) | {
    _PARAMETER, "torch._tensor._rebuild_from_type_v2", "functools.partial",
}  # fmt: skip
"""Calls that `Builder` makes something of; see `Builder._called`."""

_PLAIN = (bool, int, float, str, bytes, type(None))
_OWN = frozenset([*dir(Tensor), "_is_param", "_is_buffer"])
_COMPOSITE = frozenset([dict, OrderedDict, Counter, list, tuple, Record, TensorRef, StorageRef, Global])
_PARTS = {"_parameters": Tensor | None, "_buffers": Tensor | None, "_modules": nn.Module | None}


@functools.cache
def module_names() -> frozenset[str]:
    """Return the classes of allowlist.txt."""
    return frozenset(resources.files(__package__).joinpath("allowlist.txt").read_text(encoding="utf-8").split())


@functools.cache
def allowed_names() -> frozenset[str]:
    """Return every global of which something is made; objects and calls of others stay records."""
    read = pickle_reader.NAMES_READ | pickle_reader.constants().keys()
    return module_names() | HELPERS | _CLASSES | _CALLS | ARRAY_CALLS | read


def is_safe_name(name: str) -> bool:
    """True for a name that a module may have: torch writes it into code, and copying calls a child `__deepcopy__`."""
    short = len(name) <= _LONGEST_ATTRIBUTE
    return short and name.isprintable() and not set("\"'\\.") & set(name) and not name.startswith("__")


def named_in(root: Any) -> set[str]:
    """Return the names of all that is in a file, but for what torch.compile keeps beside a module."""
    seen: dict[int, Any] = {}
    todo = [root]
    while todo:
        part = todo.pop()
        if type(part) in _COMPOSITE and id(part) not in seen:
            seen[id(part)] = part
            if isinstance(part, dict):
                todo += [*part, *part.values()]
            elif isinstance(part, list | tuple):
                todo += part
            elif isinstance(part, Record):
                todo += part.arguments[:1] if part.name == COMPILED else part.arguments
                todo += [part.state, part.items, part.elements]
    return {part.name for part in seen.values() if isinstance(part, Record | Global)}


class _Found(NamedTuple):
    """What a part of the file became."""

    value: Any
    levels: int = 0  # of nesting in it
    parts: int = 1  # that a walk through it meets
    whole: bool = True  # nothing in it is of a class that is not read


class Builder:
    """Makes what a file holds out of what its pickle says.

    `storage` reads a storage, once for each; `held` says how many bytes all of them have. With `foreign`, the file
    holds objects of other classes than those allowed: modules with such a part stay records too.
    """

    def __init__(
        self, storage: Callable[[StorageRef], torch.UntypedStorage], held: int, label: str, foreign: bool
    ) -> None:
        self._storage, self._label, self._foreign = storage, label, foreign
        self._memories: dict[str | int, tuple[StorageRef, torch.UntypedStorage]] = {}
        self._left = max(_MOST_VIEWED, _VIEWS * held)
        self._done: dict[int, tuple[Any, _Found]] = {}
        self._above: set[int] = set()
        self._records: list[Record] = []
        self._inside_record = False
        self.unread: set[str] = set()

    def build(self, root: Any) -> Any:
        """Put tensors, arrays and modules in the place of what describes them, and return the root; raise Odd."""
        found = self.visit(root, 0).value
        self._inside_record = True
        while self._records:
            record = self._records.pop()
            record.state = self.visit(record.state, 0).value
        return found

    def visit(self, value: Any, depth: int) -> _Found:
        """Return what a part becomes; the same part, met again, becomes the same."""
        kind = type(value)
        if kind not in _COMPOSITE:
            return _Found(value, parts=1 + (len(value) // 1000 if kind in (str, bytes) else 0))
        known = self._done.get(id(value))
        if depth + (known[1].levels if known else 1) > DEEPEST:
            raise Odd(f"is nested more than {DEEPEST} levels deep")
        if known is None:
            if id(value) in self._above:
                raise Odd("holds something that holds itself")
            self._above.add(id(value))
            try:
                # The value itself is kept as well: its id must not become another's.
                known = self._done[id(value)] = (value, self._make(value, kind, depth + 1))
            finally:
                self._above.discard(id(value))
        return known[1]

    def _make(self, value: Any, kind: type, depth: int) -> _Found:
        if kind is TensorRef:
            return _Found(self.tensor(value))
        if kind is Record:
            return self._of_record(value, depth)
        if kind is Global:
            if value.name in module_names() or value.name in HELPERS:
                return _Found(value, whole=False) if self._inside_record else _Found(look_up(value.name, self._label))
            if value.name in allowed_names() and not self._foreign and not value.name.startswith("builtins."):
                # A function is there to be called; as a value it could end where a module calls it.
                raise Odd(f"keeps {value.name} itself as a value")
            if value.name == "builtins.getattr":
                self.unread.add(value.name)
            return _Found(value, whole=False)
        if kind is StorageRef:
            return _Found(self.tensor(TensorRef(value, 0, (value.length,), (1,))))
        levels, parts, whole = 0, 1, True
        made = list(value) if kind is tuple else value
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            weight = 1 + (len(key) >> 5 if type(key) is str else 0)
            found = self.visit(item, depth)
            levels, whole, parts = max(levels, found.levels), whole and found.whole, parts + found.parts * weight
            made[key] = found.value
        if parts > MOST_PARTS:
            raise Odd(f"holds the same things again and again, more than {MOST_PARTS:,} in all")
        return _Found(tuple(made) if kind is tuple else made, levels + 1, parts, whole)

    def _of_record(self, record: Record, depth: int) -> _Found:
        if record.name in _CALLS:
            return _Found(self._called(record, depth))
        if record.name in ARRAY_CALLS:
            try:
                made = _array_of(record)
            except _NoArrayError as error:
                self.unread.add(str(error))
                return _Found(record, whole=False)
            self._spend(2 * getattr(made, "nbytes", 0))
            return _Found(made)
        if record.name == COMPILED and len(record.arguments) == 2:
            return self.visit(record.arguments[0], depth)
        allowed = record.name in module_names() or record.name in HELPERS or record.name == "argparse.Namespace"
        if allowed and not self._inside_record:
            try:
                return self._object(record, depth)
            except Odd:
                if not self._foreign:
                    raise
        elif record.name in allowed_names() and not allowed:
            raise Odd(f"calls {record.name} in another way")
        self._records.append(record)
        return _Found(record, whole=False)

    def tensor(self, ref: TensorRef) -> Tensor:
        """Return the tensor of a reference; raise Odd where it is no view of its storage."""
        storage, dtype = ref.storage, ref.dtype or ref.storage.dtype
        self.check(ref, dtype)
        if 0 in ref.size:
            tensor = torch.empty_strided(ref.size, ref.stride, dtype=dtype)
        else:
            offset = ref.offset + storage.start
            tensor = torch.tensor((), dtype=dtype).set_(self._memory(storage), offset, ref.size, ref.stride)
        if ref.requires_grad:
            tensor.requires_grad_()
        if ref.metadata:
            torch._utils.set_tensor_metadata(tensor, ref.metadata)
        return tensor

    def _memory(self, storage: StorageRef) -> torch.UntypedStorage:
        key = storage.key if storage.data is None else id(storage)
        if key not in self._memories:
            inside = None if storage.data is None else torch.frombuffer(bytearray(storage.data), dtype=torch.uint8)
            memory = self._storage(storage) if inside is None else inside.untyped_storage()
            # The reference is kept as well: its id must not become another's.
            self._memories[key] = storage, memory
        return self._memories[key][1]

    def check(self, ref: TensorRef, dtype: torch.dtype) -> None:
        """Raise Odd for a tensor that its storage does not hold, or that is far larger than all storages."""
        total = math.prod(ref.size)
        last = ref.offset + sum((n - 1) * step for n, step in zip(ref.size, ref.stride, strict=True)) if total else -1
        held = ref.storage.length * ref.storage.dtype.itemsize
        what = f"has a tensor of {'x'.join(map(str, ref.size))}"
        memory = f"the {held:,} bytes of its storage {ref.storage.key!r}"
        if (last + 1) * dtype.itemsize > held:
            raise Odd(f"{what} that reaches beyond {memory}")
        self._spend(total * dtype.itemsize, f"{what} expanded from {memory}, or far too many of such")

    def _spend(self, made: int, otherwise: str = "makes far more bytes than it has") -> None:
        self._left -= made
        if self._left < 0:
            raise Odd(otherwise)

    def _inner(self, value: Any, depth: int) -> Tensor:
        made = self.visit(value, depth).value
        if not isinstance(made, Tensor):
            raise Odd("makes a tensor of something else")
        return made

    def _called(self, record: Record, depth: int) -> Any:
        """Return what a call of one of `_CALLS` makes; raise Odd for one that torch does not write so."""
        match record.name.rpartition(".")[2], record.arguments:
            case "Parameter" | "_rebuild_parameter" | "_rebuild_parameter_with_state", _:
                return self._parameter(record, depth)
            case "partial", (Global(name),) if name in module_names():
                # Only what makes a layer, with numbers and text given in advance: no `forward` of torchvision calls it.
                match record.state:
                    case (Global(again), (), dict() | None as keywords, None) if name == again and all(
                        isinstance(key, str) and key.isidentifier() and type(value) in _PLAIN
                        for key, value in (keywords or {}).items()
                    ):
                        return functools.partial(look_up(name, self._label), **(keywords or {}))
            case "_rebuild_from_type_v2", (Global(function), Global(kind), tuple(inner), state):
                # A tensor or parameter with attributes of its own.
                plain = function in pickle_reader.TENSOR_CALLS
                if kind in ("torch.Tensor", _PARAMETER) and (plain or function in _CALLS - {record.name}):
                    part = pickle_reader.described_tensor(function, inner) if plain else Record(function, inner)
                    return self._with_attributes(self._inner(part, depth), state, depth)
            # Neither is converted, whatever its numbers: its kind and size suffice to say so.
            case "_rebuild_qtensor", (StorageRef() as storage, _, tuple(size), *_) if are_sizes(size):
                return torch.empty(size, dtype=storage.dtype, device="meta")
            case "_rebuild_sparse_tensor", (_, (_, _, torch.Size() as size, *_) | (_, _, _, torch.Size() as size)):
                return torch.empty(size, layout=torch.sparse_coo, device="meta")
            case "_rebuild_meta_tensor_no_storage", (torch.dtype() as dtype, size, stride, bool(grad)):
                if are_sizes(size) and are_sizes(stride):
                    return torch.empty_strided(size, stride, dtype=dtype, device="meta", requires_grad=grad)
            case "_rebuild_device_tensor_from_cpu_tensor", (data, torch.dtype() as dtype, str(), bool(grad)):
                tensor = self._inner(data, depth).detach()
                self._spend(tensor.numel() * dtype.itemsize)
                return tensor.to(dtype).requires_grad_(grad)
        raise Odd(f"calls {record.name} in another way")

    def _parameter(self, record: Record, depth: int) -> Tensor:
        """`Parameter(data, requires_grad)`, `_rebuild_parameter`, `_rebuild_parameter_with_state`."""
        given = (*record.arguments, *(None, True, None, None)[len(record.arguments) :])
        match given, record.state:
            case (data, bool(requires_grad), hooks, state), None if not hooks:
                pass
            case (data, bool(), hooks, state), (bool(requires_grad), bool(), more) if not hooks and not more:
                pass  # as before torch 0.4
            case _:
                raise Odd(f"calls {record.name} in another way")
        return self._with_attributes(nn.Parameter(self._inner(data, depth).detach(), requires_grad), state, depth)

    def _with_attributes(self, tensor: Tensor, state: Any, depth: int) -> Tensor:
        """Set attributes that a tensor does not have by itself."""
        state = {} if state is None else state
        # numpy and torch obey attributes with underscores around them.
        if not isinstance(state, dict) or not all(
            isinstance(key, str) and key.isidentifier() and not key.startswith("__") and key not in _OWN
            for key in state
        ):
            raise Odd("fills a tensor with attributes that it has itself, or that torch obeys")
        for key, value in self.visit(state, depth).value.items():
            if not isinstance(value, Record | Global):
                setattr(tensor, key, value)
        return tensor

    def _object(self, record: Record, depth: int) -> _Found:
        owner, state = record.name, {} if record.state is None else record.state
        kind = look_up(owner, self._label)
        if record.made_by != "new" or record.arguments or record.items or record.elements or not isinstance(kind, type):
            raise Odd(f"makes a {owner} in another way")
        if type(state) is dict and state.get("__overloads__") == {}:
            # torch.jit.script leaves it on every module that it has been given.
            del state["__overloads__"]
        if type(state) is not dict or not all(
            isinstance(key, str) and len(key) <= _LONGEST_ATTRIBUTE and not key.startswith("__") for key in state
        ):
            raise Odd(f"fills a {owner} in another way")
        found = self.visit(state, depth)
        is_module = issubclass(kind, nn.Module)
        if not found.whole and owner != "argparse.Namespace":
            raise Odd(f"keeps objects of other classes in a {owner}")
        for key, value in state.items():
            if callable(getattr(kind, key, None)) or key == "_compiled_call_impl":
                raise Odd(f"puts another {key} into a {owner}")
            if is_module:
                self._check_attribute(owner, key, value)
        made: Any = object.__new__(kind)
        own = vars(made)
        own.update(state)
        if is_module:
            for part in _PARTS:
                if part not in state:
                    raise MalformedError(f"its {owner} lacks parts ({part})")
            # What later versions of torch keep on a module, as its `__setstate__` would add it, without calling that.
            own.update(vars(nn.Module()) | own)
            for later, added in _ADDED.items():
                if isinstance(made, later):
                    own.update(added | own)
        if isinstance(made, nn.RNNBase):
            names = own.get("_flat_weights_names")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise Odd(f"has a {kind.__name__} of a very old torch")
            weights = [made._parameters.get(name) for name in names]
            own["_flat_weights"] = weights
            own["_flat_weight_refs"] = [None if weight is None else weakref.ref(weight) for weight in weights]
        return _Found(made, found.levels + 1, found.parts, found.whole)

    def _check_attribute(self, owner: str, key: str, value: Any) -> None:
        """Raise Odd for what is no data: a hook, a child that is no module, a part of another class."""
        if key in _PARTS:
            if not isinstance(value, dict) or not all(isinstance(part, _PARTS[key]) for part in value.values()):
                raise Odd(f"has other things than such in the {key} of a {owner}")
            for name in value:
                if not isinstance(name, str) or not is_safe_name(name):
                    raise Odd(f"has {name!r} for a name in the {key} of a {owner}")
        elif key.endswith("_hooks") and not (isinstance(value, dict) and not value):
            raise Odd(f"has hooks on a {owner}")
        elif key == "_non_persistent_buffers_set" and not isinstance(value, set):
            raise Odd(f"fills a {owner} in another way")


def look_up(name: str, label: str) -> Any:
    """The object behind a name of the allowlist."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        lack = "which the installed torch and torchvision lack; install a version with it"
        raise SourceError(f"{label} needs {name}, {lack}") from None


class _NoArrayError(Exception):
    """Harmless data of a type that is not read; the text says which."""


def _array_of(record: Record) -> Any:
    """Return the array, number or text of a call among `ARRAY_CALLS`; raise Odd or _NoArrayError.

    numpy believes a file's dtype down to its flags, and could take bytes for addresses of objects. Here, a dtype is its
    code and its byte order, and the rest follows.
    """
    match record.name.rpartition(".")[2], record.arguments, record.state:
        case "scalar", (Record() as described, bytes(data)), _:
            dtype = _dtype(described)
            if len(data) != dtype.itemsize:
                raise Odd("has a numpy scalar of other data than numpy writes for a number")
            return np.frombuffer(data, dtype)[0] if data else dtype.type()
        case "_reconstruct", (Global("numpy.ndarray"), _, _), (int(), tuple(shape), Record() as described, rows, data):
            order: Any = "F" if rows is True else "C"
        case "_frombuffer", (bytes() | bytearray() as data, Record() as described, tuple(shape), "C" | "F" as order), _:
            pass  # as protocol 5 writes it
        case _:
            raise Odd(f"calls {record.name} in another way")
    dtype = _dtype(described)
    if not are_sizes(shape):
        raise Odd("has a numpy array of a shape that no array has")
    count, size = math.prod(shape), dtype.itemsize
    if not isinstance(data, bytes | bytearray) or len(data) != count * size or (size == 0 and count > 0):
        raise Odd("has a numpy array in another state than numpy writes")
    found: Any = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    return found.astype(dtype.newbyteorder("=")).reshape(shape, order=order)


def _dtype(record: Record) -> np.dtype[Any]:
    match record.name, record.arguments, (3, "=") if record.state is None else record.state:
        case "numpy.dtype", (str(code), *_), (_, "<" | ">" | "|" | "=" as order, *_):
            if not _NUMPY_CODE.fullmatch(code):
                raise _NoArrayError(f"numpy data of the type {code[:40]!r}")
            return np.dtype(code).newbyteorder(order)
    raise Odd("has a numpy.dtype in another state than numpy writes")
