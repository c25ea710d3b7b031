"""Files are written whole or not at all, and replaced only when that was meant."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import asymswap
from asymswap.errors import OutputError
from asymswap.utils.files import check_output, whole_file, write_file

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))


def convert() -> asymswap.Conversion:
    return asymswap.convert(asymswap.open_model(net(), input_size=(3, 8, 8)), "all-spatial", overrides={"rank": 4})


def test_new_and_forced_files_may_be_written(tmp_path: Path) -> None:
    check_output(tmp_path / "new", force=False)
    (tmp_path / "old").touch()
    check_output(tmp_path / "old", force=True)


@pytest.mark.parametrize(
    ("name", "force", "expected"),
    [
        ("old", False, r"old exists already; give another name, or `force=True` to replace it"),
        ("folder", True, r"folder is a folder; give a file name in it"),
        ("pipe", True, r"pipe is a device or a pipe, which a file would replace; give another name"),
        ("no/new", True, r"the folder .*no does not exist; create it with mkdir -p .*no"),
        ("old/new", True, r"old is not a folder, so new cannot be written there"),
        ("n" * 300, True, r"n cannot be the name of a file: File name too long"),
    ],
)
def test_files_that_cannot_be_written(name: str, force: bool, expected: str, tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match=expected):
        check_output(tmp_path / name, force)


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"the folder .* cannot be written to; give another"):
        check_output(tmp_path / "new", force=False)


def test_whole_file_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as draft:
        draft.write_text("new")
        assert draft.parent.parent == path.parent
        assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127, "🙂" * 63])
def test_longest_names(name: str, tmp_path: Path) -> None:
    write_file(tmp_path / name, "x")
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_any_error_leaves_the_old_file_and_no_draft(kind: type[BaseException], tmp_path: Path) -> None:
    def write_half() -> None:
        with whole_file(path) as draft:
            draft.write_text("half")
            raise kind("stop")

    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(kind, match="stop"):
        write_half()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS])
def test_errors_of_the_system_name_the_file_and_the_reason(code: int, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=rf"^cannot write .*a\.txt: {os.strerror(code)}$"),
        whole_file(tmp_path / "a.txt"),
    ):
        raise OSError(code, os.strerror(code))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*a\.txt: No such file or directory"):
        write_file(tmp_path / "gone" / "a.txt", "x")


def test_two_drafts_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from asymswap.utils.files import whole_file

with whole_file(Path(sys.argv[1])) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def left_by_a_killed_process(path: Path) -> Path:
    """The draft folder of a process that was killed while it wrote."""
    done = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert done.returncode == -signal.SIGKILL
    (folder,) = path.parent.glob(".*.part")
    assert (folder / "draft").read_text() == "half"
    assert not path.exists()
    return folder


@pytest.mark.parametrize("name", ["a.txt", "other.txt"])
def test_what_a_killed_process_left_is_removed_by_the_next(name: str, tmp_path: Path) -> None:
    left_by_a_killed_process(tmp_path / "a.txt")
    write_file(tmp_path / name, "x")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_what_is_still_being_written_is_left_alone(tmp_path: Path) -> None:
    abandoned = left_by_a_killed_process(tmp_path / "a.txt")
    with whole_file(tmp_path / "b.txt") as draft:
        assert not abandoned.exists()
        write_file(tmp_path / "c.txt", "x")
        draft.write_text("y")
    assert (tmp_path / "b.txt").read_text() == "y"


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    kept = [
        tmp_path / name for name in (".a.txt.0123abcd.part", ".a.txt.part", "a.txt.0123abcd.part", ".b.0123abcz.part")
    ]
    for folder in kept:
        folder.mkdir()
    for folder in kept[1:]:
        (folder / "lock").touch()
    (tmp_path / ".file.01234567.part").touch()
    write_file(tmp_path / "a.txt", "x")
    assert all(folder.is_dir() for folder in kept)
    assert (tmp_path / ".file.01234567.part").is_file()


def test_a_disk_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_file(tmp_path / "a.txt", "x")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_are_readable_by_whom_the_umask_lets(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    before = os.umask(0o027)
    try:
        asymswap.save(convert(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_equal_models_make_equal_files(suffix: str, tmp_path: Path) -> None:
    for name in "abcd":
        asymswap.save(convert(), tmp_path / f"{name}{suffix}")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path, conversion = tmp_path / "x.pt", convert()
    asymswap.save(conversion, path)
    with pytest.raises(OutputError, match=r"x\.pt exists already"):
        asymswap.save(conversion, path)
    asymswap.save(conversion, path, force=True)


@pytest.mark.parametrize("name", ["x", "x.onnx", "x.pt.gz"])
def test_the_ending_chooses_the_form(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=rf"{name} must end in \.pt, \.pth, \.safetensors"):
        asymswap.save(convert(), tmp_path / name)
    assert not list(tmp_path.iterdir())
