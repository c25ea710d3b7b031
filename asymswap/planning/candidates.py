"""What could be gained at each site, from the formulas alone: no weights are looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from asymswap import replacements
from asymswap.errors import RecipeError
from asymswap.planning.plan import find_rule, refusal_of, saves
from asymswap.planning.recipe import Recipe
from asymswap.replacements import separable
from asymswap.types import Candidate, RankCost, Site

_ORDERS: tuple[separable.Order, ...] = ("vertical-first", "horizontal-first")


def find_candidates(model: nn.Module, sites: Sequence[Site], recipe: Recipe | None) -> list[Candidate]:
    """Every site of the model, in order; with a recipe, only those are candidates that one of its rules swaps."""
    rules = find_rule(sites, recipe) if recipe is not None else {}
    return [_candidate(model, site, recipe, rules.get(site.name)) for site in sites]


def _candidate(model: nn.Module, site: Site, recipe: Recipe | None, number: int | None) -> Candidate:
    swap: Mapping[str, Any] = {"kind": "separable"}
    if recipe is not None:
        if number is None:
            return Candidate(site, "no rule matches")
        wanted = recipe.rules[number].swap
        if wanted is None:
            return Candidate(site, f"rule {number + 1} keeps it")
        swap = wanted
    name = swap["kind"]
    kind = replacements.load(name)
    reason = refusal_of(site, kind)
    if reason is not None:
        return Candidate(site, reason, kind=name)
    if name != "separable":
        wish = replacements.parse_settings(name, {key: value for key, value in swap.items() if key != "kind"})
        if kind.SIZES:
            return Candidate(site, kind=name)
        # What approximates the conv is resolved from its weights, which would take as long as a plan.
        if kind.preserves(site.conv, wish):
            try:
                kind.resolve(site, cast(nn.Conv2d, model.get_submodule(site.name)), wish)
            except RecipeError as error:
                return Candidate(site, str(error), kind=name)
        return Candidate(site, kind=name, becomes=kind.cost(site, wish))
    best = _break_even(site)
    if best is None or best.rank == 1:
        # One column of weights for each input channel is no approximation that anybody keeps.
        return Candidate(site, "even rank 1 saves nothing" if best is None else "only rank 1 would save anything")
    return Candidate(site, None, best, _at(site, best.rank // 2, best.order))


def _break_even(site: Site) -> RankCost | None:
    """The largest rank that costs less than the conv, in the order that allows more of it."""
    found = []
    for order in _ORDERS:
        low, high = 0, separable.full_rank(site.conv, order)
        while low < high:
            middle = (low + high + 1) // 2
            if saves(separable.pair_cost(site, middle, order), site.cost):
                low = middle
            else:
                high = middle - 1
        if low:
            found.append(_at(site, low, order))
    return max(found, key=lambda item: (item.rank, -item.cost.macs), default=None)


def _at(site: Site, rank: int, order: str) -> RankCost:
    known: separable.Order = "vertical-first" if order == "vertical-first" else "horizontal-first"
    return RankCost(rank, known, separable.pair_cost(site, rank, known))
