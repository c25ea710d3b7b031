"""Statistics of one conv from every patch of an input, and the patches themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from conv_cases import Case
from torch import Tensor

from asymswap.calibration.gather import PatchSums, patches_of
from asymswap.factorize.statistics import SiteStatistics


@dataclass(frozen=True)
class Seen:
    """The statistics, and the patches (G, D, N) that it was gathered from, in float64."""

    statistics: SiteStatistics
    patches_GDN: Tensor


def see_all(case: Case, weighted: bool = False) -> Seen:
    """Look at every pixel of the conv's output on the case's input; `weighted` adds random output gradients."""
    conv = case.conv
    with torch.no_grad():
        y = conv(case.x)
        flat = torch.arange(y.shape[-2:].numel())
        at = flat // y.shape[-1], flat % y.shape[-1]
        patches = patches_of(conv, case.x, at).to(torch.float64)
        sums = PatchSums(conv)
        sums.add(patches)
        mean, covariance = sums.moments()
        kernel = conv.weight.detach().to(torch.float64).flatten(1).unflatten(0, (conv.groups, -1))
        wanted = torch.einsum("god,gd->go", kernel, mean)
        if conv.bias is not None:
            wanted = wanted + conv.bias.detach().to(torch.float64).unflatten(0, (conv.groups, -1))
        weight = None
        if weighted:
            slopes = torch.randn(conv.groups, 20, kernel.shape[1], dtype=torch.float64)
            weight = slopes.mT @ slopes / 20
    return Seen(SiteStatistics(mean, covariance, kernel, wanted, weight, sums.patches), patches)
