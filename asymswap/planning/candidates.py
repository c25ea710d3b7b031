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
from asymswap.planning.recipe import Recipe, Way
from asymswap.replacements import Original
from asymswap.replacements._pairs import Pair, SettledPair, full_rank
from asymswap.types import Candidate, RankCost, Site


def find_candidates(model: nn.Module, sites: Sequence[Site], recipe: Recipe | None) -> list[Candidate]:
    """Return every site, in order, as a candidate for the first kind that could gain something there.

    With a recipe, only what its rules swap is a candidate.
    """
    rules = find_rule(sites, recipe) if recipe is not None else {}
    candidates = []
    for site in sites:
        number = rules.get(site.name)
        if recipe is None:
            kind = "low-rank" if site.conv.kernel == (1, 1) else "separable"
            found = [_by(model, site, Way(replacements.load(kind), replacements.parse_settings(kind, {})))]
        elif number is None:
            found = [Candidate(site, "no rule matches")]
        else:
            found = [_by(model, site, way) for way in recipe.rules[number].ways]
            found = found or [Candidate(site, f"rule {number + 1} keeps it")]
        reasons = {one.kind: one.reason for one in found if one.reason is not None}
        gaining = next((one for one in found if one.reason is None), None)
        candidates.append(gaining or replace(found[0], reason=join_reasons(reasons)))
    return candidates


def _by(model: nn.Module, site: Site, way: Way) -> Candidate:
    """Return what a kind could do at a site."""
    kind = way.kind
    reason = refusal_of(site, kind)
    if reason is not None or (kind.SIZES and not isinstance(kind, Pair)):
        return Candidate(site, reason, kind=kind.name)
    if not isinstance(kind, Pair):
        # What approximates the conv is resolved from its weights, which would take as long as a plan.
        if kind.preserves(site.conv, way.settings):
            try:
                kind.resolve(site, Original(cast(nn.Conv2d, model.get_submodule(site.name))), way.settings)
            except RecipeError as error:
                return Candidate(site, str(error), kind=kind.name)
        return Candidate(site, kind=kind.name, becomes=kind.cost(site, way.settings))
    best, half = max(
        (_break_even(site, kind, form) for form in kind.forms(way.settings)),
        key=lambda item: (item[0].rank, -item[0].cost.macs),
    )
    if best.rank < 2:
        # One column of weights for each input channel is no approximation that anybody keeps.
        why = "only rank 1 would save anything" if best.rank else "even rank 1 saves nothing"
        return Candidate(site, why, kind=kind.name)
    return Candidate(site, None, best, half, kind.name)


def _break_even(site: Site, kind: Pair, form: SettledPair) -> tuple[RankCost, RankCost]:
    """Return the largest rank at which a pair of this form costs less than the conv, 0 if none does, and half of it."""

    def at(rank: int) -> RankCost:
        return RankCost(rank, getattr(form, "order", None), kind.cost(site, form.model_copy(update={"rank": rank})))

    # Costs rise with the rank: the ranks that save come first.
    ranks = range(1, full_rank(site.conv, form) + 1)
    rank = bisect.bisect_left(ranks, True, key=lambda rank: not saves(at(rank).cost, site.cost))
    return at(rank), at(rank // 2)
