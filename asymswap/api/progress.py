"""What is seen while a verb runs: by default a bar in a terminal and in a notebook, nothing elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from asymswap.errors import AsymswapError, visible
from asymswap.results.finetune import EpochRow, RunStart, StepRow
from asymswap.training.config import Callback
from asymswap.types import Progress, silent

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")
T = TypeVar("T")
Shows: TypeAlias = Any
"""What `progress=` takes, True, False or a function of (stage, done, total); the verb itself gets a function."""


def shows_progress(verb: Callable[P, T]) -> Callable[P, T]:
    """Let a verb show bars where its `progress` is True and somebody sees them; what it gets is always a function.

    A verb that trains gets a `callback` in the same way.
    """
    trains = "callback" in inspect.signature(verb).parameters
    name, show, nothing = ("callback", training, None) if trains else ("progress", bars, silent)

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        given: Any = kwargs.get(name) or kwargs.get("progress", True)
        if not isinstance(given, bool | Callback | None) and (trains or not callable(given)):
            what = "True or False" if trains else "True, False or a function of (stage, done, total)"
            own = "; `callback=…` follows a run" if trains else ""
            raise AsymswapError(f"`progress=` takes {what}, not {given!r:.60}{own}")
        with ExitStack() as stack:
            if given is True:
                # Of several processes the first shows them.
                alone = os.environ.get("RANK", "0") == "0"
                given = stack.enter_context(show()) if alone and not _live(False)["disable"] else nothing
            kwargs[name] = given or nothing
            return verb(*args, **kwargs)

    return run


def plain_console(**options: Any) -> Console:
    """Return a console without bold and dim too under NO_COLOR, and without emoji for names such as `x:bug:y`."""
    from rich.console import Console

    return Console(color_system=None if os.environ.get("NO_COLOR") else "auto", emoji=False, **options)


@contextmanager
def bars(quiet: bool = False) -> Iterator[Progress]:
    """Show a bar on stderr while the block runs, one per stage; nothing but in a terminal or a notebook."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    name, bar, numbers = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    with Progress(SpinnerColumn(), name, bar, numbers, TimeRemainingColumn(), **_live(quiet)) as bars:
        task = bars.add_task("loading", total=None)

        def step(stage: str, done: int, total: int) -> None:
            if visible(stage) != bars.tasks[0].description:
                # Else the time left would be estimated from the previous stage.
                bars.reset(task, total=total, completed=done, description=visible(stage))
            bars.update(task, completed=done, total=total)

        yield step


@contextmanager
def training(quiet: bool = False, say: Callable[[str], str] = str) -> Iterator[Callback]:
    """Show a training run on stderr: a line an epoch, put by `say`, and in a terminal a live one for the steps."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from asymswap.reporting.screens import epoch_line, step_words, validation_words

    def tell(text: str) -> None:
        if not quiet:
            # Through a pipe a line stays a line, however long it is.
            live.console.print(say(text), highlight=False, markup=False, soft_wrap=True)

    class Shown(Callback):
        def begin(self, start: RunStart) -> None:
            self.epochs = start.epochs
            live.update(task, description="epoch 1", completed=start.done, total=start.steps)
            if start.note:
                tell(start.note)
            if start.done:
                tell(f"resumed after {start.done} of {start.steps} steps")
            elif start.before is not None:
                tell(f"before: validation {validation_words(start.before, loss=True)}")

        def step(self, row: StepRow) -> None:
            live.update(task, description=f"epoch {row.epoch}/{self.epochs}", completed=row.step, words=step_words(row))

        def epoch(self, row: EpochRow) -> None:
            tell(epoch_line(row, self.epochs))

    name, words = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[words]"))
    bar, numbers = BarColumn(bar_width=12), MofNCompleteColumn()
    with Progress(name, bar, numbers, words, TimeRemainingColumn(), **_live(quiet)) as live:
        task = live.add_task("loading", total=None, words="")
        yield Shown()


def _live(quiet: bool) -> dict[str, Any]:
    """Return the options of a bar on stderr, which is there while the block runs, in a terminal or a notebook only."""
    screen = plain_console(stderr=True)
    seen = screen.is_terminal or screen.is_jupyter
    if screen.is_jupyter and importlib.util.find_spec("ipywidgets") is None:
        # Without widgets, rich shows a warning and no bar.
        screen = plain_console(stderr=True, force_jupyter=False, force_terminal=True)
    # What a metric prints must not go to stderr where only stdout is a file.
    return {"console": screen, "transient": True, "disable": quiet or not seen, "redirect_stdout": sys.stdout.isatty()}
