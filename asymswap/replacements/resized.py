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


def _as_pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else as_size(value)


Side = Annotated[int, Field(ge=1)]
Taps = Annotated[tuple[Side, Side], BeforeValidator(_as_pair), SIZE_SCHEMA]
Pixels = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], SIZE_SCHEMA]
Padding = Annotated[Pixels | Literal["same", "valid"], BeforeValidator(_as_pair)]


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
        new, conv = cast(nn.Conv2d, module), original.conv
        places = []
        for axis in (0, 1):
            taps, step, old_step = new.kernel_size[axis], new.dilation[axis], conv.dilation[axis]
            margin = (step * (taps - 1) - old_step * (conv.kernel_size[axis] - 1)) // (2 * step)
            places.append(slice(margin, taps - margin, max(1, old_step // step)))
        kernel = torch.zeros_like(new.weight)
        kernel[:, :, places[0], places[1]] = conv.weight.detach()
        _convs.copy_(new, kernel, conv.bias)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
        return cast(nn.Conv2d, module)


def resized(conv: ConvSpec, settings: Settings) -> ConvSpec:
    """Return the fields of the new conv."""
    kernel = settings.kernel or (conv.kernel[0] + 2, conv.kernel[1] + 2)
    grown = replace(conv, kernel=kernel, dilation=settings.dilation or conv.dilation, bias=conv.bias or settings.bias)
    return replace(grown, padding=_in_place(conv, grown)[1] if settings.padding is None else settings.padding)


def _growth(conv: ConvSpec, grown: ConvSpec) -> Size:
    """Return the number of pixels that the new taps span more, along each axis."""
    sides = zip(conv.kernel, conv.dilation, grown.kernel, grown.dilation, strict=True)
    rows, columns = (new_step * (new_taps - 1) - step * (taps - 1) for taps, step, new_taps, new_step in sides)
    return rows, columns


def _in_place(conv: ConvSpec, grown: ConvSpec) -> tuple[tuple[Size, Size], Size | str]:
    """Return the margins, and the padding that gives them, with which the output stays where it was."""
    (top, bottom), (left, right) = _convs.margins(conv)
    rows, columns = (extra // 2 for extra in _growth(conv, grown))
    margins = (top + rows, bottom + rows), (left + columns, right + columns)
    return margins, "same" if conv.padding == "same" else (top + rows, left + columns)


def _check(conv: ConvSpec, grown: ConvSpec) -> None:
    """Raise RecipeError where the new conv could not compute what the conv does."""
    old, new, step, dilation = (_text(size) for size in (conv.kernel, grown.kernel, grown.dilation, conv.dilation))
    axes = zip(_growth(conv, grown), conv.kernel, conv.dilation, grown.dilation, strict=True)
    if any(more < 0 or more % (2 * wide) or (taps > 1 and narrow % wide) for more, taps, narrow, wide in axes):
        if grown.dilation == conv.dilation:
            raise RecipeError(f"kernel = {new}: a {old} kernel grows by an even number of taps on each axis")
        about = f"its taps would not meet those of {old} and dilation {dilation}"
        raise RecipeError(f"kernel = {new}, dilation = {step}: {about}")
    margins, suitable = _in_place(conv, grown)
    about = f"padding = {_text(grown.padding)}:"
    if grown.padding == "same" and grown.stride != (1, 1):
        raise RecipeError(f"{about} a conv of stride {_text(conv.stride)} cannot have it; give {_text(suitable)}")
    if _convs.margins(grown) != margins:
        raise RecipeError(f"{about} the output keeps its size and place with {_text(suitable)} only")


def _text(size: Size | str) -> str:
    return f'"{size}"' if isinstance(size, str) else "x".join(map(str, size))
