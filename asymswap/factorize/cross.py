"""The kernel on one row and one column of taps that errs least: all of a k x k kernel's work, done by a cross.

Shapes, G groups, C inputs and O outputs of one group, D = C*kh*kw in the order of a kernel (c, i, j), L = C*(kh+kw-1)
the taps of the cross, R the others:

    w_GOD       the target kernel
    x_GOD       the solution, zero off the cross
    s_GDD       covariance of the input patches
    p_GOO       weight of the outputs' errors

The expected squared error trace(P (W - X) S (W - X)') depends on the data through S alone. Over all X on the cross it
is least at X_L = W S_DL S_LL^-1 = W_L + W_R S_RL S_LL^-1, whatever P: ordinary least squares, in which the taps of the
cross take over what predicts the others' inputs.

Least squares on the kernel itself is the case S = 1, white inputs: its solution is the centre row and column of W. But
feature maps are not white: pixels are like their neighbours, and most are positive behind a ReLU, so that a kernel
without its corners answers above all with the wrong mean. Without data, `smooth` is a better assumption.
"""

import torch
from torch import Tensor

from asymswap.factorize.statistics import SiteStatistics


def places(inputs: int, kernel: tuple[int, int]) -> Tensor:
    """Return a mask of length D of the taps on the centre row or column."""
    on_cross = torch.zeros(inputs, *kernel, dtype=torch.bool)
    on_cross[:, kernel[0] // 2, :] = True
    on_cross[:, :, kernel[1] // 2] = True
    return on_cross.flatten()


def smooth(kernel: tuple[int, int], dilation: tuple[int, int], correlation: float) -> Tensor:
    """Return the covariance (kh*kw, kh*kw) of one channel's taps where neighbouring pixels have this correlation.

    It falls by the same factor with each further pixel, in rows and columns apart: a first-order autoregressive
    process, the usual model of images (Jain, Fundamentals of Digital Image Processing, 1989).
    """
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in kernel)
    along_rows = correlation ** (dilation[0] * (rows[:, None] - rows).abs())
    return torch.kron(along_rows, correlation ** (dilation[1] * (columns[:, None] - columns).abs()))


def fit(w_GOD: Tensor, on_cross_D: Tensor, s_GDD: Tensor) -> Tensor:
    """Return the best kernel x_GOD on the cross for inputs of this covariance."""
    x_GOD = w_GOD * on_cross_D
    s_GLD = s_GDD[:, on_cross_D]
    right_GLO = s_GLD[:, :, ~on_cross_D] @ w_GOD[:, :, ~on_cross_D].mT
    moved_GLO: Tensor = torch.linalg.solve(s_GLD[:, :, on_cross_D], right_GLO)
    x_GOD[:, :, on_cross_D] += moved_GLO.mT
    return x_GOD


def relative_error(w_GOD: Tensor, x_GOD: Tensor, s_GDD: Tensor | None = None) -> float:
    """Return the squared error summed over the groups, relative to the energy of the target; 0 where that is 0.

    Of the kernel itself, or with a covariance of the output; never above 1, which is the error of no kernel at all.
    """
    gap_GOD = w_GOD - x_GOD
    whole, left = (float((one * one if s_GDD is None else one @ s_GDD * one).sum()) for one in (w_GOD, gap_GOD))
    return min(left / whole, 1.0) if whole else 0.0


def divergence(statistics: SiteStatistics, x_GOD: Tensor) -> float | None:
    """Return K-FAC's estimate, in nats, of what the error does to the prediction: half the weighted one, or None."""
    if statistics.weight_GOO is None:
        return None
    gap_GOD, weight_GOO = statistics.target_GOD - x_GOD, statistics.output_weight()
    return 0.5 * float(torch.einsum("god,gde,gpe,gop->", gap_GOD, statistics.ridged(), gap_GOD, weight_GOO))
