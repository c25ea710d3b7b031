"""Whatever keeps a file from being written whole, no part of one is left, and no file is lost."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import CLI, Forked

LISTING = ("recipes", "3x3-only")
"""Prints without loading torch."""
CONVERT = ("convert", "digits-resnet", "--recipe", "3x3-only")
FORMS = ("x.pt", "x.safetensors")

Refusal = Callable[..., str]

# Runs for as long as it is let, once it has started.
SLOW_NET = """
import time
from pathlib import Path
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        Path("started").touch()
        time.sleep(60)
        return super().forward(x)

def net():
    return Net(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
"""


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """While open, writing more to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", FORMS)
def test_existing_output(name: str, refusal: Refusal) -> None:
    Path(name).write_text("mine")
    said = refusal(*CONVERT, "-o", name)
    assert said.startswith(f"{name} exists already; give another name")
    assert "--force" in said


@pytest.mark.parametrize("option", ["-o", "--report", "--write-plan"])
def test_the_model_is_never_written_over(option: str, refusal: Refusal) -> None:
    Path("model.json").write_text("mine")
    said = refusal("convert", "model.json", "--recipe", "3x3-only", "--force", option, "./model.json")
    assert said == f"the model and {option} both name model.json; give them two files"
    assert Path("model.json").read_text() == "mine"


@pytest.mark.parametrize("command", ["fuse", "export"])
def test_a_checkpoint_is_never_written_over(command: str, refusal: Refusal) -> None:
    Path("x.pt").write_text("mine")
    said = refusal(command, "x.pt", "-o", "x.pt", "--force")
    assert Path("x.pt").read_text() == "mine"
    assert said == "the checkpoint and -o both name x.pt; give them two files"


def test_existing_default_output(refusal: Refusal) -> None:
    Path("digits-resnet.asym.pt").write_text("mine")
    assert "digits-resnet.asym.pt exists already" in refusal(*CONVERT)


@pytest.mark.parametrize("option", ["--report", "--write-plan"])
def test_existing_report(option: str, refusal: Refusal) -> None:
    Path("r.json").write_text("mine")
    assert "r.json exists already" in refusal(*CONVERT, option, "r.json")


@pytest.mark.parametrize("option", ["-o", "--report", "--write-plan"])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("no/such/r.json", r"the folder no/such does not exist; create it with mkdir -p no/such"),
        ("folder", r"folder is a folder; give a file name in it"),
        ("file/r.json", r"file is not a folder, so r\.json cannot be written there"),
        ("/dev/null", r"/dev/null is a device or a pipe"),
    ],
)
def test_no_such_place(path: str, expected: str, option: str, refusal: Refusal) -> None:
    Path("folder").mkdir()
    Path("file").touch()
    assert re.search(expected, refusal(*CONVERT, option, path, "--force"))


def test_folder_that_cannot_be_written_to(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("locked").mkdir()
    # Root may write everywhere, so the permission is taken from the question, not from the folder.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refusal(*CONVERT, "-o", "locked/x.pt").startswith("the folder locked cannot be written to")


def test_folder_that_refuses_in_the_end(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    assert refusal(*CONVERT, "-o", "x.pt") == "cannot write x.pt: Permission denied"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_full_disk(name: str, existing: bool, refusal: Refusal) -> None:
    if existing:
        Path(name).write_text("mine")
    with files_of_at_most(50_000):
        said = refusal(*CONVERT, "-o", name, "--force")
    assert re.fullmatch(rf"cannot write {re.escape(name)}: .*File too large.*", said)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        place.rmdir()
        pytest.skip("only root may mount a disk, and not everywhere")
    yield place
    subprocess.run(["umount", str(place)], check=True)
    place.rmdir()


@pytest.mark.programs
@pytest.mark.parametrize("name", FORMS)
def test_really_full_disk(name: str, small_disk: Path, run: Any) -> None:
    outcome = run(*CONVERT, "-o", small_disk / name)
    expected = rf"error: cannot write .*/disk/{re.escape(name)}: .*(No space left on device|os error 28).*\n"
    assert outcome.code == 1
    assert re.fullmatch(expected, outcome.err), outcome.err
    assert list(small_disk.iterdir()) == []


def test_full_disk_at_the_report(run: Any) -> None:
    with files_of_at_most(400_000):
        outcome = run(*CONVERT, "-o", "x.pt", "--report", "r.json", "--write-plan", "p.json")
        assert outcome.code == 0
    for name in ("x.pt", "r.json", "p.json"):
        Path(name).unlink()
    with files_of_at_most(500):
        outcome = run(*CONVERT, "--dry-run", "--report", "r.json")
    assert outcome.err == "error: cannot write r.json: File too large\n"
    assert not list(Path().iterdir())


def test_report_that_fails_after_the_model_is_told_of_both(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def fail(path: Path, *arguments: Any, **options: Any) -> int:
        if "r.json" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_bytes", fail)
    outcome = run(*CONVERT, "-o", "x.pt", "--report", "r.json")
    expected = "cannot write r.json: No space left on device; but the model was written to x.pt"
    assert (outcome.code, outcome.err) == (1, f"error: {expected}\n")
    assert [path.name for path in Path().iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; no half-written file is left"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), 1, "cannot write x.pt: PytorchStreamWriter f"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write x.pt: No space left on device"),
        (MemoryError(), 1, "not enough memory; use a smaller model or --input"),
    ],
)
def test_writer_that_stops_halfway(
    raised: BaseException, code: int, said: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object, file: Any) -> None:
        file.write(b"half")
        file.flush()
        assert list(Path().glob(".*.part"))
        raise raised

    monkeypatch.setattr(torch, "save", stop)
    assert refusal(*CONVERT, "-o", "x.pt", code=code).startswith(said)


# A shell that starts the tests in the background has told them to ignore Ctrl-C.
HEEDING = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{CLI}"


@pytest.mark.parametrize("command", [("convert", "slow:net", "--recipe", "all-spatial"), ("candidates", "slow:net")])
def test_ctrl_c(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_NET)
    running = Forked(HEEDING, *command, "--input", "3x16x16", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline and running.process.is_alive():
        time.sleep(0.05)
    assert running.process.pid is not None
    os.kill(running.process.pid, signal.SIGINT)
    done = running.end()
    expected = (130, "", "error: interrupted; no half-written file is left\n")
    assert (done.returncode, done.stdout, done.stderr) == expected
    assert {path.name for path in tmp_path.iterdir()} <= {"slow.py", "started", "__pycache__"}


def test_reader_of_a_pipe_that_has_gone_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "asymswap", *LISTING]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_that_cannot_be_printed(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "asymswap", *LISTING]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: the system refused: No space left on device\n")
