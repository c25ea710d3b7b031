"""A file that changes while it is read is refused, so that the SHA-256 in a report is that of what was loaded."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asymswap
from asymswap.errors import CheckpointError, SourceError
from asymswap.models import opening
from asymswap.models.networks import digits_resnet
from asymswap.utils.files import fail_if_modified

Refusal = Callable[..., str]
CHANGED = r"changed while it was being read; run again when nothing writes to it"


def write_to(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write_over(path: Path) -> None:
    """The same size, and even the same time of change as far as programs can set it."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_it(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


CHANGES = [write_to, cut_off, write_over, replace_it, Path.unlink]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"1234")
    with pytest.raises(SourceError, match=CHANGED), fail_if_modified(path):
        change(path)


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_wrong_meanwhile_is_the_change_s_doing(change: Callable[[Path], None], tmp_path: Path) -> None:
    def read() -> None:
        with fail_if_modified(path):
            change(path)
            raise CheckpointError("x.pt is damaged")

    path = tmp_path / "x.pt"
    path.write_bytes(b"1234")
    with pytest.raises(SourceError, match=CHANGED):
        read()


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"1234")
    with fail_if_modified(path):
        path.read_bytes()
    with pytest.raises(CheckpointError, match="x is damaged"), fail_if_modified(path):
        raise CheckpointError("x is damaged")
    with pytest.raises(SourceError, match="no file"), fail_if_modified(tmp_path / "none"):
        raise SourceError("no file")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "x.pt"
    torch.manual_seed(0)
    torch.save(digits_resnet().state_dict(), path)
    return path


READERS = (
    ("convert", "x.pt", "--arch", "digits-resnet", "--recipe", "3x3-only", "-o", "y.pt"),
    ("convert", "digits-resnet", "--weights", "x.pt", "--recipe", "3x3-only", "-o", "y.pt"),
)


@pytest.mark.parametrize("arguments", READERS)
@pytest.mark.parametrize("change", [cut_off, write_over, replace_it])
def test_a_source_that_changes_after_it_was_read_makes_no_report(
    change: Callable[[Path], None],
    arguments: tuple[str, ...],
    model: Path,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_raw = opening.read_raw

    def read_and_change(path: Path, *others: Any) -> Any:
        loaded = read_raw(path, *others)
        change(path)
        return loaded

    monkeypatch.setattr(opening, "read_raw", read_and_change)
    outcome = run(*arguments)
    assert outcome.code == 1
    assert re.fullmatch(rf"error: x\.pt {CHANGED}\n", outcome.err)
    assert not Path("y.pt").exists()


@pytest.mark.parametrize("arguments", READERS)
def test_the_sha256_told_is_that_of_the_file(arguments: tuple[str, ...], model: Path, run: Any) -> None:
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert run(*arguments).code == 0
    assert digest in run("show", "y.pt").out


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        ({"state_dict": 0}, (), None),
        ({"state_dict": 0}, ("--trust-pickle",), "was not needed: nothing in x.pt was executed"),
        (
            {"state_dict": 0, "x": slice(1)},
            ("--trust-pickle",),
            "code in x.pt was executed to read it (",
        ),
    ],
)
@pytest.mark.parametrize("arguments", READERS)
def test_the_report_says_whether_code_was_executed(
    value: dict[str, Any],
    options: tuple[str, ...],
    expected: str | None,
    arguments: tuple[str, ...],
    model: Path,
    run: Any,
) -> None:
    torch.save({**value, "state_dict": torch.load(model, weights_only=True)}, model)
    outcome = run(*arguments, *options, "--json")
    assert outcome.code == 0, outcome.err
    if expected is None:
        assert "executed" not in outcome.out
    else:
        assert expected in outcome.out
        assert expected.lower() in " ".join(run(*arguments, *options, "--force").out.split()).lower()


@pytest.mark.parametrize("content", [{"x": slice(1)}, {"weight": torch.ones(1), "x": slice(1)}])
def test_a_file_that_is_of_no_use_once_it_has_run_is_told_of_too(content: object, refusal: Refusal) -> None:
    torch.save(content, "x.pt")
    said = refusal("candidates", "x.pt", "--trust-pickle")
    assert re.search(r"holds no state_dict: .*; code in x\.pt was executed to read it \(.*\)$", said)


def test_the_library_says_so_too(model: Path) -> None:
    conversion = asymswap.convert(asymswap.open_model(model, arch="digits-resnet", trust_pickle=True), "3x3-only")
    assert "`trust_pickle=True` was not needed: nothing in x.pt was executed" in conversion.report.model.notes
