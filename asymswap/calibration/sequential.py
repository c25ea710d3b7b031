"""Layer after layer: each replacement is solved for the input that it will really get.

At each swapped site the patches come from the network as converted so far, and the target output from the original one
(Zhang, Zou, He and Sun, 2015, section 3.3, in closed form; see factorize.statistics). Where the graph of the whole
model is what runs, both networks walk through it side by side (`graph_walk`). Elsewhere real forward passes are stopped
at the current layer: the original runs once for many sites, keeping the sampled positions of each output alone; the
converted network runs for every site, up to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from asymswap import replacements
from asymswap.calibration.gather import (
    Images,
    PatchSums,
    choose_positions,
    outputs_at,
    patches_of,
    positions_for,
    within,
)
from asymswap.calibration.graph_walk import walk_graph
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.trace import conv_hooks, conv_input
from asymswap.types import Plan, Progress, Site, silent
from asymswap.utils.distributed import Team
from asymswap.utils.inputs import Inputs, copied
from asymswap.utils.tensors import eval_mode, generator_for

_UNEXPLAINED = 0.8
"""Above this fraction of a target output's energy that no kernel explains, patches and targets do not belong together:
a detector's second stage looks at other boxes in the converted network than in the original."""


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
    example: Inputs,
    progress: Progress = silent,
) -> Refined:
    """Solve every refinable replacement in `converted`, in place, in the order in which the sites run.

    `example` holds arguments of one sample; only sizes and dtypes count, for a process may have no batch. A conv that
    runs more than once in a forward pass keeps its one-pass solution, since its later inputs are not known when it is
    needed first; a replacement that preserves the conv's function is left alone.
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
        module, conv = converted.get_submodule(name), cast(nn.Conv2d, model.get_submodule(name))
        kind, settings = replacements.load_swap(swaps[name])
        kind.init_(module, replacements.Original(conv, used), settings)
        images.team.follow_(module)
        progress("solving layer by layer", len(found.used), len(swaps))

    with eval_mode(model, converted), torch.inference_mode():
        walk = walk_graph(model, converted, chosen, images, example)
        found.by_graph = walk is not None
        for name, sums in walk or _stop_at_sites(model, converted, chosen, images):
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
    """Return statistics of the converted network's patches from all processes, or why they are of no use."""
    sums.meet(team)
    if not sums.patches:
        return "it did not run"
    mean_GD, cov_GDD = sums.moments()
    mean_GO, cross_GOD = sums.targets()
    bare = replace(one_pass, mean_GD=mean_GD, cov_GDD=cov_GDD, target_mean_GO=mean_GO, patches=sums.patches)
    # The ridge pulls the target kernel towards the conv's own.
    pulled_GOD = cross_GOD + bare.ridge()[:, :, None] * one_pass.target_GOD
    target_GOD: Tensor = torch.linalg.solve(bare.ridged(), pulled_GOD.mT).mT
    if sums.unexplained(target_GOD) > _UNEXPLAINED:
        return "its inputs in the two networks do not belong together"
    return replace(bare, target_GOD=target_GOD)


class _Stop(BaseException):
    """Ends a forward pass; no `except Exception` in a model's code catches it."""


@dataclass
class _Target:
    """The original network at one site for one batch: its input's shape, some positions, and the outputs there."""

    input: torch.Size
    at: tuple[Tensor, Tensor]
    outputs_GON: Tensor
    calls: int = 1


def _stop_at_sites(
    model: nn.Module, converted: nn.Module, sites: Sequence[Site], images: Images
) -> Iterator[tuple[str, PatchSums | str]]:
    """Yield each site in call order, to be solved before the next one, with its sums or why there are none."""
    by_name = {site.name: site for site in sites}

    def call_order() -> list[str]:
        """Return the convs in the order in which they run on the first batch."""
        seen: dict[str, None] = {}
        with conv_hooks(model, lambda name, _, __: seen.setdefault(name)):
            for _, batch in images.batches():
                model(*copied(batch))
                break
        return [name for name in seen if name in by_name]

    def output_bytes(site: Site) -> float:
        return 4.0 * images.count * positions_for(site, images.count) * site.conv.out_channels

    order = [by_name[name] for name in images.team.first(call_order)]
    for group in within(images.memory_gib * 2**30, order, output_bytes):
        targets = _targets(model, group, images)
        for site in group:
            conv = cast(nn.Conv2d, model.get_submodule(site.name))
            sums = PatchSums(conv, targets=True)
            reason = _add_runs(conv, converted, site.name, sums, targets.pop(site.name), images)
            reasons = [one for one in images.team.gather(reason) if one is not None]
            yield site.name, reasons[0] if reasons else sums


def _targets(model: nn.Module, group: Sequence[Site], images: Images) -> dict[str, dict[int, _Target]]:
    """Return the targets for each site and batch."""
    most = {site.name: positions_for(site, images.count) for site in group}
    found: dict[str, dict[int, _Target]] = {site.name: {} for site in group}
    number = 0

    def see(name: str, seen: Tensor, output: Tensor) -> None:
        if name not in found:
            return
        if number in found[name]:
            found[name][number].calls += 1
            return
        conv = cast(nn.Conv2d, model.get_submodule(name))
        at = choose_positions(output.shape[-2:], most[name], generator_for(images.seed, name, number))
        found[name][number] = _Target(seen.shape, at, outputs_at(output, conv.groups, at))

    with conv_hooks(model, see):
        for number, batch in images.batches():  # noqa: B007  # `see` reads it
            model(*copied(batch))
    return found


def _add_runs(
    conv: nn.Conv2d, converted: nn.Module, name: str, sums: PatchSums, targets: Mapping[int, _Target], images: Images
) -> str | None:
    """Add the site's patches in the converted network; return why they do not fit the targets, if so."""
    if any(target.calls > 1 for target in targets.values()):
        return "it runs several times in a forward pass"
    inputs: list[Tensor] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(conv_input(args, kwargs))
        raise _Stop

    with converted.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True):
        for number, batch in images.batches():
            inputs.clear()
            with suppress(_Stop):
                converted(*copied(batch))
            target = targets.get(number)
            if not inputs and target is None:
                continue
            if not inputs or target is None or inputs[0].shape != target.input:
                return "it runs on inputs of another size, or another number of times, in the converted network"
            try:
                sums.add(patches_of(conv, inputs[0], target.at), target.outputs_GON)
            except ValueError:
                return "its input in the converted network is not finite"
    return None
