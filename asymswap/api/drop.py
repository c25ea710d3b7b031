"""The smallest network whose loss, measured, stays below what is allowed: a few trials of one session."""

from __future__ import annotations

from functools import partial

from asymswap.api.session import Converted, Session
from asymswap.data.metrics import Evaluator, Measured, check_same
from asymswap.errors import RecipeError
from asymswap.measure.statistics import mean_interval
from asymswap.planning.drop_budget import Drop, Search
from asymswap.planning.plan import check_not_empty
from asymswap.planning.recipe import Budget, Recipe
from asymswap.reporting import format as fmt
from asymswap.results.convert import DropRow
from asymswap.types import Progress

_POLISHED = 3  # networks, at most: each takes minutes


def convert_within(
    session: Session, recipe: Recipe, drop: Drop, evaluator: Evaluator, before: Measured, progress: Progress
) -> tuple[Converted, Measured, DropRow]:
    """Return the smallest network found whose loss is at most `drop`, with its scores and what the report says of it.

    `before` is what the original measured.

    With polish a first search, without it, says where to begin; then up to three networks are polished. Raises
    RecipeError where every network that swaps anything loses more.
    """
    first = before.scores[0]
    allowed = drop.allowed(first)
    curve = session.team.first(partial(session.curve, recipe, progress))
    if not curve:
        check_not_empty(session.plan(recipe, progress, Budget.model_validate({"macs": 1.0}))[0], recipe)
    fractions, predicted = zip(*curve, strict=True)
    # A share of images moves by one of them.
    grain = 1 / evaluator.images if first.unit == "%" and evaluator.images else 0.0
    polishes = session.calibration is not None and session.calibration.polishes
    search = Search(fractions, predicted, allowed, grain=grain)
    kept, solves = None, 0
    for polished in (False, True) if polishes else (False,):
        if polished:
            start = fractions[-1] if search.best is None else search.best[0]
            slope = search.slope
            search = Search(fractions, predicted, allowed, grain=grain, start=start, first_slope=slope, tries=_POLISHED)
        while (fraction := search.next()) is not None:
            solves += 1
            place = f"try {solves}, {fraction:.2f} of the MACs: "

            def step(stage: str, done: int, total: int, place: str = place) -> None:
                progress(place + stage, done, total)

            plan, _ = session.plan(recipe, step, Budget.model_validate({"macs": fraction}))
            converted = session.apply(plan, step, polished)
            after = session.team.first(partial(evaluator.measured, converted.model, partial(step, "measuring")))
            session.clock.stop("measure")
            check_same(before.scores, after.scores)
            lost, interval = _lost(before, after)
            search.add(fraction, lost)
            if search.best == (fraction, lost):
                kept = converted, after, lost, interval, fraction <= fractions[0]
    if kept is None:
        share, least = min(search.tried, key=lambda one: one[1])
        raise RecipeError(
            f"the budget of {recipe.budget} cannot be kept: at {share:.3f} of the MACs {fmt.lost(least, first)} of "
            f"{first.name} are lost; allow more" + ("" if polishes else ", or polish")
        )
    converted, after, lost, interval, smallest = kept
    row = DropRow(
        score=first.name,
        unit=first.unit,
        lower_is_better=first.lower_is_better,
        allowed=allowed,
        lost=lost,
        interval=interval,
        data=evaluator.description,
        samples=evaluator.images,
        share=converted.costs.total.macs / session.costs.total.macs,
        solves=solves,
        smallest=smallest,
    )
    return converted, after, row


def _lost(before: Measured, after: Measured) -> tuple[float, tuple[float, float] | None]:
    """Return how much of the first score is lost, with its 95 % interval where there is one."""
    first, now = before.scores[0], next(one for one in after.scores if one.name == before.scores[0].name)
    sign = -1 if first.lower_is_better else 1
    lost = sign * (first.value - now.value)
    if before.each and len(before.each) == len(after.each):
        changes = [sign * (one - other) for one, other in zip(before.each, after.each, strict=True)]
        # Of images that are right or wrong, one more of each kind of change: Bonett and Price (2012).
        return lost, mean_interval([*changes, -1.0, 1.0] if first.unit == "%" else changes)
    if now.interval is not None:
        low, high = now.interval
        return lost, (first.value - high, first.value - low)
    return lost, None
