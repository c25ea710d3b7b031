"""Carrying out a plan: it holds every decision already, so nothing is decided here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from asymswap import kinds
from asymswap.errors import PlanError, near_names
from asymswap.factorize.evidence import Evidence
from asymswap.graph.sites import find_convs, read_conv
from asymswap.graph.surgery import swap, take_over_
from asymswap.spec import Plan, Progress, Swap, silent


def apply_plan(
    model: nn.Module, plan: Plan, progress: Progress = silent, evidence: Mapping[str, Evidence] | None = None
) -> nn.Module:
    """A deep copy of the model with the plan's swaps in it, initialised from the weights and, where there is some, from
    the evidence of their sites; the model is unchanged."""
    found = evidence or {}
    replacements: dict[str, nn.Module] = {}
    for done, (entry, conv, settings, replacement) in enumerate(_built(model, plan), start=1):
        kinds.load(entry.kind).init_(replacement, conv, settings, found.get(entry.site))
        replacements[entry.site] = take_over_(replacement, conv)
        progress("converting", done, len(plan.swaps))
    return swap(model, replacements)


def apply_structure(model: nn.Module, plan: Plan) -> nn.Module:
    """The same with unset weights in the replacements, for loading a state dict into it."""
    return swap(model, {entry.site: take_over_(new, conv) for entry, conv, _, new in _built(model, plan)})


def apply_random(model: nn.Module, plan: Plan) -> nn.Module:
    """The same with random weights in the replacements, which shares all others with the model: for being timed."""
    generator = torch.Generator().manual_seed(0)
    replacements = {}
    for entry, conv, _, replacement in _built(model, plan):
        for name, tensor in replacement.state_dict().items():
            # Values neither grow nor vanish on their way through the network, where they would slow down arithmetic.
            if tensor.dim() > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5)
            else:
                tensor.fill_(name.endswith(("weight", "running_var")))
        replacements[entry.site] = take_over_(replacement, conv)
    return swap(model, replacements, share=True)


def _built(model: nn.Module, plan: Plan) -> Iterator[tuple[Swap, nn.Conv2d, kinds.KindSettings, nn.Module]]:
    """Each swap of the plan with its conv, its settings and its replacement, whose weights are unset."""
    convs = {name: conv for name, (conv, _) in find_convs(model).items()}
    for entry in plan.swaps:
        conv = convs.get(entry.site)
        if conv is None:
            raise PlanError(f"the model has no Conv2d named {entry.site!r}{near_names(entry.site, convs)}")
        settings = kinds.parse_settings(entry.kind, entry.settings)
        yield entry, conv, settings, kinds.load(entry.kind).build(read_conv(conv), settings)
