"""Progress of verbs in Python: bars where somebody sees them, the caller's function, or nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rich.console
from screens import on_terminal

import asymswap
from asymswap.api import progress
from asymswap.api.progress import shows_progress
from asymswap.errors import AsymswapError
from asymswap.types import Progress, silent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_terminal_shows_it_and_a_pipe_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    def convert(**options: Any) -> None:
        asymswap.convert("digits-resnet", "3x3-only", evaluate="digits", **options)

    assert "evaluating after" in on_terminal(100, convert)
    assert on_terminal(100, lambda: convert(progress=False)) == ""
    stages: set[str] = set()
    assert on_terminal(100, lambda: convert(progress=lambda stage, done, total: stages.add(stage))) == ""
    assert {"evaluating before", "evaluating after"} <= stages
    convert()
    assert capfd.readouterr() == ("", "")


def test_training_is_shown_in_a_terminal_alone(capfd: pytest.CaptureFixture[str]) -> None:
    conversion = asymswap.convert("digits-resnet", "3x3-only", progress=False)

    def tune(**options: Any) -> None:
        asymswap.finetune(conversion, "digits", asymswap.Training(steps=1, workers=0), **options)

    assert "epoch 1/1: loss " in on_terminal(100, tune)
    assert on_terminal(100, lambda: tune(progress=False)) == ""
    tune()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(AsymswapError, match=r"`progress=` takes True or False, not .*; `callback=…` follows a run"):
        tune(progress=lambda *_: None)


@shows_progress
def verb(*, progress: Progress | bool = True) -> object:
    return progress


def test_every_verb_has_it() -> None:
    verbs = ["benchmark", "candidates", "compare", "convert", "evaluate", "export", "finetune", "fuse", "plan", "sweep"]
    for name in verbs:
        assert getattr(asymswap, name).__wrapped__.__name__ == name


def test_a_verb_always_gets_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(stage: str, done: int, total: int) -> None: ...

    assert (verb(), verb(progress=False), verb(progress=True), verb(progress=own)) == (silent, silent, silent, own)
    with pytest.raises(AsymswapError, match=r"`progress=` takes True, False or a function .*, not 'yes'"):
        verb(progress="yes")  # type: ignore[arg-type]
    found: list[object] = []
    on_terminal(80, lambda: found.append(verb()))
    assert found[0] not in (silent, own)
    monkeypatch.setenv("RANK", "1")
    on_terminal(80, lambda: found.append(verb()))
    assert found[1] is silent


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_it(widgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a widget where there are any; else by a line that is written again and again."""
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: object() if widgets else None)
    options = progress._live(False)
    assert options["disable"] is False
    assert options["console"].is_jupyter is widgets
    assert options["console"].is_terminal is not widgets
    if not widgets:
        assert verb() is not silent


def test_what_is_printed_meanwhile_stays_on_stdout() -> None:
    """As a metric prints: with the bars on a terminal and stdout in a file."""

    @contextlib.contextmanager
    def into(path: Path) -> Iterator[None]:
        with path.open("w") as file, contextlib.redirect_stdout(file):
            yield

    @shows_progress
    def prints(*, progress: Progress | bool = True) -> None:
        assert callable(progress)
        progress("working", 0, 2)
        sys.stdout.write("a number\n")
        progress("working", 2, 2)

    def run() -> None:
        with into(Path("out.txt")):
            prints()

    assert "working" in on_terminal(80, run)
    assert Path("out.txt").read_text() == "a number\n"
