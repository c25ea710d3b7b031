"""What evaluating one or more classifiers has to say: numbers and text, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.terminal import WIDE, table, written
from asymswap.results.evaluate import ClassRow, EvaluationReport

_CLASSES_SHOWN = 20
"""Of more classes, the worst are shown."""


def evaluation_view(report: EvaluationReport, width: int) -> RenderableType:
    """The models' scores, how they compare with the first, their classes and their confusions."""
    skipped = f"; {report.images} can be read, {report.unreadable} cannot" if report.unreadable else ""
    parts: list[RenderableType] = [written(f"{report.data}{skipped}", style="bold")]
    parts += [*(written(fmt.sentence(line), style="yellow") for line in report.warnings), Text("")]
    parts += [_scores(report), Text("")]
    if len(report.models) > 1:
        parts += [_comparison(report), Text("")]
    parts += [_classes(report), Text("")]
    parts += _confusions(report, width)
    parts += [written(line, style="dim") for line in _fine_print(report)]
    return Group(*parts)


def _scores(report: EvaluationReport) -> RenderableType:
    columns = [("Model", "fold"), ("top-1", "right"), ("95 %", "right"), ("top-5", "right"), ("loss", "right")]
    columns.append(("images/s", "right"))
    rows = []
    for number, model in enumerate(report.models, start=1):
        low, high = model.interval
        top5 = "-" if model.top5 is None else _percent(model.top5)
        name = _name(report, number)
        rows.append(
            (
                name,
                _percent(model.top1),
                f"{100 * low:.2f}-{100 * high:.2f}",
                top5,
                f"{model.loss:.4f}",
                f"{model.images_per_second:.0f}",
            )
        )
    return table(columns, rows)


def _comparison(report: EvaluationReport) -> RenderableType:
    first = report.models[0]
    rows = []
    for number, model in enumerate(report.models[1:], start=2):
        against = model.against_first
        assert against is not None
        rows.append(
            (
                _name(report, number),
                f"{100 * (model.top1 - first.top1):+.2f}",
                _percent(against.agreement),
                f"{against.only_first}",
                f"{against.only_this}",
                "< 0.0001" if against.p < 1e-4 else f"{against.p:.4f}",
            )
        )
    columns = [("Beside the first", "fold"), ("points", "right"), ("agree", "right"), ("only 1st right", "right")]
    return table([*columns, ("only this", "right"), ("McNemar p", "right")], rows)


def _classes(report: EvaluationReport) -> RenderableType:
    first = report.models[0]
    order = range(len(first.classes))
    if len(order) > _CLASSES_SHOWN:
        order = sorted(order, key=lambda number: _share(first.classes[number]))[:_CLASSES_SHOWN]  # type: ignore[assignment]
    title = "Class" if len(order) == len(first.classes) else f"Worst {_CLASSES_SHOWN} of {len(first.classes)} classes"
    columns = [(title, "fold"), ("images", "right")]
    columns += [
        (f"{number}" if len(report.models) > 1 else "right", "right") for number in range(1, len(report.models) + 1)
    ]
    rows = [
        (
            first.classes[number].name,
            f"{first.classes[number].images}",
            *(_class_share(model.classes[number]) for model in report.models),
        )
        for number in order
    ]
    return table(columns, rows)


def _confusions(report: EvaluationReport, width: int) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for number, model in enumerate(report.models, start=1):
        if model.confusions:
            pairs = [f"{row.of} as {row.taken_for} ({row.images})" for row in model.confusions]
            shown = pairs if width >= WIDE else pairs[:5]
            which = f" by {number}" if len(report.models) > 1 else ""
            lines.append(written(f"Most confused{which}: {'; '.join(shown)}"))
    return [*lines, Text("")] if lines else []


def _fine_print(report: EvaluationReport) -> Sequence[str]:
    lines = ["95 %: Wilson's interval of top-1."]
    if len(report.models) > 1:
        lines.append("p: how likely models that are equally good would differ so much (McNemar, exact, two-sided).")
    lines.append(f"images/s: forward passes of {report.batch} images on {report.device}, without reading the images.")
    lines += fmt.fed_by_model((model.model, model.fed) for model in report.models)
    return [*lines, *map(fmt.sentence, report.notes)]


def _name(report: EvaluationReport, number: int) -> str:
    name = report.models[number - 1].model
    return f"{number} {name}" if len(report.models) > 1 else name


def _share(row: ClassRow) -> float:
    return row.right / row.images if row.images else 2.0


def _class_share(row: ClassRow) -> str:
    return f"{100 * row.right / row.images:.1f} %" if row.images else "-"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
