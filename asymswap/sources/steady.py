"""A file that stays the same while it is read, so that what is told of it is true of what was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asymswap.errors import AsymswapError, SourceError


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Raise SourceError where the file is written to, cut off or replaced while the block runs.

    That goes before what the block itself finds wrong with the file, which may come of the change.
    """
    before = _state(path)
    try:
        yield
    except AsymswapError as error:
        if _state(path) != before:
            raise _changed(path) from error
        raise
    if _state(path) != before:
        raise _changed(path)


def _changed(path: Path) -> SourceError:
    return SourceError(f"{path} was changed while it was being read; run again when nothing writes to it")


def _state(path: Path) -> tuple[int, ...] | None:
    """Which file it is, and when it was last changed."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
