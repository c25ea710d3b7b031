"""What a person sees while and after a command runs: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from asymswap.spec import Progress


def console() -> Console:
    """The console for results; where nothing says how wide, as wide as a complete table needs."""
    from rich.console import Console

    screen = Console()
    told = screen.is_terminal or "COLUMNS" in os.environ
    return screen if told else Console(width=max(screen.width, 120))


def show(view: RenderableType, screen: Console) -> None:
    """Print a view."""
    screen.print(view, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print JSON for programs: always the same layout, no colour."""
    print(json.dumps(value, indent=2))  # noqa: T201


@contextmanager
def progress(quiet: bool, first: str = "loading") -> Iterator[Progress]:
    """Bars on stderr for as long as the block lasts, one a stage; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    screen = Console(stderr=True)
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=quiet or not screen.is_terminal,
    )
    with bars:
        task = bars.add_task(first, total=None)

        def step(stage: str, done: int, total: int) -> None:
            bars.update(task, description=stage, completed=done, total=total)

        yield step
