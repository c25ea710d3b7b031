"""What could be saved at each site, by the cost formulas alone, without the weights."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import nn

from asymswap import replacements
from asymswap.errors import RecipeError
from asymswap.planning.plan import find_rule, join_reasons, refusal_of, saves
from asymswap.planning.recipe import Recipe, RequestedSwap
from asymswap.replacements import Original
from asymswap.replacements._pairs import Pair, SettledPair, full_rank
from asymswap.types import Candidate, RankCost, Site


def find_candidates(model: nn.Module, sites: Sequence[Site], recipe: Recipe | None) -> list[Candidate]:
    """Return every site of the model, in order; with a recipe, only what its rules swap is a candidate."""
    rules = find_rule(sites, recipe) if recipe is not None else {}
    return [_candidate(model, site, recipe, rules.get(site.name)) for site in sites]


def _candidate(model: nn.Module, site: Site, recipe: Recipe | None, number: int | None) -> Candidate:
    """Return the site as a candidate for the first kind that could gain something there."""
    if recipe is None:
        kind = "low-rank" if site.conv.kernel == (1, 1) else "separable"
        return _by(model, site, RequestedSwap(kind, replacements.parse_settings(kind, {})))
    if number is None:
        return Candidate(site, "no rule matches")
    swaps = recipe.rules[number].swaps
    if not swaps:
        return Candidate(site, f"rule {number + 1} keeps it")
    found = [_by(model, site, swap) for swap in swaps]
    reasons = {one.kind: one.reason for one in found if one.reason is not None}
    gaining = (one for one in found if one.reason is None)
    return next(gaining, None) or replace(found[0], reason=join_reasons(reasons))


def _by(model: nn.Module, site: Site, swap: RequestedSwap) -> Candidate:
    """Return what a kind could do at a site."""
    kind = replacements.load(swap.kind)
    reason = refusal_of(site, kind)
    if reason is not None:
        return Candidate(site, reason, kind=swap.kind)
    if not isinstance(kind, Pair):
        if kind.SIZES:
            return Candidate(site, kind=swap.kind)
        # What approximates the conv is resolved from its weights, which would take as long as a plan.
        if kind.preserves(site.conv, swap.settings):
            try:
                kind.resolve(site, Original(cast(nn.Conv2d, model.get_submodule(site.name))), swap.settings)
            except RecipeError as error:
                return Candidate(site, str(error), kind=swap.kind)
        return Candidate(site, kind=swap.kind, becomes=kind.cost(site, swap.settings))
    best, half = max(
        (_break_even(site, kind, form) for form in kind.forms(swap.settings)),
        key=lambda item: (item[0].rank, -item[0].cost.macs),
    )
    if best.rank < 2:
        # One column of weights for each input channel is no approximation that anybody keeps.
        why = "only rank 1 would save anything" if best.rank else "even rank 1 saves nothing"
        return Candidate(site, why, kind=swap.kind)
    return Candidate(site, None, best, half, swap.kind)


def _break_even(site: Site, kind: Pair, form: SettledPair) -> tuple[RankCost, RankCost]:
    """Return the largest rank at which a pair of this form costs less than the conv, 0 if none does, and half of it."""

    def at(rank: int) -> RankCost:
        settled = form.model_copy(update={"rank": rank})
        return RankCost(rank, getattr(form, "order", None), kind.cost(site, settled))

    # Costs rise with the rank: the ranks that save come first.
    ranks = range(1, full_rank(site.conv, form) + 1)
    rank = bisect.bisect_left(ranks, True, key=lambda rank: not saves(at(rank).cost, site.cost))
    return at(rank), at(rank // 2)
