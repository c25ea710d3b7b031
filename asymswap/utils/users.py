"""Calls of the user's functions, whose errors become one line that says where."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from asymswap.errors import AsymswapError, SourceError, reason_of

T = TypeVar("T")

_PACKAGE = str(Path(__file__).parents[1])
_INSTALLED = (_PACKAGE, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<")
_KNOWN = ("allocate memory", "more than 1 value per channel", "gloo", "NCCL", "Connection")
"""In errors of torch for which a caller has better words."""


def call(what: str, function: Callable[..., T], *arguments: Any, hint: str = "") -> T:
    """Return what the user's `function` returns; where it fails, raise SourceError with its reason and its line.

    `what` names the function in the message. Errors of memory, and of other processes, pass.
    """
    try:
        return function(*arguments)
    except (AsymswapError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if any(word in str(error) for word in _KNOWN):
            raise
        # A DataLoader's worker sends its whole traceback, of which the last line says what went wrong.
        lines = str(error).strip().splitlines()
        name = type(error).__name__
        text = lines[-1] if "Original Traceback" in str(error) else f"{name}: {reason_of(error, 300)}"
        places = [
            f" ({Path(frame.filename).name}, line {frame.lineno})"
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith(_INSTALLED)
        ]
        raise SourceError(f"{what} raised {text}{''.join(places[-1:])}{hint}") from error
