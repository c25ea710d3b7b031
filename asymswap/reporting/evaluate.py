"""How an evaluation is shown."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from rich.console import RenderableType

from asymswap.reporting import format as fmt
from asymswap.reporting.tables import WIDE, Column, Table, heading, layout, paragraphs
from asymswap.results.evaluate import ClassRow, EvaluationReport

_CLASSES_SHOWN = 20
"""Of more classes, the worst are shown."""


def evaluation_view(report: EvaluationReport, width: int) -> RenderableType:
    """Return the models' scores, how they compare with the first, their classes and their confusions."""
    several = len(report.models) > 1
    skipped = f"; {report.images} can be read, {report.unreadable} cannot" if report.unreadable else ""
    models = [
        (f"{number} {model.model}" if several else model.model, model)
        for number, model in enumerate(report.models, start=1)
    ]
    scores = Table(
        (
            Column("Model", itemgetter(0), side="fold"),
            Column("top-1", lambda row: row[1].top1, fmt.accuracy),
            Column("95 %", lambda row: row[1].interval, lambda ends: f"{100 * ends[0]:.2f}-{100 * ends[1]:.2f}"),
            Column("top-5", lambda row: row[1].top5, fmt.accuracy),
            Column("loss", lambda row: row[1].loss, "{:.4f}".format),
            Column("images/s", lambda row: row[1].images_per_second, "{:.0f}".format),
        ),
        models,
    )
    first = report.models[0]
    beside_first = Table(
        (
            Column("Beside the first", itemgetter(0), side="fold"),
            Column("points", lambda row: 100 * (row[1].top1 - first.top1), "{:+.2f}".format),
            Column("agree", lambda row: row[1].against_first.agreement, fmt.accuracy),
            Column("only 1st right", lambda row: row[1].against_first.only_first),
            Column("only this", lambda row: row[1].against_first.only_this),
            Column("McNemar p", lambda row: row[1].against_first.p, lambda p: "< 0.0001" if p < 1e-4 else f"{p:.4f}"),
        ),
        models[1:],
    )
    return layout(
        heading(f"{report.data}{skipped}", report.warnings),
        [scores.terminal()],
        [beside_first.terminal()] if several else [],
        [_classes(report).terminal()],
        paragraphs(_confusions(report, width)),
        paragraphs(_fine_print(report), "dim"),
    )


def _classes(report: EvaluationReport) -> Table:
    """How many images of each class are right; a row holds the class as each model has it."""
    rows: Sequence[tuple[ClassRow, ...]] = list(zip(*(model.classes for model in report.models), strict=True))
    title = "Class"
    if len(rows) > _CLASSES_SHOWN:
        title = f"Worst {_CLASSES_SHOWN} of {len(rows)} classes"
        # A class without images is the last to be shown.
        rows = sorted(rows, key=lambda row: row[0].right / row[0].images if row[0].images else 2.0)[:_CLASSES_SHOWN]
    columns = [
        Column(title, lambda row: row[0].name, side="fold"),
        Column("images", lambda row: row[0].images),
    ]
    for number in range(len(report.models)):
        heading = f"{number + 1}" if len(report.models) > 1 else "right"
        columns.append(Column(heading, itemgetter(number), lambda row: fmt.share(row.right, row.images)))
    return Table(columns, rows)


def _confusions(report: EvaluationReport, width: int) -> list[str]:
    found = []
    for number, model in enumerate(report.models, start=1):
        pairs = [f"{row.of} as {row.taken_for} ({row.images})" for row in model.confusions]
        if pairs:
            which = f" by {number}" if len(report.models) > 1 else ""
            found.append(f"Most confused{which}: {'; '.join(pairs if width >= WIDE else pairs[:5])}")
    return found


def _fine_print(report: EvaluationReport) -> list[str]:
    lines = ["95 %: Wilson's interval of top-1."]
    if len(report.models) > 1:
        lines.append("p: how likely models that are equally good would differ so much (McNemar, exact, two-sided).")
    lines.append(f"images/s: forward passes of {report.batch} images on {report.device}, without reading the images.")
    lines += fmt.fed_by_model((model.model, model.fed) for model in report.models)
    return [*lines, *map(fmt.sentence, report.notes)]
