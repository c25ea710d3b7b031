"""How a sweep over budgets is shown: what each budget costs in its scores, and what the curve advises."""

import base64
import re
from collections.abc import Callable, Sequence
from functools import partial

from asymswap.reporting import format as fmt
from asymswap.reporting.pages import add_legend, new_figure, picture_of, render
from asymswap.reporting.tables import WIDE, Column, Screen, Table
from asymswap.results.sweep import Point, Tradeoff

_SPAN = {"%": 5.0, "dB": 1.0}  # the least that the axis of scores spans, by their unit
_MEASURES = {"macs": "MACs", "params": "parameters", "latency": "latency"}


def sweep_view(sweep: Tradeoff, width: int | None = None) -> Screen:
    """Return the advice, the network as it was and every point, and how the figures were measured."""
    first, advised, front = sweep.first, sweep.advised, sweep.front
    unchanged = Point("unchanged", 1.0, sweep.before, {score.name: score.value for score in sweep.scores})

    def mark(point: Point) -> str:
        if point.cost is None:
            return "not met"
        return "advised" if point == advised else "front" if point in front else ""

    def cost(before: int) -> Callable[[int], str]:
        return lambda value: fmt.count(value) + ("" if value == before else f" ({fmt.share(value, before)})")

    def change(point: Point) -> str | None:
        if point is unchanged or point.cost is None:
            return None
        return fmt.score_change(point.scores[first.name] - first.value, first.unit).removesuffix(" points")

    columns = [
        Column("Recipe", "recipe", side="fold"),
        Column("Budget", lambda point: None if point is unchanged else point.budget, "{:g}".format),
        Column("MACs", "cost.macs", cost(sweep.before.macs)),
        Column("Parameters", "cost.params", cost(sweep.before.params)),
    ]
    if sweep.measure == "latency":
        columns.append(Column("Time", "time", fmt.percent))
    for score in sweep.scores:
        show = partial(fmt.score, unit=score.unit, digits=1)
        value = partial(lambda name, point: point.scores.get(name), score.name)
        columns.append(Column(score.name, value, show, least=0 if score is first else WIDE))
        columns += [Column("Change", change)] if score is first else []
    columns.append(Column("Note", mark, side="left"))
    measured = fmt.measured_on(sweep.scores, sweep.data)
    lines = [f"{measured}. Budgets are fractions of the model's {_MEASURES[sweep.measure]}."]
    lines += fmt.fed_by_model([(sweep.model, sweep.fed)])
    lines += map(fmt.sentence, sweep.notes)
    # Budgets of a recipe share a line if the reasons why they were not met differ only in their figures.
    failed: dict[tuple[str, str], list[Point]] = {}
    for point in sweep.points:
        if point.failed is not None:
            failed.setdefault((point.recipe, re.sub(r"\d[\d.]*", "", point.failed)), []).append(point)
    for (recipe, _), points in failed.items():
        *most, last = [f"{point.budget:g}" for point in points]
        budgets = f"{', '.join(most)} and {last}" if most else last
        lines.append(f"{recipe} at {budgets}: {points[0].failed}.")
    advice = sweep.advice()
    title = f"{sweep.model}: {advice[0].lower()}{advice[1:]}"
    return Screen(title, sweep.warnings, [[Table(columns, [unchanged, *sweep.points])]], lines, width)


def to_html(sweep: Tradeoff) -> str:
    """Return the advice, the curve and the table as one self-contained page; needs matplotlib."""
    picture = "data:image/svg+xml;base64," + base64.b64encode(draw(sweep, "svg")).decode()
    return render("sweep.html.j2", sweep=sweep, screen=sweep_view(sweep), picture=picture)


def draw(sweep: Tradeoff, form: str) -> bytes:
    """Draw the curve of each recipe, the Pareto front and the advice, as an SVG or PNG file; needs matplotlib."""
    first, advised, named = sweep.first, sweep.advised, []
    scale = 100.0 if first.unit == "%" else 1.0
    figure = new_figure(7.2, 4.4)
    axes = figure.add_subplot()

    def places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
        """Return what is left of the cost, and the first score in its unit."""
        return [sweep.share(point) for point in points], [scale * point.scores[first.name] for point in points]

    for number, recipe in enumerate(dict.fromkeys(point.recipe for point in sweep.measured)):
        shown = places([point for point in sweep.measured if point.recipe == recipe])
        # Each thinner than the one before: where recipes give the same, all of them are seen.
        thick = 1.5 + 2.5 / (1 + 2 * number)
        (line,) = axes.plot(*shown, marker="os^Dv<>"[number % 7], markersize=2.5 * thick, linewidth=thick - 1)
        named.append((line, recipe))
    word, sign = ("more", 1) if first.lower_is_better else ("less", -1)
    sides = ("bottom", "top")[::-sign]
    for top, text, style, side in (
        (first.value, "unchanged", "-", sides[0]),
        (first.value + sign * sweep.tolerance, f"{scale * sweep.tolerance:.4g} {word}", ":", sides[1]),
    ):
        axes.axhline(scale * top, color="0.4", linewidth=1, linestyle=style)
        axes.text(0.01, scale * top, text, transform=axes.get_yaxis_transform(), color="0.3", va=side)
    if advised is not None:
        ((share,), (top,)) = places([advised])
        axes.plot(share, top, "o", markersize=13, markerfacecolor="none", markeredgecolor="black")
        # The words go below the curve, which falls to the left; they need room on the right, and a background of their
        # own where it rises again.
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
        words = f"advised: {advised.budget:g}"
        axes.annotate(words, (share, top), (4, -32), textcoords="offset points", bbox=ground, zorder=9)
        left, right = axes.get_xlim()
        axes.set_xlim(left, max(right, share + 0.25 * (right - left)))
    if len(sweep.front) > 1:
        (front,) = axes.plot(*places(sweep.front), color="0.75", linewidth=6, alpha=0.6, zorder=0)
        named.append((front, "Pareto front"))
    low, high = axes.get_ylim()
    if first.unit in _SPAN and high - low < _SPAN[first.unit]:
        # Else the axis would make a cliff of what is next to nothing.
        more = _SPAN[first.unit] - (high - low)
        axes.set_ylim(low - 0.8 * more, high + 0.2 * more)
    axes.set_xlabel(f"{_MEASURES[sweep.measure]} left, as a fraction")
    axes.set_ylabel(fmt.clean(first.name + (f" in {first.unit}" if first.unit else "")), parse_math=False)
    axes.set_title(fmt.clean(sweep.model), parse_math=False)
    axes.grid(alpha=0.3)
    if named:
        add_legend(axes, named, loc="lower right")
    return picture_of(figure, form)
