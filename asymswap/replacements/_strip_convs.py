"""Convs of one column or one row of taps that run beside a k x k conv and meet its centre.

Of a kernel with odd sides, k x 1 taps at the centre column see what that column sees if the input has d * (k - 1) / 2
pixels less beside it than the kernel pads, d being the dilation: the padding shrinks by so much, and where the kernel
pads less, the rest is cut from the input. Stride, dilation and padding along the strip are those of the kernel. Every
padding mode fills a pixel by its distance from the border alone, so that less of it is a part of more of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from asymswap.types import ConvSpec, Size


@dataclass(frozen=True)
class Strip:
    """A conv of one column or row, and how many (rows, columns) are cut from each side of its input."""

    conv: ConvSpec
    crop: Size


def refuse(conv: ConvSpec) -> str | None:
    """The reason why a kernel has no strips at its centre, or why its weights cannot be theirs; None otherwise."""
    shape = "x".join(map(str, conv.kernel))
    if conv.kernel == (1, 1):
        return "a 1x1 kernel has no row and column to tell apart"
    if 1 in conv.kernel:
        return f"{shape} is asymmetric already"
    if any(side % 2 == 0 for side in conv.kernel):
        return f"a {shape} kernel has no centre row and column, since not both of its sides are odd"
    if conv.dtype not in ("float64", "float32", "float16", "bfloat16"):
        return f"{conv.dtype} weights are not real floating-point numbers"
    return None


def vertical_strip(conv: ConvSpec) -> Strip:
    """The kh x 1 conv, without a bias, whose taps are at the centre column of the kernel of `conv`."""
    return _strip(conv, axis=1)


def horizontal_strip(conv: ConvSpec) -> Strip:
    """The 1 x kw conv, without a bias, whose taps are at the centre row of the kernel of `conv`."""
    return _strip(conv, axis=0)


def _strip(conv: ConvSpec, axis: int) -> Strip:
    """The kernel's middle along one axis."""
    kernel = _with(conv.kernel, axis, 1)
    if conv.padding == "same":
        return Strip(replace(conv, kernel=kernel, bias=False), (0, 0))
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    left = padding[axis] - conv.dilation[axis] * (conv.kernel[axis] - 1) // 2
    padding = _with(padding, axis, max(left, 0))
    return Strip(replace(conv, kernel=kernel, padding=padding, bias=False), _with((0, 0), axis, max(-left, 0)))


def _with(size: Size, axis: int, value: int) -> Size:
    return (value, size[1]) if axis == 0 else (size[0], value)


def new_conv(conv: ConvSpec, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Conv2d:
    """A conv of these fields with unset weights; `dtype` goes before that of the fields."""
    module: nn.Conv2d = nn.utils.skip_init(
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        conv.kernel,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias,
        padding_mode=conv.padding_mode,
        dtype=dtype or getattr(torch, conv.dtype),
        device=device,
    )
    return module


def cut(x: Tensor, crop: Size) -> Tensor:
    """The input (…, H, W) without so many rows and columns at each side."""
    rows, columns = crop
    if rows:
        x = x[..., rows:-rows, :]
    return x[..., columns:-columns] if columns else x


def centre_column(w_OIHW: Tensor) -> Tensor:
    """The taps (O, I, H, 1) that the vertical strip meets."""
    middle = w_OIHW.shape[3] // 2
    return w_OIHW[..., middle : middle + 1]


def centre_row(w_OIHW: Tensor) -> Tensor:
    """The taps (O, I, 1, W) that the horizontal strip meets."""
    middle = w_OIHW.shape[2] // 2
    return w_OIHW[:, :, middle : middle + 1]


def as_square(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """The kernel (O, I, H, W) that a strip of each direction amounts to when the two outputs are summed."""
    outputs, inputs, height, _ = vertical.shape
    kernel = vertical.new_zeros(outputs, inputs, height, horizontal.shape[3])
    centre_column(kernel).copy_(vertical)
    centre_row(kernel).add_(horizontal)
    return kernel
