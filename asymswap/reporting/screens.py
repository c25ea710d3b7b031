"""Screens of the verbs that have no page of their own: evaluate, compare, finetune, fuse, export, show."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

from rich.text import Text

from asymswap.models.preprocessing import fed, size_warning
from asymswap.reporting import format as fmt
from asymswap.reporting.convert import agreement_lines, fusion_table, headline
from asymswap.reporting.tables import WIDE, Change, Column, Screen, Table, changes, facts, kept_lines, score_column
from asymswap.results.convert import ExportReport, FusionReport
from asymswap.results.evaluate import ClassRow, Comparison, EvaluationReport
from asymswap.results.finetune import EpochRow, StepRow, TrainingReport
from asymswap.results.records import read_provenance, read_report
from asymswap.types import Plan

_CLASSES_SHOWN = 20  # of more, the worst are shown
_NAMES = {"top1": "top-1", "top5": "top-5"}  # of scores that are fractions of images


def evaluation_view(report: EvaluationReport, width: int | None) -> Screen:
    """Return the models' scores, how they compare with the first, their classes and their confusions."""
    first, several, classifiers = report.models[0], len(report.models) > 1, report.models[0].classifier is not None
    models = [replace(one, model=f"{n} " * several + one.model) for n, one in enumerate(report.models, start=1)]
    scores = [Column("Model", "model", side="fold"), *map(score_column, first.scores)]
    beside_first = [Column("Beside the first", "model", side="fold")]
    beside_first += [score_column(score, change=True) for score in first.scores]
    lines = []
    if classifiers:
        scores[2:2] = [Column("95 %", "classifier.interval", lambda ends: f"{100 * ends[0]:.2f}-{100 * ends[1]:.2f}")]
        scores += [
            Column("loss", "classifier.loss", "{:.4f}".format),
            Column("images/s", "classifier.images_per_second", "{:.0f}".format),
        ]
        beside_first[2:] = [  # there is no room for the change of top-5
            Column("agree", "classifier.against_first.agreement", partial(fmt.score, unit="%")),
            Column("only 1st right", "classifier.against_first.only_first"),
            Column("only this", "classifier.against_first.only_this"),
            Column("McNemar p", "classifier.against_first.p", lambda p: f"{p:.4f}" if p >= 1e-4 else "< 0.0001"),
        ]
        lines = [
            "95 %: Wilson's interval of top-1.",
            "p: how likely models that are equally good would differ so much (McNemar, exact, two-sided)." * several,
            f"images/s: forward passes of {report.batch} images on {report.device}, without reading them.",
        ]
    lines += fmt.fed_by_model((model.model, model.fed) for model in report.models)
    lines += map(fmt.sentence, report.notes)
    confused = []
    for number, model in enumerate(report.models, start=1):
        confusions = model.classifier.confusions if model.classifier else ()
        pairs = [f"{row.of} as {row.taken_for} ({row.images})" for row in confusions]
        shown = pairs[:5] if width is not None and width < WIDE else pairs
        confused += [f"Most confused{f' by {number}' * several}: {'; '.join(shown)}"] if shown else []
    skipped = f"; {report.images} can be read, {report.unreadable} cannot" if report.unreadable else ""
    title = f"{report.data if classifiers else fmt.measured_on(first.scores, report.data)}{skipped}"
    beside = Table(beside_first, models[1:])
    return Screen(title, report.warnings, [[Table(scores, models)], [beside], [_classes(report)], confused], lines)


def _classes(report: EvaluationReport) -> Table:
    """Return how many images of each class are right; a row holds the class as each model has it."""
    classes = [() if model.classifier is None else model.classifier.classes for model in report.models]
    rows: Sequence[tuple[ClassRow, ...]] = list(zip(*classes, strict=True))
    title = "Class"
    if len(rows) > _CLASSES_SHOWN:
        title = f"Worst {_CLASSES_SHOWN} of {len(rows)} classes"
        # A class without images is the last to be shown.
        rows = sorted(rows, key=lambda row: row[0].right / row[0].images if row[0].images else 2.0)[:_CLASSES_SHOWN]
    columns = [Column(title, lambda row: row[0].name, side="fold"), Column("images", lambda row: row[0].images)]
    for number in range(len(report.models)):
        heading = f"{number + 1}" if len(report.models) > 1 else "right"
        columns.append(Column(heading, itemgetter(number), lambda row: fmt.share(row.right, row.images)))
    return Table(columns, rows)


def comparison_view(comparison: Comparison, width: int | None) -> Screen:
    """Return a row for each model, and the fine print below."""
    models, first, timing = comparison.models, comparison.models[0], comparison.timing
    wide = width is None or width >= WIDE
    scores = list({score.name: score for row in models for score in row.scores}.values())
    columns = [
        Column("Model", "model", side="fold", code=True),
        Column("MACs", "cost.macs", fmt.count),
        Column("of 1st", lambda row: fmt.share(row.cost.macs, first.cost.macs), least=WIDE),
        Column("Params", "cost.params", fmt.count),
        Column("of 1st", lambda row: fmt.share(row.cost.params, first.cost.params), least=WIDE),
        Column("Weights", "weights_bytes", fmt.size, least=WIDE),
    ]
    if any(row.file_bytes is not None for row in models):
        columns.append(Column("File", "file_bytes", fmt.size))
    if timing is not None:
        columns += [
            Column("ms", "latency.minimum", fmt.milliseconds),
            Column("Median", "latency.median", fmt.milliseconds, least=WIDE),
            Column("of 1st", lambda row: fmt.time_share(row.latency_ratio, row is first), least=WIDE),
        ]
    columns.append(Column("Output", "gap.relative", fmt.error))
    if any(row.gap is not None and row.gap.agreement is not None for row in models):
        columns.append(Column("Agree", "gap.agreement", fmt.percent, least=WIDE))
    # There is hardly room for top-5; its change is in the fine print.
    columns += [score_column(score, least=130 if score.name == "top-5" else 0) for score in scores]
    # Twelve columns of figures leave the names of the models too little with two blanks between them.
    table = Table(columns, models, gap=1 if wide else 2)
    lines = [f"Output: relative difference from {first.model}'s, on {comparison.outputs_on}."]
    if timing is not None:
        lines.append(
            f"ms: one forward pass, {fmt.setting(timing)} of {timing.machine}; all models in turn, "
            f"{timing.rounds} rounds at most, their minimum." + " Of 1st: the median of the rounds' ratios." * wide
        )
        lines += fmt.doubts(first.model, ((row.model, row.latency_ratio) for row in models[1:]))
    if comparison.data is not None:
        of_them = f", {comparison.images:,} of them" if comparison.images else ""
        lines.append(f"{fmt.measured_on(scores, comparison.data)}{of_them}.")
    for row in models[1:]:
        compared = [f"{one.name} {score_column(one, change=True).text(row)}" for one in first.scores]
        lines += [f"{row.model} beside the first: {', '.join(compared)}."] if row.scores else []
        if row.against_first is not None:
            lines.append(
                f"{row.model} alone is right on {row.against_first.only_this} images, {first.model} alone on "
                f"{row.against_first.only_first} (McNemar's exact test: p = {row.against_first.p:.2g})."
            )
    if len({row.input for row in models}) > 1:
        lines.append("Inputs: " + ", ".join(f"{row.model} {row.input}" for row in models) + ".")
    lines += fmt.fed_by_model((row.model, row.fed) for row in models)
    lines += [f"{row.model}: {note}." for row in models for note in row.notes]
    left = " Of 1st: what is left of the first model's." * wide
    lines.append(f"MACs of one forward pass, batch 1; FLOPs are 2 x MACs.{left}")
    return Screen("", comparison.warnings, [[table]], lines, width)


def training_view(report: TrainingReport, width: int | None = None) -> Screen:
    """Return scores before and after, what was trained on what, and the files."""
    kept = f"those of epoch {report.best_epoch} kept" if report.best is not None else "the last weights kept"
    scores = [one for one in (report.before, report.best, report.last) if one is not None]
    names = sorted(report.before or (), key=lambda name: name == "loss")
    rows = [(_NAMES.get(name, name), *(_score(name, one[name]) for one in scores)) for name in names]
    images = "on validation images" if report.before is None or "top1" in report.before else "validation"
    titles = (images, "before", "kept", "last epoch")
    columns = [Column(title, itemgetter(n), side="right" if n else "left") for n, title in enumerate(titles)]
    settings = report.settings
    batch = "batches of the data" if settings["batch_size"] is None else f"batch {settings['batch_size']}"
    how = "by" if "evaluate" in settings else "on"
    lines = [
        f"Trained on {report.data}.",
        f"Validated {how} {report.validation}." if report.validation else "Not validated.",
        f"{settings['optimizer']}, learning rate {settings['lr']:g}, {batch}, "
        f"{settings['precision']}, on {report.device}; {fmt.count(report.trained)} of {fmt.count(report.total)} "
        f"parameters trained; seed {settings['seed']}.",
        "" if report.teacher is None else f"Taught by {report.teacher}.",
        *fmt.fed_by_model([(report.model, report.fed)]),
        *map(fmt.sentence, report.notes),
        *(f"{file.path}: {fmt.size(file.bytes)}." for file in report.files),
        f"Time: {report.seconds:.1f} s.",
    ]
    length = f"{fmt.plural(report.epochs, 'epoch')}, {fmt.plural(report.steps, 'step')}"
    title = f"{report.model}: trained for {length}; {kept}"
    return Screen(title, report.warnings, [[Table(columns, rows)]], lines, width)


def _score(name: str, value: float) -> str:
    return fmt.score(value, "%") if name in _NAMES else f"{value:.4f}" if name == "loss" else f"{value:.4g}"


def validation_words(scores: Mapping[str, float], loss: bool = False) -> str:
    """Return the scores of a validation: of classes top-1, with `loss` the loss too; else all of them."""
    if "top1" in scores:
        return _score("top1", scores["top1"]) + (f", loss {_score('loss', scores['loss'])}" if loss else "")
    return ", ".join(f"{name} {_score(name, value)}" for name, value in scores.items())


def epoch_line(row: EpochRow, epochs: int) -> str:
    """Return one epoch as a line of 80 columns."""
    top1 = f", top-1 {100 * row.train['top1']:.1f} %" if "top1" in row.train else ""
    parts = [f"epoch {row.epoch}/{epochs}: loss {row.train['loss']:.4f}{top1}"]
    parts += [] if row.validation is None else [f"validation {validation_words(row.validation)}{' (best)' * row.best}"]
    parts += [f"{row.images_per_second:.0f} {row.unit}/s", f"{row.skipped} unreadable skipped" if row.skipped else ""]
    return "; ".join(filter(None, parts))


def step_words(row: StepRow) -> str:
    """Return how the epoch goes, in a few words."""
    top1 = f"top-1 {100 * row.train['top1']:.1f} %  " if "top1" in row.train else ""
    unit = "img" if row.unit == "images" else row.unit
    return f"loss {row.train['loss']:.3f}  {top1}{row.images_per_second:.0f} {unit}/s"


def fusion_view(report: FusionReport, width: int | None = None) -> Screen:
    """Return what was fused, what was left and why, and how the outputs compare."""
    before, after = report.before, report.after
    costs = [Change("MACs", before.macs, after.macs), Change("parameters", before.params, after.params)]
    outcomes = Counter((row.kind, row.outcome) for row in report.sites)
    reasons = Counter((row.outcome, row.reason) for row in report.sites if row.reason)
    done = [f"{number} {kind}: {outcome}" for (kind, outcome), number in sorted(outcomes.items())]
    done += [f"  {outcome}, {number} x: {reason}" for (outcome, reason), number in reasons.most_common()]
    fits = "fits" if report.as_original else "does not fit"
    lines = [
        f"Outputs: {fmt.error(report.relative)} relative difference, {report.largest:.3g} at most, on {report.probe}.",
        f"The state dict {fits} {report.origin} as it was before it was converted.",
        *fmt.fed_by_model([(report.model, report.fed)]),
        *(f"{file.path}: {fmt.size(file.bytes)}." for file in report.files),
    ]
    fused = sum(row.outcome != "left" for row in report.sites)
    title = f"{report.model}: {fused} of {len(report.sites)} replacements fused"
    return Screen(title, report.warnings, [[changes(costs)], done], lines, width)


def export_view(report: ExportReport, width: int | None = None) -> Screen:
    """Return the file, which of its sizes may vary, and the differences from PyTorch."""
    compared = "against PyTorch" if report.int8 is None else "before, in float"
    known = [
        ("form", report.form + (f", opset {report.opset}" if report.opset is not None else "")),
        ("any size", ", ".join(report.dynamic) or "none"),
        ("fused before", f"{report.fused} replacements"),
        ("run by", ", ".join((report.runner, *report.versions))),
        *((compared, f"{check.largest:.1e} at most on {check.inputs}") for check in report.checks),
        *([] if report.int8 is None else [("rotated before", f"{report.rotated} pairs, for int8")]),
        *(("written", f"{file.path} ({fmt.size(file.bytes)})") for file in report.files),
    ]
    lines = [f"In int8. {line}" for line in agreement_lines(report.int8, "the model")]
    return Screen(f"{report.model} exported", report.warnings, [lines, [facts(known)]], width=width)


def plan_view(plan: Plan, width: int | None = None) -> Screen:
    """Return the swaps of a plan, and what it keeps and why."""
    columns = (
        Column("Layer", "site", side="fold"),
        Column("Kind", "kind", side="left"),
        Column("Settings", "settings", fmt.settings, side="left"),
    )
    title, kept = f"{len(plan.swaps)} convs swapped, {len(plan.keeps)} kept", kept_lines(plan.keeps)
    blocks = [Table(columns, plan.swaps)], ["Kept: " + "; ".join(kept)] if kept else []
    return Screen(title, (), blocks, width=width)


def show_view(path: str, header: Any) -> Screen:
    """Return how a checkpoint was made; raises CheckpointError or Python's errors for a provenance that is damaged."""
    made, origin = read_provenance(header.provenance, path), header.origin
    texts = {key: str(value) for key, value in origin.arguments.items()}
    # A whole yaml or config is an argument, too.
    arguments = ", ".join(f"{key}={text if len(text) <= 60 else '…'}" for key, text in texts.items())
    known = [
        ("built from", origin.reference + (f" ({arguments})" if arguments else "")),
        ("input", fmt.fed(fed(header.preprocessing))),
    ]
    figures = []
    if "report" in header.provenance:
        report = read_report(header.provenance, path)
        known += [
            ("converted from", report.model.reference),
            ("weights", report.model.weights),
            ("source SHA-256", report.model.sha256 or ""),
            ("recipe", report.recipe + (f", budget {report.budget}" if report.budget else "")),
            ("output change", f"{fmt.error(report.output.relative)} on {report.output.probe}"),
        ]
        figures = [changes(headline(report))]
    known.append(("versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())))
    blocks: list[Sequence[str | Text | Table]] = [[facts(known)], figures]
    for number, plan in enumerate(map(plan_view, header.plans), start=1):
        blocks += [[f"Conversion {number}: {plan.title}"], plan.blocks[0]]
    if made.fused:
        done = sum(row.outcome != "left" for row in made.fused)
        blocks += [[f"Fused: {done} of {len(made.fused)} replacements"], [fusion_table(made.fused)]]
    for number, record in enumerate(made.training, start=1):
        length = f"{fmt.plural(record.epochs, 'epoch')} ({fmt.plural(record.steps, 'step')})"
        text = f"Training {number}: {length} on {record.data}" + f", taught by {record.teacher}" * bool(record.teacher)
        before, best = record.scores.get("before"), record.scores.get("best")
        if before and best:
            name = "top1" if "top1" in before else next(iter(before))
            change = f"{_NAMES.get(name, name)} {_score(name, before[name])} -> {_score(name, best[name])}"
            text += f"; validation {change} (epoch {record.best_epoch})"
        blocks.append([text])
    return Screen(path, size_warning(header.preprocessing), blocks)
