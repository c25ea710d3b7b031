"""The report of merging back into ordinary convs."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.results.convert import FileRow
from asymswap.types import Cost, Fed, Shown


@dataclass(frozen=True)
class FusionRow:
    """One replacement: `fused` to the original form of conv, `resized` to one conv of another, or `left` and why."""

    site: str
    kind: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class FusionReport(Shown, view="screens.fusion_view"):
    """Costs of the converted and the fused model, and the difference of their outputs on `probe`."""

    model: str
    origin: str
    sites: tuple[FusionRow, ...]
    before: Cost
    after: Cost
    relative: float
    largest: float
    probe: str
    as_original: bool  # the state dict fits the unconverted model again
    files: tuple[FileRow, ...] = ()
    fed: Fed | None = None
    warnings: tuple[str, ...] = ()
