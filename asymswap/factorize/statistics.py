"""Calibration statistics of one conv: mean and covariance of its input patches, and its target output.

Shapes, G groups, C inputs and O outputs of one group, D = C*kh*kw the length of a patch, in a kernel's order (c, i, j):

    mean_GD         mean of the patches
    cov_GDD         their covariance
    target_GOD      the kernel that reproduces the target output from these patches best
    target_mean_GO  mean of the target output
    weight_GOO      how much each output affects the prediction; see below

In one-pass calibration the target output is the conv's own, so `target` is its kernel. In sequential calibration the
patches come from the network as converted so far and the target output from the original network (the asymmetric
reconstruction of Zhang, Zou, He and Sun, 2015, section 3.3): target = T S^-1 with T the cross-covariance.

`weight` is the second moment of the gradient, with respect to the conv's output, of the log-likelihood of outputs drawn
about the network's own, in a normal distribution: the output factor of K-FAC's Fisher matrix (Martens and Grosse, 2015;
Grosse and Martens, 2016, for convolutions). For a small error E of the kernel, trace(weight E cov E') / 2 is the
expected divergence (in nats) of the network's output, half its squared difference in deviations, up to spatial
correlations that K-FAC leaves out. No labels are needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  # added to a covariance, relative to the mean of its diagonal: see `SiteStatistics.ridged`
_LEAST_WEIGHT = 0.05


@dataclass(frozen=True)
class SiteStatistics:
    """The statistics of one conv, in float64; `patches` is how many were seen."""

    mean_GD: Tensor
    cov_GDD: Tensor
    target_GOD: Tensor
    target_mean_GO: Tensor
    weight_GOO: Tensor | None
    patches: int

    def ridged(self) -> Tensor:
        """Return the covariance with a ridge, positive definite.

        Directions that the images hardly ever took (dead channels, fewer patches than D) could otherwise take any
        weight. As if they occurred a thousandth as often as the average one, the kernel keeps its values there; the
        ridge is 100 times the float32 noise of the sums, and harmless where patches are plenty.
        """
        found = self.cov_GDD.clone()
        found.diagonal(dim1=1, dim2=2).add_(self.ridge())
        return found

    def ridge(self) -> Tensor:
        """Return the number (G, 1) that is added to each diagonal; 1 where the patches never varied at all."""
        scale = self.cov_GDD.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        return torch.where(scale > 0, RIDGE * scale, 1.0)

    def output_weight(self) -> Tensor:
        """Return `weight_GOO` with a share of its own average on the diagonal, or the identity where there is none.

        The gradient of a few hundred images is noisy: no output channel may be given up because of it.
        """
        groups, outputs, _ = self.target_GOD.shape
        eye_GOO = torch.eye(outputs).to(self.target_GOD).expand(groups, -1, -1)
        if self.weight_GOO is None:
            return eye_GOO
        scale = self.weight_GOO.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        return self.weight_GOO + torch.where(scale > 0, _LEAST_WEIGHT * scale, 1.0) * eye_GOO

    def bias_of(self, kernel_GOD: Tensor) -> Tensor:
        """Return the bias (G*O) that gives the outputs of a kernel their target mean."""
        return (self.target_mean_GO - torch.einsum("god,gd->go", kernel_GOD, self.mean_GD)).flatten()

    def intermediate(self, first_OIHW: Tensor, kernel: tuple[int, int], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return mean_GR and variance_GR of the output of a first conv, (G*R, C, kh, 1) or (G*R, C, 1, kw), of a pair.

        Each of the second conv's taps reads an output of the first one that is made of its part of the patch (a column,
        with the vertical conv first): its mean and covariance tell the moments of the first conv's output map, seen
        through this tap. Here it is seen through the given taps together, exactly for the pixels that they read.
        """
        axis = 3 if first_OIHW.shape[3] == 1 else 2
        v_GRM = first_OIHW.detach().to(torch.float64).flatten(1).unflatten(0, (len(self.mean_GD), -1))
        mean_GKM = self.mean_GD.unflatten(1, (-1, *kernel)).movedim(axis, 1).flatten(2)
        cov_GCijCij = self.cov_GDD.unflatten(2, (-1, *kernel)).unflatten(1, (-1, *kernel))
        cov_GKMM = cov_GCijCij.diagonal(dim1=axis, dim2=axis + 3).movedim(-1, 1).flatten(4).flatten(2, 3)
        mean_GKR = torch.einsum("grm,gkm->gkr", v_GRM, mean_GKM[:, taps])
        variance_GKR = torch.einsum("grm,gkmn,grn->gkr", v_GRM, cov_GKMM[:, taps], v_GRM)
        mean_GR, square_GR = mean_GKR.mean(1), (variance_GKR + mean_GKR.square()).mean(1)
        return mean_GR, (square_GR - mean_GR.square()).clamp_min(0.0)
