"""Where the taps of converted layers have gone: numbers, arrows for a terminal, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.drawing import clean
from asymswap.reporting.figures import new_figure, picture_of
from asymswap.reporting.terminal import table, written
from asymswap.results.offsets import STILL, Offset, OffsetReport, OffsetRow
from asymswap.results.records import plain
from asymswap.results.records import to_json as whole


def to_json(report: OffsetReport) -> dict[str, Any]:
    """Everything as plain data, with what follows from it."""
    rows = [{**plain(row), "average": row.average, "still": row.still} for row in report.rows]
    return whole(report, rows=rows)


def offsets_view(report: OffsetReport) -> RenderableType:
    """A row a layer with an arrow for each tap, and the layers in which nothing has moved."""
    columns = [("Layer", "fold"), ("Kind", "left"), ("Mean", "right"), ("Largest", "right"), ("Limit", "right")]
    columns.append(("Taps", "left"))
    rows: list[list[str | Text]] = [
        [
            row.site,
            row.kind,
            f"{row.average:.2f} px",
            f"{row.largest:.2f} px",
            "-" if row.limit is None else f"{row.limit:g} px",
            Text("\n".join(arrows(row))),
        ]
        for row in report.rows
    ]
    still = [row.site for row in report.rows if row.still]
    lines = [f"No tap has moved by {STILL:g} pixels: {', '.join(still)}."] if still else []
    if any(row.kind.startswith("predicted") for row in report.rows):
        lines.append(f"Predicted offsets: on {report.probe}; their mean over all pixels.")
    lines += fmt.fed_by_model([(report.model, report.fed)])
    lines.append(f"Taps: where each has gone, {_DOT} for less than {STILL:g} pixels.")
    moved = len(report.rows) - len(still)
    return Group(
        written(f"{report.model}: taps have moved in {moved} of {len(report.rows)} layers that can", style="bold"),
        *(written(fmt.sentence(line), style="yellow") for line in report.warnings),
        Text(""),
        table(columns, rows),
        Text(""),
        *(written(line, style="dim") for line in lines),
    )


_DOT = "\N{MIDDLE DOT}"
_ARROWS = "→↘↓↙←↖↑↗"


def arrows(row: OffsetRow) -> list[str]:
    """The kernel as lines of arrows, one a tap, which point where it has gone on average."""
    signs = [_arrow(offset) for offset in row.mean]
    width = row.kernel[1]
    return [" ".join(signs[start : start + width]) for start in range(0, len(signs), width)]


def _arrow(offset: Offset) -> str:
    down, right = offset
    if math.hypot(down, right) < STILL:
        return _DOT
    return _ARROWS[round(math.atan2(down, right) / (math.pi / 4)) % 8]


def draw(report: OffsetReport, form: str) -> bytes:
    """A grid for each layer: its taps as they were, and where they are, as an SVG or PNG picture; needs matplotlib."""
    across = min(4, max(1, len(report.rows)))
    down = max(1, math.ceil(len(report.rows) / across))
    figure = new_figure(2.6 * across, 2.8 * down)
    figure.suptitle(clean(report.model), parse_math=False)
    for number, row in enumerate(report.rows, start=1):
        _draw_layer(figure.add_subplot(down, across, number), row)
    return picture_of(figure, form)


def _draw_layer(axes: Any, row: OffsetRow) -> None:
    places = _places(row)
    ends = [(y + down, x + right) for (y, x), (down, right) in zip(places, row.mean, strict=True)]
    axes.scatter([x for _, x in places], [y for y, _ in places], marker="s", s=40, color="0.8", label="before")
    for (y, x), (end_y, end_x), (tall, wide) in zip(places, ends, row.spread, strict=True):
        axes.plot([x, end_x], [y, end_y], color="tab:blue", linewidth=1)
        if max(tall, wide) > 0:
            axes.errorbar(end_x, end_y, yerr=tall, xerr=wide, color="tab:orange", linewidth=1)
    axes.scatter([x for _, x in ends], [y for y, _ in ends], s=16, color="tab:blue", zorder=3)
    reach = max(0.2, row.largest)
    axes.set_xlim(-0.5 - reach, max(x for _, x in places) + 0.5 + reach)
    axes.set_ylim(max(y for y, _ in places) + 0.5 + reach, -0.5 - reach)
    axes.set_aspect("equal")
    axes.set_title(f"{clean(row.site)}\n{row.kind}" + (", still" if row.still else ""), fontsize=8, parse_math=False)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)


def _places(row: OffsetRow) -> Sequence[tuple[int, int]]:
    """Where the taps stood, (down, right) in pixels from the first one."""
    return [(i * row.dilation[0], j * row.dilation[1]) for i in range(row.kernel[0]) for j in range(row.kernel[1])]
