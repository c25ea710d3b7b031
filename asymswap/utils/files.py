"""Files are written completely or not at all, none is replaced without permission or may change while it is read.

A file is written into a folder beside its target, `.NAME.XXXXXXXX.part`, and renamed from there. Only a killed process
or a power failure leaves the folder behind: the next writer there, who finds it without its lock, removes it.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from asymswap.errors import OutputError, SourceError

try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing is removed there but what a process itself has left.
    fcntl = None  # type: ignore[assignment]


def check_output(path: Path, force: bool) -> None:
    """Raise OutputError where a file cannot be written, before any work is done for it."""
    folder = path.parent
    try:
        if path.is_dir():
            reason = f"{path} is a folder; give a file name in it"
        elif path.exists() and not path.is_file():
            reason = f"{path} is a device or a pipe, which a file would replace; give another name"
        elif path.exists() and not force:
            reason = f"{path} exists already; give another name, or `force=True` to replace it"
        elif not folder.exists():
            reason = f"the folder {folder} does not exist; create it with mkdir -p {folder}"
        elif not folder.is_dir():
            reason = f"{folder} is not a folder, so {path.name} cannot be written there"
        elif not os.access(folder, os.W_OK):
            reason = f"the folder {folder} cannot be written to; give another"
        else:
            return
    except OSError as error:
        reason = f"{path} cannot be the name of a file: {error.strerror}"
    raise OutputError(reason)


def check_distinct(files: Mapping[str, Path | None]) -> None:
    """Raise OutputError where two options name one file; `files` are paths by the option that names them."""
    named: dict[Path, str] = {}
    for option, path in files.items():
        if path is not None and (other := named.setdefault(path.resolve(), option)) != option:
            raise OutputError(f"{other} and {option} both name {path}; give them two files")


def real_cause(error: Exception) -> BaseException:
    """Return what stopped a writer: torch and safetensors wrap a system error, or Ctrl-C, in their own errors."""
    cause = error.__context__
    if isinstance(cause, OSError | KeyboardInterrupt):
        return cause
    return OSError(" ".join(str(error).split())[:200])


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` at the end, or is removed at any error."""
    # The name must not become too long, nor be the name of another draft for the same file.
    folder = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        _remove_abandoned(path.parent)
        folder.mkdir(mode=0o700)
        with ExitStack() as ending:
            ending.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = ending.enter_context((folder / "unlocked").open("w"))
            if fcntl is not None:
                # A network disk may have no locks: then nobody removes what is left on it.
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
            # Only now: nobody else sees it without its lock.
            (folder / "unlocked").rename(folder / "lock")
            draft = folder / "draft"
            draft.touch(exist_ok=False)
            mode = draft.stat().st_mode
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            # Some writers make a file of their own there, which only its owner may read.
            draft.chmod(mode)
            draft.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file completely, or not at all."""
    with whole_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def _remove_abandoned(place: Path) -> None:
    """Remove the draft folders of dead writers in a place; whatever cannot be removed stays."""
    if fcntl is None:
        return
    with suppress(OSError):
        for folder in place.iterdir():
            if re.fullmatch(r"\..{1,40}\.[0-9a-f]{8}\.part", folder.name, re.DOTALL):
                # Without a lock file it is only just being made, or not ours.
                with suppress(OSError), (folder / "lock").open("r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fail_if_modified(*paths: Path) -> Iterator[None]:
    """Raise SourceError, before any error of the block, if one of the files is modified while it runs."""

    def state(path: Path) -> tuple[int, ...] | None:
        with suppress(OSError):
            found = path.stat()
            return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        return None

    before = [state(path) for path in paths]
    try:
        yield
    finally:
        for path, was in zip(paths, before, strict=True):
            if state(path) != was:
                raise SourceError(f"{path} changed while it was being read; run again when nothing writes to it")
