"""Layer after layer: each replacement is solved for the input that it will really get.

At each swapped site the patches come from the converted network as it is so far, and the target output from the
original one (Zhang, Zou, He and Sun, 2015, section 3.3, in closed form; see factorize.statistics). Where the graph of
the whole model is what runs, both networks walk through it side by side (`graph_walk`); elsewhere both are run for each
layer, and stopped there (`stopped_runs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from asymswap import replacements
from asymswap.calibration.gather import Batches, PatchSums
from asymswap.calibration.graph_walk import walk_graph
from asymswap.calibration.stopped_runs import stop_at_sites
from asymswap.factorize.statistics import SiteStatistics
from asymswap.types import Plan, Progress, Site, Swap, silent
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.tensors import eval_mode

_UNEXPLAINED = 0.8
"""The share of a target output's energy that no kernel could make of the patches, from which on the two do not belong
together: a detector's second stage looks at other boxes in the converted network than in the original."""


@dataclass
class Refined:
    """The statistics that each replacement was solved with, and why some were solved in one pass."""

    used: dict[str, SiteStatistics] = field(default_factory=dict)
    one_pass: dict[str, str] = field(default_factory=dict)
    by_graph: bool = True


def refine_(
    model: nn.Module,
    converted: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    statistics: Mapping[str, SiteStatistics],
    batches: Batches,
    images: int,
    example: Tensor,
    *,
    memory_gib: float = 4.0,
    seed: int = 0,
    team: Team = ALONE,
    progress: Progress = silent,
) -> Refined:
    """Solve every refinable replacement in `converted`, in place, in the order in which the sites run.

    `images` is how many the batches of all processes hold, and `example` one of them (1xCxHxW), of which only the size
    and the dtype count: a process may have no batch at all. A conv that runs more than once in a forward pass keeps its
    one-pass solution, since its later inputs are not known yet when it is needed first; what is promised to preserve
    the conv's function is left alone.
    """
    by_name = {site.name: site for site in sites}
    names = refinable(sites, plan)
    swaps = {swap.site: swap for swap in plan.swaps if swap.site in names}
    chosen = [by_name[name] for name in swaps]
    found = Refined()
    with eval_mode(model, converted), torch.inference_mode():
        walk = walk_graph(model, converted, chosen, batches, images, example, memory_gib, seed, team)
        found.by_graph = walk is not None
        steps = walk or stop_at_sites(model, converted, chosen, batches, images, memory_gib, seed, team)
        for name, sums in _with_rest(steps, chosen):
            used = sums if isinstance(sums, str) else _sequential_statistics(statistics[name], sums, team)
            if isinstance(used, str):
                found.one_pass[name] = used
            found.used[name] = statistics[name] if isinstance(used, str) else used
            conv = model.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            _solve_(converted.get_submodule(name), conv, swaps[name], found.used[name], team)
            progress("solving layer by layer", len(found.used), len(swaps))
    assert found.used.keys() == swaps.keys(), "every replacement is solved by exactly one way"
    return found


def refinable(sites: Sequence[Site], plan: Plan) -> set[str]:
    """The swapped sites that `refine_` solves: whose input is known in time, and whose function is not promised."""
    by_name = {site.name: site for site in sites}
    found = set()
    for swap in plan.swaps:
        site, (kind, settings) = by_name[swap.site], replacements.load_swap(swap)
        if len(site.calls) == 1 and not kind.preserves(site.conv, settings):
            found.add(swap.site)
    return found


def _solve_(module: nn.Module, conv: nn.Conv2d, swap: Swap, statistics: SiteStatistics, team: Team) -> None:
    kind, settings = replacements.load_swap(swap)
    kind.init_(module, conv, settings, statistics)
    team.follow_(module)


def _with_rest(
    steps: Iterator[tuple[str, PatchSums | str]], chosen: Sequence[Site]
) -> Iterator[tuple[str, PatchSums | str]]:
    """The steps, and the sites that none of them was for."""
    waiting = {site.name for site in chosen}
    for name, sums in steps:
        waiting.remove(name)
        yield name, sums
    yield from ((site.name, "it did not run") for site in chosen if site.name in waiting)


def _sequential_statistics(one_pass: SiteStatistics, sums: PatchSums, team: Team) -> SiteStatistics | str:
    """Statistics of the converted network's patches from all processes, or the reason why they tell nothing.

    The ridge pulls the target kernel towards the conv's own.
    """
    sums.meet(team)
    if not sums.patches:
        return "it did not run"
    mean_GD, cov_GDD = sums.moments()
    mean_GO, cross_GOD = sums.targets()
    bare = replace(one_pass, mean_GD=mean_GD, cov_GDD=cov_GDD, target_mean_GO=mean_GO, patches=sums.patches)
    pulled_GOD = cross_GOD + bare.ridge()[:, :, None] * one_pass.target_GOD
    target_GOD: Tensor = torch.linalg.solve(bare.ridged(), pulled_GOD.mT).mT
    if sums.unexplained(target_GOD) > _UNEXPLAINED:
        return "its inputs in the two networks do not belong together"
    return replace(bare, target_GOD=target_GOD)
