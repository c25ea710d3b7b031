"""The archives that torch.save writes: what their entries claim, looked at before torch reads one."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from asymswap.sources.audit import Odd

LARGEST_PICKLE = 32 * 2**20
"""Bytes of what a file holds beside the numbers of its tensors; a few kilobytes in a state dict."""

_UNPACKED, _UNPACKED_RATIO = 64 * 2**20, 8
"""torch.save compresses nothing. What somebody compressed afterwards may be larger than this, and by this factor."""


@dataclass(frozen=True)
class Contents:
    """The pickle of an archive, how many bytes it holds for each storage by its key, and how large the archive is."""

    pickle: bytes
    storage_bytes: Mapping[str, int]
    size: int


def read_contents(file: Path | BinaryIO) -> Contents:
    """Look into an archive; raises Odd for what torch.save does not write, or what zipfile raises where it is damaged.

    Only entries of the archive are opened, by their whole names.
    """
    with zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        roots = {entry.filename.partition("/")[0] for entry in entries}
        # torch does not tell upper from lower case where it looks an entry up.
        if len(roots) != 1 or len({entry.filename.lower() for entry in entries}) != len(entries):
            raise Odd("is an archive with several roots, or with two entries of one name")
        size = _size(file)
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > max(size * _UNPACKED_RATIO, _UNPACKED):
            raise Odd(f"is an archive of {size:,} bytes that would unpack to {unpacked:,}")
        root = roots.pop()
        inner = archive.getinfo(f"{root}/data.pkl")
        if inner.file_size > LARGEST_PICKLE:
            raise Odd(f"holds {inner.file_size:,} bytes beside its tensors, more than {LARGEST_PICKLE:,}")
        _check_alike(file, archive, entries, root)
        folder = f"{root}/data/"
        held = {e.filename.removeprefix(folder): e.file_size for e in entries if e.filename.startswith(folder)}
        return Contents(archive.read(inner), held, size)


def _check_alike(
    file: Path | BinaryIO, archive: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo], root: str
) -> None:
    """Raise Odd where torch's own reader would see other entries, or the same ones elsewhere.

    An archive with something before it can be made so that the two readers find different things.
    """
    stream = archive.fp
    assert stream is not None
    starts = {}
    for entry in entries:
        stream.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", stream.read(4))
        starts[entry.filename.removeprefix(f"{root}/")] = entry.header_offset + 30 + name_length + extra_length
    stream.seek(0)
    try:
        reader: Any = torch._C.PyTorchFileReader(str(file) if isinstance(file, Path) else file)
        seen = {name: reader.get_record_offset(name) for name in starts}
    except RuntimeError as error:
        raise zipfile.BadZipFile(str(error)) from None
    if seen != starts:
        raise Odd("is an archive that two readers read in two ways")


def _size(file: Path | BinaryIO) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.seek(0, 2)
