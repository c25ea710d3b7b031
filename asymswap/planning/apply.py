"""Carrying out a plan: it holds every decision already, so nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from asymswap import kinds
from asymswap.errors import PlanError, near_names
from asymswap.factorize.evidence import Evidence
from asymswap.graph.sites import find_convs, read_conv
from asymswap.graph.surgery import swap, take_over_
from asymswap.spec import Plan, Progress, silent


def apply_plan(
    model: nn.Module, plan: Plan, progress: Progress = silent, evidence: Mapping[str, Evidence] | None = None
) -> nn.Module:
    """A deep copy of the model with the plan's swaps in it, initialised from the weights and, where there is some, from
    the evidence of their sites; the model is unchanged."""
    return _apply(model, plan, evidence or {}, progress)


def apply_structure(model: nn.Module, plan: Plan) -> nn.Module:
    """The same with unset weights in the replacements, for loading a state dict into it."""
    return _apply(model, plan, None, silent)


def _apply(model: nn.Module, plan: Plan, evidence: Mapping[str, Evidence] | None, progress: Progress) -> nn.Module:
    """Without evidence, not even an empty one, nothing is initialised."""
    convs = {name: conv for name, (conv, _) in find_convs(model).items()}
    replacements: dict[str, nn.Module] = {}
    for done, entry in enumerate(plan.swaps, start=1):
        conv = convs.get(entry.site)
        if conv is None:
            raise PlanError(f"the model has no Conv2d named {entry.site!r}{near_names(entry.site, convs)}")
        kind = kinds.load(entry.kind)
        settings = kinds.parse_settings(entry.kind, entry.settings)
        replacement = kind.build(read_conv(conv), settings)
        if evidence is not None:
            kind.init_(replacement, conv, settings, evidence.get(entry.site))
        replacements[entry.site] = take_over_(replacement, conv)
        progress("converting", done, len(plan.swaps))
    return swap(model, replacements)
