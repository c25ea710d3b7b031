"""What each budget costs in accuracy: the points of a sweep, what they advise, and how they are shown."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.drawing import clean
from asymswap.reporting.figures import legend_of, new_figure, picture_of
from asymswap.reporting.pages import render
from asymswap.reporting.terminal import table, written
from asymswap.results.sweep import Point, Tradeoff, _cost

COLUMNS = (
    ("Recipe", "fold"),
    ("Budget", "right"),
    ("MACs", "right"),
    ("Parameters", "right"),
    ("Top-1", "right"),
    ("Change", "right"),
    ("", "left"),
)


def sweep_rows(sweep: Tradeoff) -> list[list[str]]:
    """The network as it was and every point, as text; the last cell marks the front and what is advised."""
    first = ["unchanged", "-", fmt.count(sweep.before.macs), fmt.count(sweep.before.params)]
    rows = [[*first, fmt.percent(sweep.accuracy), "-", ""]]
    for point in sweep.points:
        if point.cost is None or point.accuracy is None:
            rows.append([point.recipe, f"{point.budget:g}", "-", "-", "-", "-", "not met"])
            continue
        mark = "advised" if point == sweep.advised else ("front" if point in sweep.front else "")
        cost = point.cost
        rows.append(
            [
                point.recipe,
                f"{point.budget:g}",
                f"{fmt.count(cost.macs)} ({fmt.share(cost.macs, sweep.before.macs)})",
                f"{fmt.count(cost.params)} ({fmt.share(cost.params, sweep.before.params)})",
                fmt.percent(point.accuracy),
                f"{100 * (point.accuracy - sweep.accuracy):+.2f}",
                mark,
            ]
        )
    return rows


def fine_print(sweep: Tradeoff) -> list[str]:
    """How the figures came about, and which budgets could not be met."""
    measure = "MACs" if sweep.measure == "macs" else "parameters"
    lines = [f"Top-1 on {sweep.data}. Budgets are fractions of the model's {measure}."]
    lines += fmt.fed_by_model([(sweep.model, sweep.fed)])
    lines += map(fmt.sentence, sweep.notes)
    return lines + _failures(sweep)


def _failures(sweep: Tradeoff) -> list[str]:
    """Why budgets were not met; those of a recipe for which the reason differs in its figures alone share a line."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in sweep.points:
        if point.failed is not None:
            groups.setdefault((point.recipe, re.sub(r"\d[\d.]*", "", point.failed)), []).append(point)
    lines = []
    for (recipe, _), points in groups.items():
        *most, last = [f"{point.budget:g}" for point in points]
        budgets = f"{', '.join(most)} and {last}" if most else last
        lines.append(f"{recipe} at {budgets}: {points[0].failed}.")
    return lines


def sweep_view(sweep: Tradeoff) -> RenderableType:
    """The table for a terminal, the advice first."""
    advice = sweep.advice()
    return Group(
        written(f"{sweep.model}: {advice[0].lower()}{advice[1:]}", style="bold"),
        *(written(fmt.sentence(line), style="yellow") for line in sweep.warnings),
        Text(""),
        table(COLUMNS, sweep_rows(sweep)),
        Text(""),
        *(written(line, style="dim") for line in fine_print(sweep)),
    )


def to_markdown(sweep: Tradeoff) -> str:
    """The table in Markdown."""
    text = fmt.markdown_text
    head = [title or "note" for title, _ in COLUMNS]
    sides = ["---" if side in ("left", "fold") else "---:" for _, side in COLUMNS]
    lines = [
        f"# {text(sweep.model)}: accuracy over budgets",
        "",
        *(line for warning in sweep.warnings for line in (f"**{text(fmt.sentence(warning))}**", "")),
        text(sweep.advice()),
        "",
        *fmt.markdown_table([head, sides, *(list(map(text, row)) for row in sweep_rows(sweep))]),
        "",
        *(f"- {text(line)}" for line in fine_print(sweep)),
        "",
    ]
    return "\n".join(lines)


def to_html(sweep: Tradeoff) -> str:
    """The advice, the curve and the table as one page that needs nothing beside it; needs matplotlib."""
    picture = "data:image/svg+xml;base64," + base64.b64encode(draw(sweep, "svg")).decode()
    return render(
        "sweep.html.j2",
        sweep=sweep,
        picture=picture,
        columns=COLUMNS,
        rows=sweep_rows(sweep),
        lines=fine_print(sweep),
        warnings=[fmt.sentence(line) for line in sweep.warnings],
    )


def draw(sweep: Tradeoff, form: str) -> bytes:
    """The curve of each recipe, the Pareto front and the advice, as an SVG or PNG picture; needs matplotlib."""
    figure = new_figure(7.2, 4.4)
    axes = figure.add_subplot()
    named = []
    for number, recipe in enumerate(dict.fromkeys(point.recipe for point in sweep.measured)):
        points = [point for point in sweep.measured if point.recipe == recipe]
        named.append((_draw_recipe(axes, sweep, points, number), recipe))
    across = axes.get_yaxis_transform()
    for top, text, style, side in (
        (sweep.accuracy, "unchanged", "-", "bottom"),
        (sweep.accuracy - sweep.tolerance, f"{100 * sweep.tolerance:g} less", ":", "top"),
    ):
        axes.axhline(100 * top, color="0.4", linewidth=1, linestyle=style)
        axes.text(0.01, 100 * top, text, transform=across, color="0.3", va=side)
    if sweep.advised is not None:
        at = (sweep.share(_cost(sweep.advised)), 100 * (sweep.advised.accuracy or 0.0))
        axes.plot(*at, marker="o", markersize=13, markerfacecolor="none", markeredgecolor="black", linestyle="")
        # The words stand below the curve, which falls to the left; they need room on the right, and ground of their own
        # where it rises again.
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
        words_at = {"textcoords": "offset points", "xytext": (4, -32)}
        axes.annotate(f"advised: {sweep.advised.budget:g}", at, bbox=ground, zorder=9, **words_at)
        left, right = axes.get_xlim()
        axes.set_xlim(left, max(right, at[0] + 0.25 * (right - left)))
    if len(sweep.front) > 1:
        shares = [sweep.share(_cost(point)) for point in sweep.front]
        tops = [100 * (point.accuracy or 0.0) for point in sweep.front]
        (front,) = axes.plot(shares, tops, color="0.75", linewidth=6, alpha=0.6, zorder=0)
        named.append((front, "Pareto front"))
    axes.set_xlabel(f"{'MACs' if sweep.measure == 'macs' else 'parameters'} left, as a fraction")
    axes.set_ylabel("top-1 accuracy in %")
    axes.set_title(clean(sweep.model), parse_math=False)
    axes.grid(alpha=0.3)
    if named:
        legend_of(axes, named, "lower right")
    return picture_of(figure, form)


def _draw_recipe(axes: Any, sweep: Tradeoff, points: Sequence[Point], number: int) -> Any:
    shares = [sweep.share(_cost(point)) for point in points]
    tops = [100 * (point.accuracy or 0.0) for point in points]
    # Each thinner than the one before: where recipes come to the same, all of them are seen.
    thick = 1.5 + 2.5 / (1 + 2 * number)
    (line,) = axes.plot(shares, tops, marker="os^Dv<>"[number % 7], markersize=2.5 * thick, linewidth=thick - 1)
    return line
