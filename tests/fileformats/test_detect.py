"""Model files are told apart by what is in them, whatever they are called."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from asymswap.errors import SourceError
from asymswap.fileformats.detect import FileKind, exists, sha256, sniff

STATE = {"weight": torch.ones(3)}


def write_zip(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x")


@pytest.mark.parametrize("name", ["model.pt", "model.th", "model", "model.safetensors", "model.zip"])
@pytest.mark.parametrize(
    ("save", "kind"),
    [
        (lambda path: torch.save(STATE, path), FileKind.TORCH),
        (lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False), FileKind.LEGACY),
        (lambda path: save_file(STATE, path), FileKind.SAFETENSORS),
        (lambda path: save_file(STATE, path, metadata={"format": "pt"}), FileKind.SAFETENSORS),
        (lambda path: torch.save({}, path), FileKind.TORCH),
    ],
)
def test_kinds(save: Callable[[Path], object], kind: FileKind, name: str, tmp_path: Path) -> None:
    save(tmp_path / name)
    assert sniff(tmp_path / name) is kind


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["m/data.pkl", "m/constants.pkl", "m/code/net.py"], FileKind.TORCHSCRIPT),
        (["m/data.pkl", "m/code/net.py"], FileKind.TORCHSCRIPT),
        (["m/archive_format", "m/models/model.json"], FileKind.EXPORTED),
        (["archive_format", "models/model.json"], FileKind.EXPORTED),
        (["m/models/model.json"], FileKind.EXPORTED),
        (["serialized_exported_program.json", "version"], FileKind.EXPORTED),
        (["m/data.pkl", "m/data/0"], FileKind.TORCH),
    ],
)
def test_zip_archives(names: list[str], kind: FileKind, tmp_path: Path) -> None:
    write_zip(tmp_path / "x.pt", *names)
    assert sniff(tmp_path / "x.pt") is kind


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["word/document.xml"], r"a zip archive of something else \(it holds word/document\.xml\); give a \.pt"),
        ([], r"a zip archive of something else \(it holds nothing\)"),
    ],
)
def test_zip_archives_of_other_kinds(names: list[str], expected: str, tmp_path: Path) -> None:
    write_zip(tmp_path / "x.pt", *names)
    with pytest.raises(SourceError, match=expected):
        sniff(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"is empty \(0 bytes\); write or download it again"),
        (b"notes", r"is text, not a checkpoint; give a \.pt, \.pth or \.safetensors file"),
        (b"  <html>", r"is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r"a Git LFS pointer \(run `git lfs pull`\)"),
        (b"\x89HDF\r\n\x1a\nrest", r"an HDF5 file \(Keras\?\)"),
        (bytes(100), r"binary data of an unknown kind"),
        (b"PK\x03\x04" + bytes(50), r"is cut off or damaged: a zip archive that cannot be opened; download it again"),
        ((2**60).to_bytes(8, "little") + b"{}", r"binary data of an unknown kind"),
    ],
)
def test_files_that_are_no_checkpoints(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(SourceError, match=expected):
        sniff(tmp_path / "x.pt")


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file .*x\.pt; give a path that exists or a model reference"):
        sniff(tmp_path / "x.pt")
    with pytest.raises(SourceError, match=r"is a folder; give the checkpoint file in it"):
        sniff(tmp_path)
    with pytest.raises(SourceError, match=r"cannot read n+: File name too long"):
        sniff(Path("n" * 300))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.pt").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match=r"cannot read .*x\.pt: Permission denied"):
        sniff(tmp_path / "x.pt")


def test_exists(tmp_path: Path) -> None:
    assert exists(tmp_path)
    assert not exists(tmp_path / "no")
    assert not exists(Path("n" * 300))


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()
