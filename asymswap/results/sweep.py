"""The points of a sweep over budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from asymswap.results.records import plain
from asymswap.types import Cost, Fed, Shown


@dataclass(frozen=True)
class Point:
    """One conversion of a sweep, or the reason in `failed` why there is none.

    `budget` is the fraction that was allowed, `cost` what is left, `accuracy` a fraction of images.
    """

    recipe: str
    budget: float
    cost: Cost | None = None
    accuracy: float | None = None
    swapped: int = 0
    seconds: float = 0.0
    failed: str | None = None


@dataclass(frozen=True)
class Tradeoff(Shown, view="sweep.sweep_view"):
    """A sweep: the original network, and the points measured so far.

    Budgets are fractions of the `measure`, `macs` or `params`; `tolerance` is the accuracy that may be lost, as a
    fraction; `setting` is everything that the results depend on.
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
        """Return the points whose budget was reached."""
        return tuple(point for point in self.points if point.failed is None)

    def share(self, cost: Cost) -> float:
        """Return the fraction of the original cost that is left."""
        return float(getattr(cost, self.measure)) / max(float(getattr(self.before, self.measure)), 1.0)

    @property
    def front(self) -> tuple[Point, ...]:
        """Return the Pareto front, the cheapest point first."""
        best, front = -1.0, []
        for point in sorted(self.measured, key=lambda p: (self.share(_cost(p)), -(p.accuracy or 0.0))):
            if (point.accuracy or 0.0) > best:
                best = point.accuracy or 0.0
                front.append(point)
        return tuple(front)

    @property
    def advised(self) -> Point | None:
        """Return the cheapest point within the tolerance; None where there is none."""
        # Accuracies are whole numbers of images: what is exactly tolerated must not fail by rounding.
        least = self.accuracy - self.tolerance - 1e-9
        return next((point for point in self.front if (point.accuracy or 0.0) >= least), None)

    def advice(self) -> str:
        """Return the advised budget as a sentence."""
        allowed = f"{100 * self.tolerance:g} point" + "s" * (self.tolerance != 0.01)
        if self.advised is None:
            return f"Every budget loses more than {allowed} of accuracy: allow more, give more images, or polish."
        point = self.advised
        by = f" by {point.recipe}" if len({p.recipe for p in self.points}) > 1 else ""
        return (
            f"Advised: {point.budget:g}{by}, the last before the accuracy falls by more than {allowed} "
            f"({100 * self.accuracy:.1f} % -> {100 * (point.accuracy or 0.0):.1f} %)."
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
                "share": None if point.cost is None else self.share(point.cost),
                "lost": None if point.accuracy is None else self.accuracy - point.accuracy,
                "on_front": point in front,
                "advised": point == advised,
            }
            for point in self.points
        ]
        return {**plain(self), "points": points, "advice": self.advice()}


def _cost(point: Point) -> Cost:
    assert point.cost is not None
    return point.cost


def from_json(value: Mapping[str, Any]) -> Tradeoff:
    """Read what `to_json` wrote; raises KeyError, TypeError or ValueError for anything else."""
    from pydantic import TypeAdapter

    found = TypeAdapter(Tradeoff).validate_python({**value, "setting": value["setting"], "fed": None, "warnings": ()})
    numbers = [found.accuracy, found.tolerance]
    counts = [found.images, found.before.macs, found.before.params]
    for point in found.points:
        if (point.cost is None or point.accuracy is None) != (point.failed is not None):
            raise ValueError("one of its points is neither measured nor failed")
        numbers += [point.budget, point.seconds, point.accuracy or 0.0]
        counts += [] if point.cost is None else [point.cost.macs, point.cost.params]
    sound = all(map(math.isfinite, numbers)) and all(0 <= number < 2**63 for number in counts)
    if found.measure not in ("macs", "params") or not sound:
        raise ValueError("its measure or one of its numbers cannot be")
    if not isinstance(found.setting.get("recipes", {}), Mapping):
        raise ValueError("its setting has no recipes")
    return found
