"""What merging back into ordinary convs changed."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.results.convert import FileRow
from asymswap.types import Cost, Fed


@dataclass(frozen=True)
class FusionRow:
    """One replacement: `fused` to the original form of conv, `resized` to one conv of another, or `left` and why."""

    site: str
    kind: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class FusionReport:
    """Everything that fusing has to say; costs and outputs are those of the converted and of the fused model.

    `relative` and `largest` are the difference of the outputs on `probe`; `as_original` says whether the state dict
    fits the unconverted model again.
    """

    model: str
    origin: str
    sites: tuple[FusionRow, ...]
    before: Cost
    after: Cost
    relative: float
    largest: float
    probe: str
    as_original: bool
    files: tuple[FileRow, ...] = ()
    fed: Fed | None = None
    warnings: tuple[str, ...] = ()
