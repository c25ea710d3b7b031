"""What an export has written, and how far it computes from the model in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import words
from asymswap.reporting.report import FileRow
from asymswap.reporting.terminal import table, written


@dataclass(frozen=True)
class Check:
    """One run of the written file beside PyTorch: the sizes of its inputs, and the largest difference of an output.

    `allowed` is that difference up to which the two count as the same: 1e-4 of the largest output, and at least 1e-4.
    """

    inputs: str
    largest: float
    allowed: float


@dataclass(frozen=True)
class ExportReport:
    """An exported model: `form` is `onnx`, `pt2` or `state-dict`, `runner` what ran it for the checks.

    `fused` is how many replacements were fused before, `dynamic` what of its inputs may have any size.
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


def export_view(report: ExportReport) -> RenderableType:
    """The file, what may vary, and the differences."""
    facts = [
        ("form", report.form + (f", opset {report.opset}" if report.opset is not None else "")),
        ("any size", ", ".join(report.dynamic) or "none"),
        ("fused before", f"{report.fused} replacements"),
        ("run by", ", ".join((report.runner, *report.versions))),
        *(("against PyTorch", f"{check.largest:.1e} at most on {check.inputs}") for check in report.checks),
        *(("written", f"{file.path} ({words.size(file.bytes)})") for file in report.files),
    ]
    return Group(
        written(f"{report.model} exported", style="bold"),
        *(written(words.sentence(line), style="yellow") for line in report.warnings),
        Text(""),
        table([("", "left"), ("", "fold")], facts),
    )
