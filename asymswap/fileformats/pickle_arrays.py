"""numpy's arrays and scalars out of a pickle: numbers and text, and arrays of plain values.

numpy's pickles say how memory is to be read, down to the flags of a dtype. Believed, a file could have its bytes taken
for addresses of objects. Here, a dtype is its code and its byte order, and the rest follows.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from asymswap.fileformats.pickle_reader import Global, Odd, Record

# `numpy.core` is where numpy kept them before version 2.
ARRAY_CALLS = frozenset(
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
)

_CODE = re.compile(r"[biufc][1-9]\d?|[?bBhHiIlLqQefdgFDG]|[SU]\d{1,9}|O8?")
_PLAIN = (bool, int, float, str, bytes, type(None))


class NoArrayError(Exception):
    """Harmless data of a type that is not read; the text says which."""


def array_of(record: Record) -> Any:
    """Return the array, number or text of a call among `ARRAY_CALLS`; raise Odd or NoArrayError."""
    match record.name.rpartition(".")[2], record.arguments, record.state:
        case "scalar", (Record() as described, bytes(data)), _:
            dtype = _dtype(described)
            if dtype.hasobject or len(data) != dtype.itemsize:
                raise Odd("has a numpy scalar of other data than numpy writes for a number")
            return np.frombuffer(data, dtype)[0] if data else dtype.type()
        case "_reconstruct", (Global("numpy.ndarray"), _, _), (
            int(),
            tuple(shape),
            Record() as described,
            fortran,
            data,
        ):
            return _array(_dtype(described), shape, "F" if fortran is True else "C", data)
        case "_frombuffer", (bytes() | bytearray() as data, Record() as described, tuple(shape), "C" | "F" as order), _:
            # As protocol 5 writes it.
            return _array(_dtype(described), shape, order, data)
    raise Odd(f"calls {record.name} in another way")


def _dtype(record: Record) -> np.dtype[Any]:
    match record.name, record.arguments, record.state:
        case "numpy.dtype", (str(code), *_), None:
            order = "="
        case "numpy.dtype", (str(code), *_), (_, "<" | ">" | "|" | "=" as order, *_):
            pass
        case _:
            raise Odd("has a numpy.dtype in another state than numpy writes")
    if not _CODE.fullmatch(code):
        raise NoArrayError(f"numpy data of the type {code[:40]!r}")
    return np.dtype(code).newbyteorder(order)  # type: ignore[arg-type]


def _array(dtype: np.dtype[Any], shape: tuple[Any, ...], order: Any, data: Any) -> Any:
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise Odd("has a numpy array of a shape that no array has")
    count, size = math.prod(shape), dtype.itemsize
    if dtype.hasobject:
        fits = isinstance(data, list) and len(data) == count
    else:
        fits = isinstance(data, bytes | bytearray) and len(data) == count * size and (size > 0 or count == 0)
    if not fits:
        raise Odd("has a numpy array in another state than numpy writes")
    if dtype.hasobject:
        if not all(type(item) in _PLAIN for item in data):
            raise NoArrayError("a numpy array of objects")
        made = np.empty(count, dtype)
        made[:] = data
        return made.reshape(shape, order=order)
    found: Any = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    return found.astype(dtype.newbyteorder("=")).reshape(shape, order=order)
