"""What an export wrote, and how it was checked."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.results.convert import FileRow
from asymswap.types import Shown


@dataclass(frozen=True)
class Check:
    """One run of the written file beside PyTorch: the sizes of its inputs, and the largest difference of an output.

    `allowed` is the largest difference accepted: 1e-4 of the largest output, and at least 1e-4.
    """

    inputs: str
    largest: float
    allowed: float


@dataclass(frozen=True)
class ExportReport(Shown, view="screens.export_view"):
    """An exported model: `form` is `onnx`, `pt2` or `state-dict`, `runner` what ran it for the checks.

    `fused` is the number of replacements fused before, `dynamic` names the dimensions of inputs that may have any size.
    """

    model: str
    form: str
    runner: str
    fused: int
    checks: tuple[Check, ...]
    dynamic: tuple[str, ...] = ()
    opset: int | None = None
    files: tuple[FileRow, ...] = ()
    versions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
