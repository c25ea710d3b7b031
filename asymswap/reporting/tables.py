"""Tables and screens for a terminal, Markdown and HTML; `asymswap.types.Shown` finds the functions `to_…` by name."""

import json
import pkgutil
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import rich.table
from rich.console import Console, Group, RenderableType
from rich.text import Text

from asymswap.errors import visible
from asymswap.reporting import format as fmt
from asymswap.reporting.pages import render
from asymswap.results.evaluate import Score
from asymswap.results.records import to_json

WIDE = 110  # terminals of at least this many columns show more columns of most tables
_ALL = 1000  # columns, at which all are shown
# Text that may break its lines keeps at least this many characters, prose beside names in one piece more.
_LEAST, _LEAST_PROSE = 12, 19


@dataclass(frozen=True)
class Column:
    """One column: its title, what a row gives for it, and how to write that value; None is written `-`."""

    title: str
    of: str | Callable[[Any], Any]  # a function of the row, or the path of a field, any part of which may be None
    show: Callable[[Any], str | Text] = str
    side: Literal["left", "right", "fold"] = "right"  # what folds may break its lines
    least: int = 0  # the width from which on a terminal shows the column
    exact: Callable[[Any], str] | None = None  # writes a value with all its digits, for Markdown
    code: bool = False  # names that Markdown sets as code
    about: str = ""  # the tooltip of the heading in HTML

    def value(self, row: Any) -> Any:
        if callable(self.of):
            return self.of(row)
        return reduce(lambda one, name: None if one is None else getattr(one, name), self.of.split("."), row)

    def text(self, row: Any, none: str = "-", exact: bool = False) -> str | Text:
        if (value := self.value(row)) is None:
            return none
        return self.exact(value) if exact and self.exact else self.show(value)


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]  # the first names the rows
    rows: Sequence[Any]
    sums: Sequence[Any] = ()  # rows below the others, the last of which is the total
    gap: int = 2  # blanks between the columns in a terminal
    cards: bool = False  # the rows are figures before and after, which a page draws as cards

    def __bool__(self) -> bool:
        return bool(self.rows)

    def terminal(self, width: int | None = None) -> rich.table.Table:
        """Return the table for a terminal, None: of any width; in a narrow one, names of rows break at their dots."""
        columns = [column for column in self.columns if width is None or column.least <= width]
        titles = [column.title for column in columns]
        cells = [[written(column.text(row)) for column in columns] for row in self.rows]
        cells += [[written(column.text(row, none="")) for column in columns] for row in self.sums]
        folds = [number for number, column in enumerate(columns) if column.side == "fold"]
        sizes = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        if width is not None and folds:
            names, *prose = folds
            taken = sum(min(size, _LEAST_PROSE) if number in prose else size for number, size in enumerate(sizes))
            room = width - (taken - sizes[names]) - self.gap * (len(columns) - 1)
            if room >= _LEAST:
                folds = prose
                # Lines end after a dot, or where they are full if there is none.
                parts = re.compile(rf".{{1,{room}}}(?:(?<=\.)|$)|.{{1,{room}}}", re.DOTALL)
                for row in cells:
                    row[names] = Text("\n".join(parts.findall(row[names].plain)), row[names].style)
        drawn = rich.table.Table(box=None, pad_edge=False, padding=(0, self.gap, 0, 0), header_style="bold")
        drawn.show_header = any(titles)
        for number, column in enumerate(columns):
            drawn.add_column(
                visible(column.title),
                justify="right" if column.side == "right" else "left",
                min_width=min(sizes[number], _LEAST) if number in folds else None,
                no_wrap=number not in folds,
                overflow="fold" if number in folds else "ellipsis",
            )
        for row in cells:
            drawn.add_row(*row)
        return drawn

    def markdown(self) -> str:
        """Return the table as Markdown, every column shown."""
        lines = [[fmt.markdown_text(column.title) for column in self.columns]]
        lines.append(["---:" if column.side == "right" else "---" for column in self.columns])
        lines += [[fmt.markdown_text(str(c.text(row, exact=True)), c.code) for c in self.columns] for row in self.rows]
        for row in self.sums:
            sums = [fmt.markdown_text(str(column.text(row, "", exact=True))) for column in self.columns]
            lines.append([f"**{cell}**" if cell and row is self.sums[-1] else cell for cell in sums])
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def written(text: str | Text, style: str = "") -> Text:
    """Return text for a terminal, with nothing in it that the terminal, or rich, would obey."""
    return text if isinstance(text, Text) else Text(visible(text), style)


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values, without empty values."""
    columns = (Column("", itemgetter(0), visible, "left"), Column("", itemgetter(1), visible, "fold"))
    return Table(columns, [pair for pair in pairs if pair[1]])


@dataclass(frozen=True)
class Change:
    """A headline figure before and after, how to write it, and its difference if that is not a share of it."""

    name: str
    before: float
    after: float
    show: Callable[[Any], str] = fmt.count
    exact: Callable[[Any], str] = "{:,}".format
    difference: str = ""
    remark: str = ""

    @property
    def left(self) -> str:
        return self.difference or fmt.share(self.after, self.before)


def changes(rows: Sequence[Change]) -> Table:
    columns = (
        Column("", "name", side="left"),
        Column("before", lambda row: row, lambda row: row.show(row.before), exact=lambda row: row.exact(row.before)),
        Column("after", lambda row: row, lambda row: row.show(row.after), exact=lambda row: row.exact(row.after)),
        Column("left", "left"),
    )
    return Table(columns, rows, cards=True)


def score_column(score: Score, change: bool = False, least: int = 0) -> Column:
    """Return the scores of this name, `-` where a row has none, as of top-5 of few classes; or their changes."""

    def value(row: Any) -> float | None:
        return next((one.value - score.value * change for one in row.scores if one.name == score.name), None)

    return Column(score.name, value, partial(fmt.score_change if change else fmt.score, unit=score.unit), least=least)


@dataclass(frozen=True)
class Screen:
    """Title, warnings, blocks and fine print, without what of them is empty; without a width, all columns of tables."""

    title: str
    warnings: Sequence[str]
    blocks: Sequence[Sequence[str | Text | Table]]
    fine_print: Sequence[str] = ()
    width: int | None = None

    @property
    def items(self) -> list[str | Text | Table]:
        return [item for block in self.blocks for item in block if item]

    def __rich__(self) -> RenderableType:
        first = [written(self.title, "bold"), *(written(fmt.sentence(line), "yellow") for line in self.warnings)]
        last = [written(line, "dim") for line in self.fine_print]
        parts: list[RenderableType] = []
        for block in (first, *self.blocks, last):
            parts += [Text("")] if parts and any(block) else []
            parts += [item.terminal(self.width) if isinstance(item, Table) else written(item) for item in block if item]
        return Group(*parts)

    def markdown(self) -> str:
        """Return the screen as a document of Markdown, with all columns of its tables."""
        texts = [f"# {fmt.markdown_text(self.title)}"] if self.title else []
        for item in (*(written(fmt.sentence(line), "bold") for line in self.warnings), *self.items):
            text = item.markdown() if isinstance(item, Table) else fmt.markdown_text(str(item))
            texts.append(f"**{text}**" if isinstance(item, Text) else text)
        texts.append("\n".join(f"- {fmt.markdown_text(line)}" for line in self.fine_print if line))
        return "\n\n".join(filter(None, texts)) + "\n"


def kept_lines(kept: Iterable[Any]) -> list[str]:
    """Return why sites were kept, the commonest reason first, with their number; up to three are named."""
    sites: dict[str, list[str]] = {}
    for row in kept:
        sites.setdefault(row.reason, []).append(row.site)
    return [
        fmt.plural(len(names), "conv") + (f" ({', '.join(names)})" if len(names) <= 3 else "") + f": {reason}"
        for reason, names in sorted(sites.items(), key=lambda item: -len(item[1]))
    ]


def view(result: Any, width: int | None) -> Screen:
    """Return a result, or the report of one that holds a model, as a screen of some columns; None shows all of it."""
    shown = result if result._view else result.report
    found: Screen = pkgutil.resolve_name(f"asymswap.reporting.{shown._view}")(shown, width)
    return found


def to_text(result: Any) -> str:
    """Return what the command line prints, at the terminal's width, or 100 columns where there is none."""
    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(width=width, color_system=None, emoji=False, force_jupyter=False)
    with console.capture() as printed:
        console.print(view(result, width), highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in printed.get().splitlines())


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
    return to_page(result, "", "fragment.html.j2", "fragment.css")


def to_page(result: Any, title: str, template: str = "page.html.j2", sheet: str = "report.css") -> str:
    """Return a result as a whole page, which needs no other file."""
    screen = view(result, _ALL)
    items = [item if isinstance(item, Table) else str(item) for item in screen.items]
    return render(template, sheet=sheet, screen=screen, items=items, title=title)


def to_file(result: Any, path: Path, page: Callable[[Any], str]) -> str:
    """Return a result in the form of the file's ending: what `page` makes of it, Markdown, or JSON."""
    if path.suffix == ".html":
        return page(result)
    if path.suffix == ".md":
        return view(result, None).markdown()
    return json.dumps(to_json(result), indent=2, allow_nan=False) + "\n"
