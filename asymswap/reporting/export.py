"""How an export is shown."""

from __future__ import annotations

from rich.console import RenderableType

from asymswap.reporting import format as fmt
from asymswap.reporting.tables import facts, heading, layout
from asymswap.results.export import ExportReport


def export_view(report: ExportReport) -> RenderableType:
    """Return the file, which of its sizes may vary, and the differences from PyTorch."""
    table = facts(
        [
            ("form", report.form + (f", opset {report.opset}" if report.opset is not None else "")),
            ("any size", ", ".join(report.dynamic) or "none"),
            ("fused before", f"{report.fused} replacements"),
            ("run by", ", ".join((report.runner, *report.versions))),
            *(("against PyTorch", f"{check.largest:.1e} at most on {check.inputs}") for check in report.checks),
            *(("written", f"{file.path} ({fmt.size(file.bytes)})") for file in report.files),
        ]
    )
    return layout(heading(f"{report.model} exported", report.warnings), [table.terminal()])
