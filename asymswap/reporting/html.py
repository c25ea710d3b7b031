"""A report as one HTML page that needs nothing beside it: no network, no font, no script of others.

Everything in it comes from the report's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asymswap.reporting import format as fmt
from asymswap.reporting.drawing import element, mark, markup
from asymswap.reporting.layers import Bar, Column, Panel, draw_layers
from asymswap.reporting.pages import render
from asymswap.results.convert import Report, SiteRow
from asymswap.results.provenance import Making
from asymswap.types import MACS

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class Figure:
    """One headline figure, before and after; `left` is what is told in large, `numbers` stand at the bars."""

    name: str
    left: str
    remark: str
    before: float
    after: float
    numbers: tuple[str, str]


@dataclass(frozen=True)
class Cell:
    """What a table shows, and what it is sorted by: a number, or the text itself; None is last."""

    text: str
    value: float | None


@dataclass(frozen=True)
class Layer:
    """One row of the table of layers; `kind` is the number of its kind, None where it is kept."""

    number: int
    row: SiteRow
    kind: int | None
    what: str
    how: str
    facts: tuple[tuple[str, str], ...]
    cells: tuple[Cell, ...]


def to_html(report: Report, making: Making) -> str:
    """The whole report as the text of an HTML file."""
    from markupsafe import Markup

    kinds = list(dict.fromkeys(row.kind for row in report.swapped if row.kind is not None))
    return render(
        "report.html.j2",
        "report.js",
        report=report,
        making=making,
        fmt=fmt,
        macs=MACS,
        title=f"{report.model.reference} by {report.recipe}",
        verdict=_verdict(report),
        figures=_figures(report),
        pair=_pair,
        kinds=kinds,
        swatch=_swatch,
        picture=Markup(markup(_picture(report, kinds))),
        columns=_COLUMNS,
        layers=_layers(report, kinds),
        kept=fmt.kept(report.sites),
        settings=_source_facts(report),
        making_facts=_making_facts(report, making),
    )


def _verdict(report: Report) -> str:
    before, after = report.before, report.after
    parts = [
        f"{len(report.swapped)} of {len(report.sites)} convolutions swapped",
        f"the model needs {fmt.share(after.macs, before.macs)} of its MACs and "
        f"{fmt.share(after.params, before.params)} of its parameters",
        f"output changed by {fmt.error(report.output.relative)} on {report.output.probe}",
    ]
    # A number and its sign belong on one line.
    return f"{'; '.join(parts)}.".replace(" %", "\u00a0%")


def _figures(report: Report) -> list[Figure]:
    before, after = report.before, report.after
    bytes_before, bytes_after = report.weights_bytes
    flops = f"FLOPs (2 x MACs): {fmt.count(before.flops)} to {fmt.count(after.flops)}"
    figures = [
        _counted("MACs", before.macs, after.macs, flops),
        _counted("Parameters", before.params, after.params),
    ]
    if bytes_before:
        sizes = (fmt.size(bytes_before), fmt.size(bytes_after))
        figures.append(
            Figure("Weights in bytes", _left(bytes_after, bytes_before), "", bytes_before, bytes_after, sizes)
        )
    if report.latency is not None:
        was, now = report.latency.before, report.latency.after
        said = (f"{1e3 * was:.3g} ms", f"{1e3 * now:.3g} ms")
        remark = f"batch {report.latency.batch}, {report.latency.memory_format}"
        figures.append(Figure("Latency", _left(now, was), remark, was, now, said))
    if report.accuracy is not None:
        acc = report.accuracy
        said = (f"{100 * acc.before:.2f} %", f"{100 * acc.after:.2f} %")
        change = f"{100 * (acc.after - acc.before):+.2f} points"
        figures.append(Figure("Top-1 accuracy", change, f"{acc.images:,} images", acc.before, acc.after, said))
    return figures


def _counted(name: str, before: int, after: int, remark: str = "") -> Figure:
    numbers = (fmt.count(before), fmt.count(after))
    return Figure(name, _left(after, before), remark, before, after, numbers)


def _left(after: float, before: float) -> str:
    more = after > before > 0
    return f"{fmt.percent(after / before - 1)} more" if more else f"{fmt.share(after, before)} left"


def _pair(figure: Figure) -> Markup:
    """The two bars of a headline figure."""
    from markupsafe import Markup

    # What is a fraction is drawn of the whole.
    most = 1.0 if figure.name == "Top-1 accuracy" else max(figure.before, figure.after)
    bars = [
        element("rect", x=0, y=y, width=100 * max(0.0, value) / most if most else 0.0, height=8, class_=css)
        for y, value, css in ((1, figure.before, "f-before s-edge"), (11, figure.after, "f-accent s-accent"))
    ]
    label = f"{figure.name}: {figure.numbers[0]} before, {figure.numbers[1]} after"
    picture = element(
        "svg", *bars, viewBox="0 0 100 20", preserveAspectRatio="none", role="img", aria_label=label, class_="pair"
    )
    return Markup(markup(picture))


def _swatch(kind: int | None) -> Markup:
    """The shape and colour of a kind, to stand beside its name."""
    from markupsafe import Markup

    picture = element("svg", mark(kind, 6, 6, 4.5), viewBox="0 0 12 12", class_="swatch", aria_hidden="true")
    return Markup(markup(picture))


def _picture(report: Report, kinds: Sequence[str]) -> Any:
    rows = report.sites
    columns = [
        Column(row.site, tuple(_lines(row)), None if row.kind is None else kinds.index(row.kind)) for row in rows
    ]
    panels = [
        Panel("MACs", fmt.count, tuple(_cost_bar(row.before.macs, row.after.macs, row) for row in rows)),
        Panel("Parameters", fmt.count, tuple(_cost_bar(row.before.params, row.after.params, row) for row in rows)),
    ]
    if any(row.output_error is not None or row.predicted_error is not None for row in rows):
        bars = tuple(Bar(front=row.output_error, line=row.predicted_error) for row in rows)
        panels.append(Panel("Error", fmt.error, bars))
    label = f"Cost before and after, and error, of the {len(rows)} convolutions of {report.model.reference}"
    return draw_layers(columns, panels, label)


def _cost_bar(before: int, after: int, row: SiteRow) -> Bar:
    return Bar(back=before, front=after) if row.action == "swap" else Bar(front=before)


def _lines(row: SiteRow) -> list[str]:
    """What the picture says of a layer."""
    lines = [row.site, f"{row.conv}{_at(row)}", f"{_what(row)}: {_how(row)}"]
    if row.action == "keep":
        return [*lines, f"MACs {fmt.count(row.before.macs)}, parameters {fmt.count(row.before.params)}"]
    lines.append(_change("MACs", row.before.macs, row.after.macs))
    lines.append(_change("parameters", row.before.params, row.after.params))
    errors = (("predicted", row.predicted_error), ("kernel", row.kernel_error), ("output", row.output_error))
    told = [f"{name} {fmt.error(value)}" for name, value in errors if value is not None]
    return [*lines, "error: " + ", ".join(told)] if told else lines


def _at(row: SiteRow) -> str:
    size = "" if row.feature_map is None else f" at {row.feature_map[0]}x{row.feature_map[1]}"
    return size if row.calls == 1 else f"{size}, {row.calls} calls"


def _change(name: str, before: int, after: int) -> str:
    return f"{name} {fmt.count(before)} to {fmt.count(after)} ({fmt.share(after, before)} left)"


def _what(row: SiteRow) -> str:
    return row.kind or "kept"


def _how(row: SiteRow) -> str:
    return row.becomes if row.action == "swap" else row.reason


_COLUMNS = (
    ("#", "number", "Place in the network"),
    ("Layer", "text", "Name of the module"),
    ("Conv", "text", "Channels, kernel, stride (s), dilation (d), groups (g; dw: depthwise)"),
    ("Map", "number", "Height x width of the input"),
    ("Done", "text", "The kind that replaces the conv, or kept"),
    ("How", "text", "Settings of the replacement, or why the conv is kept"),
    ("MACs", "number", "Multiply-adds of one forward pass, before"),
    ("after", "number", "Multiply-adds of one forward pass, after"),
    ("Params", "number", "Parameters before"),
    ("after", "number", "Parameters after"),
    ("Predicted", "number", "Error that the plan expected"),
    ("Kernel", "number", "Relative change of the kernel"),
    ("Output", "number", "Relative change of the layer's output on the probe, on the original's input to it"),
)


def _layers(report: Report, kinds: Sequence[str]) -> list[Layer]:
    return [
        Layer(
            number=number,
            row=row,
            kind=None if row.kind is None else kinds.index(row.kind),
            what=_what(row),
            how=_how(row),
            facts=tuple(_facts(row, report)),
            cells=tuple(_cells(row)),
        )
        for number, row in enumerate(report.sites, start=1)
    ]


def _cells(row: SiteRow) -> list[Cell]:
    costs = (row.before.macs, row.after.macs, row.before.params, row.after.params)
    errors = (row.predicted_error, row.kernel_error, row.output_error)
    return [
        *(Cell(fmt.count(cost), cost) for cost in costs),
        *(Cell(fmt.error(error), error) for error in errors),
    ]


def _facts(row: SiteRow, report: Report) -> list[tuple[str, str]]:
    """What is told of a layer where its details are opened."""
    facts = [("calls in a forward pass", str(row.calls)), ("share of the model's MACs before", _of_model(row, report))]
    facts += [(key, str(value)) for key, value in row.settings.items()]
    if row.action == "swap":
        facts.append(("MACs", f"{row.before.macs:,} to {row.after.macs:,}"))
        facts.append(("parameters", f"{row.before.params:,} to {row.after.params:,}"))
        facts.append(("promised to be exact", "yes" if row.exact else "no"))
        if row.reason:
            facts.append(("why", row.reason))
    if row.absorbs is not None:
        facts.append(("takes over the batch norm", row.absorbs))
    if row.output_largest is not None:
        facts.append(("largest change of an output value", f"{row.output_largest:.3g}"))
    return facts


def _of_model(row: SiteRow, report: Report) -> str:
    return fmt.share(row.before.macs, report.before.macs)


def _source_facts(report: Report) -> list[tuple[str, str]]:
    model = report.model
    facts = [
        ("Model", model.reference),
        ("Built from", model.origin),
        ("Weights", model.weights),
        ("SHA-256 of the file", model.sha256 or ""),
        ("Input", model.input),
        ("Read by", model.traced_by),
        *(("Note", note) for note in model.notes),
    ]
    return [(name, value) for name, value in facts if value]


def _making_facts(report: Report, making: Making) -> list[tuple[str, str]]:
    changed = ", ".join(f"{key} = {value}" for key, value in making.overrides.items())
    versions = {"asymswap": report.asymswap, **making.versions}
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in report.seconds.items())
    facts = [
        ("Recipe", report.recipe),
        ("Changed in it", changed),
        ("Budget", report.budget or ""),
        ("Seed", "" if making.seed is None else str(making.seed)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        *(("File", f"{file.path}: {fmt.size(file.bytes)}") for file in report.files),
        ("Seconds", f"{sum(report.seconds.values()):.1f} ({seconds})" if seconds else ""),
    ]
    return [(name, value) for name, value in facts if value]
