"""`offset` with a learned factor for each tap, the same for all channels, which starts at one.

The weights could express the factors too. They are for training few parameters: with the conv's weights frozen, 3 *
kh*kw numbers a conv say where each tap looks and how much it counts. Everything else is that of `offset`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from asymswap.factorize.statistics import SiteStatistics
from asymswap.replacements import offset
from asymswap.replacements.offset import SIZES, OffsetConv2d, Settings, fuse, init_, preserves, refuse, tap_offsets
from asymswap.types import ConvSpec, Cost, Option, Site

__all__ = [
    "PRESERVES",
    "SIZES",
    "Settings",
    "build",
    "cost",
    "fuse",
    "init_",
    "options",
    "preserves",
    "refuse",
    "settle",
    "tap_offsets",
]

PRESERVES = "the function, exactly: every offset starts at zero, every tap's factor at one"


def cost(site: Site, settings: Settings) -> Cost:
    """That of `offset`, and a parameter more for each tap; multiplying the shares by the factors is not counted."""
    return offset.cost(site, settings) + Cost(0, math.prod(site.conv.kernel))


def options(
    site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None
) -> Sequence[Option]:
    """The one size that there is."""
    return [settle(site, conv, settings, statistics)]


def settle(site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None) -> Option:
    """The limit is all there is to settle, and it is given."""
    return Option({"limit": settings.limit}, cost(site, settings), error=0.0, loss=0.0)


def build(conv: ConvSpec, settings: Settings) -> OffsetConv2d:
    """An `OffsetConv2d` with factors, its weights unset."""
    return OffsetConv2d(conv, settings.limit, weighted=True)
