from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from asymswap.planning.plan import Point, allocate

points = st.builds(Point, cost=st.integers(0, 60), error=st.floats(0, 1))
curves = st.lists(st.lists(points, min_size=1, max_size=4), min_size=1, max_size=4)


def least_cost(all_curves: list[list[Point]]) -> int:
    return sum(min(point.cost for point in curve) for curve in all_curves)


def total(chosen: tuple[int, ...], all_curves: list[list[Point]]) -> tuple[int, float]:
    picked = [curve[index] for curve, index in zip(all_curves, chosen, strict=True)]
    return sum(p.cost for p in picked), sum(p.error for p in picked)


@given(all_curves=curves, extra=st.integers(0, 200))
def test_never_over_the_limit_and_not_far_from_the_best(all_curves: list[list[Point]], extra: int) -> None:
    """Against all combinations: within the limit, no better by more than the largest single step off the hull."""
    limit = least_cost(all_curves) + extra
    cost, error = total(allocate(all_curves, limit)[0], all_curves)
    assert cost <= limit
    combinations = itertools.product(*(range(len(curve)) for curve in all_curves))
    best = min(e for c, e in (total(chosen, all_curves) for chosen in combinations) if c <= limit)
    step = max(max(p.error for p in curve) - min(p.error for p in curve) for curve in all_curves)
    assert error <= best + step + 1e-9


@given(all_curves=curves, extra=st.integers(0, 200))
def test_no_single_move_within_the_rest_would_help(all_curves: list[list[Point]], extra: int) -> None:
    limit = least_cost(all_curves) + extra
    chosen = allocate(all_curves, limit)[0]
    _, error = total(chosen, all_curves)
    for site, curve in enumerate(all_curves):
        for index in range(len(curve)):
            moved = (*chosen[:site], index, *chosen[site + 1 :])
            new_cost, new_error = total(moved, all_curves)
            assert new_cost > limit or new_error >= error - 1e-12


def test_one_multiplier_explains_convex_curves() -> None:
    """With convex curves every chosen point minimises error + multiplier * cost of its own curve."""
    convex = [[Point(10 * r, a / (r + 1)) for r in range(20)] for a in (0.2, 1.0, 3.0)]
    chosen, multiplier = allocate(convex, 200)
    for curve, index in zip(convex, chosen, strict=True):
        lagrangian = [p.error + multiplier * p.cost for p in curve]
        assert lagrangian[index] <= min(lagrangian) + 0.02
    assert multiplier > 0


def test_a_limit_that_nothing_exceeds_takes_the_best_of_each() -> None:
    chosen, multiplier = allocate([[Point(3, 0.5), Point(9, 0.0)], [Point(2, 0.1), Point(4, 0.3)]], 1000)
    assert chosen == (1, 0)
    assert multiplier == 0.0
