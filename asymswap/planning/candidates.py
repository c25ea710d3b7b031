"""What could be saved at each site, by the cost formulas alone, without the weights."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import cast

from torch import nn

from asymswap import replacements
from asymswap.errors import RecipeError
from asymswap.planning.plan import find_rule, refusal_of, saves
from asymswap.planning.recipe import Recipe
from asymswap.replacements import Original, separable
from asymswap.types import Candidate, RankCost, Site

_ORDERS: tuple[separable.Order, ...] = ("vertical-first", "horizontal-first")


def find_candidates(model: nn.Module, sites: Sequence[Site], recipe: Recipe | None) -> list[Candidate]:
    """Return every site of the model, in order; with a recipe, only what its rules swap is a candidate."""
    rules = find_rule(sites, recipe) if recipe is not None else {}
    return [_candidate(model, site, recipe, rules.get(site.name)) for site in sites]


def _candidate(model: nn.Module, site: Site, recipe: Recipe | None, number: int | None) -> Candidate:
    name, rule = "separable", None
    if recipe is not None:
        if number is None:
            return Candidate(site, "no rule matches")
        rule = recipe.rules[number]
        if rule.swap is None:
            return Candidate(site, f"rule {number + 1} keeps it")
        name = rule.kind
    kind = replacements.load(name)
    reason = refusal_of(site, kind)
    if reason is not None:
        return Candidate(site, reason, kind=name)
    if rule is not None and name != "separable":
        if kind.SIZES:
            return Candidate(site, kind=name)
        # What approximates the conv is resolved from its weights, which would take as long as a plan.
        if kind.preserves(site.conv, rule.settings):
            try:
                kind.resolve(site, Original(cast(nn.Conv2d, model.get_submodule(site.name))), rule.settings)
            except RecipeError as error:
                return Candidate(site, str(error), kind=name)
        return Candidate(site, kind=name, becomes=kind.cost(site, rule.settings))
    best = _break_even(site)
    if best is None or best.rank == 1:
        # One column of weights for each input channel is no approximation that anybody keeps.
        return Candidate(site, "even rank 1 saves nothing" if best is None else "only rank 1 would save anything")
    half, order = best.rank // 2, _ORDERS[best.order == "horizontal-first"]
    return Candidate(site, None, best, RankCost(half, order, separable.pair_cost(site, half, order)))


def _break_even(site: Site) -> RankCost | None:
    """Return the largest rank that costs less than the conv, in the order that allows more of it."""
    found = []
    for order in _ORDERS:
        costs = functools.partial(separable.pair_cost, site, order=order)
        ranks = range(1, separable.full_rank(site.conv, order) + 1)
        # Costs rise with the rank: the ranks that save come first.
        rank = bisect.bisect_left(ranks, True, key=lambda rank: not saves(costs(rank), site.cost))
        if rank:
            found.append(RankCost(rank, order, costs(rank)))
    return max(found, key=lambda item: (item.rank, -item.cost.macs), default=None)
