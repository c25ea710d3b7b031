"""Loading what torch.save wrote, through torch's restricted unpickler and an allowlist of classes.

`allowlist.txt` (made by benchmarks/make_allowlist.py) names the nn.Module classes of torch.nn and torchvision. A
handful of other globals is allowed because real checkpoints hold them and calling them runs no code of the file: see
`_HARMLESS` and `_HELPERS`. Nothing else is ever looked up, let alone called, unless the user says `--trust-pickle`.
What is done with the allowed names, and how much a file claims to hold, is checked before by `asymswap.sources.audit`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import itertools
import pathlib
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from asymswap.errors import SourceError
from asymswap.sources.audit import Odd, Old, Rules, audit, global_name, operations
from asymswap.sources.files import FileKind
from asymswap.sources.plain_numpy import Array, DType, array, scalar
from asymswap.sources.zipped import LARGEST_PICKLE, read_contents

_INSTEAD = "save model.state_dict() instead and give it with --arch, or, if you trust the file, use --trust-pickle"

# Of pickle's protocols; torch's restricted unpickler knows none of the operations that the fourth added.
_NEWEST_READABLE = 3

# Each makes a plain object of its arguments; paths are text, and never opened. What stands for numpy's own makes arrays
# of numbers alone. A `partial` makes a layer, if anything calls it: see `audit`.
_HARMLESS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": OrderedDict,
    "functools.partial": functools.partial,
    "pathlib.PosixPath": pathlib.PurePosixPath,
    "pathlib.PurePosixPath": pathlib.PurePosixPath,
    "pathlib.WindowsPath": pathlib.PureWindowsPath,
    "pathlib.PureWindowsPath": pathlib.PureWindowsPath,
    "numpy.dtype": DType,
    "numpy.ndarray": Array,
    # Where numpy keeps these two depends on its version.
    "numpy.core.multiarray.scalar": scalar,
    "numpy._core.multiarray.scalar": scalar,
    "numpy.core.multiarray._reconstruct": array,
    "numpy._core.multiarray._reconstruct": array,
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


@dataclass(frozen=True)
class Loaded:
    """What a file holds, and whether it was unpickled without restriction, so that code in it ran."""

    value: Any
    executed: bool = False


@dataclass(frozen=True)
class _Needs:
    """What a pickle asks for: the names of its globals, the highest protocol that it is written in, and what is odd.

    `odd` says what of it torch.save does not write; it is not looked for where the rest is a reason to refuse already.
    """

    names: frozenset[str] = frozenset()
    protocol: int = 0
    odd: str = ""

    @property
    def refused(self) -> list[str]:
        return sorted(self.names - allowed_names())

    @property
    def plain(self) -> bool:
        return not self.refused and self.protocol <= _NEWEST_READABLE and not self.odd


def load_object(file: Path | BinaryIO, kind: FileKind, trust_pickle: bool, label: str, instead: str = _INSTEAD) -> Any:
    """What torch.save wrote into a file, on the CPU; see `load_told`."""
    return load_told(file, kind, trust_pickle, label, instead).value


def load_told(file: Path | BinaryIO, kind: FileKind, trust_pickle: bool, label: str, instead: str = _INSTEAD) -> Loaded:
    """What torch.save wrote into a file, on the CPU, and whether code in the file ran for it.

    Raises SourceError where the file is damaged, or where it cannot be read without running code and the user has not
    said `--trust-pickle`; `instead` is what it then says to do. With `trust_pickle`, Python code of the file may run.
    """
    needs = _read_needs(file, kind, label)
    if not trust_pickle:
        _check_needs(needs, label, instead)
    with warnings.catch_warnings():
        # torch warns of classes whose source has changed since; the weights are checked by their shapes instead.
        warnings.simplefilter("ignore")
        if not needs.plain:
            return Loaded(_load_trusting(file, label), executed=True)
        try:
            return Loaded(_load_restricted(file, needs, label))
        except pickle.UnpicklingError as error:
            if trust_pickle:
                return Loaded(_load_trusting(file, label), executed=True)
            raise SourceError(
                f"{label} was refused by torch's restricted unpickler ({_last_words(error)}); {instead}"
            ) from None


def refused_globals(file: BinaryIO, label: str) -> list[str]:
    """Names of the globals in a torch.save file of the zip form that are outside of the allowlist, sorted."""
    return _read_needs(file, FileKind.TORCH, label).refused


def is_plain(file: BinaryIO, label: str) -> bool:
    """Whether a torch.save file of the zip form can be loaded without trusting it."""
    return _read_needs(file, FileKind.TORCH, label).plain


@functools.cache
def module_names() -> frozenset[str]:
    """The classes of allowlist.txt."""
    text = resources.files(__package__).joinpath("allowlist.txt").read_text(encoding="utf-8")
    return frozenset(text.split())


@functools.cache
def allowed_names() -> frozenset[str]:
    """Every global that a file may name: torch's safe ones, the two lists above, the classes of allowlist.txt."""
    return module_names() | frozenset(_HARMLESS) | _HELPERS | _torch_safe()


def is_allowed_module(model: nn.Module) -> bool:
    """Whether every class in a module tree is one of the allowlist, so that its structure can be stored and loaded."""
    return all(f"{type(m).__module__}.{type(m).__qualname__}" in allowed_names() for m in model.modules())


def _check_needs(needs: _Needs, label: str, instead: str) -> None:
    """Raise SourceError where a pickle cannot be loaded without the user's trust."""
    if needs.refused:
        shown = ", ".join(needs.refused[:3]) + (f" and {len(needs.refused) - 3} more" if len(needs.refused) > 3 else "")
        raise SourceError(
            f"{label} is a pickle that needs {shown}, outside of the allowlist; nothing of it was executed; {instead}"
        )
    if needs.protocol > _NEWEST_READABLE:
        raise SourceError(
            f"{label} is written in pickle protocol {needs.protocol}, not torch.save's own, and cannot be read safely; "
            f"nothing of it was executed; {instead}"
        )
    if needs.odd:
        raise SourceError(f"{label} {needs.odd}; nothing of it was executed; {instead}")


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
        raise SourceError(
            f"{label} cannot be unpickled: {_last_words(error)}; code in it may have been executed (--trust-pickle)"
        ) from error


def import_from_here() -> None:
    """Let the working directory count for imports, as with `python -m`, so that a project need not be installed."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _allowed(wanted: Iterable[str], label: str) -> list[Any]:
    """The objects behind the wanted names, in the form that torch's unpickler asks for."""
    pairs: list[Any] = []
    for name in wanted:
        if name in _HARMLESS:
            pairs.append((_HARMLESS[name], name))
        elif name not in _torch_safe():
            pairs.append(_look_up(label, name))
    return pairs


def _look_up(label: str, name: str) -> Any:
    """The object behind a name of the allowlist."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise SourceError(
            f"{label} needs {name}, which the installed torch and torchvision lack; install a version with it"
        ) from None


@functools.cache
def _torch_safe() -> frozenset[str]:
    from torch._weights_only_unpickler import _get_allowed_globals

    return frozenset(_get_allowed_globals())


def _read_needs(file: Path | BinaryIO, kind: FileKind, label: str) -> _Needs:
    """What the pickle in a file asks for, read without executing it."""
    try:
        if kind is FileKind.TORCH:
            contents = read_contents(file)
            return _examine([io.BytesIO(contents.pickle)], contents.storage_bytes, contents.size, label)
        path = Path(str(file))
        with path.open("rb") as stream:
            head = io.BytesIO(stream.read(LARGEST_PICKLE))
        # A legacy file is five pickles in a row: magic, protocol, system, the object, the storage keys.
        return _examine(itertools.repeat(head, 5), None, path.stat().st_size, label)
    except Odd as error:
        return _Needs(odd=str(error) if isinstance(error, Old) else f"{error}, which torch.save never writes")
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{label} is cut off or damaged: {_last_words(error)}") from None
    finally:
        if not isinstance(file, Path):
            file.seek(0)


def _examine(
    streams: Iterable[BinaryIO], storage_bytes: Mapping[str, int] | None, total_bytes: int, label: str
) -> _Needs:
    """The names and the protocol of pickles, and what is odd in them where those are no reason to refuse them."""
    streams = list(streams)
    needs = _scan(streams)
    if needs.plain:
        for stream in streams:
            stream.seek(0)
        rules = Rules(module_names(), _HELPERS, functools.partial(_look_up, label), storage_bytes, total_bytes)
        audit(streams, rules)
    return needs


def _scan(streams: Iterable[BinaryIO]) -> _Needs:
    names, protocol = set(), 0
    for op, argument in operations(streams):
        if op.name in ("GLOBAL", "INST"):
            names.add(global_name(str(argument)))
        written = argument if op.name == "PROTO" and isinstance(argument, int) else op.proto
        protocol = max(protocol, written)
    return _Needs(frozenset(names), protocol)


def _last_words(error: Exception) -> str:
    # Torch wraps the reason in a paragraph about its own option.
    text = " ".join(str(error).partition("WeightsUnpickler error:")[2].split("\n\nCheck the doc")[0].split())
    text = text or " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
