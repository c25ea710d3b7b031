"""Files that stay the same while they are read, so that what is told of them is true of what was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asymswap.errors import AsymswapError, SourceError


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Raise SourceError where one of the files is written to, cut off or replaced while the block runs.

    That goes before what the block itself finds wrong with a file, which may come of the change.
    """
    before = {path: _state(path) for path in paths}
    try:
        yield
    except AsymswapError as error:
        _check(before, error)
        raise
    _check(before, None)


def _check(before: dict[Path, tuple[int, ...] | None], cause: AsymswapError | None) -> None:
    for path, state in before.items():
        if _state(path) != state:
            raise SourceError(
                f"{path} was changed while it was being read; run again when nothing writes to it"
            ) from cause


def _state(path: Path) -> tuple[int, ...] | None:
    """Which file it is, and when it was last changed."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
