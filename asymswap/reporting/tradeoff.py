"""What each budget costs in accuracy: the points of a sweep, what they advise, and how they are shown."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import words
from asymswap.reporting.drawing import clean
from asymswap.reporting.figures import legend_of, new_figure, picture_of
from asymswap.reporting.pages import render
from asymswap.reporting.report import plain
from asymswap.reporting.report import to_json as whole
from asymswap.reporting.terminal import table, written
from asymswap.spec import Cost, Fed


@dataclass(frozen=True)
class Point:
    """One conversion of a sweep, or why there is none.

    `budget` is the fraction that was allowed, `cost` what is left; `accuracy` is a fraction of `images`. `failed` says
    why this budget was not met.
    """

    recipe: str
    budget: float
    cost: Cost | None = None
    accuracy: float | None = None
    swapped: int = 0
    seconds: float = 0.0
    failed: str | None = None


@dataclass(frozen=True)
class Tradeoff:
    """A sweep: the network as it was, the points measured so far, and how they were made.

    `measure` is what budgets are fractions of, `macs` or `params`; `tolerance` is how much accuracy may be lost, as a
    fraction; `setting` is all that the figures depend on; `warnings` is what a reader must know before any figure.
    """

    model: str
    measure: str
    before: Cost
    accuracy: float
    images: int
    data: str
    tolerance: float
    points: tuple[Point, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    fed: Fed | None = None

    @property
    def measured(self) -> tuple[Point, ...]:
        """The points that were reached."""
        return tuple(point for point in self.points if point.failed is None)

    def share(self, cost: Cost) -> float:
        """What is left of the cost that the budgets are about."""
        return float(getattr(cost, self.measure)) / max(float(getattr(self.before, self.measure)), 1.0)

    @property
    def front(self) -> tuple[Point, ...]:
        """The Pareto front: points to which no other is at least as cheap and as accurate, the cheapest first."""
        best, front = -1.0, []
        for point in sorted(self.measured, key=lambda p: (self.share(_cost(p)), -(p.accuracy or 0.0))):
            if (point.accuracy or 0.0) > best:
                best = point.accuracy or 0.0
                front.append(point)
        return tuple(front)

    @property
    def advised(self) -> Point | None:
        """The cheapest point that loses no more accuracy than is tolerated; None where there is none."""
        # Accuracies are whole numbers of images: what is exactly tolerated must not fail by rounding.
        least = self.accuracy - self.tolerance - 1e-9
        return next((point for point in self.front if (point.accuracy or 0.0) >= least), None)

    def advice(self) -> str:
        """The budget that the curve advises, in words."""
        allowed = f"{100 * self.tolerance:g} point" + "s" * (self.tolerance != 0.01)
        if self.advised is None:
            return f"Every budget loses more than {allowed} of accuracy: allow more, give more images, or polish."
        point = self.advised
        by = f" by {point.recipe}" if len({p.recipe for p in self.points}) > 1 else ""
        return (
            f"Advised: {point.budget:g}{by}, the last before the accuracy falls by more than {allowed} "
            f"({words.percent(self.accuracy)} -> {words.percent(point.accuracy or 0.0)})."
        )

    def with_point(self, point: Point) -> Tradeoff:
        """The same with one more point, in order of recipes and falling budgets."""
        order = list(dict.fromkeys([*(p.recipe for p in self.points), point.recipe]))
        points = sorted((*self.points, point), key=lambda p: (order.index(p.recipe), -p.budget))
        return replace(self, points=tuple(points))


def _cost(point: Point) -> Cost:
    assert point.cost is not None
    return point.cost


def to_json(sweep: Tradeoff) -> dict[str, Any]:
    """Everything, with what follows from it: each point's share, the front and the advice."""
    front, advised = sweep.front, sweep.advised
    points = [
        {
            **plain(point),
            "share": None if point.cost is None else sweep.share(point.cost),
            "lost": None if point.accuracy is None else sweep.accuracy - point.accuracy,
            "on_front": point in front,
            "advised": point == advised,
        }
        for point in sweep.points
    ]
    return whole(sweep, points=points, advice=sweep.advice())


def from_json(value: Mapping[str, Any]) -> Tradeoff:
    """What `to_json` wrote; raises KeyError, TypeError or ValueError for anything else."""
    from pydantic import TypeAdapter

    names = ("model", "measure", "before", "accuracy", "images", "data", "tolerance", "setting", "notes")
    point_names = ("recipe", "budget", "cost", "accuracy", "swapped", "seconds", "failed")
    points = [{name: point[name] for name in point_names} for point in value["points"]]
    found = TypeAdapter(Tradeoff).validate_python({**{name: value[name] for name in names}, "points": points})
    costs = [found.before, *(point.cost for point in found.points if point.cost is not None)]
    numbers = [found.accuracy, found.tolerance, *(point.budget for point in found.points)]
    numbers += [point.accuracy for point in found.points if point.accuracy is not None]
    numbers += [point.seconds for point in found.points]
    whole_numbers = [number for cost in costs for number in (cost.macs, cost.params)] + [found.images]
    sound = all(map(math.isfinite, numbers)) and all(0 <= number < 2**63 for number in whole_numbers)
    if found.measure not in ("macs", "params") or not sound:
        raise ValueError("its measure or one of its numbers cannot be")
    if any((point.cost is None or point.accuracy is None) != (point.failed is not None) for point in found.points):
        raise ValueError("one of its points is neither measured nor failed")
    if not isinstance(found.setting.get("recipes", {}), Mapping):
        raise ValueError("its setting has no recipes")
    return found


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
    first = ["unchanged", "-", words.count(sweep.before.macs), words.count(sweep.before.params)]
    rows = [[*first, words.percent(sweep.accuracy), "-", ""]]
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
                f"{words.count(cost.macs)} ({words.share(cost.macs, sweep.before.macs)})",
                f"{words.count(cost.params)} ({words.share(cost.params, sweep.before.params)})",
                words.percent(point.accuracy),
                f"{100 * (point.accuracy - sweep.accuracy):+.2f}",
                mark,
            ]
        )
    return rows


def fine_print(sweep: Tradeoff) -> list[str]:
    """How the figures came about, and which budgets could not be met."""
    measure = "MACs" if sweep.measure == "macs" else "parameters"
    lines = [f"Top-1 on {sweep.data}. Budgets are fractions of the model's {measure}."]
    lines += words.fed_by_model([(sweep.model, sweep.fed)])
    lines += map(words.sentence, sweep.notes)
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
        *(written(words.sentence(line), style="yellow") for line in sweep.warnings),
        Text(""),
        table(COLUMNS, sweep_rows(sweep)),
        Text(""),
        *(written(line, style="dim") for line in fine_print(sweep)),
    )


def to_markdown(sweep: Tradeoff) -> str:
    """The table in Markdown."""
    text = words.markdown_text
    head = [title or "note" for title, _ in COLUMNS]
    sides = ["---" if side in ("left", "fold") else "---:" for _, side in COLUMNS]
    lines = [
        f"# {text(sweep.model)}: accuracy over budgets",
        "",
        *(line for warning in sweep.warnings for line in (f"**{text(words.sentence(warning))}**", "")),
        text(sweep.advice()),
        "",
        *words.markdown_table([head, sides, *(list(map(text, row)) for row in sweep_rows(sweep))]),
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
        warnings=[words.sentence(line) for line in sweep.warnings],
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
