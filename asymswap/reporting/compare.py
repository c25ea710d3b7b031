"""Models beside each other: numbers and text, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.terminal import WIDE, table, written
from asymswap.results.compare import ComparedRow, Comparison

Say = Callable[[ComparedRow, ComparedRow], str]
"""What a column says of a model, the first being given too."""


@dataclass(frozen=True)
class _Column:
    title: str
    say: Say
    shown: Callable[[Comparison], bool] = lambda _: True
    wide: bool = False


def _ratio(value: Callable[[ComparedRow], float | None]) -> Say:
    def say(row: ComparedRow, first: ComparedRow) -> str:
        part, whole = value(row), value(first)
        return "-" if part is None or whole is None else fmt.share(part, whole)

    return say


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else fmt.milliseconds(seconds)


def _timed(comparison: Comparison) -> bool:
    return comparison.timing is not None


def _evaluated(comparison: Comparison) -> bool:
    return comparison.data is not None


def _agreed(comparison: Comparison) -> bool:
    return any(row.gap is not None and row.gap.agreement is not None for row in comparison.models)


def _minimum(row: ComparedRow) -> float | None:
    return None if row.latency is None else row.latency.minimum


_COLUMNS = (
    _Column("MACs", lambda row, _: fmt.count(row.cost.macs)),
    _Column("of 1st", _ratio(lambda row: row.cost.macs), wide=True),
    _Column("Params", lambda row, _: fmt.count(row.cost.params)),
    _Column("of 1st", _ratio(lambda row: row.cost.params), wide=True),
    _Column("Weights", lambda row, _: fmt.size(row.weights_bytes), wide=True),
    _Column(
        "File",
        lambda row, _: "-" if row.file_bytes is None else fmt.size(row.file_bytes),
        lambda c: any(row.file_bytes is not None for row in c.models),
    ),
    _Column("ms", lambda row, _: _milliseconds(_minimum(row)), _timed),
    _Column(
        "Median", lambda row, _: _milliseconds(None if row.latency is None else row.latency.median), _timed, wide=True
    ),
    _Column("of 1st", lambda row, first: _time_ratio(row, row is first), _timed, wide=True),
    _Column("Output", lambda row, _: "-" if row.gap is None else fmt.error(row.gap.relative)),
    _Column(
        "Agree",
        lambda row, _: "-" if row.gap is None or row.gap.agreement is None else fmt.percent(row.gap.agreement),
        _agreed,
        wide=True,
    ),
    _Column("Top-1", lambda row, _: "-" if row.accuracy is None else f"{100 * row.accuracy.top1:.2f} %", _evaluated),
)


def _time_ratio(row: ComparedRow, is_first: bool) -> str:
    return fmt.percent(1) if is_first else fmt.time_share(row.latency_ratio)


def _columns(comparison: Comparison, wide: bool) -> list[_Column]:
    return [column for column in _COLUMNS if column.shown(comparison) and (wide or not column.wide)]


def _cells(row: ComparedRow, comparison: Comparison, wide: bool) -> list[str]:
    first = comparison.models[0]
    return [row.model, *(column.say(row, first) for column in _columns(comparison, wide))]


def comparison_view(comparison: Comparison, width: int) -> RenderableType:
    """A line for each model, and the fine print below."""
    wide = width >= WIDE
    titles = [("Model", "fold"), *((column.title, "right") for column in _columns(comparison, wide))]
    rows = [_cells(row, comparison, wide) for row in comparison.models]
    lines = [written(line, style="dim") for line in _fine_print(comparison, wide)]
    # Twelve columns of figures leave the names of the models too little with two blanks between them.
    first = [written(fmt.sentence(line), style="yellow") for line in comparison.warnings]
    return Group(*first, *[Text("")] * bool(first), table(titles, rows, gap=1 if wide else 2), Text(""), *lines)


def comparison_to_markdown(comparison: Comparison) -> str:
    """The whole table and the fine print, to be pasted into a pull request."""
    titles = ["Model", *(column.title for column in _columns(comparison, wide=True))]
    titles = [{"ms": "ms (minimum)", "Median": "ms (median)"}.get(title, title) for title in titles]
    lines = [titles, ["---", *("---:" for _ in titles[1:])]]
    lines += [[fmt.markdown_code(row.model), *_cells(row, comparison, wide=True)[1:]] for row in comparison.models]
    notes = (f"- {fmt.markdown_text(line)}" for line in _fine_print(comparison, wide=True))
    first = [text for line in comparison.warnings for text in (f"**{fmt.markdown_text(fmt.sentence(line))}**", "")]
    return "\n".join([*first, *fmt.markdown_table(lines), "", *notes, ""])


def _fine_print(comparison: Comparison, wide: bool) -> list[str]:
    first = comparison.models[0]
    lines = [f"Output: relative difference from {first.model}'s, on {comparison.outputs_on}."]
    timing = comparison.timing
    if timing is not None:
        threads = f"{timing.threads} thread" + "s" * (timing.threads != 1)
        lines.append(
            f"ms: one forward pass, batch {timing.batch}, {timing.memory_format}, {threads} of {timing.machine}; all "
            f"models in turn, {timing.rounds} rounds at most, their minimum."
            + " Of 1st: the median of the rounds' ratios."
            * wide
        )
        lines += fmt.doubts(first.model, ((row.model, row.latency_ratio) for row in comparison.models[1:]))
    if comparison.data is not None:
        lines.append(
            f"Top-1 on {comparison.data}" + (f", {comparison.images:,} of them." if comparison.images else ".")
        )
    for row in comparison.models[1:]:
        accuracy = row.accuracy
        if accuracy is not None and accuracy.p_value is not None:
            lines.append(
                f"{row.model} alone is right on {accuracy.gained} images, {first.model} alone on {accuracy.lost} "
                f"(McNemar's exact test: p = {accuracy.p_value:.2g})."
            )
    sizes = dict.fromkeys(row.input for row in comparison.models)
    if len(sizes) > 1:
        lines.append("Inputs: " + ", ".join(f"{row.model} {row.input}" for row in comparison.models) + ".")
    lines += fmt.fed_by_model((row.model, row.fed) for row in comparison.models)
    lines += [f"{row.model}: {note}." for row in comparison.models for note in row.notes]
    lines.append(
        "MACs of one forward pass, batch 1; FLOPs are 2 x MACs." + " Of 1st: what is left of the first model's." * wide
    )
    return lines
