"""What a person sees while and after a command runs: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asymswap.cli.failures import in_flags
from asymswap.training.config import Callback

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from asymswap.results.finetune import EpochRow, RunStart, StepRow
    from asymswap.types import Progress


def console() -> Console:
    """Return the console for results; of unknown width, it is wide enough for complete tables."""
    screen = _console()
    known = screen.is_terminal or "COLUMNS" in os.environ
    return screen if known else _console(width=max(screen.width, 120))


def _console(**options: Any) -> Console:
    """Return a console without bold and dim too under NO_COLOR, and without emoji for names such as `x:bug:y`."""
    from rich.console import Console

    return Console(color_system=None if os.environ.get("NO_COLOR") else "auto", emoji=False, **options)


def show(view: RenderableType, screen: Console) -> None:
    """Print a view."""
    screen.print(view, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print JSON for programs: always the same layout, no colour, and null for numbers that are not finite."""
    from asymswap.results.records import plain

    print(json.dumps(plain(in_flags(value)), indent=2, allow_nan=False))  # noqa: T201


@contextmanager
def progress(quiet: bool, first: str = "loading") -> Iterator[Progress]:
    """Show a bar on stderr while the block runs, one per stage; nothing if stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from asymswap.errors import visible

    name, bar, numbers = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    with Progress(SpinnerColumn(), name, bar, numbers, TimeRemainingColumn(), **_live(quiet)) as bars:
        task = bars.add_task(first, total=None)
        stages = [first]

        def step(stage: str, done: int, total: int) -> None:
            if stage != stages[-1]:
                # Else the time left would be estimated from the previous stage.
                stages.append(stage)
                bars.reset(task, total=total, completed=done, description=visible(stage))
            bars.update(task, description=visible(stage), completed=done, total=total)

        yield step


@contextmanager
def training(quiet: bool) -> Iterator[Callback]:
    """Show a training run on stderr: a line for each epoch, and in a terminal a live one for the steps."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name, words = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[words]"))
    bar, numbers = BarColumn(bar_width=12), MofNCompleteColumn()
    with Progress(name, bar, numbers, words, TimeRemainingColumn(), **_live(quiet)) as live:
        yield _Shown(live, live.console, quiet)


def _live(quiet: bool) -> dict[str, Any]:
    """Return the options of a bar on stderr, which is there while the block runs, and in a terminal only."""
    screen = _console(stderr=True)
    return {"console": screen, "transient": True, "disable": quiet or not screen.is_terminal}


class _Shown(Callback):
    """Shows a training run."""

    def __init__(self, live: Any, screen: Console, quiet: bool) -> None:
        self._live, self._screen, self._quiet = live, screen, quiet
        self._task = live.add_task("loading", total=None, words="")
        self._epochs = 0

    def begin(self, start: RunStart) -> None:
        """Say how long it will be, and where it begins."""
        self._epochs = start.epochs
        self._live.update(self._task, description="epoch 1", completed=start.done, total=start.steps)
        if start.note:
            self._say(start.note)
        if start.done:
            self._say(f"resumed after {start.done} of {start.steps} steps")
        elif start.before is not None:
            from asymswap.reporting.screens import validation_words

            self._say(f"before: validation {validation_words(start.before, loss=True)}")

    def step(self, row: StepRow) -> None:
        """Move the bar."""
        from asymswap.reporting.screens import step_words

        text = f"epoch {row.epoch}/{self._epochs}"
        self._live.update(self._task, description=text, completed=row.step, words=step_words(row))

    def epoch(self, row: EpochRow) -> None:
        """Add a line."""
        from asymswap.reporting.screens import epoch_line

        self._say(epoch_line(row, self._epochs))

    def _say(self, text: str) -> None:
        if not self._quiet:
            # Through a pipe a line stays a line, however long it is.
            self._screen.print(in_flags(text), highlight=False, markup=False, soft_wrap=True)
