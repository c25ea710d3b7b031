"""What a person sees after a command has run: results on stdout."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from asymswap.api.progress import plain_console
from asymswap.cli.failures import in_flags

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def console() -> Console:
    """Return the console for results; of unknown width, it is wide enough for complete tables."""
    screen = plain_console()
    known = screen.is_terminal or "COLUMNS" in os.environ
    return screen if known else plain_console(width=max(screen.width, 120))


def show(view: RenderableType, screen: Console) -> None:
    """Print a view."""
    screen.print(view, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print JSON for programs: always the same layout, no colour, and null for numbers that are not finite."""
    from asymswap.results.records import plain

    print(json.dumps(plain(in_flags(value)), indent=2, allow_nan=False))  # noqa: T201
