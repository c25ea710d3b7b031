"""Convs made from their fields, strip convs (one column or one row of taps), and batch norms as numbers.

A strip meets the centre of a k x k kernel with odd sides: k x 1 taps at the centre column see what that column sees if
the input has d * (k - 1) / 2 pixels less beside it than the kernel pads, d being the dilation. So the padding shrinks
by that much, and where the kernel pads less, the rest is cut from the input. Every padding mode fills a pixel by its
distance from the border alone, so that less of it is a part of more of it.
"""

from dataclasses import astuple, replace
from typing import cast

import torch
from torch import Tensor, nn

from asymswap.types import ConvSpec, Size
from asymswap.utils.tensors import store_


def new_conv(conv: ConvSpec, cls: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    """Return a conv of these fields with unset weights."""
    *fields, dtype = astuple(conv)  # in the order in which nn.Conv2d takes them
    module: nn.Conv2d = nn.utils.skip_init(cls, *fields, dtype=getattr(torch, dtype))
    return module


def conv_of(conv: ConvSpec, weight_OIHW: Tensor, bias_O: Tensor | None, like: Tensor) -> nn.Conv2d:
    """Return a conv of these fields but for kernel size and bias, with these numbers; dtype and device are `like`'s."""
    kernel, dtype = (weight_OIHW.shape[2], weight_OIHW.shape[3]), str(like.dtype).removeprefix("torch.")
    made = new_conv(replace(conv, kernel=kernel, bias=bias_O is not None, dtype=dtype)).to(like.device)
    copy_(made, weight_OIHW, bias_O)
    return made


def copy_(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Copy numbers into the `weight` and the `bias` of a module, in place; a bias that it has alone becomes zero."""
    with torch.no_grad():
        cast(Tensor, module.weight).copy_(weight)
        if module.bias is not None:
            own = cast(Tensor, module.bias)
            own.copy_(torch.zeros_like(own) if bias is None else bias)


def margins(conv: ConvSpec) -> tuple[Size, Size]:
    """Return the pixels that a conv pads (before, after), for rows and for columns."""
    left, right, top, bottom = conv.pads
    return (top, bottom), (left, right)


def unsupported(conv: ConvSpec) -> str | None:
    """Return the reason why a kernel has no centre row and column apart from each other, or None where it has."""
    shape = "x".join(map(str, conv.kernel))
    if conv.kernel == (1, 1):
        return "a 1x1 kernel has no row and column to tell apart"
    if 1 in conv.kernel:
        return f"{shape} is asymmetric already"
    if any(side % 2 == 0 for side in conv.kernel):
        return f"a {shape} kernel has no centre row and column, since not both of its sides are odd"
    return None


def strip_convs(conv: ConvSpec, bias: bool = False) -> tuple[ConvSpec, ConvSpec, Size]:
    """Return the kh x 1 (maybe with a bias) and the 1 x kw conv at the centre of a kernel, and `StripSum`'s crop."""
    vertical = replace(conv, kernel=(conv.kernel[0], 1), bias=bias)
    horizontal = replace(conv, kernel=(1, conv.kernel[1]), bias=False)
    if conv.padding == "same":
        return vertical, horizontal, (0, 0)
    height, width = (0, 0) if isinstance(conv.padding, str) else conv.padding
    rows = height - conv.dilation[0] * (conv.kernel[0] - 1) // 2
    columns = width - conv.dilation[1] * (conv.kernel[1] - 1) // 2
    vertical = replace(vertical, padding=(height, max(columns, 0)))
    return vertical, replace(horizontal, padding=(max(rows, 0), width)), (max(-rows, 0), max(-columns, 0))


class StripSum(nn.Module):
    """The sum of a vertical and a horizontal strip.

    Input (N, C, H, W) or (C, H, W), output that of the k x k conv. `crop` is how many (rows, columns) are cut from each
    side of the horizontal and of the vertical strip's input.
    """

    def __init__(self, crop: Size, vertical: nn.Module, horizontal: nn.Module) -> None:
        super().__init__()
        self.vertical, self.horizontal = vertical, horizontal
        self.crop = crop

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.crop
        beside: Tensor = self.horizontal(input[..., rows:-rows, :] if rows else input)
        output: Tensor = self.vertical(input[..., columns:-columns] if columns else input) + beside
        return output

    def extra_repr(self) -> str:
        return f"crop={self.crop}" if any(self.crop) else ""


def centre_column(w_OIHW: Tensor) -> Tensor:
    """Return the taps (O, I, H, 1) of the vertical strip, a view."""
    return w_OIHW.narrow(3, w_OIHW.shape[3] // 2, 1)


def centre_row(w_OIHW: Tensor) -> Tensor:
    """Return the taps (O, I, 1, W) of the horizontal strip, a view."""
    return w_OIHW.narrow(2, w_OIHW.shape[2] // 2, 1)


def as_square(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Return the kernel (O, I, H, W) that equals the sum of a vertical and a horizontal strip."""
    outputs, inputs, height, _ = vertical.shape
    kernel = vertical.new_zeros(outputs, inputs, height, horizontal.shape[3])
    centre_column(kernel).copy_(vertical)
    centre_row(kernel).add_(horizontal)
    return kernel


def set_neutral_(norm: nn.BatchNorm2d, mean_O: Tensor, variance_O: Tensor) -> None:
    """Give a batch norm these statistics, in place, and the weight and bias by which it does nothing in eval mode."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    store_(mean, mean_O)
    store_(variance, variance_O)
    # From the statistics as they are stored, rounded or cut, so that one undoes the other.
    norm.weight.copy_((variance.to(torch.float64) + norm.eps).sqrt())
    norm.bias.copy_(mean)


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of a batch norm in eval mode, each (O) in float64."""
    numbers = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean_O, variance_O, weight_O, bias_O = (cast(Tensor, tensor).detach().to(torch.float64) for tensor in numbers)
    scale_O = weight_O / (variance_O + norm.eps).sqrt()
    return scale_O, bias_O - mean_O * scale_O
