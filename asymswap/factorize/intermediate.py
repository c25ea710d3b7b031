"""Mean and variance of the output of a separable pair's first conv, and what a constant added to it does.

Shapes, G groups, C inputs of one group, R the rank, D = C*kh*kw the length of a patch (see `statistics`):

    first_OIHW   weight of the first conv, (G*R, C, kh, 1) or (G*R, C, 1, kw)
    mean_GR      mean of its outputs, variance_GR their variance

At a pixel of the output the second conv reads one output of the first for each of its taps, and the part of the patch
that belongs to the tap (a column of it, with the vertical conv first) is what that output was made of. So the mean and
the block of the covariance of that part tell the moments of the first conv's output map, seen through this tap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asymswap.factorize.statistics import SiteStatistics


def seen(
    statistics: SiteStatistics, first_OIHW: Tensor, kernel: tuple[int, int], taps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return mean_GR and variance_GR in float64, on the images of the statistics, for a k x k conv of this `kernel`.

    They are seen through the given taps of the second conv together, and exact for the pixels that those taps read.
    """
    groups = len(statistics.mean_GD)
    axis = 2 if first_OIHW.shape[3] == 1 else 1
    v_GRM = first_OIHW.detach().to(torch.float64).flatten(1).unflatten(0, (groups, -1))
    mean_GCij = statistics.mean_GD.unflatten(1, (-1, *kernel))
    cov_GCijCij = statistics.cov_GDD.unflatten(2, (-1, *kernel)).unflatten(1, (-1, *kernel))
    means, squares = [], []
    for tap in taps:
        mean_GM = mean_GCij.select(1 + axis, tap).flatten(1)
        cov_GMM = cov_GCijCij.select(4 + axis, tap).select(1 + axis, tap).flatten(3).flatten(1, 2)
        means.append(torch.einsum("grm,gm->gr", v_GRM, mean_GM))
        squares.append(torch.einsum("grm,gmn,grn->gr", v_GRM, cov_GMM, v_GRM) + means[-1].square())
    mean_GR = torch.stack(means).mean(0)
    variance_GR = torch.stack(squares).mean(0) - mean_GR.square()
    return mean_GR, variance_GR.clamp_min(0.0)


def white(first_OIHW: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean_GR and variance_GR for white inputs of mean 0 and variance 1: the assumption without statistics."""
    v_GRM = first_OIHW.detach().to(torch.float64).flatten(1).unflatten(0, (groups, -1))
    variance_GR = v_GRM.square().sum(2)
    return torch.zeros_like(variance_GR), variance_GR


def carried(shift_GR: Tensor, second_ORHW: Tensor) -> Tensor:
    """Return the change (G*O) of the second conv's output for a constant added to its inputs, away from padding."""
    weight_GORx = second_ORHW.detach().flatten(2).unflatten(0, (len(shift_GR), -1))
    return torch.einsum("gorx,gr->go", weight_GORx.to(shift_GR), shift_GR).flatten()
