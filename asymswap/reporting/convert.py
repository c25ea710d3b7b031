"""How the report of a conversion is shown: for a terminal, as Markdown, as one HTML page, as a file."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from asymswap.errors import OutputError, listed, near_names
from asymswap.reporting import format as fmt
from asymswap.reporting.pages import percent_of, render
from asymswap.reporting.tables import WIDE, Change, Column, Screen, Table, changes, kept_lines
from asymswap.results.convert import FusionRow, Report, SiteRow
from asymswap.results.evaluate import Agreement, OutputAgreement
from asymswap.results.records import Provenance
from asymswap.types import MACS

_FULL = 150  # terminals of at least this many columns show everything that is known of a layer
_ERRORS = (
    "Kernel error: Frobenius norm of the kernel's change over the norm of the kernel. Error: the same of the layer's "
    "output on the probe, the layer seeing the original's input."
)
MARKS = "●■▲◆▼✚▮"  # the signs of the kinds in their order: they differ in shape as well as in colour


def check_suffix(path: Path) -> None:
    """Raise OutputError unless the file name ends as a report does."""
    if path.suffix not in (known := (".html", ".json", ".md")):
        raise OutputError(f"report {path}: the file must end in .html, .json or .md{near_names(path.suffix, known)}")


def headline(report: Report) -> list[Change]:
    """Return the figures before and after."""
    before, after = report.before, report.after
    flops = f"FLOPs (2 x MACs): {fmt.count(before.flops)} to {fmt.count(after.flops)}"
    rows = [
        Change("MACs", before.macs, after.macs, remark=flops),
        Change("FLOPs", before.flops, after.flops),
        Change("parameters", before.params, after.params),
        Change("weights", *report.weights_bytes, fmt.size, "{:,} B".format),
    ]
    latency, accuracy = report.latency, report.accuracy
    for row in latency.times if latency else ():
        if latency and row.before and row.after and (share := fmt.time_share(row.ratio)):
            # In milliseconds: bars of what is below 1, as scores mostly are, are drawn as parts of it.
            both, how = (1e3 * row.before.minimum, 1e3 * row.after.minimum), fmt.setting(latency, row.runtime)
            rows.append(Change(f"time, {fmt.runtime(row.runtime)}", *both, _ms, _ms, share, how))
    images = f"{accuracy.images:,} images" if accuracy and accuracy.images is not None else ""
    for one in accuracy.scores if accuracy else ():
        show, change = partial(fmt.score, unit=one.unit), fmt.score_change(one.after - one.before, one.unit)
        remark = ", ".join(filter(None, (images, "lower is better" * one.lower_is_better)))
        rows.append(Change(one.name, one.before, one.after, show, show, change, remark))
    return rows


def _ms(milliseconds: float) -> str:
    return f"{fmt.milliseconds(milliseconds / 1e3)} ms"


def layer_table(report: Report, width: int | None = None) -> Table:
    """Return a row for each conv and, below, sums; with a width, of swapped convs, and kinds only where they differ."""

    def becomes(row: SiteRow, settings: str) -> str:
        if row.kind is None:
            return f"kept: {row.reason}" if row.action == "keep" else ""
        if width is not None and width < WIDE:
            # Names of layers need the room more than the second conv's bias does.
            settings = settings.removesuffix(", bias")
        if settings.startswith(row.kind) or (width is not None and len(report.preserves) == 1):
            return settings
        return f"{row.kind}: {settings}" if settings else row.kind

    conv = "Channels, kernel, stride (s), dilation (d), groups (g; dw: depthwise)"
    exact, on = "{:,}".format, "on the original's input to it"
    columns = (
        Column("Layer", "site", side="fold", code=True, about="Name of the module"),
        Column("Conv", "conv", side="left", about=conv),
        Column("Map", "feature_map", fmt.extent, "left", _FULL, about="Height x width of the input"),
        Column("Calls", lambda row: row.calls or None, least=_FULL, about="Calls in a forward pass"),
        Column(
            "Becomes",
            lambda row: row,
            lambda row: becomes(row, row.becomes),
            "fold",
            exact=lambda row: becomes(row, fmt.settings(row.settings)),
            about="The kind that replaces the conv and its settings, or why the conv is kept",
        ),
        Column("MACs", "before.macs", fmt.count, exact=exact, about="Multiply-adds of one forward pass, before"),
        Column("after", "after.macs", fmt.count, exact=exact, about="Multiply-adds of one forward pass, after"),
        Column("Params", "before.params", fmt.count, least=WIDE, exact=exact, about="Parameters before"),
        Column("after", "after.params", fmt.count, least=WIDE, exact=exact, about="Parameters after"),
        Column("Predicted", "predicted_error", fmt.error, least=_FULL, about="Error that the plan expected"),
        Column("Kernel error", "kernel_error", fmt.error, least=WIDE, about="Relative change of the kernel"),
        Column("Error", "output_error", fmt.error, about=f"Relative change of the layer's output, {on}"),
    )
    if width is not None:
        return Table(columns, report.swapped)
    rest = SiteRow("other layers", "", None, 0, "sum", before=report.rest, after=report.rest)
    total = SiteRow("total", "", None, 0, "sum", before=report.before, after=report.after)
    return Table(columns, report.sites, [rest, total])


def report_view(report: Report, width: int | None) -> Screen:
    """Return figures, what each conv became or why it was kept, and the fine print; without a width all there is."""
    model, calibration = report.model, report.calibration
    origin = "" if model.origin in (model.reference, f"torchvision:{model.reference}") else f" ({model.origin})"
    kept = [] if width is None else kept_lines(row for row in report.sites if row.action == "keep")
    lines = _fine_print(report)
    if width is None:
        lines += [f"SHA-256 of the model's file: {model.sha256}."] if model.sha256 else []
        lines += [f"SHA-256 of the calibration images' pixels: {calibration.sha256}."] if calibration else []
        lines += [_ERRORS, f"MACs of one forward pass, batch 1. asymswap {report.asymswap}."]
    title = f"{model.reference}{origin} by {report.recipe}: {len(report.swapped)} of {len(report.sites)} convs swapped"
    reasons = ["Kept: " + "; ".join(kept)] if kept else []
    blocks = _verdicts(report), [changes(headline(report))], [layer_table(report, width)], reasons
    return Screen(title, _first_lines(report), blocks, lines, width)


def _verdicts(report: Report) -> list[str]:
    """Return what was allowed to be lost and what was lost; where no metric tells more, the agreement."""
    drop, lines = report.drop, list[str]()
    if drop is not None:
        inputs = drop.data if drop.samples is None else f"{drop.samples:,} inputs"
        ends = "" if drop.interval is None else " to ".join(fmt.lost(end, drop) for end in drop.interval)
        lines.append(
            f"Of {drop.score} at most {fmt.lost(drop.allowed, drop)} may be lost: {fmt.lost(drop.lost, drop)} measured "
            f"on {inputs}{f' ({ends} with 95 % confidence)' if ends else ''}, at {drop.share:.3f} of the MACs, after "
            f"{fmt.plural(drop.solves, 'solve')}{', with the smallest swap everywhere' if drop.smallest else ''}."
        )
    return lines + (agreement_lines(report.agreement, "the original") if report.accuracy is None else [])


def _lost(report: Report) -> list[str]:
    """Return what the page says first of the loss: of the metric, else of the agreement, else of the outputs."""
    if report.accuracy is None:
        change = f"{fmt.error(report.output.relative)} on {report.output.probe}"
        return _verdicts(report) or [f"The output changed by {change}."]
    one = report.accuracy.scores[0]
    before, after = (fmt.score(value, one.unit) for value in (one.before, one.after))
    return [f"{one.name}: {before} before, {after} after.", *_verdicts(report)]


def agreement_lines(agreement: Agreement | None, other: str) -> list[str]:
    """Return how far a network answers as the other one does."""
    if agreement is None or not agreement.outputs:
        return []
    figures = [f"{one.output}: {_agreed(one)}".removeprefix(": ") for one in agreement.outputs]
    inputs = fmt.plural(agreement.samples, "held-back input")
    return [f"Agreement with {other} on {inputs}: {listed(figures, 6)}."]


def _agreed(one: OutputAgreement) -> str:
    if one.measure == "top-1":
        low, high = map(fmt.percent, one.interval or (one.value, one.value))
        return f"{fmt.percent(one.value)} the same class ({low} to {high} with 95 % confidence)"
    if one.measure == "cosine":
        return f"cosine {one.value:.4f}"
    if one.measure == "PSNR":
        return "equal" if math.isinf(one.value) else f"{one.value:.1f} dB between the images"
    return f"{fmt.error(one.value)} relative error"


def _first_lines(report: Report) -> list[str]:
    """Return what to read before any figure: the warnings, and if nothing was swapped, the command that says why."""
    reference, lines = report.model.reference, list[str]()
    for row in report.latency.times if report.latency is not None else ():
        ratio = row.ratio
        if ratio is not None and ratio.is_significant and ratio.value > 1:
            interval = f"{ratio.low:.2f} to {ratio.high:.2f} with {fmt.score(ratio.confidence, '%', 0)} confidence"
            lines.append(f"slower in {fmt.runtime(row.runtime)}: it takes {ratio.value:.2f} of the time ({interval})")
    lines += report.warnings
    if not report.sites:
        lines.append(f"nothing was swapped: {reference} has no Conv2d")
    elif not report.swapped:
        lines.append(f"nothing was swapped; `asymswap candidates {reference}` tells what each conv would save")
    return lines


def _latency(report: Report) -> list[str]:
    found = report.latency
    if found is None:
        return [report.untimed] if report.untimed else []
    setting = fmt.setting(found, found.times[0].runtime if len(found.times) == 1 else None)
    versions = ", ".join(dict.fromkeys(row.version for row in found.times if row.version))
    lines = [
        f"Time of a pass: {setting} of {found.machine} ({versions}); before and after in turn, the fastest pass, and "
        "the median of the rounds' ratios (?: not significant)."
    ]
    if found.undone:
        lines.append(f"Measured to be slower than the conv itself, and taken back: {', '.join(found.undone)}.")
    first = next(iter(found.times), None)
    if found.wanted is not None and first is not None and first.after is not None and first.ratio is not None:
        asked, reached, got = f"{found.wanted:g} of the time", f"{first.ratio.value:.3f}", first.ratio.value
        if found.in_seconds:
            got = first.after.minimum
            asked, reached = _ms(1e3 * found.wanted), _ms(1e3 * got)
        lines.append(f"In {fmt.runtime(first.runtime)}: asked for {asked}, measured {reached}.")
        if got > found.wanted:
            lines.append("That is above the budget: the machine is noisy, or the convs matched cannot bring it about.")
    lines += [f"{fmt.runtime(row.runtime)}: {row.failure}." for row in found.times if row.failure]
    return lines + fmt.doubts("the original", ((fmt.runtime(row.runtime), row.ratio) for row in found.times))


def _fine_print(report: Report) -> list[str]:
    model, output, accuracy, calibration = report.model, report.output, report.accuracy, report.calibration
    change = f"{fmt.error(output.relative)} relative difference, {output.largest:.3g} at most"
    error = "Error: relative change of the layer's own output, on the original's input to it."
    chosen = "The network was chosen by the loss measured: on other inputs it may be a little larger."
    lines = [
        f"Output of the whole model: {change}, on {output.probe} of {output.input or model.input}.",
        *(f"{kind}: {what}." for kind, what in report.preserves.items()),
        error if report.swapped else "",
        "" if report.budget is None else f"Budget: {report.budget}.",
        "" if report.drop is None else chosen,
        *_latency(report),
    ]
    if accuracy is not None:
        lines += agreement_lines(report.agreement, "the original")
        lines += [f"{fmt.measured_on(accuracy.scores, accuracy.data)}.", fmt.sentence(accuracy.note)]
    if calibration is not None:
        how = "layer by layer" if calibration.sequential else "in one pass"
        images = fmt.samples(calibration.images, calibration.data)
        lines.append(f"Calibrated {how} on {images} (seed {calibration.seed}).")
        lines += map(fmt.sentence, calibration.notes)
    lines += fmt.fed_by_model([(model.reference, report.fed)])
    lines.append(f"Weights: {model.weights}. Read by {model.traced_by}.")
    lines += map(fmt.sentence, model.notes)
    lines += [f"{file.path}: {fmt.size(file.bytes)}." for file in report.files]
    if report.seconds:  # a checkpoint has none
        total = sum(report.seconds.values())
        lines.append(f"Time: {total:.1f} s ({', '.join(f'{k} {v:.1f}' for k, v in report.seconds.items())}).")
    return lines


def fusion_table(rows: Sequence[FusionRow]) -> Table:
    """Return what became of each replacement that was fused."""
    columns = (
        Column("Layer", "site", side="fold"),
        Column("Was", "kind", side="left"),
        Column("Became", lambda row: f"{row.outcome}: {row.reason}".removesuffix(": "), side="left"),
    )
    return Table(columns, rows)


def to_html(report: Report, provenance: Provenance) -> str:
    """Return the whole report as the text of an HTML file."""
    kinds = list(dict.fromkeys(row.kind for row in report.sites if row.kind is not None))
    marks = {kind: (f"kind{number % len(MARKS)}", MARKS[number % len(MARKS)]) for number, kind in enumerate(kinds)}
    marks["kept"] = ("kept", "-")
    return render(
        "report.html.j2",
        "report.js",
        report=report,
        provenance=provenance,
        macs=MACS,
        errors=_ERRORS,
        first_lines=map(fmt.sentence, _first_lines(report)),
        figures=headline(report),
        marks=marks,
        panels=_panels(report),
        table=layer_table(report),
        lost=_lost(report),
        agreement=agreement_lines(report.agreement, "the original") if report.accuracy is not None else (),
        kept=kept_lines(row for row in report.sites if row.action == "keep"),
        latency=_latency(report),
        markdown=report_view(replace(report, seconds={}), None).markdown(),
        fused=fusion_table(provenance.fused),
    )


def _panels(report: Report) -> list[tuple[str, str, list[dict[str, int]]]]:
    """Return each panel's title, what its highest bar stands for, and for each layer the heights of its bars."""
    rows, panels = report.sites, []
    for title, show, layers in (
        ("MACs", fmt.count, [{"before": row.before.macs, "after": row.after.macs} for row in rows]),
        ("Parameters", fmt.count, [{"before": row.before.params, "after": row.after.params} for row in rows]),
        ("Error", fmt.error, [{"after": row.output_error, "predicted": row.predicted_error} for row in rows]),
    ):
        known = [{css: value for css, value in layer.items() if value is not None} for layer in layers]
        if any(known):
            most = max((value for layer in known for value in layer.values() if math.isfinite(value)), default=0.0)
            heights = [{css: percent_of(value, most) for css, value in layer.items()} for layer in known]
            panels.append((title, show(most), heights))
    return panels
