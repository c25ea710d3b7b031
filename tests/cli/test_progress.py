"""What a terminal shows while a command works: a bar with the time left for each stage; nothing with --quiet."""

from __future__ import annotations

import functools
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import rich.progress
from screens import on_terminal

from asymswap.api.progress import bars
from asymswap.cli.commands import SUMMARIES
from asymswap.cli.main import main


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_the_time_left_is_that_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar that is full has no time left; the next stage, of as many steps, must not take that over."""
    made: list[rich.progress.Progress] = []

    class Seen(rich.progress.Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options)
            made.append(self)

    monkeypatch.setattr(rich.progress, "Progress", Seen)

    def work() -> None:
        with bars() as step:
            (task,) = made[0].tasks
            step("evaluating before", 9, 9)
            assert task.time_remaining == 0
            step("evaluating after", 0, 9)
            assert (task.description, task.completed, task.total) == ("evaluating after", 0, 9)
            assert task.time_remaining is None
            step("evaluating after", 4, 9)
            step("evaluating after", 8, 9)
            assert task.time_remaining is not None

    assert "evaluating after" in on_terminal(100, work)


QUIET = [
    "candidates digits-resnet --plot p.svg",
    "convert digits-resnet --recipe 3x3-only",
    "recipes",
    "recipes mine.toml",
    "doctor",
    "show digits-resnet.asym.pt --report r.html",
    "show offset.pt --offsets",
    "compare digits-resnet digits-resnet.asym.pt --no-latency",
    "benchmark digits-resnet --rounds 1 --layers 0",
    "sweep digits-resnet --recipe half-macs --macs 0.5 --evaluate digits",
    "evaluate digits-resnet --data digits",
    "finetune digits-resnet.asym.pt --data digits --steps 1 --workers 0 --device cpu",
    "fuse offset.pt",
    "export offset.pt --to state-dict",
]


def called(line: str) -> int:
    """The exit code of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["asymswap", *shlex.split(line)])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


def succeeds(line: str) -> None:
    assert called(line) == 0


@pytest.fixture
def _files(capfd: pytest.CaptureFixture[str]) -> None:
    assert called("convert digits-resnet --recipe offset -o offset.pt -q") == 0
    Path("mine.toml").write_text('[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "acb" }\n')


@pytest.mark.usefixtures("_files")
def test_every_command_can_be_silent() -> None:
    """On a terminal, where both progress and results would show; files are written all the same."""
    commands = {line.split()[0] for line in QUIET}
    assert commands == set(SUMMARIES) - {"task"}  # which prints a file
    for line in QUIET:
        assert on_terminal(80, functools.partial(succeeds, f"{line} --quiet")) == "", line
    assert all(Path(name).exists() for name in ("p.svg", "r.html", "digits-resnet.sweep.json", "offset.fused.pt"))


@pytest.mark.usefixtures("_files")
def test_what_was_asked_for_as_data_is_printed_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    for line in ("candidates digits-resnet --json", "recipes --schema", "recipes 3x3-only", "show offset.pt --plan"):
        assert called(f"{line} --quiet") == 0
        assert capfd.readouterr().out.strip(), line
