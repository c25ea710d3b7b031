"""What an export wrote, and how it was checked."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.results.convert import FileRow
from asymswap.types import Shown


@dataclass(frozen=True)
class Check:
    """One run of the written file beside PyTorch."""

    inputs: str  # their sizes
    largest: float  # difference of an output
    allowed: float  # 1e-4 of the largest output, and at least 1e-4


@dataclass(frozen=True)
class ExportReport(Shown, view="screens.export_view"):
    model: str
    form: str  # `onnx`, `pt2` or `state-dict`
    runner: str  # what ran it for the checks
    fused: int  # replacements fused before
    checks: tuple[Check, ...]
    dynamic: tuple[str, ...] = ()  # dimensions of inputs that may have any size
    opset: int | None = None
    files: tuple[FileRow, ...] = ()
    versions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
