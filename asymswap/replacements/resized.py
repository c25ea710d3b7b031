"""One ordinary conv whose kernel has another size: what `asymswap fuse` makes of taps that have moved.

As a swap of its own it grows a kernel by taps of zero at its rim, which changes nothing until it is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from torch import nn

from asymswap.errors import RecipeError
from asymswap.factorize.statistics import SiteStatistics
from asymswap.replacements import SIZE_SCHEMA, KindSettings
from asymswap.replacements import _strip_convs as strip_convs
from asymswap.types import ConvSpec, Cost, Option, Site, Size

SIZES = ()
PRESERVES = "the function exactly: the new taps are zero"


def _as_pair(value: Any) -> Any:
    if isinstance(value, str) and value not in ("same", "valid"):
        parts = value.lower().split("x")
        return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else value
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    return tuple(value) if isinstance(value, list) else value


Side = Annotated[int, Field(ge=1)]
Taps = Annotated[tuple[Side, Side], BeforeValidator(_as_pair), SIZE_SCHEMA]
Pixels = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], SIZE_SCHEMA]
Padding = Annotated[Pixels | Literal["same", "valid"], BeforeValidator(_as_pair)]


class Settings(KindSettings):
    """The fields of the new conv; those that are not given follow from the kernel's size."""

    allow_growth: bool = True
    """Swap although the new conv costs more, which is its nature."""

    kernel: Taps | None = None
    """Its size, such as "5x5": on each axis larger than the conv's by an even number of taps; by itself by two."""

    dilation: Taps | None = None
    """Pixels between its taps; by itself those of the conv."""

    padding: Padding | None = None
    """Pixels on each side, "same" or "valid"; by itself what leaves the output where it was."""

    bias: bool = False
    """Give it a bias even where the conv has none."""


def refuse(conv: ConvSpec) -> str | None:
    """Padding by anything but zeros would have to be wider than some inputs are."""
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode}, which may not be wide enough for a larger kernel"
    if conv.dtype not in ("float64", "float32", "float16", "bfloat16"):
        return f"{conv.dtype} weights are not real floating-point numbers"
    return None


def preserves(conv: ConvSpec, settings: Settings) -> bool:
    """Always: the new taps are zero."""
    return True


def cost(site: Site, settings: Settings) -> Cost:
    """MACs over all calls and parameters of the new conv."""
    return replace(site, conv=resized(site.conv, settings)).cost


def options(
    site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None
) -> Sequence[Option]:
    """The one new conv there is, which changes nothing."""
    return [settle(site, conv, settings, statistics)]


def settle(site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None) -> Option:
    """All fields of the new conv; raises RecipeError for those to which the conv cannot grow without a change."""
    new_conv = resized(site.conv, settings)
    problem = _change(site.conv, new_conv)
    if problem is not None:
        raise RecipeError(problem)
    padding = new_conv.padding if isinstance(new_conv.padding, str) else list(new_conv.padding)
    fields = {"kernel": list(new_conv.kernel), "dilation": list(new_conv.dilation), "padding": padding}
    bias = {"bias": True} if settings.bias and not site.conv.bias else {}
    return Option({**fields, **bias}, cost(site, settings), error=0.0, loss=0.0)


def resized(conv: ConvSpec, settings: Settings) -> ConvSpec:
    """The fields of the new conv."""
    kernel = settings.kernel or (conv.kernel[0] + 2, conv.kernel[1] + 2)
    grown = replace(conv, kernel=kernel, dilation=settings.dilation or conv.dilation, bias=conv.bias or settings.bias)
    return replace(grown, padding=_padding(conv, grown) if settings.padding is None else settings.padding)


def _padding(conv: ConvSpec, grown: ConvSpec) -> Size | str:
    """What leaves the output where it was."""
    if conv.padding == "same":
        return "same"
    rows, columns = (margin[0] + extra // 2 for margin, extra in zip(_margins(conv), _growth(conv, grown), strict=True))
    return rows, columns


def _change(conv: ConvSpec, grown: ConvSpec) -> str | None:
    """Why the new conv could not compute what the conv does, in words; None where it can."""
    old, new, step, dilation = (_text(size) for size in (conv.kernel, grown.kernel, grown.dilation, conv.dilation))
    growth = _growth(conv, grown)
    if any(
        extra < 0 or extra % (2 * new_step) or (taps > 1 and old_step % new_step)
        for extra, taps, old_step, new_step in zip(growth, conv.kernel, conv.dilation, grown.dilation, strict=True)
    ):
        if grown.dilation == conv.dilation:
            return f"kernel = {new}: a {old} kernel grows by an even number of taps on each axis"
        return f"kernel = {new}, dilation = {step}: its taps would not meet those of {old} and dilation {dilation}"
    wanted = _padding(conv, grown)
    if grown.padding == "same" and grown.stride != (1, 1):
        return f'padding = "same": a conv of stride {_text(conv.stride)} cannot have it; give {_text(wanted)}'
    moved = tuple(
        (before + extra // 2, after + extra // 2) for (before, after), extra in zip(_margins(conv), growth, strict=True)
    )
    if _margins(grown) != moved:
        return f"padding = {_text(grown.padding)}: the output keeps its size and place with {_text(wanted)} only"
    return None


def _growth(conv: ConvSpec, grown: ConvSpec) -> Size:
    """By how many pixels more the new taps span, along each axis."""
    rows, columns = (new - old for new, old in zip(_spans(grown), _spans(conv), strict=True))
    return rows, columns


def _spans(conv: ConvSpec) -> Size:
    rows, columns = (step * (taps - 1) for step, taps in zip(conv.dilation, conv.kernel, strict=True))
    return rows, columns


def _margins(conv: ConvSpec) -> tuple[Size, Size]:
    """The pixels of padding before and after, along each axis."""
    if conv.padding == "same":
        rows, columns = ((span // 2, span - span // 2) for span in _spans(conv))
        return rows, columns
    height, width = (0, 0) if isinstance(conv.padding, str) else conv.padding
    return (height, height), (width, width)


def _text(size: Size | str) -> str:
    return f'"{size}"' if isinstance(size, str) else "x".join(map(str, size))


def build(conv: ConvSpec, settings: Settings) -> nn.Conv2d:
    """The new conv."""
    return strip_convs.new_conv(resized(conv, settings))


def init_(module: nn.Module, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None) -> None:
    """The conv's own taps in the middle of zeros, and as far apart as they were."""
    new = cast(nn.Conv2d, module)
    sizes = (new.kernel_size, new.dilation, conv.kernel_size, conv.dilation)
    rows, columns = (_places(*axis) for axis in zip(*(cast(Size, size) for size in sizes), strict=True))
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :, rows, columns] = conv.weight
        if new.bias is not None:
            new.bias.copy_(torch.zeros_like(new.bias) if conv.bias is None else conv.bias)


def _places(taps: int, step: int, old_taps: int, old_step: int) -> slice:
    """Where the old taps are among the new ones, along one axis."""
    margin = (step * (taps - 1) - old_step * (old_taps - 1)) // (2 * step)
    return slice(margin, taps - margin, max(1, old_step // step))


def fuse(module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
    """It is an ordinary conv already."""
    return cast(nn.Conv2d, module)
