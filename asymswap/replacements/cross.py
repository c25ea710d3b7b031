"""A k x k conv as a k x 1 and a 1 x k conv side by side, their outputs summed: a cross of taps without the square.

For large kernels and depthwise ones (strip convolutions; SegNeXt, Guo et al., NeurIPS 2022): kh + kw taps instead of
kh * kw, and no channels between the two. Both convs keep the stride, dilation, groups and padding mode; the padding
shrinks across the strip. The centre tap is in both, half of it each. Mathematics: `asymswap.factorize.cross`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from asymswap.factorize import cross
from asymswap.factorize.allocation_cost import loss
from asymswap.replacements import _convs
from asymswap.replacements.base import KindSettings, Original, Replacement
from asymswap.types import ConvSpec, Cost, Option, Site, Size


class Settings(KindSettings):
    """A bias, and what is assumed about the inputs without statistics; a cross has one size."""

    bias: bool = Field(False, description="Give the cross a bias even where the conv has none, for calibration to set.")
    correlation: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Of neighbouring input pixels, assumed without calibration; 0 copies the centre row and column.",
    )


class CrossConv2d(nn.Module):
    """The sum of a vertical and a horizontal conv, each of which sees the input less `crop` pixels across its strip.

    Input (N, C, H, W) or (C, H, W), output that of the k x k conv. The bias is the vertical conv's.
    """

    def __init__(self, vertical: nn.Conv2d, horizontal: nn.Conv2d, crop: Size) -> None:
        super().__init__()
        self.vertical, self.horizontal = vertical, horizontal
        self.crop = crop

    def forward(self, input: Tensor) -> Tensor:
        vertical, horizontal = _convs.run_strips(self.vertical, self.horizontal, input, self.crop)
        return vertical + horizontal

    def extra_repr(self) -> str:
        return f"crop={self.crop}" if any(self.crop) else ""


class Cross(Replacement):
    settings = Settings
    PRESERVES = "approximate: the best that one row and one column of taps can do, by least squares"

    def unsupported(self, conv: ConvSpec) -> str | None:
        return _convs.unsupported(conv) or super().unsupported(conv)

    def preserves(self, conv: ConvSpec, settings: Settings) -> bool:
        return False  # the taps off the cross are lost

    def cost(self, site: Site, settings: Settings) -> Cost:
        strips = _convs.strip_convs(site.conv)
        vertical = replace(strips.vertical, bias=site.conv.bias or settings.bias)
        return replace(site, conv=vertical).cost + replace(site, conv=strips.horizontal).cost

    def resolve(self, site: Site, original: Original, settings: Settings) -> Option:
        target, found = _solve(original, settings)
        statistics = original.statistics
        bias = {"bias": True} if not site.conv.bias and (settings.bias or statistics is not None) else {}
        if statistics is None:
            error, divergence = cross.relative_error(target, found), None
            settled = Settings(**bias, correlation=settings.correlation)
        else:
            error, settled = cross.relative_error(target, found, statistics.ridged()), Settings(**bias)
            divergence = None if statistics.weight_GOO is None else cross.divergence(statistics, found)
        return self.option(site, settled, error, loss(error, divergence))

    def build(self, conv: ConvSpec, settings: Settings) -> CrossConv2d:
        strips = _convs.strip_convs(conv)
        vertical = replace(strips.vertical, bias=conv.bias or settings.bias)
        return CrossConv2d(_convs.new_conv(vertical), _convs.new_conv(strips.horizontal), strips.crop)

    def init_(self, module: nn.Module, original: Original, settings: Settings) -> None:
        """Set the best cross for the assumed inputs, or those of the statistics, which set the output's mean, too."""
        own, conv, statistics = cast(CrossConv2d, module), original.conv, original.statistics
        _, found = _solve(original, settings)
        kernel = found.flatten(0, 1).unflatten(1, (-1, *cast(Size, conv.kernel_size)))
        column, row = _convs.centre_column(kernel).clone(), _convs.centre_row(kernel).clone()
        _convs.centre_row(column).mul_(0.5)
        _convs.centre_column(row).mul_(0.5)
        bias = None if conv.bias is None else conv.bias.detach()
        if statistics is not None:
            bias = (statistics.target_mean_GO - torch.einsum("god,gd->go", found, statistics.mean_GD)).flatten()
        _convs.copy_(own.vertical, column, bias)
        _convs.copy_(own.horizontal, row, None)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
        """Return one k x k conv of the original fields, zero off the cross, with the cross's bias."""
        own = cast(CrossConv2d, module)
        column, row = own.vertical.weight.to(torch.float64), own.horizontal.weight.to(torch.float64)
        with torch.no_grad():
            kernel = _convs.as_square(column, row)
        return _convs.conv_of(conv, kernel, own.vertical.bias, own.vertical.weight)


def _solve(original: Original, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the target kernel (G, O, D), and the best one on the cross."""
    conv, statistics = original.conv, original.statistics
    kernel = cast(Size, conv.kernel_size)
    if statistics is not None:
        on_cross_D = cross.places(conv.in_channels // conv.groups, kernel)
        return statistics.target_GOD, cross.fit(statistics.target_GOD, on_cross_D, statistics.ridged())
    # We assume that channels are independent, so that the cross takes over each tap's work within its own channel.
    planes = conv.weight.detach().to("cpu", torch.float64).flatten(2).flatten(0, 1)[None]
    assumed = cross.smooth(kernel, cast(Size, conv.dilation), settings.correlation)[None]
    found = cross.fit(planes, cross.places(1, kernel), assumed)
    shape = (conv.groups, conv.out_channels // conv.groups, -1)
    return planes.reshape(shape), found.reshape(shape)
