"""Sharing a budget among sites: one Lagrange multiplier over all error-against-cost curves.

Each site has points (cost, error), one of which must be chosen; the sum of costs is bounded, the sum of errors is to
be small. Minimising `error + multiplier * cost` at each site alone, with one multiplier for all, is optimal on the
lower convex hulls of the curves (Shoham and Gersho, 1988, eq. 8). The multiplier is found by walking down the hulls:
from the cheapest point of every site, the step that buys the most error per cost is taken first. What is left of the
budget at the end is smaller than one step, and is then spent on points off the hulls.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """One choice of a site: its cost and its error."""

    cost: int
    error: float


class Allocation(NamedTuple):
    """The index of each site's chosen point, and the multiplier: the error that one more unit of cost would save."""

    chosen: tuple[int, ...]
    multiplier: float


def least_cost(curves: Sequence[Sequence[Point]]) -> int:
    """Return the sum of costs below which no budget can be met."""
    return sum(min(point.cost for point in curve) for curve in curves)


def allocate(curves: Sequence[Sequence[Point]], limit: int) -> Allocation:
    """Choose a point of every curve such that costs sum to at most `limit`, which is no less than the least cost."""
    hulls = [_hull(curve) for curve in curves]
    chosen = [hull[0] for hull in hulls]
    spent = sum(curve[index].cost for curve, index in zip(curves, chosen, strict=True))
    steps = sorted(
        (-_slope(curves[site][low], curves[site][high]), site, position)
        for site, hull in enumerate(hulls)
        for position, (low, high) in enumerate(itertools.pairwise(hull), start=1)
    )
    multiplier = 0.0
    blocked: set[int] = set()
    for slope, site, position in steps:
        new = hulls[site][position]
        extra = curves[site][new].cost - curves[site][chosen[site]].cost
        if site in blocked:
            continue
        if spent + extra > limit:
            # Later steps of this site start from the point that was not reached.
            blocked.add(site)
            multiplier = multiplier or -slope
            continue
        chosen[site] = new
        spent += extra
    _spend_rest(curves, chosen, limit - spent)
    return Allocation(tuple(chosen), multiplier)


def _hull(curve: Sequence[Point]) -> list[int]:
    """Return the indices of the lower convex hull from the cheapest to the best point, by rising cost."""
    hull: list[int] = []
    for index in _ladder(curve):
        while len(hull) > 1 and _slope(curve[hull[-2]], curve[hull[-1]]) <= _slope(curve[hull[-1]], curve[index]):
            hull.pop()
        hull.append(index)
    return hull


def _slope(low: Point, high: Point) -> float:
    """Return the error saved per unit of cost between two points of rising cost."""
    return (low.error - high.error) / max(high.cost - low.cost, 1)


def _spend_rest(curves: Sequence[Sequence[Point]], chosen: list[int], rest: int) -> None:
    """Move single sites, in place, to the best point that the rest of the budget pays for, the largest gain first."""
    ladders = [_ladder(curve) for curve in curves]
    costs = [[curve[index].cost for index in ladder] for curve, ladder in zip(curves, ladders, strict=True)]
    while curves:
        moves = []
        for site, curve in enumerate(curves):
            now = curve[chosen[site]]
            index = ladders[site][bisect.bisect_right(costs[site], now.cost + rest) - 1]
            moves.append((now.error - curve[index].error, site, index))
        gain, site, index = max(moves, key=lambda move: move[0])
        if gain <= 0:
            return
        rest -= curves[site][index].cost - curves[site][chosen[site]].cost
        chosen[site] = index


def _ladder(curve: Sequence[Point]) -> list[int]:
    """Return the indices of the points that are better than all cheaper ones, by rising cost."""
    ladder: list[int] = []
    for index in sorted(range(len(curve)), key=curve.__getitem__):
        if not ladder or curve[index].error < curve[ladder[-1]].error:
            ladder.append(index)
    return ladder
