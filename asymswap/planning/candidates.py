"""What could be gained at each site, from the formulas alone: no weights are looked at."""

from __future__ import annotations

from collections.abc import Sequence

from asymswap.kinds import separable
from asymswap.planning.plan import find_rule, saves
from asymswap.planning.recipe import Recipe
from asymswap.spec import Candidate, RankCost, Site

_ORDERS: tuple[separable.Order, ...] = ("vertical-first", "horizontal-first")


def find_candidates(sites: Sequence[Site], recipe: Recipe | None) -> list[Candidate]:
    """Every site, in order; with a recipe, only those are candidates that one of its rules swaps."""
    rules = find_rule(sites, recipe) if recipe is not None else {}
    found = []
    for site in sites:
        reason = site.refusal or separable.refuse(site.conv) or (None if site.calls else "never runs in eval mode")
        if reason is None and recipe is not None:
            number = rules[site.name]
            if number is None or recipe.rules[number].swap is None:
                reason = "no rule matches" if number is None else f"rule {number + 1} keeps it"
        best = None if reason else _break_even(site)
        if reason is None and (best is None or best.rank == 1):
            # One column of weights for each input channel is no approximation that anybody keeps.
            reason = "even rank 1 saves nothing" if best is None else "only rank 1 would save anything"
        if reason is not None or best is None:
            found.append(Candidate(site, reason))
        else:
            found.append(Candidate(site, None, best, _at(site, best.rank // 2, best.order)))
    return found


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
