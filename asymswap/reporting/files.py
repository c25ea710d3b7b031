"""Which form a report file takes, by its ending."""

from __future__ import annotations

import json
from pathlib import Path

from asymswap.errors import OutputError, near_names
from asymswap.reporting.markdown import to_markdown
from asymswap.reporting.report import Report, to_json

SUFFIXES = (".json", ".md")


def check_suffix(path: Path) -> None:
    """Raise OutputError for an ending that stands for no form of a report."""
    if path.suffix not in SUFFIXES:
        hint = near_names(path.suffix, SUFFIXES)
        raise OutputError(f"--report {path}: the file must end in {' or '.join(SUFFIXES)}{hint}")


def report_text(report: Report, path: Path) -> str:
    """The report in the form that the file's ending stands for."""
    return to_markdown(report) if path.suffix == ".md" else json.dumps(to_json(report), indent=2) + "\n"
