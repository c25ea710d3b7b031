"""Where the taps of offset convs have moved."""

import math
from dataclasses import dataclass
from typing import ClassVar

from asymswap.types import Fed, Shown, Size

STILL = 0.05
"""Pixels below which a tap counts as not moved."""


@dataclass(frozen=True)
class OffsetRow:
    """The offsets of one layer, (down, right) in pixels of its input, for each tap row by row.

    Offsets predicted from the input have a mean and a spread (standard deviation) over all pixels and images.
    """

    derived: ClassVar = ("average", "still")

    site: str
    kind: str
    kernel: Size
    dilation: Size
    mean: tuple[tuple[float, float], ...]
    spread: tuple[tuple[float, float], ...]
    largest: float  # the longest single offset
    limit: float | None = None  # along an axis; None if unbounded

    @property
    def average(self) -> float:
        """The mean length of the mean offsets."""
        return sum(math.hypot(*offset) for offset in self.mean) / len(self.mean)

    @property
    def still(self) -> bool:
        """True if no tap has moved."""
        return self.largest < STILL


@dataclass(frozen=True)
class OffsetReport(Shown, view="offsets.offsets_view"):
    """The layers of one model whose taps can move; `probe` describes the inputs."""

    model: str
    rows: tuple[OffsetRow, ...]
    probe: str
    fed: Fed | None = None
    warnings: tuple[str, ...] = ()
