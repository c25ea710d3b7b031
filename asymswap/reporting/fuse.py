"""What fusing a converted model has done: numbers and text, and how they are shown."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.terminal import table, written
from asymswap.results.fuse import FusionReport


def fusion_view(report: FusionReport) -> RenderableType:
    """What was fused, what was left and why, and how the outputs compare."""
    done = Counter((row.kind, row.outcome) for row in report.sites)
    parts: list[RenderableType] = [written(f"{report.model}: {_sum(report)}", style="bold")]
    parts += [*(written(fmt.sentence(line), style="yellow") for line in report.warnings), Text("")]
    rows = [(name, fmt.count(a), fmt.count(b), fmt.share(b, a)) for name, a, b in _figures(report)]
    parts += [table([("", "left"), ("before", "right"), ("after", "right"), ("left", "right")], rows), Text("")]
    parts += [written(f"{number} {kind}: {outcome}") for (kind, outcome), number in sorted(done.items())]
    reasons = Counter((row.outcome, row.reason) for row in report.sites if row.reason)
    parts += [written(f"  {outcome}, {number} x: {reason}") for (outcome, reason), number in reasons.most_common()]
    fits = "fits" if report.as_original else "does not fit"
    parts += [
        Text(""),
        written(
            f"Outputs: {fmt.error(report.relative)} relative difference, {report.largest:.3g} at most, on "
            f"{report.probe}.",
            style="dim",
        ),
        written(f"The state dict {fits} {report.origin} as it was before it was converted.", style="dim"),
    ]
    parts += [written(line, style="dim") for line in fmt.fed_by_model([(report.model, report.fed)])]
    parts += [written(f"{file.path}: {fmt.size(file.bytes)}.", style="dim") for file in report.files]
    return Group(*parts)


def _sum(report: FusionReport) -> str:
    fused = sum(row.outcome != "left" for row in report.sites)
    return f"{fused} of {len(report.sites)} replacements fused"


def _figures(report: FusionReport) -> list[tuple[str, int, int]]:
    before, after = report.before, report.after
    return [("MACs", before.macs, after.macs), ("parameters", before.params, after.params)]
