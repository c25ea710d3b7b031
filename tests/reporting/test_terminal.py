"""Tables for a terminal: names of layers stay whole where there is room, and break at their dots where there is not."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asymswap.reporting.format import error, kept
from asymswap.reporting.format import settings as in_short
from asymswap.reporting.terminal import table
from asymswap.results.convert import SiteRow
from asymswap.types import Cost

COLUMNS = [("Layer", "fold"), ("Conv", "left"), ("MACs", "right"), ("Saves", "fold")]
REASON = "a 1x1 kernel has nothing to separate"


def shown(width: int, rows: Sequence[Sequence[str]]) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(COLUMNS, rows, width=width))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_names_are_whole_and_prose_breaks() -> None:
    lines = shown(60, [["backbone.layer1.0.conv1", "64->64", "12.8 M", REASON]])
    assert [line.split("  ")[0] for line in lines] == ["Layer", "backbone.layer1.0.conv1", ""]
    assert lines[2].endswith("nothing to separate")


def test_names_break_at_dots() -> None:
    lines = shown(50, [["backbone.layer1.0.conv1", "64->64", "12.8 M", REASON]])
    assert [line.split("  ")[0] for line in lines] == ["Layer", "backbone.", "layer1.0.", "conv1"]


@given(
    st.lists(st.text("abcdefgh0123_", min_size=1, max_size=30), min_size=1, max_size=8).map(".".join),
    st.integers(50, 130),
)
def test_nothing_is_lost_and_nothing_is_too_wide(name: str, width: int) -> None:
    lines = shown(width, [[name, "64->64 3x3", "12.8 M", REASON]])
    assert all(len(line) <= width for line in lines)
    edge = lines[0].index("Conv")
    assert "".join(line[:edge].strip() for line in lines[1:]) == name
    assert REASON.split() == " ".join(line[lines[0].index("Saves") :] for line in lines[1:]).split()


def row(site: str, reason: str) -> SiteRow:
    cost = Cost(1, 1)
    return SiteRow(site, "3->3 1x1", None, 1, "keep", None, "", {}, reason, cost, cost)


def test_what_was_kept_is_named_where_it_is_little() -> None:
    rows = [row("a", "few"), *(row(f"b{number}", "many") for number in range(4)), row("c", "few")]
    assert kept(rows) == ["4 convs: many", "2 convs (a, c): few"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (1e-7, "1e-07"), (0.25, "25.0 %"), (9.99, "999.0 %"), (1225.4, "1,225 x")],
)
def test_errors(value: float | None, text: str) -> None:
    assert error(value) == text


def test_sizes_are_written_as_in_recipes() -> None:
    assert in_short({"kernel": [5, 3], "order": "vertical-first", "bias": True}) == "kernel 5x3, vertical, bias"
