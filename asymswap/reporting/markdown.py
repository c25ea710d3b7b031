"""A report as Markdown, complete, with every conv's row and the totals below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asymswap.reporting import format as fmt
from asymswap.results.convert import Report, SiteRow


def to_markdown(report: Report) -> str:
    """The whole report as one Markdown document."""
    model, output = report.model, report.output
    head = [
        [
            "MACs",
            f"{report.before.macs:,}",
            f"{report.after.macs:,}",
            fmt.share(report.after.macs, report.before.macs),
        ],
        [
            "FLOPs (2 x MACs)",
            f"{report.before.flops:,}",
            f"{report.after.flops:,}",
            fmt.share(report.after.flops, report.before.flops),
        ],
        [
            "parameters",
            f"{report.before.params:,}",
            f"{report.after.params:,}",
            fmt.share(report.after.params, report.before.params),
        ],
    ]
    if report.latency is not None:
        was, now = report.latency.before, report.latency.after
        head.append(["latency", f"{1e3 * was:.2f} ms", f"{1e3 * now:.2f} ms", fmt.share(now, was)])
    if report.accuracy is not None:
        acc = report.accuracy
        points = f"{100 * (acc.after - acc.before):+.2f} points"
        head.append([fmt.markdown_text(f"top-1 on {acc.data}"), f"{acc.before:.2%}", f"{acc.after:.2%}", points])
    facts = [
        f"Recipe: {report.recipe}" + (f", budget {report.budget}" if report.budget else ""),
        f"Weights: {model.weights}" + (f", SHA-256 {model.sha256}" if model.sha256 else ""),
        f"Read by {model.traced_by} at an input of {model.input}",
        f"Output of the whole model: {fmt.error(output.relative)} relative difference, "
        f"{output.largest:.3g} at most, on {output.probe}",
        *(f"{kind} preserves {what}" for kind, what in report.preserves.items()),
        *([] if report.latency is None else fmt.latency(report.latency)),
        *_calibration(report),
        *([] if report.fed is None else [f"Fed: {fmt.fed(report.fed)}"]),
        *model.notes,
        *(f"File {file.path}: {fmt.size(file.bytes)}" for file in report.files),
        "Time in seconds: " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in report.seconds.items()),
        f"asymswap {report.asymswap}",
    ]
    lines = [
        f"# {fmt.markdown_text(model.reference)} converted: {len(report.swapped)} of {len(report.sites)} convs swapped",
        "",
        *(line for text in fmt.first_lines(report) for line in (f"**{fmt.markdown_text(text)}**", "")),
        *_table(["", "before", "after", "left"], head),
        "",
        *(f"- {fmt.markdown_text(fact)}" for fact in facts),
        "",
        *_table(_COLUMNS, [*map(_cells, report.sites), _rest(report), _total(report)]),
        "",
        "Kernel error: Frobenius norm of the kernel's change over that of the kernel. Output error: the same of the",
        "layer's output on the probe, the layer seeing the original's input. MACs of one forward pass, batch 1.",
        "",
    ]
    return "\n".join(lines)


def _calibration(report: Report) -> list[str]:
    row = report.calibration
    if row is None:
        return []
    how = "layer by layer" if row.sequential else "in one pass"
    images = f"{row.images} images of {row.data} (seed {row.seed}, SHA-256 of the pixels {row.sha256})"
    return [f"Calibrated {how} on {images}", *row.notes]


_COLUMNS = [
    "layer",
    "conv",
    "map",
    "calls",
    "becomes",
    "MACs before",
    "MACs after",
    "parameters before",
    "parameters after",
    "predicted error",
    "kernel error",
    "output error",
]


def _cells(row: SiteRow) -> list[str]:
    becomes = f"{row.kind}: {fmt.settings(row.settings)}" if row.kind else f"kept: {row.reason}"
    return [
        fmt.markdown_code(row.site),
        fmt.markdown_text(row.conv),
        "x".join(map(str, row.feature_map)) if row.feature_map else "-",
        str(row.calls),
        fmt.markdown_text(becomes),
        f"{row.before.macs:,}",
        f"{row.after.macs:,}",
        f"{row.before.params:,}",
        f"{row.after.params:,}",
        fmt.error(row.predicted_error),
        fmt.error(row.kernel_error),
        fmt.error(row.output_error),
    ]


def _rest(report: Report) -> list[str]:
    rest = report.rest
    params = f"{rest.params:,}"
    return ["other layers", "", "", "", "", f"{rest.macs:,}", f"{rest.macs:,}", params, params, "", "", ""]


def _total(report: Report) -> list[str]:
    before, after = report.before, report.after
    sums = [before.macs, after.macs, before.params, after.params]
    return ["**total**", "", "", "", "", *(f"**{value:,}**" for value in sums), "", "", ""]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return fmt.markdown_table([columns, ["---"] * len(columns), *rows])
