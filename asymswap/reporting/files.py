"""Which form a report file takes, by its ending."""

from __future__ import annotations

import json
from pathlib import Path

from asymswap.errors import OutputError, near_names
from asymswap.reporting.markdown import to_markdown
from asymswap.results.convert import Report
from asymswap.results.provenance import Making
from asymswap.results.records import to_json

SUFFIXES = (".html", ".json", ".md")


def check_suffix(path: Path) -> None:
    """Raise OutputError for an ending that stands for no form of a report."""
    if path.suffix not in SUFFIXES:
        hint = near_names(path.suffix, SUFFIXES)
        raise OutputError(f"--report {path}: the file must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}{hint}")


def report_text(report: Report, making: Making, path: Path) -> str:
    """The report in the form that the file's ending stands for."""
    if path.suffix == ".html":
        from asymswap.reporting.html import to_html

        return to_html(report, making)
    return (
        to_markdown(report) if path.suffix == ".md" else json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    )
