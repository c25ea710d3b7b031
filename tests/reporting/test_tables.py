"""Tables for a terminal: names of layers stay whole where there is room, and break at their dots where there is not."""

from __future__ import annotations

import io
from collections.abc import Sequence
from operator import itemgetter

import made_reports as made
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asymswap.reporting.convert import layer_table, report_view
from asymswap.reporting.format import error
from asymswap.reporting.format import settings as in_short
from asymswap.reporting.tables import Column, Table

COLUMNS = [
    Column("Layer", itemgetter(0), side="fold"),
    Column("Conv", itemgetter(1), side="left"),
    Column("MACs", itemgetter(2)),
    Column("Saves", itemgetter(3), side="fold"),
]
REASON = "a 1x1 kernel has nothing to separate"


def shown(width: int, rows: Sequence[Sequence[str]]) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(Table(COLUMNS, rows).terminal(width))
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


def test_wide_columns_are_left_out_of_narrow_terminals() -> None:
    columns = [*COLUMNS[:3], Column("Params", itemgetter(2), least=110)]
    for width, titles in ((109, ["Layer", "Conv", "MACs"]), (110, ["Layer", "Conv", "MACs", "Params"])):
        drawn = Table(columns, [["a", "b", "c"]]).terminal(width)
        assert [column.header for column in drawn.columns] == titles


def test_every_form_of_the_table_of_layers_has_its_sums() -> None:
    told = made.report(made.site(0), made.kept(1))
    table = layer_table(told)
    costs = [column for column in table.columns if column.title in ("MACs", "Params", "after")]
    for column in costs:
        *rows, rest, total = (column.value(row) for row in (*table.rows, *table.sums))
        assert sum(rows) + rest == total
    last = table.markdown().splitlines()[-1]
    assert last.startswith("| **total** |")
    assert f"| **{told.before.macs:,}** | **{told.after.macs:,}** |" in last


def test_markdown_holds_every_column_and_no_markup_of_others() -> None:
    columns = [Column("Name", itemgetter(0), side="fold", code=True), Column("Why", itemgetter(1), side="left")]
    columns.append(Column("MACs", itemgetter(2), "{:.0e}".format, exact="{:,}".format, least=999))
    assert Table(columns, [["a|b", "*x*", 12345], ["c", None, None]]).markdown().splitlines() == [
        "| Name | Why | MACs |",
        "| --- | --- | ---: |",
        r"| `a\|b` | \*x\* | 12,345 |",
        "| `c` | - | - |",
    ]


def test_what_was_kept_is_named_where_it_is_little() -> None:
    rows = [made.kept(0, "few", site="a"), *(made.kept(number, "many") for number in range(4))]
    rows.append(made.kept(9, "few", site="c"))
    console = Console(file=io.StringIO(), width=120)
    console.print(report_view(made.report(*rows), 120))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Kept: 4 convs: many; 2 convs (a, c): few\n" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-7, "1e-07"), (0.25, "25.0 %"), (9.99, "999.0 %"), (1225.4, "1,225 x")],
)
def test_errors(value: float, text: str) -> None:
    assert error(value) == text


def test_sizes_are_written_as_in_recipes() -> None:
    assert in_short({"kernel": [5, 3], "order": "vertical-first", "bias": True}) == "kernel 5x3, vertical, bias"
