"""The entries of the archives that torch writes: what they claim is checked before any is read."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from asymswap.errors import SourceError
from asymswap.fileformats.messages import reason_of
from asymswap.fileformats.pickle_reader import MalformedError, Odd

LARGEST_PICKLE = 32 * 2**20
"""Bytes of a pickle that is larger than its archive, being compressed; others can't be larger."""

_UNPACKED, _UNPACKED_RATIO = 64 * 2**20, 8
"""torch.save compresses nothing. What somebody compressed afterwards may be larger than this, and by this factor."""

_LOCAL = struct.Struct("<4s5H3I2H")


class Entries:
    """The entries of an archive, by their whole names; a storage is read once."""

    def __init__(self, archive: zipfile.ZipFile, size: int, verify: bool) -> None:
        self._archive = archive
        infos = [info for info in archive.infolist() if not info.is_dir()]
        self._infos = {info.filename: info for info in infos}
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._verify = verify
        self.size = size
        # torch ignores case where it looks an entry up.
        if len({info.filename.lower() for info in infos}) != len(infos):
            raise Odd("is an archive with two entries of one name")
        if min((info.header_offset for info in infos), default=0):
            # Python looks for the list of entries from the end, torch where the end says it is.
            raise Odd("is an archive with something before it, which two readers read in two ways")
        unpacked = sum(info.file_size for info in infos)
        if unpacked > max(size * _UNPACKED_RATIO, _UNPACKED):
            raise Odd(f"is an archive of {size:,} bytes that would unpack to {unpacked:,}")
        if sum(info.file_size for info in infos if info.compress_type == zipfile.ZIP_STORED) > size:
            raise MalformedError("its entries claim more bytes than the file has")

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def ending(self, *suffixes: str) -> str | None:
        """Return the first entry whose name ends so, at the border of a part of its name."""
        for suffix in suffixes:
            for name in self._infos:
                if name == suffix or name.endswith(suffix if suffix.startswith("_") else f"/{suffix}"):
                    return name
        return None

    def length(self, name: str) -> int | None:
        """Return how many bytes an entry has; None where there is none."""
        return self._infos[name].file_size if name in self._infos else None

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry; raise MalformedError where it is missing."""
        return self._archive.read(self._info(name))

    def pickle(self, name: str) -> bytes:
        """Return the bytes of a pickle; raise Odd where they are more than any checkpoint has beside its tensors."""
        length = self._info(name).file_size
        if length > max(LARGEST_PICKLE, self.size):
            raise Odd(f"holds {length:,} bytes beside its tensors, more than {LARGEST_PICKLE:,}")
        return self.read(name)

    def storage(self, name: str, needed: int) -> torch.UntypedStorage:
        """Return the bytes of an entry, of which `needed` are claimed, as memory for tensors."""
        info = self._info(name)
        if info.file_size < needed:
            raise MalformedError(f"entry {name} is shorter than its {needed} bytes")
        if name not in self._storages:
            self._storages[name] = self._memory(info)
        return self._storages[name]

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._infos:
            raise MalformedError(f"entry {name} is missing")
        return self._infos[name]

    def _memory(self, info: zipfile.ZipInfo) -> torch.UntypedStorage:
        memory = torch.empty_strided((info.file_size,), (1,), dtype=torch.uint8)
        if not info.file_size:
            return memory.untyped_storage()
        place: Any = memory.numpy()
        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            # The bytes are read into their place, so that they are in memory once.
            file = cast(BinaryIO, self._archive.fp)
            file.seek(info.header_offset)
            signature, *_, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
            if signature != b"PK\x03\x04" or file.read(name_length) != info.orig_filename.encode():
                raise MalformedError(f"entry {info.filename} is not where the list of entries says")
            file.seek(extra_length, 1)
            if file.readinto(place) != info.file_size:  # type: ignore[attr-defined]
                raise MalformedError(f"entry {info.filename} is cut off")
        else:
            content = self._archive.read(info)
            if len(content) != info.file_size:
                raise MalformedError(f"entry {info.filename} is cut off")
            place[:] = memoryview(content)
        if self._verify and zlib.crc32(place) != info.CRC:
            raise MalformedError(f"Bad CRC-32 for file {info.filename!r}")
        return memory.untyped_storage()


@contextmanager
def opened(file: Path | BinaryIO, verify: bool) -> Iterator[Entries]:
    """Open an archive; whatever goes wrong with a damaged one is a MalformedError.

    `verify`: compare the checksums of storages too, which torch does not; it takes half as long again as reading them.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            yield Entries(archive, file.stat().st_size if isinstance(file, Path) else file.seek(0, 2), verify)
    except (SourceError, Odd, MalformedError, MemoryError):
        raise
    except Exception as error:
        # What is damaged can make zipfile and torch raise about anything.
        raise MalformedError(reason_of(error)) from None
