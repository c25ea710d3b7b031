"""Checkpoints in several files: an index (`model.safetensors.index.json`) says which of its folder's files holds what.

The index is JSON, `{"weight_map": {key of the state dict: name of a file}}`. Its files lie beside it, and a name that
leads out of the folder is refused. A link is followed, since download caches keep links in the folder and the files
elsewhere; an index cannot make one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from asymswap.errors import SourceError
from asymswap.fileformats.detect import sha256

# The largest index known has some thousand entries of a hundred bytes.
_LARGEST_INDEX = 64 * 2**20


def read_shards(index: Path, read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """The state dict whose parts an index names, each file read by `read`; raises SourceError."""
    weight_map = _weight_map(index)
    state: dict[str, Tensor] = {}
    for path in _files(index, weight_map):
        part = read(path)
        if not isinstance(part, Mapping):
            raise SourceError(f"{path} is no part of a state_dict, as {index} says; it holds a {type(part).__name__}")
        wanted = [key for key, name in weight_map.items() if name == path.name]
        lacking = [key for key in wanted if not isinstance(part.get(key), Tensor)]
        if lacking:
            raise SourceError(f"{path} lacks {lacking[0]!r}, which {index} says it holds; download both again")
        state.update({key: part[key] for key in wanted})
    return state


def files_of(path: Path) -> list[Path]:
    """The file itself, and those that it names where it is an index of shards that can be read."""
    try:
        return [path, *_files(path, _weight_map(path))] if path.suffix == ".json" else [path]
    except (SourceError, OSError):
        return [path]


def fingerprint(index: Path) -> str:
    """One SHA-256 for all files: that of the index's own and of its files' SHA-256, by name, as hexadecimal text."""
    each = [sha256(index), *(sha256(path) for path in _files(index, _weight_map(index)))]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > _LARGEST_INDEX:
        raise SourceError(f"{index} is larger than any index of shards; give the checkpoint file itself")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = list(weight_map.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise SourceError(
            f'{index} is no index of shards: it must be JSON with a "weight_map" of keys to files'
        ) from None
    if not entries or not all(isinstance(name, str) for _, name in entries):
        raise SourceError(f'{index} is damaged: its "weight_map" must name a file for every key')
    return dict(entries)


def _files(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The files beside the index, each once; raises SourceError for a name that leads elsewhere or to nothing."""
    found = []
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if "/" in name or "\\" in name or name in ("", ".", "..") or "\0" in name:
            raise SourceError(f"{index} names the file {name!r}, which leads out of its folder; nothing of it was read")
        if not os.path.isfile(path):  # noqa: PTH113 (no name, however long, makes it raise)
            raise SourceError(f"{index} names {name}, which is not in {index.parent}; download it too")
        found.append(path)
    return found
