"""Plans of a recipe without a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from asymswap.factorize.statistics import SiteStatistics
from asymswap.planning.plan import choose, counted_costs, find_choices
from asymswap.planning.recipe import Recipe
from asymswap.types import Cost, Plan, Site


def make_plan(
    model: nn.Module,
    sites: Sequence[Site],
    recipe: Recipe,
    total: Cost,
    statistics: Mapping[str, SiteStatistics] | None = None,
) -> Plan:
    """Decide about every site and share a budget of MACs, parameters or error; `total` is the whole model's cost."""
    choices = find_choices(model, sites, recipe, statistics=statistics)
    return choose(choices, counted_costs(recipe.budget, total))
