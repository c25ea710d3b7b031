"""Loading what torch.save wrote, through torch's restricted unpickler and an allowlist of classes.

`allowlist.txt` (made by benchmarks/make_allowlist.py) names the nn.Module classes of torch.nn and torchvision. A
handful of other globals is allowed because real checkpoints hold them and calling them runs no code of the file: see
`_HARMLESS`. Nothing else is ever looked up, let alone called, unless the user says `--trust-pickle`.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import functools
import importlib
import io
import pathlib
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from asymswap.errors import SourceError
from asymswap.sources.files import FileKind

# Each makes a plain object of its arguments. A `partial` is only ever called by a module's own forward, and what it
# calls came through this same list.
_HARMLESS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": OrderedDict,
    "functools.partial": functools.partial,
    "pathlib.PosixPath": pathlib.PurePosixPath,
    "pathlib.PurePosixPath": pathlib.PurePosixPath,
    "pathlib.WindowsPath": pathlib.PureWindowsPath,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy._core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
}
_NUMPY_DTYPES = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]


def load_object(file: Path | BinaryIO, kind: FileKind, trust_pickle: bool, label: str) -> Any:
    """What torch.save wrote into a file, on the CPU.

    Raises SourceError where the file is damaged, or where it names something outside of the allowlist and the user has
    not said `--trust-pickle`. With `trust_pickle`, Python code of the file may run.
    """
    wanted = _globals(file, kind, label)
    refused = sorted(name for name in wanted if name not in allowed_names())
    if refused and not trust_pickle:
        shown = ", ".join(refused[:3]) + (f" and {len(refused) - 3} more" if len(refused) > 3 else "")
        raise SourceError(
            f"{label} is a pickle that needs {shown}, which is outside of the allowlist; nothing of it was executed; "
            f"save model.state_dict() instead and give it with --arch, or, if you trust the file, use --trust-pickle"
        )
    try:
        with warnings.catch_warnings():
            # torch warns of classes whose source has changed since; the weights are checked by their shapes instead.
            warnings.simplefilter("ignore")
            if refused:
                return torch.load(file, map_location="cpu", weights_only=False)
            with torch.serialization.safe_globals(_allowed(wanted)):
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SourceError(f"{label} was refused by torch's restricted unpickler: {_last_words(error)}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError, OSError, AttributeError) as error:
        raise SourceError(f"{label} is cut off or damaged: {_last_words(error)}") from None


@functools.cache
def allowed_names() -> frozenset[str]:
    """Every global that a file may name: torch's safe ones, those of `_HARMLESS`, the classes of allowlist.txt."""
    text = resources.files(__package__).joinpath("allowlist.txt").read_text(encoding="utf-8")
    return frozenset(text.split()) | frozenset(_HARMLESS) | frozenset(_torch_safe())


def is_allowed_module(model: nn.Module) -> bool:
    """Whether every class in a module tree is one of the allowlist, so that its structure can be stored and loaded."""
    return all(f"{type(m).__module__}.{type(m).__qualname__}" in allowed_names() for m in model.modules())


def _allowed(wanted: Iterable[str]) -> list[Any]:
    """The objects behind the wanted names, in the form that torch's unpickler asks for."""
    pairs: list[Any] = list(_NUMPY_DTYPES)
    for name in wanted:
        if name in _HARMLESS:
            pairs.append((_HARMLESS[name], name))
        elif name not in _torch_safe():
            module, _, attribute = name.rpartition(".")
            pairs.append(getattr(importlib.import_module(module), attribute))
    return pairs


@functools.cache
def _torch_safe() -> frozenset[str]:
    from torch._weights_only_unpickler import _get_allowed_globals

    return frozenset(_get_allowed_globals())


def _globals(file: Path | BinaryIO, kind: FileKind, label: str) -> set[str]:
    """Names of all globals in the pickle, read without executing it."""
    try:
        if kind is FileKind.TORCH:
            with zipfile.ZipFile(file) as archive:
                inner = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
                stream: BinaryIO = io.BytesIO(archive.read(inner))
            found = set(_genops_globals(stream, pickles=1))
        else:
            with Path(str(file)).open("rb") as stream:
                # A legacy file is five pickles in a row: magic, protocol, system, the object, the storage keys.
                found = set(_genops_globals(stream, pickles=5))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, StopIteration) as error:
        raise SourceError(f"{label} is cut off or damaged: {_last_words(error)}") from None
    finally:
        if not isinstance(file, Path):
            file.seek(0)
    return found


def _genops_globals(stream: BinaryIO, pickles: int) -> Iterable[str]:
    for _ in range(pickles):
        texts: list[str] = []
        for op, argument, _position in pickletools.genops(stream):
            if op.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                # Protocol 2 writes the names of Python 2, as torch's unpickler knows too.
                yield f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
            elif op.name == "STACK_GLOBAL":
                # The two names are on the stack; those that the file hides better are refused by the unpickler itself.
                yield ".".join(texts[-2:])
            elif isinstance(argument, str):
                texts.append(argument)


def _last_words(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
