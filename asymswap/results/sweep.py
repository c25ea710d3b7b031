"""The points of a sweep over budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from asymswap.results.evaluate import Score
from asymswap.results.records import plain
from asymswap.types import Cost, Fed, Shown

Measure = Literal["macs", "params", "latency"]  # of which budgets are fractions


@dataclass(frozen=True)
class Point:
    """One conversion of a sweep, or the reason in `failed` why there is none."""

    recipe: str
    budget: float  # the fraction that was allowed
    cost: Cost | None = None  # what is left
    scores: Mapping[str, float] = field(default_factory=dict)  # what the metric gave, by name
    swapped: int = 0
    seconds: float = 0.0
    failed: str | None = None
    time: float | None = None  # the fraction that is left, where budgets are of latency


@dataclass(frozen=True)
class Tradeoff(Shown, view="sweep.sweep_view"):
    """A sweep: the original network, and the points measured so far."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    model: str
    measure: Measure
    before: Cost
    scores: tuple[Score, ...]  # the original's
    images: int | None
    data: str
    tolerance: float  # how much of the first score the advice may lose
    points: tuple[Point, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)  # everything that the results depend on
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    fed: Fed | None = None

    @property
    def measured(self) -> tuple[Point, ...]:
        """The points whose budget was reached."""
        return tuple(point for point in self.points if point.failed is None)

    def share(self, point: Point) -> float:
        """Return the fraction of the original's cost that a measured point has left."""
        if self.measure == "latency":
            assert point.time is not None
            return point.time
        return float(getattr(point.cost, self.measure)) / max(float(getattr(self.before, self.measure)), 1.0)

    @property
    def front(self) -> tuple[Point, ...]:
        """The Pareto front, the cheapest point first."""
        front: list[Point] = []
        for point in sorted(self.measured, key=lambda p: (self.share(p), -self.gain(p))):
            if not front or self.gain(point) > self.gain(front[-1]):
                front.append(point)
        return tuple(front)

    @property
    def first(self) -> Score:
        """The original's first score."""
        return self.scores[0]

    def gain(self, point: Point) -> float:
        """Return by how much a measured point is better than the original in its first score; below 0 if worse."""
        change = point.scores[self.first.name] - self.first.value
        return -change if self.first.lower_is_better else change

    @property
    def advised(self) -> Point | None:
        """The cheapest point within the tolerance; None where there is none."""
        # Accuracies are whole numbers of images: what is exactly tolerated must not fail by rounding.
        return next((point for point in self.front if self.gain(point) >= -self.tolerance - 1e-9), None)

    def advice(self) -> str:
        """Return the advised budget as a sentence."""
        first, point = self.first, self.advised
        percent = first.unit == "%"
        points = f"{100 * self.tolerance:g} point" + "s" * (self.tolerance != 0.01)
        allowed = points if percent else f"{self.tolerance:.4g} {first.unit}".strip()
        if point is None:
            return f"Every budget loses more than {allowed} of {first.name}: allow more, give more images, or polish."
        by = f" by {point.recipe}" if len({p.recipe for p in self.points}) > 1 else ""
        values = (first.value, point.scores[first.name])
        before, after = (f"{100 * value:.1f} %" if percent else f"{value:.4g} {first.unit}".strip() for value in values)
        verb = "rises" if first.lower_is_better else "falls"
        return (
            f"Advised: {point.budget:g}{by}, the last before {first.name} {verb} by more than {allowed} "
            f"({before} -> {after})."
        )

    def with_point(self, point: Point) -> Tradeoff:
        """Return the sweep with one more point, in order of recipes and falling budgets."""
        order = list(dict.fromkeys([*(p.recipe for p in self.points), point.recipe]))
        points = sorted((*self.points, point), key=lambda p: (order.index(p.recipe), -p.budget))
        return replace(self, points=tuple(points))

    def to_plain(self) -> dict[str, Any]:
        """Return everything as plain data, with each point's share, the front and the advice."""
        front, advised = self.front, self.advised
        points = [
            {
                **plain(point),
                "share": None if point.cost is None else self.share(point),
                "lost": None if point.failed is not None else 0.0 - self.gain(point),
                "on_front": point in front,
                "advised": point == advised,
            }
            for point in self.points
        ]
        return {**plain(self), "points": points, "advice": self.advice()}


def from_json(value: Mapping[str, Any]) -> Tradeoff:
    """Read what `to_json` wrote; raises KeyError, TypeError or ValueError for anything else."""
    from pydantic import TypeAdapter

    if "scores" not in value:
        # Written when top-1 was all that could be measured.
        points = [{**one, "scores": {"top-1": one["accuracy"]} if one["cost"] else {}} for one in value["points"]]
        value = {**value, "scores": [Score("top-1", value["accuracy"], "%")], "points": points}
    found = TypeAdapter(Tradeoff).validate_python({**value, "setting": value["setting"], "fed": None, "warnings": ()})
    names = {score.name for score in found.scores}
    counts = [found.images or 0, found.before.macs, found.before.params]
    for point in found.points:
        measured = point.cost is not None and names == point.scores.keys()
        timed = found.measure != "latency" or (point.time is None) == (point.cost is None)
        if not names or measured == (point.failed is not None) or not timed:
            raise ValueError("one of its points is neither measured nor failed")
        counts += [] if point.cost is None else [point.cost.macs, point.cost.params]
    if not all(0 <= number < 2**63 for number in counts) or not isinstance(found.setting.get("recipes", {}), Mapping):
        raise ValueError("its recipes or one of its numbers cannot be")
    return found
