"""How a training run is shown, at its end and line by line."""

from __future__ import annotations

from operator import itemgetter

from rich.console import RenderableType

from asymswap.reporting import format as fmt
from asymswap.reporting.tables import Column, Table, heading, layout, paragraphs
from asymswap.results.finetune import EpochRow, StepRow, TrainingReport


def training_view(report: TrainingReport) -> RenderableType:
    """Return scores before and after, what was trained on what, and the files."""
    kept = f"those of epoch {report.best_epoch} kept" if report.best is not None else "the last weights kept"
    length = f"{fmt.plural(report.epochs, 'epoch')}, {fmt.plural(report.steps, 'step')}"
    tables = []
    if report.before is not None and report.best is not None and report.last is not None:
        scores = (report.before, report.best, report.last)
        columns = [Column("on validation images", itemgetter(0), side="left")]
        columns += [
            Column(title, itemgetter(number)) for number, title in enumerate(("before", "kept", "last epoch"), start=1)
        ]
        top1 = ("top-1", *(fmt.accuracy(one.top1) for one in scores))
        loss = ("loss", *(f"{one.loss:.4f}" for one in scores))
        tables.append(Table(columns, (top1, loss)).terminal())
    return layout(
        heading(f"{report.model}: trained for {length}; {kept}", report.warnings),
        tables,
        paragraphs(_fine_print(report), "dim"),
    )


def _fine_print(report: TrainingReport) -> list[str]:
    settings = report.settings
    lines = [f"Trained on {report.data}."]
    lines += [f"Validated on {report.validation}."] if report.validation else ["Not validated."]
    lines.append(
        f"{settings['optimizer']}, learning rate {settings['lr']:g}, batch {settings['batch_size']}, "
        f"{settings['precision']}, on {report.device}; {fmt.count(report.trained)} of {fmt.count(report.total)} "
        f"parameters trained; seed {settings['seed']}."
    )
    if report.teacher is not None:
        lines.append(f"Taught by {report.teacher}.")
    lines += fmt.fed_by_model([(report.model, report.fed)])
    lines += map(fmt.sentence, report.notes)
    lines += [f"{file.path}: {fmt.size(file.bytes)}." for file in report.files]
    lines.append(f"Time: {report.seconds:.1f} s.")
    return lines


def epoch_line(row: EpochRow, epochs: int) -> str:
    """Return one epoch as a line of 80 columns."""
    text = f"epoch {row.epoch}/{epochs}: loss {row.train.loss:.4f}, top-1 {100 * row.train.top1:.1f} %"
    if row.validation is not None:
        text += f"; validation {100 * row.validation.top1:.2f} %{' (best)' if row.best else ''}"
    text += f"; {row.images_per_second:.0f} images/s"
    return text + (f"; {row.skipped} unreadable skipped" if row.skipped else "")


def step_words(row: StepRow) -> str:
    """Return how the epoch goes, in a few words."""
    return f"loss {row.train.loss:.3f}  top-1 {100 * row.train.top1:.1f} %  {row.images_per_second:.0f} img/s"
