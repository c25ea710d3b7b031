"""What stands for numpy's own when a checkpoint holds scalars and arrays: numbers and text, and nothing else.

numpy's pickles say how memory is to be read, down to the flags of a dtype. Believed, a file could have its bytes taken
for addresses of objects. Here, a dtype is its code and its byte order, and the rest follows.
"""

from __future__ import annotations

import re
from pickle import UnpicklingError
from typing import Any

import numpy as np

_CODE = re.compile(r"[biufc][1-9]\d?|[?bBhHiIlLqQefdgFDG]|[SU]\d{1,9}")


class DType:
    """A dtype of numbers or text, as `numpy.dtype` is pickled: a code, then a state of which the byte order counts."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise UnpicklingError(f"numpy data of the type {code!r} is no number and no text")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise UnpicklingError("a numpy.dtype has another state than numpy writes")
        self.value = self.value.newbyteorder(state[1])


class Array(np.ndarray[Any, np.dtype[Any]]):
    """An array that is filled by `__setstate__` with as many bytes as its shape and dtype need."""

    def __setstate__(self, state: Any) -> None:
        match state:
            case (int(version), tuple(shape), DType() as dtype, bool(fortran), bytes(data)):
                checked: Any = (version, shape, dtype.value, fortran, data)
                super().__setstate__(checked)
            case _:
                raise UnpicklingError("a numpy array has another state than numpy writes for numbers")

    def __repr__(self) -> str:
        return repr(self.view(np.ndarray))


def array(*_: Any) -> Array:
    """An empty array to be filled, for `numpy.core.multiarray._reconstruct`."""
    return Array((0,), np.int8)


def scalar(dtype: Any, data: Any) -> Any:
    """One number or text out of its bytes, for `numpy.core.multiarray.scalar`."""
    if not isinstance(dtype, DType) or not isinstance(data, bytes) or len(data) != dtype.value.itemsize:
        raise UnpicklingError("a numpy scalar has other data than numpy writes for a number")
    return np.frombuffer(data, dtype.value)[0] if data else dtype.value.type()
