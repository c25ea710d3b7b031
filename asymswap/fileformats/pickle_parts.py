"""What pickles are read into: records, references to tensors, and which of their parts are believed."""

from __future__ import annotations

import functools
import pathlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

_LONGEST_KEY = 4096
MOST_DIMENSIONS = 64


class Odd(Exception):  # noqa: N818 - not always an error: with --trust-pickle it is only reported
    """A pickle holds what torch.save does not write; the text says what."""


class MalformedError(Exception):
    """The bytes are no pickle, or not the file that they claim to be; the text says why."""


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
    """A storage: its key in the file, the dtype and the number of its elements, and where the view of it begins.

    `data` are its bytes where they stand in the pickle itself, `viewed` the elements of a view of the old form.
    """

    key: str
    dtype: torch.dtype
    count: int
    start: int = 0
    viewed: int | None = None
    data: memoryview | None = None

    @property
    def length(self) -> int:
        """Elements that a tensor may be made of."""
        return self.count if self.viewed is None else self.viewed

    @property
    def claimed(self) -> int:
        """Bytes that the file must hold for it."""
        return self.count * self.dtype.itemsize


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


def global_name(module: str, name: str) -> str:
    """The full name of a global in today's Python."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


@functools.cache
def constants() -> dict[str, Any]:
    """torch's dtypes and quantisation schemes by name: values that run nothing."""
    kinds = (torch.dtype, torch.qscheme)
    return {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, kinds)}


def described_tensor(arguments: tuple[Any, ...], typed: bool = False) -> TensorRef | None:
    """The tensor that a call of `_rebuild_tensor`, `_rebuild_tensor_v2` or, `typed`, `_rebuild_tensor_v3` makes.

    None where it is not called as torch.save does. For the last the storage is of bytes, and the dtype is given.
    """
    dtype = arguments[6] if typed and len(arguments) > 6 else None
    arguments = (*arguments[:6], *arguments[7:]) if typed else arguments
    requires_grad = False
    metadata: Any = {}
    match arguments:
        case (StorageRef() as storage, offset, size, stride) if not typed:
            pass
        case (StorageRef() as storage, offset, size, stride, bool(requires_grad), hooks, *rest) if not hooks:
            metadata = (rest[0] if rest else None) or {}
        case _:
            return None
    fits = are_sizes(size) and are_sizes(stride) and len(size) == len(stride) and are_sizes((offset,))
    flags = isinstance(metadata, dict) and all(type(k) is str and type(v) is bool for k, v in metadata.items())
    if not fits or not flags or isinstance(dtype, torch.dtype) != typed:
        return None
    return TensorRef(storage, offset, tuple(size), tuple(stride), requires_grad, metadata, dtype)


def key_of(key: Any) -> Any:
    """The same key of a dict or item of a set; raises Odd for one whose hash or comparison could be made to take long.

    Text and bytes are hashed with a secret of the process; numbers are not, and a file could give all the same hash.
    """
    kind = type(key)
    if kind is str or kind is bytes:
        if len(key) > _LONGEST_KEY:
            raise Odd(f"has a key of {len(key):,} characters")
    elif kind is int:
        if not -(2**53) <= key <= 2**53:
            raise Odd("has a key that is neither text nor a small number")
    elif kind is tuple:
        if len(key) > 4 or not all(type(part) is str or _is_small(part) for part in key):
            raise Odd("has a key that is neither text nor a small number")
        for part in key:
            key_of(part)
    elif kind is not float and not isinstance(key, _PLAIN_KEYS):
        raise Odd("has a key that is neither text nor a small number")
    return key


_PLAIN_KEYS = (bool, type(None), Global, Record, pathlib.PurePath, torch.dtype, torch.device)


def _is_small(value: Any) -> bool:
    return value is None or (isinstance(value, int) and -(2**31) <= value <= 2**31)


def are_sizes(value: Any) -> bool:
    """Whether these can be the sizes or strides of a tensor."""
    if not isinstance(value, tuple | list):
        return False
    return len(value) <= MOST_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in value)


@functools.cache
def storage_dtype(name: str) -> torch.dtype:
    """The dtype of a storage type such as torch.FloatStorage."""
    module, _, kind = name.rpartition(".")
    if kind == "UntypedStorage" and module in ("torch.storage", "torch"):
        return torch.uint8
    try:
        if module not in ("torch", "torch.cuda"):
            raise KeyError(name)
        dtype: torch.dtype = torch.serialization.StorageType(kind).dtype
        return dtype
    except KeyError:
        raise Odd(f"has a storage of the type {name}") from None
