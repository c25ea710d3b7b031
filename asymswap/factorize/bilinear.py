"""Kernels whose taps sit between the pixels: bilinear interpolation onto a larger, ordinary kernel.

Shapes, G groups, C inputs of one group and O outputs in all, T = kh*kw taps in row-major order:

    w_OIHW     (O, C, kh, kw)    the weights of the taps
    offset_T2  (T, 2)            how far each tap has moved: (down, right) in pixels of the input
    share_TYX  (T, Y, X)         the share of each tap that falls on each cell of the grid; one in all
    grown_OIYX (O, C, Y, X)      the grown kernel, of dilation 1

The grid has a cell for each pixel that a tap can touch: a tap moves by at most `reach` pixels, so Y =
dilation*(kh - 1) + 1 + 2*reach, and with `reach` pixels more padding on each side the grown kernel is where the
original one was, whatever the stride. A tap at (y, x) is shared among the four cells around it, as
`deform_conv2d` shares it among four pixels (Dai et al., ICCV 2017, equation 3): on zero padding the two are the same
function. Learning positions by growing the kernel: Khalfaoui-Hassani, Pellegrini and Masquelier, ICLR 2023 (DCLS).
"""

import torch
from torch import Tensor

from asymswap.types import Size


def grid_size(kernel: Size, dilation: Size, reach: int) -> Size:
    """Return rows and columns of the grown kernel."""
    height, width = (d * (k - 1) + 1 + 2 * reach for k, d in zip(kernel, dilation, strict=True))
    return height, width


def hat(distance: Tensor) -> Tensor:
    """Return the share of a tap at this signed distance from a cell: `max(0, 1 - |distance|)`, of the same shape.

    It has kinks at -1, 0 and 1, where every tap of a conv that has just been converted sits. With `relu` the derivative
    would be zero there, and no offset would ever learn. Here it is the mean of the two one-sided ones, for `abs` has
    the derivative 0 at 0 and `maximum` parts the gradient evenly between equals: exact where the image is a parabola,
    and without a direction, while the right-hand side difference of `deform_conv2d` pulls down and right.
    """
    return torch.maximum(1 - distance.abs(), torch.zeros_like(distance))


def spread(offset_T2: Tensor, kernel: Size, dilation: Size, reach: int) -> Tensor:
    """Return the shares share_TYX of all taps for offsets of at most `reach` pixels; differentiable in the offsets."""
    offset_HW2 = offset_T2.unflatten(0, kernel)
    steps = []
    for taps, step, cells in zip(kernel, dilation, grid_size(kernel, dilation, reach), strict=True):
        # How far each cell (a column) of one axis is from where each tap (a row) originally is, in pixels.
        at_taps = step * torch.arange(taps, dtype=offset_T2.dtype, device=offset_T2.device) + reach
        steps.append(torch.arange(cells, dtype=offset_T2.dtype, device=offset_T2.device) - at_taps[:, None])
    down_HWY = hat(offset_HW2[..., :1] - steps[0][:, None])
    right_HWX = hat(offset_HW2[..., 1:] - steps[1])
    return (down_HWY[..., :, None] * right_HWX[..., None, :]).flatten(0, 1)


def grow(w_OIHW: Tensor, share_TYX: Tensor) -> Tensor:
    """Return the grown kernel: each tap's weight on the cells among which the tap is shared, overlaps added."""
    grown = w_OIHW.flatten(2).flatten(0, 1) @ share_TYX.flatten(1)
    return grown.reshape(*w_OIHW.shape[:2], *share_TYX.shape[1:])


def windows(share_TYX: Tensor, kernel: Size, dilation: Size, reach: int, shrink: Size | None) -> tuple[range, range]:
    """Return the rows and the columns of the smallest window about the kernel's middle with every cell that taps touch.

    It keeps the dilation of an axis along which all taps sit where a tap of the original kernel could, and is at most
    `shrink` pixels shorter on each side: padding cannot be negative. Places count: a pruned tap changes nothing.
    """
    found = []
    for axis in (0, 1):
        touched = torch.nonzero(share_TYX.detach().amax((0, 2 - axis))).flatten().tolist()
        first, last = reach, reach + dilation[axis] * (kernel[axis] - 1)
        step = dilation[axis] if all((cell - first) % dilation[axis] == 0 for cell in touched) else 1
        growth = max(first - min(touched), max(touched) - last)
        if shrink is not None:
            growth = max(growth, -shrink[axis])
        growth += -growth % step
        found.append(range(first - growth, last + growth + 1, step))
    return found[0], found[1]
