"""Apply a plan: it holds every decision already, so nothing is decided here."""

import math
from collections.abc import Mapping, Set
from typing import Literal, cast

import torch
from torch import nn

from asymswap import replacements
from asymswap.errors import PlanError, near_names
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.surgery import swap, take_over_
from asymswap.graph.trace import find_convs, read_conv
from asymswap.replacements import Original
from asymswap.types import Plan, Progress, Swap, silent
from asymswap.utils.tensors import generator_for, side_by_side

Statistics = Mapping[str, SiteStatistics]  # by the names of sites
NO_STATISTICS: Statistics = {}
_ROOM = 2**22  # numbers of a kernel, as of a dense 3x3 conv of 683 channels, whose eigensolvers take 200 MB and more


def takes_room(original: Original) -> bool:
    """Return True if solving a conv takes so much memory that no other may be solved beside it."""
    return original.conv.weight.numel() > _ROOM


def apply_plan(
    model: nn.Module,
    plan: Plan,
    progress: Progress = silent,
    statistics: Statistics = NO_STATISTICS,
    unset: Set[str] = frozenset(),
    share: bool = False,
    weights: Literal["solved", "random", "unset"] = "solved",
) -> nn.Module:
    """Return a deep copy of the model with the plan's swaps in it; the model is unchanged.

    Replacements are initialised from the weights and the `statistics` of their sites, if there are any; those at the
    sites in `unset` hold NaN until others initialise them. For timing, `weights` may be random instead; unset ones are
    for loading a state dict into them. With `share` what is not swapped has the model's own parameters and buffers: for
    a model that nobody uses afterwards. Raises PlanError for a site or a batch norm that the model lacks, RecipeError
    for a kind or a setting that does not exist.
    """
    convs = {name: conv for name, (conv, _) in find_convs(model).items()}
    norms = dict(model.named_modules())
    every: list[tuple[Swap, Original, nn.Module]] = []
    for entry in plan.swaps:
        conv = convs.get(entry.site)
        if conv is None:
            raise PlanError(f"the model has no Conv2d named {entry.site!r}{near_names(entry.site, convs)}")
        if entry.absorbs is not None and entry.absorbs not in norms:
            raise PlanError(f"the model has no batch norm {entry.absorbs!r}, which {entry.site!r} would take over")
        kind, settings = replacements.load_swap(entry)
        norm = None if entry.absorbs is None else cast(nn.BatchNorm2d, norms[entry.absorbs])
        original = Original(conv, statistics.get(entry.site), norm)
        every.append((entry, original, kind.build(read_conv(conv), settings)))

    def init(built: tuple[Swap, Original, nn.Module]) -> None:
        entry, original, replacement = built
        if weights == "random":
            generator = generator_for(entry.site)
            for name, tensor in replacement.state_dict().items():
                # Values neither grow nor vanish on their way through the network, where they would slow it down.
                if tensor.dim() > 1:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5)
                else:
                    tensor.fill_(name.endswith(("weight", "running_var")))
        elif entry.site in unset:
            for parameter in replacement.parameters():
                nn.init.constant_(parameter, math.nan)  # what nobody sets afterwards must show
        else:
            kind, settings = replacements.load_swap(entry)
            kind.init_(replacement, original, settings)

    if weights != "unset":
        side_by_side(init, every, lambda done: progress("converting", done, len(every)), lambda one: takes_room(one[1]))
    swapped: dict[str, nn.Module] = {}
    for entry, original, replacement in every:
        swapped[entry.site] = take_over_(replacement, original.conv, original.norm)
        if entry.absorbs is not None:
            swapped[entry.absorbs] = nn.Identity()
    return swap(model, swapped, share)
