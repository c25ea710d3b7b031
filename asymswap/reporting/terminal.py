"""Reports as tables for a terminal: readable at 80 columns, complete at 120."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from asymswap.errors import visible
from asymswap.reporting import format as fmt
from asymswap.results.convert import Report, SiteRow
from asymswap.types import Candidate, Cost

_LEAST = 12
"""Columns of text that may break its lines keep at least so many characters."""

_LEAST_PROSE = 19
"""Where names of layers are in one piece, columns of words beside them keep at least so many."""

WIDE = 110
"""From this many columns on, tables show everything."""


def table(
    columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str | Text]], gap: int = 2, width: int | None = None
) -> Table:
    """A plain table of (title, side) columns; the side is `left`, `right`, or `fold` for text that may break lines.

    Where the terminal's `width` is given, the first column of text that may break holds names of layers: they are in
    one piece if there is room, and break at their dots if there is not.
    """
    result = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    result.show_header = any(title for title, _ in columns)
    cells = [[cell if isinstance(cell, Text) else written(cell) for cell in row] for row in rows]
    folds = [number for number, (_, side) in enumerate(columns) if side == "fold"]
    sizes = [max(map(len, column)) for column in zip([title for title, _ in columns], *cells, strict=True)]
    if width is not None and folds:
        names, *others = folds
        taken = sum(min(size, _LEAST_PROSE) if number in others else size for number, size in enumerate(sizes))
        room = width - (taken - sizes[names]) - gap * (len(columns) - 1)
        if room >= _LEAST:
            folds = others
            for row in cells:
                row[names] = Text("\n".join(_at_dots(row[names].plain, room)), row[names].style)
    for number, (title, side) in enumerate(columns):
        result.add_column(
            title,
            justify="right" if side == "right" else "left",
            min_width=min(sizes[number], _LEAST) if number in folds else None,
            no_wrap=number not in folds,
            overflow="fold" if number in folds else "ellipsis",
        )
    for row in cells:
        result.add_row(*row)
    return result


def _at_dots(name: str, room: int) -> list[str]:
    """A dotted name in lines of so many characters, broken after dots, and elsewhere only where a part is longer."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+", name):
        while len(lines[-1]) + len(part) > room:
            # What fits no line at all is cut where the line ends.
            cut = room - len(lines[-1]) if len(part) > room else 0
            lines[-1] += part[:cut]
            part = part[cut:]
            lines.append("")
        lines[-1] += part
    return lines


def written(text: str, style: str = "") -> Text:
    """Text for a terminal, with nothing in it that the terminal, or rich, would obey."""
    return Text(visible(text), style)


def report_view(report: Report, width: int) -> RenderableType:
    """The whole report: headline figures, what was done to each conv, what was kept and why, and the fine print."""
    parts: list[RenderableType] = [written(_title(report), style="bold")]
    parts += [written(line, style="yellow") for line in fmt.first_lines(report)]
    parts += [Text(""), _headline(report), Text("")]
    if report.swapped:
        parts += [_swaps(report, width), Text("")]
    kept = fmt.kept(report.sites)
    if kept:
        parts += [written("Kept: " + "; ".join(kept)), Text("")]
    parts += [written(line, style="dim") for line in _fine_print(report)]
    return Group(*parts)


def candidates_view(
    reference: str,
    rows: Sequence[Candidate],
    total: Cost,
    held: Cost,
    traced_by: str,
    about: str,
    width: int,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> RenderableType:
    """What the candidates hold, first of all; then every conv with what `separable` would save, or why it is none."""
    number = sum(row.reason is None for row in rows)
    share = held.macs / total.macs if total.macs else 0.0
    verdict = f"{reference}: {number} of {len(rows)} convs are candidates; they hold {fmt.percent(share)} of the MACs"
    verdict += f" and {fmt.share(held.params, total.params)} of the parameters"
    if not rows:
        verdict = f"{reference} has no Conv2d: there is nothing to swap"
    parts: list[RenderableType] = [written(verdict, style="bold")]
    parts += [written(fmt.sentence(line), style="yellow") for line in warnings]
    if rows and share < 0.05:
        parts.append(Text("Little can be gained here.", style="yellow"))
    wide = width >= WIDE
    columns = [("Layer", "fold"), ("Conv", "left"), ("MACs", "right"), ("Share", "right")]
    columns += [("Params", "right"), ("Map", "right"), ("Even at", "right")] if wide else []
    pairs = any(row.half is not None for row in rows)
    columns.append(("Half of it saves" if pairs and wide else "Saves" if pairs else "Becomes", "fold"))
    if rows:
        parts += [Text(""), table(columns, (_candidate_cells(row, total, wide) for row in rows), width=width)]
    parts.append(Text(""))
    parts += [
        written(line, style="dim")
        for line in (
            f"Model: {fmt.count(total.macs)}MACs ({fmt.count(2 * total.macs)}FLOPs), "
            f"{fmt.count(total.params)} parameters, for {about}; read by {traced_by}.",
            *(_legend(wide) if pairs else ()),
            *map(fmt.sentence, notes),
        )
    ]
    return Group(*parts)


def _legend(wide: bool) -> Sequence[str]:
    if not wide:
        return ["Saves: by a separable pair of half the rank up to which one saves anything, of the conv's MACs."]
    return [
        "Even at: the largest rank of a separable pair that still saves something. Half of it saves: so much of the "
        "conv's MACs / parameters."
    ]


def _candidate_cells(row: Candidate, total: Cost, wide: bool) -> list[str | Text]:
    site, cost = row.site, row.site.cost
    cells: list[str | Text] = [
        site.name,
        site.conv.describe(),
        fmt.count(cost.macs),
        fmt.share(cost.macs, total.macs),
    ]
    if wide:
        cells += [fmt.count(cost.params), "x".join(map(str, site.feature_map)) if site.feature_map else "-"]
        cells.append("-" if row.break_even is None or row.becomes is not None else f"{row.break_even.rank}")
    return [*cells, _outlook(row, wide)]


def _outlook(row: Candidate, wide: bool) -> str | Text:
    """What could become of a conv, or why nothing."""
    cost = row.site.cost
    if row.becomes is not None:
        return f"{row.kind}: costs {fmt.share(row.becomes.macs, cost.macs)}" + " of the MACs" * wide
    if row.reason is not None:
        return written(row.reason, style="dim")
    if row.half is None:
        return row.kind
    saved = fmt.share(cost.macs - row.half.cost.macs, cost.macs)
    text = f"rank {row.half.rank}: {saved}"
    return text + f" / {fmt.share(cost.params - row.half.cost.params, cost.params)}" * wide


def _title(report: Report) -> str:
    model = report.model
    origin = "" if model.origin in (model.reference, f"torchvision:{model.reference}") else f" ({model.origin})"
    return f"{model.reference}{origin} by {report.recipe}: {len(report.swapped)} of {len(report.sites)} convs swapped"


def _headline(report: Report) -> Table:
    before, after = report.before, report.after
    rows: list[Sequence[str | Text]] = [
        _figures("MACs", before.macs, after.macs),
        _figures("FLOPs", before.flops, after.flops),
        _figures("parameters", before.params, after.params),
        (
            "weights",
            fmt.size(report.weights_bytes[0]),
            fmt.size(report.weights_bytes[1]),
            fmt.share(report.weights_bytes[1], report.weights_bytes[0]),
        ),
    ]
    if report.latency is not None:
        was, now = report.latency.before, report.latency.after
        rows.append(("latency", f"{1e3 * was:.3g} ms", f"{1e3 * now:.3g} ms", f"{100 * now / was:.1f} %"))
    if report.accuracy is not None:
        acc = report.accuracy
        change = f"{100 * (acc.after - acc.before):+.2f} points"
        rows.append(("top-1", f"{100 * acc.before:.2f} %", f"{100 * acc.after:.2f} %", change))
    return table([("", "left"), ("before", "right"), ("after", "right"), ("left", "right")], rows)


def _figures(name: str, before: int, after: int) -> Sequence[str]:
    return name, fmt.count(before), fmt.count(after), fmt.share(after, before)


def _swaps(report: Report, width: int) -> Table:
    wide = width >= WIDE
    mixed = len(report.preserves) > 1
    columns = [("Layer", "fold"), ("Conv", "left"), ("Becomes", "fold"), ("MACs", "right")]
    columns += (
        [("Parameters", "right"), ("Kernel error", "right"), ("Output error", "right")]
        if wide
        else [("Error", "right")]
    )
    return table(columns, (_swap_cells(row, wide, mixed) for row in report.swapped), width=width)


def _swap_cells(row: SiteRow, wide: bool, mixed: bool) -> list[str]:
    # Names of layers need the room at 80 columns more than the second conv's bias does.
    becomes = row.becomes if wide else row.becomes.removesuffix(", bias")
    if mixed and row.kind is not None and not becomes.startswith(row.kind):
        becomes = f"{row.kind}: {becomes}"
    cells = [row.site, row.conv, becomes]
    cells.append(f"{fmt.count(row.before.macs)} -> {fmt.count(row.after.macs)}")
    if wide:
        cells.append(f"{fmt.count(row.before.params)} -> {fmt.count(row.after.params)}")
        cells.append(fmt.error(row.kernel_error))
    return [*cells, fmt.error(row.output_error)]


def _fine_print(report: Report) -> list[str]:
    model, output = report.model, report.output
    lines = [
        f"Output of the whole model: {fmt.error(output.relative)} relative difference, {output.largest:.3g} at most, "
        f"on {output.probe} of {model.input}."
    ]
    lines += [f"{kind} preserves {what}." for kind, what in report.preserves.items()]
    if report.swapped:
        lines.append("(Output) error: relative change of the layer's own output, on the original's input to it.")
    if report.budget is not None:
        lines.append(f"Budget: {report.budget}.")
    if report.latency is not None:
        lines += fmt.latency(report.latency)
    if report.accuracy is not None:
        lines.append(f"Top-1 on {report.accuracy.data}." + (f" {report.accuracy.note}" if report.accuracy.note else ""))
    if report.calibration is not None:
        row = report.calibration
        how = "layer by layer" if row.sequential else "in one pass"
        lines.append(f"Calibrated {how} on {row.images} unlabelled images of {row.data} (seed {row.seed}).")
        lines += map(fmt.sentence, row.notes)
    lines += fmt.fed_by_model([(model.reference, report.fed)])
    lines.append(f"Weights: {model.weights}. Read by {model.traced_by}.")
    lines += map(fmt.sentence, model.notes)
    lines += [f"{file.path}: {fmt.size(file.bytes)}." for file in report.files]
    total = sum(report.seconds.values())
    lines.append(f"Time: {total:.1f} s ({', '.join(f'{k} {v:.1f}' for k, v in report.seconds.items())}).")
    return lines
