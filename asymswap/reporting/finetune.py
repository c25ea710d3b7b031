"""What a training run has come to: numbers and text, and how they are shown, at its end and line by line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.terminal import table, written
from asymswap.results.finetune import EpochRow, StepRow, TrainingReport


def training_view(report: TrainingReport) -> RenderableType:
    """Scores before and after, what was trained on what, and the files."""
    parts: list[RenderableType] = [written(_title(report), style="bold")]
    parts += [*(written(fmt.sentence(line), style="yellow") for line in report.warnings), Text("")]
    if report.before is not None and report.best is not None and report.last is not None:
        columns = [("on validation images", "left"), ("before", "right"), ("kept", "right"), ("last epoch", "right")]
        scores = (report.before, report.best, report.last)
        rows: list[Sequence[str]] = [
            ("top-1", *(f"{100 * one.top1:.2f} %" for one in scores)),
            ("loss", *(f"{one.loss:.4f}" for one in scores)),
        ]
        parts += [table(columns, rows), Text("")]
    parts += [written(line, style="dim") for line in _fine_print(report)]
    return Group(*parts)


def _title(report: TrainingReport) -> str:
    kept = f"those of epoch {report.best_epoch} kept" if report.best is not None else "the last weights kept"
    return f"{report.model}: trained for {_count(report.epochs, 'epoch')}, {_count(report.steps, 'step')}; {kept}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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
    """One epoch in a line of 80 columns."""
    text = f"epoch {row.epoch}/{epochs}: loss {row.train.loss:.4f}, top-1 {100 * row.train.top1:.1f} %"
    if row.validation is not None:
        text += f"; validation {100 * row.validation.top1:.2f} %{' (best)' if row.best else ''}"
    text += f"; {row.images_per_second:.0f} images/s"
    return text + (f"; {row.skipped} unreadable skipped" if row.skipped else "")


def step_words(row: StepRow) -> str:
    """How the epoch goes, in a few words."""
    return f"loss {row.train.loss:.3f}  top-1 {100 * row.train.top1:.1f} %  {row.images_per_second:.0f} img/s"
