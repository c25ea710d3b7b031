"""A k x k conv as a k x 1 and a 1 x k conv side by side, their outputs summed: a cross of taps without the square.

For large kernels and depthwise ones (strip convolutions; SegNeXt, Guo et al., NeurIPS 2022): kh + kw taps instead of
kh * kw, and no channels between the two. Both convs keep the stride, dilation, groups and padding mode; the padding
shrinks across the strip. The centre tap is in both, half of it each. Mathematics: `asymswap.factorize.cross`.
"""

from dataclasses import replace
from typing import Annotated, cast

from pydantic import Field
from torch import Tensor, nn

from asymswap.factorize import cross
from asymswap.replacements import _convs
from asymswap.replacements.base import KindSettings, Original, Replacement
from asymswap.types import ConvSpec, Cost, Option, Site, Size


class Settings(KindSettings):
    """A bias, and what is assumed about the inputs without statistics; a cross has one size."""

    bias: bool = Field(False, description="Give the cross a bias even where the conv has none, for calibration to set.")
    correlation: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Correlation of neighbouring input pixels, assumed without calibration; 0 copies the centre row and column."""


class CrossConv2d(_convs.CroppedSum):
    """The sum of a vertical conv, which has the bias, and a horizontal one."""


class Cross(Replacement):
    settings = Settings
    PRESERVES = "approximate: the best that one row and one column of taps can do, by least squares"

    def unsupported(self, conv: ConvSpec) -> str | None:
        return _convs.unsupported(conv) or super().unsupported(conv)

    def preserves(self, conv: ConvSpec, settings: Settings) -> bool:
        return False  # the taps off the cross are lost

    def cost(self, site: Site, settings: Settings) -> Cost:
        (vertical, _), (horizontal, _) = _strips(site.conv, settings)
        return replace(site, conv=vertical).cost + replace(site, conv=horizontal).cost

    def resolve(self, site: Site, original: Original, settings: Settings) -> Option:
        statistics, (target, found) = original.statistics, _solve(original, settings)
        bias = {"bias": True} if not site.conv.bias and (settings.bias or statistics is not None) else {}
        if statistics is None:
            settled = Settings(**bias, correlation=settings.correlation)
            return self.option(site, settled, cross.relative_error(target, found))
        error = cross.relative_error(target, found, statistics.ridged())
        return self.option(site, Settings(**bias), error, cross.divergence(statistics, found))

    def build(self, conv: ConvSpec, settings: Settings) -> CrossConv2d:
        strips = zip(("vertical", "horizontal"), _strips(conv, settings), strict=True)
        return CrossConv2d({name: (_convs.new_conv(strip), crop) for name, (strip, crop) in strips})

    def init_(self, module: nn.Module, original: Original, settings: Settings) -> None:
        """Set the best cross for the assumed inputs, or those of the statistics, which set the output's mean, too."""
        conv, statistics, (_, found) = original.conv, original.statistics, _solve(original, settings)
        height, width = conv.kernel_size
        kernel = found.flatten(0, 1).unflatten(1, (-1, height, width))
        column, row = _convs.placed(kernel, (height, 1)), _convs.placed(kernel, (1, width))
        column[:, :, height // 2] *= 0.5
        row[..., width // 2] *= 0.5
        vertical, horizontal = module.children()
        _convs.copy_(vertical, column, conv.bias if statistics is None else statistics.bias_of(found))
        _convs.copy_(horizontal, row, None)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
        """Return one k x k conv of the original fields, zero off the cross, with the cross's bias."""
        vertical, horizontal = (cast(nn.Conv2d, strip) for strip in module.children())
        column, row = (_convs.placed(_convs.float64(strip.weight), conv.kernel) for strip in (vertical, horizontal))
        return _convs.conv_of(conv, column + row, vertical.bias, vertical.weight)


def _strips(conv: ConvSpec, settings: Settings) -> tuple[tuple[ConvSpec, Size], tuple[ConvSpec, Size]]:
    """Return the kh x 1 conv, which has the bias, and the 1 x kw conv at the centre of a kernel, with their crops."""
    biased, plain = replace(conv, bias=conv.bias or settings.bias), replace(conv, bias=False)
    return _convs.centred(biased, (conv.kernel[0], 1)), _convs.centred(plain, (1, conv.kernel[1]))


def _solve(original: Original, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the target kernel (G, O, D), and the best one on the cross."""
    conv, statistics = original.conv, original.statistics
    kernel = cast(Size, conv.kernel_size)
    if statistics is not None:
        on_cross_D = cross.places(conv.in_channels // conv.groups, kernel)
        return statistics.target_GOD, cross.fit(statistics.target_GOD, on_cross_D, statistics.ridged())
    # We assume that channels are independent, so that the cross takes over each tap's work within its own channel.
    planes = _convs.float64(conv.weight).flatten(2).flatten(0, 1)[None]
    assumed = cross.smooth(kernel, cast(Size, conv.dilation), settings.correlation)[None]
    found = cross.fit(planes, cross.places(1, kernel), assumed)
    shape = (conv.groups, conv.out_channels // conv.groups, -1)
    return planes.reshape(shape), found.reshape(shape)
