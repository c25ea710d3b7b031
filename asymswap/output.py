"""Writing files so that there is never half a file, and never one lost that the user did not mean to lose."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asymswap.errors import OutputError


def check_output(path: Path, force: bool) -> None:
    """Raise OutputError where a file cannot be written, before any work is done for it."""
    folder = path.parent
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder; give a file name in it")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is a device or a pipe, which a file would take the place of; give another name")
        if path.exists() and not force:
            raise OutputError(f"{path} exists already; give another name with -o, or --force to replace it")
    except OSError as error:
        raise OutputError(f"{path} cannot be the name of a file: {error.strerror}") from None
    if not folder.exists():
        raise OutputError(f"the folder {folder} does not exist; create it with mkdir -p {folder}")
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder, so {path.name} cannot be written there")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} cannot be written to; give another with -o")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` at the end, or vanishes at any error."""
    # The name must not grow too long with what is added, nor be that of another draft for the same file.
    draft = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        draft.touch(exist_ok=False)
        mode = draft.stat().st_mode
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        # Some writers put a file of their own there, which only its owner may read.
        draft.chmod(mode)
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or nothing."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file, or nothing."""
    with whole_file(path) as draft:
        draft.write_bytes(data)
