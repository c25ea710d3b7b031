"""What an export has written, and how far it computes from the model in PyTorch."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.terminal import table, written
from asymswap.results.export import ExportReport


def export_view(report: ExportReport) -> RenderableType:
    """The file, what may vary, and the differences."""
    facts = [
        ("form", report.form + (f", opset {report.opset}" if report.opset is not None else "")),
        ("any size", ", ".join(report.dynamic) or "none"),
        ("fused before", f"{report.fused} replacements"),
        ("run by", ", ".join((report.runner, *report.versions))),
        *(("against PyTorch", f"{check.largest:.1e} at most on {check.inputs}") for check in report.checks),
        *(("written", f"{file.path} ({fmt.size(file.bytes)})") for file in report.files),
    ]
    return Group(
        written(f"{report.model} exported", style="bold"),
        *(written(fmt.sentence(line), style="yellow") for line in report.warnings),
        Text(""),
        table([("", "left"), ("", "fold")], facts),
    )
