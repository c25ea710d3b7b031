"""The kinds of model file, told apart by their first bytes and the names in the archive; nothing is executed."""

from __future__ import annotations

import hashlib
import zipfile
from enum import Enum
from pathlib import Path

from asymswap.errors import SourceError

_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9")
_TENSORFLOW_OR_KERAS = b"\x89HDF\r\n\x1a\n"


class FileKind(Enum):
    """The kinds of file that are told apart; the values are how they are called in messages."""

    TORCH = "a torch.save file"
    LEGACY = "a torch.save file of the old form"
    SAFETENSORS = "a safetensors file"


def sniff(path: Path) -> FileKind:
    """The kind of a model file; raises SourceError, saying what it is and what to do, where it is none that we read."""
    try:
        if path.is_dir():
            raise SourceError(f"{path} is a folder; give the checkpoint file in it")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise SourceError(f"no file {path}; give a path that exists or a model reference such as resnet18") from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from None
    if size == 0:
        raise SourceError(f"{path} is empty (0 bytes); write or download it again")
    if head.startswith(b"PK"):
        return _sniff_zip(path)
    if head.startswith(_LEGACY_MAGIC):
        return FileKind.LEGACY
    if size > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 * 2**20:
        if int.from_bytes(head[:8], "little") + 8 > size:
            raise SourceError(f"{path} is cut off: its safetensors header is longer than the file; download it again")
        return FileKind.SAFETENSORS
    raise SourceError(f"{path} is {_guess(head)}, not a checkpoint; give a .pt, .pth or .safetensors file")


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; a text that cannot be a path at all, being too long, names none."""
    try:
        return path.exists()
    except OSError:
        return False


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sniff_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise SourceError(
            f"{path} is cut off or damaged: a zip archive that cannot be opened; download it again"
        ) from None
    inner = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise SourceError(
            f"{path} is a TorchScript archive, which is code; save its weights with "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt') and give them with --arch"
        )
    if "archive_format" in inner or any(name.endswith("models/model.json") for name in names):
        raise SourceError(
            f"{path} is a torch.export archive (.pt2), whose graph is fixed; save its weights with "
            f"torch.save(torch.export.load({str(path)!r}).state_dict, 'weights.pt') and give them with --arch"
        )
    if "data.pkl" in inner:
        return FileKind.TORCH
    raise SourceError(
        f"{path} is a zip archive of something else (it holds {names[0] if names else 'nothing'}); "
        f"give a .pt, .pth or .safetensors file"
    )


def _guess(head: bytes) -> str:
    if head.startswith(_TENSORFLOW_OR_KERAS):
        return "an HDF5 file (Keras?)"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a plain pickle that torch.save did not write"
    if head.lstrip()[:1] == b"<":
        return "a web page"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run `git lfs pull`)"
    return "text" if all(byte in b"\t\n\r\f" or byte >= 32 for byte in head) else "binary data of an unknown kind"
