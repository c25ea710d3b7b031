"""Recognise the kind of a model file by its first bytes and the names in the archive; nothing is executed."""

import hashlib
import os
import zipfile
from enum import Enum
from pathlib import Path

from asymswap.errors import SourceError, listed

SUFFIXES = (
    ".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors", ".tar", ".pkl", ".pickle", ".pt2", ".torch", ".json",
)  # fmt: skip

# What a pickle of protocol 0 or 1 begins with: a dict, a list or an OrderedDict.
_OLD_PICKLES = (b"(d", b"(l", b"}q", b"]q", b"ccollections\nOrderedDict\n")


class FileKind(Enum):
    """The kinds of model file; the values are their names in messages."""

    TORCH = "a torch.save file"
    LEGACY = "a torch.save file of the old form"
    PICKLE = "a pickle"
    SAFETENSORS = "a safetensors file"
    TORCHSCRIPT = "a TorchScript archive"
    EXPORTED = "a torch.export archive"
    SHARDS = "an index of shards"


def resolve(path: Path) -> Path:
    """Return the index of shards in a folder with one, else its only file of weights, else the path itself."""
    if not os.path.isdir(path):  # noqa: PTH112  # it never raises
        return path
    found = [*path.glob("*.index.json")] or [*path.glob("*.safetensors")] or [*path.glob("*.bin")]
    return found[0] if len(found) == 1 else path


def sniff(path: Path) -> FileKind:
    """Return the kind of a model file; raise SourceError, saying what it is and what to do, for any other file."""
    try:
        if path.is_dir():
            raise SourceError(f"{path} is a folder; give the checkpoint file in it{_files_in(path)}")
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
    if head[:1] == b"\x80" and bytes.fromhex("8a0a6cfc9c46f920") in head[:24]:
        return FileKind.LEGACY
    if (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05") or head.startswith(_OLD_PICKLES):
        return FileKind.PICKLE
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 * 2**20:
        return FileKind.SAFETENSORS
    if path.suffix == ".json" and head.lstrip()[:1] == b"{":
        return FileKind.SHARDS
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        guess = "an HDF5 file (Keras?)"
    elif head.lstrip()[:1] == b"<":
        guess = "a web page"
    elif head.startswith(b"version https://git-lfs"):
        guess = "a Git LFS pointer (run `git lfs pull`)"
    else:
        text = all(byte in b"\t\n\r\f" or byte >= 32 for byte in head)
        guess = "text" if text else "binary data of an unknown kind"
    raise SourceError(f"{path} is {guess}, not a checkpoint; give a .pt, .pth or .safetensors file")


def exists(path: Path) -> bool:
    """True where there is such a file or folder; a text too long for a path names none."""
    return os.path.exists(path)  # noqa: PTH110  # it never raises


def is_file_name(text: str) -> bool:
    """True for what is to be a file, not a network's name: it exists, has a slash, or ends as weights do."""
    path = Path(text)
    return exists(path) or path.suffix in SUFFIXES or "/" in text


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sniff_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        damaged = "cut off or damaged: a zip archive that cannot be opened"
        raise SourceError(f"{path} is {damaged}; download it again") from None
    inner = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return FileKind.TORCHSCRIPT
    # "archive_format" since torch 2.5, the program's name before.
    exported = {"archive_format", "serialized_exported_program.json"} & {*inner, *names}
    if exported or any(name.endswith("models/model.json") for name in names):
        return FileKind.EXPORTED
    if "data.pkl" in inner:
        return FileKind.TORCH
    what = f"a zip archive of something else (it holds {names[0] if names else 'nothing'})"
    raise SourceError(f"{path} is {what}; give a .pt, .pth or .safetensors file")


def _files_in(folder: Path) -> str:
    if (folder / ".metadata").exists() and any(folder.glob("*.distcp")):
        command = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        return f", which torch.distributed.checkpoint wrote in parts; join them with `{command}`"
    endings = (".index.json", ".pt", ".pth", ".ckpt", ".bin", ".safetensors")
    found = sorted(path.name for path in folder.iterdir() if path.name.endswith(endings))
    return f": {listed(found, 4)}" if found else ""
