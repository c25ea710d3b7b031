"""Results on a screen of some columns, as text, in one line, and as HTML for a notebook.

`asymswap.types.Shown`, the base of all results, finds this module by its name.
"""

from __future__ import annotations

import importlib
import io
import shutil
from typing import Any

from rich.console import Console

from asymswap.errors import visible
from asymswap.reporting.pages import render
from asymswap.reporting.tables import Screen, Table

_ALL = 1000
"""A width at which every column is shown."""


def view(result: Any, width: int | None) -> Screen:
    """Return a result, or the report of one that holds a model, as a screen of some columns; None shows all of it."""
    shown = result if result._view else result.report
    room, _, name = shown._view.partition(".")
    found: Screen = getattr(importlib.import_module(f"asymswap.reporting.{room}"), name)(shown, width)
    return found


def to_text(result: Any) -> str:
    """Return what the command line prints, at the terminal's width, or 100 columns where there is none."""
    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(file=io.StringIO(), width=width, color_system=None, emoji=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(view(result, width), highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def to_line(result: Any) -> str:
    """Return the name of a result's class, its title and the first of its figures before and after."""
    screen = view(result, _ALL)
    several = ", ".join(row.model for row in getattr(result, "models", ()))
    text = ": ".join(filter(None, (several, screen.title)))
    rows = [row for item in screen.items if isinstance(item, Table) and item.cards for row in item.rows]
    if rows:
        text += f", {rows[0].name} {rows[0].show(rows[0].before)} -> {rows[0].show(rows[0].after)}"
    return f"<{type(result).__name__} {visible(text)}>"


def to_fragment(result: Any) -> str:
    """Return a result as a part of a page: its style is for this part alone, and all text in it is escaped."""
    screen = view(result, _ALL)
    items = [item if isinstance(item, Table) else str(item) for item in screen.items]
    return render("fragment.html.j2", sheet="fragment.css", screen=screen, items=items)
