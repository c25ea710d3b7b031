"""A k x k conv as a k x 1 and a 1 x k conv side by side, their outputs summed: a cross of taps without the square.

For large kernels and depthwise ones (strip convolutions; SegNeXt, Guo et al., NeurIPS 2022): kh + kw taps instead of
kh * kw, and no channels between the two. Both convs keep the stride, dilation, groups and padding mode; the padding
shrinks across the strip. The centre tap is in both, half of it each. Mathematics: `asymswap.factorize.cross`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from asymswap.factorize import cross
from asymswap.factorize.allocation_cost import loss
from asymswap.factorize.statistics import SiteStatistics
from asymswap.replacements import KindSettings
from asymswap.replacements import _strip_convs as strip_convs
from asymswap.types import ConvSpec, Cost, Option, Site, Size

SIZES = ()
PRESERVES = "the function as well as one row and one column of taps can, by least squares"


class Settings(KindSettings):
    """A bias, and what is assumed about the inputs without statistics; a cross has one size."""

    bias: bool = False
    """Give the cross a bias even where the conv has none; calibration corrects the output's mean by it."""

    correlation: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of neighbouring input pixels, assumed without calibration. 0 copies the kernel's centre row and column."""


def refuse(conv: ConvSpec) -> str | None:
    """Only a kernel with two odd sides has a centre row and column, and only real weights can be fitted."""
    return strip_convs.refuse(conv)


def preserves(conv: ConvSpec, settings: Settings) -> bool:
    """Never: the taps off the cross are lost."""
    return False


def cost(site: Site, settings: Settings) -> Cost:
    """MACs over all calls and parameters of the two convs, from the formula alone."""
    conv = site.conv
    weights = conv.out_channels * conv.group_in * sum(conv.kernel)
    pixels = sum(call.batch * call.output[0] * call.output[1] for call in site.calls)
    return Cost(weights * pixels, weights + conv.out_channels * (conv.bias or settings.bias))


def options(
    site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None
) -> Sequence[Option]:
    """The one cross there is."""
    return [settle(site, conv, settings, statistics)]


def settle(site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None) -> Option:
    """The one cross there is, with the error of its kernel, or with statistics of its output."""
    wanted, found = _solve(conv, settings, statistics)
    bias = {"bias": True} if not site.conv.bias and (settings.bias or statistics is not None) else {}
    price = cost(site, settings.model_copy(update=bias))
    if statistics is None:
        error = cross.relative_error(wanted, found)
        return Option({**bias, "correlation": settings.correlation}, price, error, loss(error))
    error = cross.relative_error(wanted, found, statistics.ridged())
    divergence = None if statistics.weight_GOO is None else cross.divergence(statistics, found)
    return Option(bias, price, error, loss(error, divergence))


class Cross(nn.Module):
    """The sum of a vertical and a horizontal conv, each of which sees the input less `crop` pixels across its strip.

    Input (N, C, H, W) or (C, H, W), output that of the k x k conv. The bias is the vertical conv's.
    """

    def __init__(self, vertical: nn.Conv2d, horizontal: nn.Conv2d, crop: Size) -> None:
        super().__init__()
        self.vertical, self.horizontal = vertical, horizontal
        self.crop = crop

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.crop
        y: Tensor = self.vertical(strip_convs.cut(input, (0, columns))) + self.horizontal(
            strip_convs.cut(input, (rows, 0))
        )
        return y

    def extra_repr(self) -> str:
        return f"crop={self.crop}" if any(self.crop) else ""


def build(conv: ConvSpec, settings: Settings) -> Cross:
    """The two convs, `vertical` and `horizontal`."""
    vertical, horizontal = strip_convs.vertical_strip(conv), strip_convs.horizontal_strip(conv)
    return Cross(
        strip_convs.new_conv(replace(vertical.conv, bias=conv.bias or settings.bias)),
        strip_convs.new_conv(horizontal.conv),
        crop=(horizontal.crop[0], vertical.crop[1]),
    )


def init_(
    module: nn.Module,
    conv: nn.Conv2d,
    settings: Settings,
    statistics: SiteStatistics | None = None,
) -> None:
    """The best cross for inputs of the assumed correlation, or for those that the statistics describe."""
    vertical, horizontal = _strips(module)
    _, found = _solve(conv, settings, statistics)
    kernel = found.flatten(0, 1).unflatten(1, (-1, *cast(Size, conv.kernel_size)))
    column, row = strip_convs.centre_column(kernel).clone(), strip_convs.centre_row(kernel).clone()
    strip_convs.centre_row(column).mul_(0.5)
    strip_convs.centre_column(row).mul_(0.5)
    with torch.no_grad():
        vertical.weight.copy_(column)
        horizontal.weight.copy_(row)
        if vertical.bias is not None:
            vertical.bias.copy_(_bias(conv, found, statistics))


def fuse(module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
    """One k x k conv of the original fields, zero off the cross, with the cross's bias."""
    vertical, horizontal = _strips(module)
    own = vertical.weight
    fused = strip_convs.new_conv(replace(conv, bias=vertical.bias is not None), own.dtype, own.device)
    with torch.no_grad():
        fused.weight.copy_(strip_convs.as_square(own.to(torch.float64), horizontal.weight.to(torch.float64)))
        if fused.bias is not None:
            fused.bias.copy_(cast(Tensor, vertical.bias))
    return fused


def _solve(conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None) -> tuple[Tensor, Tensor]:
    """The kernel (G, O, D) that is wanted, and the best one on the cross."""
    kernel = cast(Size, conv.kernel_size)
    if statistics is not None:
        on_cross_D = cross.places(conv.in_channels // conv.groups, kernel)
        return statistics.target_GOD, cross.fit(statistics.target_GOD, on_cross_D, statistics.ridged())
    # Channels are taken to be independent, so that each tap's work is shared out within its own channel.
    planes = conv.weight.detach().to("cpu", torch.float64).flatten(2).flatten(0, 1)[None]
    assumed = cross.smooth(kernel, cast(Size, conv.dilation), settings.correlation)[None]
    found = cross.fit(planes, cross.places(1, kernel), assumed)
    shape = (conv.groups, conv.out_channels // conv.groups, -1)
    return planes.reshape(shape), found.reshape(shape)


def _bias(conv: nn.Conv2d, found_GOD: Tensor, statistics: SiteStatistics | None) -> Tensor:
    """The conv's own bias, or with statistics the one that gives the output its wanted mean."""
    if statistics is None:
        return torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
    return (statistics.target_mean_GO - torch.einsum("god,gd->go", found_GOD, statistics.mean_GD)).flatten()


def _strips(module: nn.Module) -> tuple[nn.Conv2d, nn.Conv2d]:
    parts = cast(Cross, module)
    return parts.vertical, parts.horizontal
