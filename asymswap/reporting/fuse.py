"""How merging back into ordinary convs is shown."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType

from asymswap.reporting import format as fmt
from asymswap.reporting.tables import Change, changes, heading, layout, paragraphs
from asymswap.results.fuse import FusionReport


def fusion_view(report: FusionReport) -> RenderableType:
    """Return what was fused, what was left and why, and how the outputs compare."""
    fused = sum(row.outcome != "left" for row in report.sites)
    table = changes(
        [
            Change("MACs", report.before.macs, report.after.macs),
            Change("parameters", report.before.params, report.after.params),
        ]
    )
    outcomes = Counter((row.kind, row.outcome) for row in report.sites)
    reasons = Counter((row.outcome, row.reason) for row in report.sites if row.reason)
    done = [f"{number} {kind}: {outcome}" for (kind, outcome), number in sorted(outcomes.items())]
    done += [f"  {outcome}, {number} x: {reason}" for (outcome, reason), number in reasons.most_common()]
    fits = "fits" if report.as_original else "does not fit"
    fine_print = [
        f"Outputs: {fmt.error(report.relative)} relative difference, {report.largest:.3g} at most, on {report.probe}.",
        f"The state dict {fits} {report.origin} as it was before it was converted.",
        *fmt.fed_by_model([(report.model, report.fed)]),
        *(f"{file.path}: {fmt.size(file.bytes)}." for file in report.files),
    ]
    return layout(
        heading(f"{report.model}: {fused} of {len(report.sites)} replacements fused", report.warnings),
        [table.terminal()],
        paragraphs(done),
        paragraphs(fine_print, "dim"),
    )
