"""Mean and variance of the output of a separable pair's first conv, and how to bring it above zero.

Shapes, G groups, C inputs of one group, R the rank, D = C*kh*kw the length of a patch (see `statistics`):

    first_OIHW   weight of the first conv, (G*R, C, kh, 1) or (G*R, C, 1, kw)
    mean_GR      mean of its outputs, variance_GR their variance

At a pixel of the output the second conv reads one output of the first for each of its taps, and the part of the patch
that belongs to the tap (a column of it, with the vertical conv first) is what that output was made of. So the mean and
the block of the covariance of that part tell the moments of the first conv's output map, seen through this tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asymswap.factorize.statistics import SiteStatistics


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each output channel of the first conv, in float64."""

    mean_GR: Tensor
    variance_GR: Tensor

    def shift(self, deviations: float | None) -> Tensor:
        """Return the least numbers (G, R), none below zero, that raise values so many deviations below the mean to 0.

        None below zero, so that a zero that was padded stays above it too; all zero where no deviations are given.
        """
        if deviations is None:
            return torch.zeros_like(self.mean_GR)
        return (deviations * self.variance_GR.sqrt() - self.mean_GR).clamp_min(0.0)


def seen(statistics: SiteStatistics, first_OIHW: Tensor, kernel: tuple[int, int], taps: Sequence[int]) -> Moments:
    """Return the moments through the given taps of the second conv together, on the images of the statistics.

    `kernel` is that of the k x k conv. Exact for the pixels that those taps read.
    """
    groups = len(statistics.mean_GD)
    vertical_first = first_OIHW.shape[3] == 1
    axis = 2 if vertical_first else 1
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
    return Moments(mean_GR, variance_GR.clamp_min(0.0))


def white(first_OIHW: Tensor, groups: int) -> Moments:
    """Return the moments for white inputs of mean 0 and variance 1: the assumption without statistics."""
    v_GRM = first_OIHW.detach().to(torch.float64).flatten(1).unflatten(0, (groups, -1))
    variance_GR = v_GRM.square().sum(2)
    return Moments(torch.zeros_like(variance_GR), variance_GR)


def carried(shift_GR: Tensor, second_ORHW: Tensor) -> Tensor:
    """Return the change (G*O) of the second conv's output for a constant added to its inputs, away from padding."""
    weight_GORx = second_ORHW.detach().flatten(2).unflatten(0, (len(shift_GR), -1))
    return torch.einsum("gorx,gr->go", weight_GORx.to(shift_GR), shift_GR).flatten()
