"""One ordinary conv whose kernel has another size: what `asymswap fuse` makes of taps that have moved.

As a swap of its own it grows a kernel by taps of zero at its rim, which changes nothing until it is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, cast

import torch
from pydantic import BeforeValidator, Field
from torch import nn

from asymswap import strips
from asymswap.errors import RecipeError
from asymswap.factorize.evidence import Evidence
from asymswap.kinds import SIZE_SCHEMA, KindSettings
from asymswap.spec import ConvSpec, Cost, Option, Site, Size

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
Padding = Annotated[Pixels | str, BeforeValidator(_as_pair)]


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


def options(site: Site, conv: nn.Conv2d, settings: Settings, evidence: Evidence | None = None) -> Sequence[Option]:
    """The one new conv there is, which changes nothing."""
    return [settle(site, conv, settings, evidence)]


def settle(site: Site, conv: nn.Conv2d, settings: Settings, evidence: Evidence | None = None) -> Option:
    """All fields of the new conv; raises RecipeError for a size that the conv cannot grow to."""
    kernel = _kernel(site.conv, settings)
    growth = [new - old for new, old in zip(kernel, site.conv.kernel, strict=True)]
    given = settings.dilation is not None or settings.padding is not None
    if not given and any(extra < 0 or extra % 2 for extra in growth):
        old, new = ("x".join(map(str, size)) for size in (site.conv.kernel, kernel))
        raise RecipeError(f"kernel = {new}: a {old} kernel grows by an even number of taps on each axis")
    new_conv = resized(site.conv, settings)
    padding = new_conv.padding if isinstance(new_conv.padding, str) else list(new_conv.padding)
    fields = {"kernel": list(new_conv.kernel), "dilation": list(new_conv.dilation), "padding": padding}
    bias = {"bias": True} if settings.bias and not site.conv.bias else {}
    return Option({**fields, **bias}, cost(site, settings), error=0.0, loss=0.0)


def resized(conv: ConvSpec, settings: Settings) -> ConvSpec:
    """The fields of the new conv."""
    kernel, dilation = _kernel(conv, settings), settings.dilation or conv.dilation
    padding = settings.padding if settings.padding is not None else _padding(conv, kernel)
    return replace(conv, kernel=kernel, dilation=dilation, padding=padding, bias=conv.bias or settings.bias)


def _kernel(conv: ConvSpec, settings: Settings) -> Size:
    return settings.kernel or (conv.kernel[0] + 2, conv.kernel[1] + 2)


def _padding(conv: ConvSpec, kernel: Size) -> Size | str:
    if conv.padding == "same":
        return "same"
    own = (0, 0) if isinstance(conv.padding, str) else conv.padding
    rows, columns = (
        pad + step * (new - old) // 2
        for pad, step, new, old in zip(own, conv.dilation, kernel, conv.kernel, strict=True)
    )
    return rows, columns


def build(conv: ConvSpec, settings: Settings) -> nn.Conv2d:
    """The new conv."""
    return strips.new_conv(resized(conv, settings))


def init_(module: nn.Module, conv: nn.Conv2d, settings: Settings, evidence: Evidence | None = None) -> None:
    """The conv's own taps in the middle of zeros."""
    new = cast(nn.Conv2d, module)
    rows, columns = (
        slice((large - small) // 2, (large + small) // 2)
        for large, small in zip(new.weight.shape[2:], conv.weight.shape[2:], strict=True)
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :, rows, columns] = conv.weight
        if new.bias is not None:
            new.bias.copy_(torch.zeros_like(new.bias) if conv.bias is None else conv.bias)


def fuse(module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
    """It is an ordinary conv already."""
    return cast(nn.Conv2d, module)
