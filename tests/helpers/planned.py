"""Plans of a recipe, and batches, without a session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from asymswap.factorize.statistics import SiteStatistics
from asymswap.planning.plan import choose, counted_costs, find_choices
from asymswap.planning.recipe import Recipe
from asymswap.types import Cost, Plan, Site, silent
from asymswap.utils.inputs import Inputs


def make_plan(
    model: nn.Module,
    sites: Sequence[Site],
    recipe: Recipe,
    total: Cost,
    statistics: Mapping[str, SiteStatistics] | None = None,
) -> Plan:
    """Decide about every site and share a budget of MACs, parameters or error; `total` is the whole model's cost."""
    choices = find_choices(model, sites, recipe, silent, statistics or {})
    return choose(choices, counted_costs(recipe.budget, total))


def in_batches(images: Tensor, size: int) -> partial[Iterator[tuple[int, Inputs]]]:
    """Return a function that yields images in batches of one argument, with their numbers."""
    return partial(_in_batches, images, size)


def _in_batches(images: Tensor, size: int) -> Iterator[tuple[int, Inputs]]:
    for number, batch in enumerate(images.split(size)):
        yield number, (batch,)
