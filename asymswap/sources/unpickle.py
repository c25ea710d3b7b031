"""Loading what torch.save wrote, through torch's restricted unpickler and an allowlist of classes.

`allowlist.txt` (made by benchmarks/make_allowlist.py) names the nn.Module classes of torch.nn and torchvision. A
handful of other globals is allowed because real checkpoints hold them and calling them runs no code of the file: see
`_HARMLESS` and `_HELPERS`. Nothing else is ever looked up, let alone called, unless the user says `--trust-pickle`.
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
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from asymswap.errors import SourceError
from asymswap.sources.files import FileKind

# Of pickle's protocols; torch's restricted unpickler knows none of the operations that the fourth added.
_NEWEST_READABLE = 3

# The functions by which numpy's scalars and arrays are pickled; where numpy keeps them depends on its version.
_SCALAR, _ARRAY = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]

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
    "numpy.ndarray": np.ndarray,
    "numpy.core.multiarray.scalar": _SCALAR,
    "numpy._core.multiarray.scalar": _SCALAR,
    "numpy.core.multiarray._reconstruct": _ARRAY,
    "numpy._core.multiarray._reconstruct": _ARRAY,
}
# What torchvision's detectors and RAFT keep beside modules: holders of a few numbers, and functions of tensors alone.
_HELPERS = {
    "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
    "torchvision.models.detection._utils.BoxCoder",
    "torchvision.models.detection._utils.BoxLinearCoder",
    "torchvision.models.detection._utils.Matcher",
    "torchvision.models.detection._utils.SSDMatcher",
    "torchvision.models.optical_flow.raft._pass_through_h",
    "torchvision.ops.boxes.box_iou",
}
_NUMPY_DTYPES = [type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSU"]


@dataclass(frozen=True)
class _Needs:
    """What a pickle asks for: the names of its globals, and the highest protocol that it is written in."""

    names: frozenset[str]
    protocol: int

    @property
    def refused(self) -> list[str]:
        return sorted(self.names - allowed_names())


def load_object(file: Path | BinaryIO, kind: FileKind, trust_pickle: bool, label: str) -> Any:
    """What torch.save wrote into a file, on the CPU.

    Raises SourceError where the file is damaged, or where it names something outside of the allowlist and the user has
    not said `--trust-pickle`. With `trust_pickle`, Python code of the file may run.
    """
    needs = _read_needs(file, kind, label)
    if not trust_pickle:
        _check_needs(needs, label)
    with warnings.catch_warnings():
        # torch warns of classes whose source has changed since; the weights are checked by their shapes instead.
        warnings.simplefilter("ignore")
        if needs.refused or needs.protocol > _NEWEST_READABLE:
            return _load_trusting(file, label)
        try:
            return _load_restricted(file, needs, label)
        except pickle.UnpicklingError as error:
            if trust_pickle:
                return _load_trusting(file, label)
            raise SourceError(
                f"{label} was refused by torch's restricted unpickler ({_last_words(error)}); save model.state_dict() "
                f"instead and give it with --arch, or, if you trust the file, use --trust-pickle"
            ) from None


def refused_globals(file: BinaryIO, label: str) -> list[str]:
    """Names of the globals in a torch.save file of the zip form that are outside of the allowlist, sorted."""
    return _read_needs(file, FileKind.TORCH, label).refused


@functools.cache
def allowed_names() -> frozenset[str]:
    """Every global that a file may name: torch's safe ones, the two lists above, the classes of allowlist.txt."""
    text = resources.files(__package__).joinpath("allowlist.txt").read_text(encoding="utf-8")
    return frozenset(text.split()) | frozenset(_HARMLESS) | _HELPERS | _torch_safe()


def is_allowed_module(model: nn.Module) -> bool:
    """Whether every class in a module tree is one of the allowlist, so that its structure can be stored and loaded."""
    return all(f"{type(m).__module__}.{type(m).__qualname__}" in allowed_names() for m in model.modules())


def _check_needs(needs: _Needs, label: str) -> None:
    """Raise SourceError where a pickle cannot be loaded without the user's trust."""
    instead = "save model.state_dict() instead and give it with --arch, or, if you trust the file, use --trust-pickle"
    if needs.refused:
        shown = ", ".join(needs.refused[:3]) + (f" and {len(needs.refused) - 3} more" if len(needs.refused) > 3 else "")
        raise SourceError(
            f"{label} is a pickle that needs {shown}, outside of the allowlist; nothing of it was executed; {instead}"
        )
    if needs.protocol > _NEWEST_READABLE:
        raise SourceError(
            f"{label} is written in pickle protocol {needs.protocol}, which cannot be read safely; nothing of it was "
            f"executed; save it again with torch.save's own protocol, or, if you trust the file, use --trust-pickle"
        )


def _load_restricted(file: Path | BinaryIO, needs: _Needs, label: str) -> Any:
    with torch.serialization.safe_globals(_allowed(needs.names, label)):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, MemoryError):
            raise
        except Exception as error:
            # What is damaged may look like anything to an unpickler, and so raise anything.
            raise SourceError(f"{label} is cut off or damaged: {_last_words(error)}") from None


def _load_trusting(file: Path | BinaryIO, label: str) -> Any:
    """Unpickle without restriction: any code may run, and may fail."""
    import_from_here()
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise SourceError(
            f"{label} needs code that cannot be imported here: {_last_words(error)}; run asymswap in its project"
        ) from error
    except Exception as error:
        raise SourceError(f"{label} cannot be unpickled: {_last_words(error)}") from error


def import_from_here() -> None:
    """Let the working directory count for imports, as with `python -m`, so that a project need not be installed."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _allowed(wanted: Iterable[str], label: str) -> list[Any]:
    """The objects behind the wanted names, in the form that torch's unpickler asks for."""
    pairs: list[Any] = list(_NUMPY_DTYPES)
    for name in wanted:
        if name in _HARMLESS:
            pairs.append((_HARMLESS[name], name))
        elif name not in _torch_safe():
            module, _, attribute = name.rpartition(".")
            try:
                pairs.append(getattr(importlib.import_module(module), attribute))
            except (ImportError, AttributeError):
                raise SourceError(
                    f"{label} needs {name}, which the installed torch and torchvision lack; install a version with it"
                ) from None
    return pairs


@functools.cache
def _torch_safe() -> frozenset[str]:
    from torch._weights_only_unpickler import _get_allowed_globals

    return frozenset(_get_allowed_globals())


def _read_needs(file: Path | BinaryIO, kind: FileKind, label: str) -> _Needs:
    """What the pickle in a file asks for, read without executing it."""
    try:
        if kind is FileKind.TORCH:
            with zipfile.ZipFile(file) as archive:
                inner = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
                return _scan(io.BytesIO(archive.read(inner)), pickles=1)
        with Path(str(file)).open("rb") as stream:
            # A legacy file is five pickles in a row: magic, protocol, system, the object, the storage keys.
            return _scan(stream, pickles=5)
    except Exception as error:
        raise SourceError(f"{label} is cut off or damaged: {_last_words(error)}") from None
    finally:
        if not isinstance(file, Path):
            file.seek(0)


def _scan(stream: BinaryIO, pickles: int) -> _Needs:
    names, protocol = set(), 0
    for _ in range(pickles):
        for op, argument, _position in pickletools.genops(stream):
            if op.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                # Protocol 2 writes the names of Python 2, as torch's unpickler knows too.
                module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
                names.add(f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}")
            written = argument if op.name == "PROTO" and isinstance(argument, int) else op.proto
            protocol = max(protocol, written)
    return _Needs(frozenset(names), protocol)


def _last_words(error: Exception) -> str:
    # Torch wraps the reason in a paragraph about its own option.
    text = " ".join(str(error).partition("WeightsUnpickler error:")[2].split("\n\nCheck the doc")[0].split())
    text = text or " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
