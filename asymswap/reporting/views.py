"""How each result is shown: on a screen of some columns, as text, in one line, and as HTML for a notebook.

`asymswap.types.Shown`, the base of all results, finds this module by its name.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from typing import Any

from rich.console import Console

from asymswap.errors import visible
from asymswap.reporting import format as fmt
from asymswap.reporting.benchmark import benchmark_view
from asymswap.reporting.candidates import candidates_view
from asymswap.reporting.compare import comparison_view
from asymswap.reporting.convert import report_view
from asymswap.reporting.offsets import offsets_view
from asymswap.reporting.pages import percent_of, render
from asymswap.reporting.screens import evaluation_view, export_view, fusion_view, plan_view, training_view
from asymswap.reporting.sweep import sweep_view
from asymswap.reporting.tables import Change, Screen, Table
from asymswap.results.benchmark import Benchmark
from asymswap.results.candidates import Candidates
from asymswap.results.compare import Comparison
from asymswap.results.convert import Report
from asymswap.results.evaluate import EvaluationReport
from asymswap.results.export import ExportReport
from asymswap.results.finetune import TrainingReport
from asymswap.results.fuse import FusionReport
from asymswap.results.offsets import OffsetReport
from asymswap.results.sweep import Tradeoff
from asymswap.types import Plan

_VIEWS: dict[type, Callable[[Any, int], Screen]] = {
    Benchmark: benchmark_view,
    Candidates: candidates_view,
    Comparison: comparison_view,
    EvaluationReport: evaluation_view,
    ExportReport: lambda report, _: export_view(report),
    FusionReport: lambda report, _: fusion_view(report),
    OffsetReport: lambda report, _: offsets_view(report),
    Plan: lambda plan, _: plan_view(plan),
    Report: report_view,
    Tradeoff: lambda sweep, _: sweep_view(sweep),
    TrainingReport: lambda report, _: training_view(report),
}
_TITLES: dict[type, Callable[[Any], str]] = {
    Benchmark: lambda found: f"{_names(found)}: {fmt.plural(len(found.settings), 'setting')} timed",
    Comparison: lambda found: f"{_names(found)} compared",
    EvaluationReport: lambda found: f"{_names(found)} on {found.data}",
}
"""Of results whose screens have no title, or one that does not say enough alone."""

_ALL = 1000
"""A width at which every column is shown."""


def _names(found: Any) -> str:
    return ", ".join(row.model for row in found.models)


def view(result: Any, width: int) -> Screen:
    """Return a result, or the report of one that holds a model, as a screen of some columns."""
    shown = getattr(result, "report", result)
    return _VIEWS[type(shown)](shown, width)


def to_text(result: Any) -> str:
    """Return what the command line prints, at the terminal's width, or 100 columns where there is none."""
    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(file=io.StringIO(), width=width, color_system=None, emoji=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(view(result, width), highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def to_line(result: Any) -> str:
    """Return the name of a result's class, its title and the first of its figures before and after."""
    shown = getattr(result, "report", result)
    screen = view(result, _ALL)
    title = _TITLES[type(shown)](shown) if type(shown) in _TITLES else screen.title
    tables = (item for item in screen.items if isinstance(item, Table))
    figure = next((row for table in tables for row in table.rows if isinstance(row, Change)), None)
    change = f", {figure.name} {figure.show(figure.before)} -> {figure.show(figure.after)}" if figure else ""
    return f"<{type(result).__name__} {visible(title)}{change}>"


def to_fragment(result: Any) -> str:
    """Return a result as a part of a page: its style is for this part alone, and all text in it is escaped."""
    screen = view(result, _ALL)
    parts: list[tuple[str, Any]] = []
    for item in screen.items:
        if isinstance(item, Table):
            parts.append(("cards" if isinstance(item.rows[0], Change) else "table", item))
        else:
            parts.append(("text", str(item)))
    return render(
        "fragment.html.j2",
        sheet="fragment.css",
        title=screen.title,
        warnings=[fmt.sentence(line) for line in screen.warnings],
        parts=parts,
        fine_print=screen.fine_print,
        fmt=fmt,
        percent_of=percent_of,
    )
