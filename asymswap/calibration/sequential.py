"""Layer after layer: each replacement is solved for the input that it will really get.

At each swapped site the patches come from the network as converted so far, and the target output from the original one
(Zhang, Zou, He and Sun, 2015, section 3.3, in closed form; see factorize.statistics). Where the graph of the whole
model is what runs, both networks walk through it side by side (`graph_walk`); elsewhere both are run for each layer,
and stopped there (`stopped_runs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from asymswap import replacements
from asymswap.calibration.gather import Images, PatchSums
from asymswap.calibration.graph_walk import walk_graph
from asymswap.calibration.stopped_runs import stop_at_sites
from asymswap.factorize.statistics import SiteStatistics
from asymswap.types import Plan, Progress, Site, silent
from asymswap.utils.distributed import Team
from asymswap.utils.tensors import eval_mode

_UNEXPLAINED = 0.8
"""If no kernel explains more than the rest of a target output's energy, patches and targets do not belong together: a
detector's second stage looks at other boxes in the converted network than in the original."""


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
    images: Images,
    example: Tensor,
    progress: Progress = silent,
) -> Refined:
    """Solve every refinable replacement in `converted`, in place, in the order in which the sites run.

    `example` is an image (1xCxHxW), of which only the size and the dtype count: a process may have no batch at all. A
    conv that runs more than once in a forward pass keeps its one-pass solution, since its later inputs are not known
    when it is needed first; a replacement that preserves the conv's function is left alone.
    """
    names = refinable(sites, plan)
    swaps = {swap.site: swap for swap in plan.swaps if swap.site in names}
    by_name = {site.name: site for site in sites}
    chosen = [by_name[name] for name in swaps]
    found = Refined()

    def solve_(name: str, sums: PatchSums | str) -> None:
        used = sums if isinstance(sums, str) else _sequential_statistics(statistics[name], sums, images.team)
        if isinstance(used, str):
            found.one_pass[name], used = used, statistics[name]
        found.used[name] = used
        module, conv, swap = converted.get_submodule(name), model.get_submodule(name), swaps[name]
        assert isinstance(conv, nn.Conv2d)
        kind, settings = replacements.load_swap(swap)
        kind.init_(module, replacements.Original(conv, used), settings)
        images.team.follow_(module)
        progress("solving layer by layer", len(found.used), len(swaps))

    with eval_mode(model, converted), torch.inference_mode():
        walk = walk_graph(model, converted, chosen, images, example)
        found.by_graph = walk is not None
        for name, sums in walk or stop_at_sites(model, converted, chosen, images):
            assert name not in found.used, "every replacement is solved by exactly one way"
            solve_(name, sums)
        for name in swaps:
            if name not in found.used:
                solve_(name, "it did not run")
    return found


def refinable(sites: Sequence[Site], plan: Plan) -> set[str]:
    """Return the swapped sites that `refine_` solves: those that run once and whose function is not preserved."""
    by_name = {site.name: site for site in sites}
    found = set()
    for swap in plan.swaps:
        site, (kind, settings) = by_name[swap.site], replacements.load_swap(swap)
        if len(site.calls) == 1 and not kind.preserves(site.conv, settings):
            found.add(swap.site)
    return found


def _sequential_statistics(one_pass: SiteStatistics, sums: PatchSums, team: Team) -> SiteStatistics | str:
    """Return statistics of the converted network's patches from all processes, or why they are of no use.

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
