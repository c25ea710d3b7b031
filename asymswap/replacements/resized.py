"""One ordinary conv whose kernel has another size: what `asymswap fuse` makes of taps that have moved.

As a swap of its own it grows a kernel by taps of zero at its rim, which changes nothing until it is trained on.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from torch import nn

from asymswap.errors import RecipeError
from asymswap.replacements import _convs
from asymswap.replacements.base import SIZE_SCHEMA, GrowingSettings, Original, Replacement, as_size
from asymswap.types import ConvSpec, Cost, Option, Site, Size

Side = Annotated[int, Field(ge=1)]
Margin = Annotated[int, Field(ge=0)]
# Not strict, so that the lists of a plan are tuples again.
Taps = Annotated[tuple[Side, Side], Field(strict=False), BeforeValidator(as_size), SIZE_SCHEMA]
Pixels = Annotated[tuple[Margin, Margin], Field(strict=False), SIZE_SCHEMA]
Padding = Annotated[Pixels | Literal["same", "valid"], BeforeValidator(as_size)]


class Settings(GrowingSettings):
    """The fields of the new conv; those that are not given follow from the kernel's size."""

    kernel: Taps | None = None
    """Its size, such as "5x5": an even number of taps more; by default two."""
    dilation: Taps | None = None
    """Pixels between its taps; by default those of the conv."""
    padding: Padding | None = None
    """Pixels, "same" or "valid"; by default the output stays in place."""
    bias: bool = False
    """Give it a bias even where the conv has none."""


class Resized(Replacement):
    settings = Settings
    PRESERVES = "exact: the new taps are zero"

    def unsupported(self, conv: ConvSpec) -> str | None:
        if conv.padding_mode != "zeros":
            return f"its padding mode is {conv.padding_mode}, which may not be wide enough for a larger kernel"
        return super().unsupported(conv)

    def cost(self, site: Site, settings: Settings) -> Cost:
        return replace(site, conv=resized(site.conv, settings)).cost

    def resolve(self, site: Site, original: Original, settings: Settings) -> Option:
        grown = resized(site.conv, settings)
        _check(site.conv, grown)
        bias = {"bias": True} if settings.bias and not site.conv.bias else {}
        padding: Any = grown.padding
        return self.option(site, Settings(kernel=grown.kernel, dilation=grown.dilation, padding=padding, **bias))

    def build(self, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
        return _convs.new_conv(resized(conv, settings))

    def init_(self, module: nn.Module, original: Original, settings: Settings) -> None:
        """Copy the conv's own taps into the middle of zeros, as far apart as they were."""
        new, conv = cast(Any, module), cast(Any, original.conv)
        kernel = _convs.placed(conv.weight.detach(), new.kernel_size, (conv.dilation, new.dilation))
        _convs.copy_(new, kernel, conv.bias)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
        return cast(nn.Conv2d, module)


def resized(conv: ConvSpec, settings: Settings) -> ConvSpec:
    """Return the fields of the new conv."""
    kernel = settings.kernel or (conv.kernel[0] + 2, conv.kernel[1] + 2)
    grown, _ = _convs.centred(conv, kernel, settings.dilation)
    padding = grown.padding if settings.padding is None else settings.padding
    return replace(grown, padding=padding, bias=conv.bias or settings.bias)


def _check(conv: ConvSpec, grown: ConvSpec) -> None:
    """Raise RecipeError where the new conv could not compute what the conv does."""
    old, new, step, dilation = (_text(size) for size in (conv.kernel, grown.kernel, grown.dilation, conv.dilation))
    taps = torch.ones(1, 1, *conv.kernel)
    if int(_convs.placed(taps, grown.kernel, (conv.dilation, grown.dilation)).sum()) < taps.numel():
        if grown.dilation == conv.dilation:
            raise RecipeError(f"kernel = {new}: a {old} kernel grows by an even number of taps on each axis")
        about = f"its taps would not meet those of {old} and dilation {dilation}"
        raise RecipeError(f"kernel = {new}, dilation = {step}: {about}")
    suitable, _ = _convs.centred(conv, grown.kernel, grown.dilation)
    # A conv with a stride cannot have "same".
    if grown.pads != suitable.pads or (grown.padding == "same" and grown.stride != (1, 1)):
        about = f"the output keeps its size and place with {_text(suitable.padding)} only"
        raise RecipeError(f"padding = {_text(grown.padding)}: {about}")


def _text(size: Size | str) -> str:
    return f'"{size}"' if isinstance(size, str) else "x".join(map(str, size))
