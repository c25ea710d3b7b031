"""What every form of a report says before any figure."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from made_reports import PROVENANCE, report, site
from rich.console import Console

from asymswap.reporting.convert import report_view, to_html
from asymswap.reporting.tables import view
from asymswap.results.convert import OutputChange, Report


def in_terminal(told: Report) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(report_view(told, 100))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


FORMS = [in_terminal, lambda told: view(told, None).markdown(), lambda told: to_html(told, PROVENANCE)]


@pytest.mark.parametrize("form", FORMS)
def test_warnings_come_before_any_figure(form: Callable[[Report], str]) -> None:
    warning = "the images were normalised by a guess"
    text = form(replace(report(site(0)), warnings=(warning,)))
    body = text.partition("<body>")[2] or text
    assert body.index(warning[1:]) < body.index("MACs")
    assert warning[1:] not in form(replace(report(site(0)), warnings=()))


@pytest.mark.parametrize("form", FORMS)
def test_outputs_on_patches_are_told_with_their_size(form: Callable[[Report], str]) -> None:
    """The page used to give the size of the model's input."""
    told = report(site(0), output=OutputChange(0.1, 2.0, "32 patches", "3x64x64"))
    assert "32 patches of 3x64x64" in " ".join(form(told).split())
