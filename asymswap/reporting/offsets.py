"""How the offsets of taps are shown: as numbers, as arrows for a terminal, and as a plot."""

import itertools
import math

from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.pages import new_figure, picture_of
from asymswap.reporting.tables import Column, Screen, Table
from asymswap.results.convert import STILL, OffsetReport, OffsetRow

_DOT = "\N{MIDDLE DOT}"
_ARROWS = "→↘↓↙←↖↑↗"


def offsets_view(report: OffsetReport, width: int | None = None) -> Screen:
    """Return a row for each layer with an arrow for each tap, and the layers in which nothing has moved."""
    columns = (
        Column("Layer", "site", side="fold"),
        Column("Kind", "kind", side="left"),
        Column("Mean", "average", "{:.2f} px".format),
        Column("Largest", "largest", "{:.2f} px".format),
        Column("Limit", "limit", "{:g} px".format),
        Column("Taps", arrows, lambda rows: Text("\n".join(rows)), side="left"),
    )
    still = [row.site for row in report.rows if row.still]
    lines = [f"No tap has moved by {STILL:g} pixels: {', '.join(still)}."] if still else []
    if any(row.kind.startswith("predicted") for row in report.rows):
        lines.append(f"Predicted offsets: on {report.probe}; their mean over all pixels.")
    lines += fmt.fed_by_model([(report.model, report.fed)])
    lines.append(f"Taps: where each has gone, {_DOT} for less than {STILL:g} pixels.")
    title = f"{report.model}: taps have moved in {len(report.rows) - len(still)} of {len(report.rows)} layers that can"
    return Screen(title, report.warnings, [[Table(columns, report.rows)]], lines, width)


def arrows(row: OffsetRow) -> list[str]:
    """Return the kernel as lines of arrows, one for each tap, which point where it has moved on average."""
    signs = []
    for down, right in row.mean:
        direction = round(math.atan2(down, right) / (math.pi / 4)) % 8
        signs.append(_DOT if math.hypot(down, right) < STILL else _ARROWS[direction])
    width = row.kernel[1]
    return [" ".join(signs[start : start + width]) for start in range(0, len(signs), width)]


def draw(report: OffsetReport, form: str) -> bytes:
    """Draw a grid for each layer, its taps as they were and where they are, as an SVG or PNG file; needs matplotlib."""
    across = min(4, max(1, len(report.rows)))
    down = max(1, math.ceil(len(report.rows) / across))
    figure = new_figure(2.6 * across, 2.8 * down)
    figure.suptitle(fmt.clean(report.model), parse_math=False)
    for number, row in enumerate(report.rows, start=1):
        axes = figure.add_subplot(down, across, number)
        # Where the taps were, in pixels from the first one, and where they are.
        taps = itertools.product(*(range(0, n * d, d) for n, d in zip(row.kernel, row.dilation, strict=True)))
        for (y, x), (below, right), (tall, wide) in zip(taps, row.mean, row.spread, strict=True):
            axes.scatter(x, y, marker="s", s=40, color="0.8")
            axes.plot([x, x + right], [y, y + below], color="tab:blue", linewidth=1)
            if max(tall, wide) > 0:
                axes.errorbar(x + right, y + below, yerr=tall, xerr=wide, color="tab:orange", linewidth=1)
            axes.scatter(x + right, y + below, s=16, color="tab:blue", zorder=3)
        margin = 0.5 + max(0.2, row.largest)
        # The last of the taps is the farthest below and to the right.
        axes.set(xlim=(-margin, x + margin), ylim=(y + margin, -margin), aspect="equal")
        title = f"{fmt.clean(row.site)}\n{row.kind}" + (", still" if row.still else "")
        axes.set_title(title, fontsize=8, parse_math=False)
        axes.tick_params(labelsize=6)
        axes.grid(alpha=0.3)
    return picture_of(figure, form)
