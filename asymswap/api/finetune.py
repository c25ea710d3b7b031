"""The verb `finetune`: open the model, the data and the teacher, check that they fit, train, keep what is best."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymswap.api.progress import shows_progress
from asymswap.api.session import check_finite
from asymswap.checkpoint import Header, check_suffix
from asymswap.data.batches import presets_for
from asymswap.data.datasets import Parts, open_parts
from asymswap.data.normalization import settle
from asymswap.data.predict import check_class_names, check_classifier, known_classes
from asymswap.fileformats import extra_state
from asymswap.fileformats.state_dict import load_state_
from asymswap.models.opening import Model, base_of, open_for_verb, save_checkpoint, versions
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.results.convert import FileRow
from asymswap.results.finetune import TrainingRecord, TrainingReport
from asymswap.results.records import plain, read_history
from asymswap.training.config import Callback, Training
from asymswap.training.distillation import Objective, find_teacher
from asymswap.training.run_folder import RunFolder, check_folder
from asymswap.training.trainer import Progress, Trainer
from asymswap.types import Shown
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.files import check_output
from asymswap.utils.tensors import deep_copy


@dataclass
class FineTuned(Shown):
    """The fine-tuned model, in eval mode, with the report and the header for its checkpoint."""

    model: nn.Module
    report: TrainingReport
    header: Header
    base: nn.Module | None = None


@shows_progress
def finetune(
    model: Model,
    data: str,
    training: Training | None = None,
    *,
    output: str | Path | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    input_size: tuple[int, ...] | None = None,
    preprocessing: PreprocessingOptions | None = None,
    team: Team = ALONE,
    callback: Callback | None = None,
    progress: Any = True,
) -> FineTuned:
    """Train a converted model, or any other classifier, on a data reference; the given model is not changed.

    `output` is the checkpoint that is written at the end, `run` the folder of what is needed to go on after an
    interruption, by default beside it; with neither nothing is written. `resume` goes on where a run is, and begins
    where there is none. In a `team` all processes must call alike. `callback` sees the run instead of the person at the
    terminal or notebook, to whom nothing is shown without `progress`. Raises AsymswapError, with a one-line reason, for
    what cannot be done.
    """
    start, settings = time.perf_counter(), training or Training()
    target = None if output is None else Path(output)
    place = Path(run) if run is not None else None if target is None else target.with_suffix(".run")
    folder = None if place is None else RunFolder(place)
    if folder is not None:
        team.first(lambda: _check_places(target, folder, resume, force))
    opened = open_for_verb(model, input_size=input_size, preprocessing=preprocessing)
    if not opened.may_share:
        opened = replace(opened, model=deep_copy(opened.model).eval())
    check_finite(opened, "trained")
    if download:
        # The first process alone downloads, which settling and opening the parts then find.
        team.first(lambda: settle(opened, data, "train", download=True))
    opened, feeding = settle(opened, data, "train")

    def images(download: bool) -> Parts:
        return open_parts(data, opened.preprocessing, settings.validation, settings.seed, download=download)

    if download:
        team.first(lambda: len(images(download=True).train))
    parts = images(download=False)
    check_class_names(known_classes(read_history(opened.provenance, opened.reference), opened.origin), parts.train)
    classes = check_classifier(opened.model, parts.train, exact=True)
    if settings.workers is None:
        # None for images in memory, else one for each core but one.
        settings = replace(
            settings, workers=0 if parts.train.pictures.ready else max(1, min(4, (os.cpu_count() or 1) - 1))
        )
    teacher = None
    if settings.distill is not None:
        beside = None if opened.file is None else opened.file.parent
        teacher = find_teacher(opened.header(), settings.distill, opened.model, beside)
    presets = presets_for(data) if settings.augment is None else settings.augment
    about = {"data": data, "images": len(parts.train), "checkpoint": opened.sha256, "processes": team.size}
    identity = settings.identity() | {"augment": list(presets)} | about

    def described(progress: Progress) -> dict[str, Any]:
        """Return what the report and the checkpoint both say of the run so far."""
        return {
            "model": opened.reference,
            "data": parts.train.description,
            "validation": None if parts.validation is None else parts.validation.description,
            "classes": parts.train.classes,
            "settings": identity,
            "teacher": None if teacher is None else teacher.description,
            "epochs": progress.epoch,
            "steps": progress.step,
            "best_epoch": progress.best_epoch,
        }

    def header(progress: Progress) -> Header:
        """Return the checkpoint's header with this training; without times, so that equal runs are equal."""
        record = TrainingRecord(
            **described(progress),
            sha256=opened.sha256,
            scores={"before": progress.before, "best": progress.best, "last": progress.last},
            versions=versions(opened.origin),
        )
        trainings = [*opened.provenance.get("training", []), plain(record)]
        return replace(opened.header(), provenance={**opened.provenance, "training": trainings})

    def write(path: Path, trained: nn.Module, progress: Progress) -> None:
        save_checkpoint(path, _with_weights(opened.model, trained.state_dict()), header(progress))

    trainable = deep_copy(opened.model)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in trainable.parameters()):
        # Small steps vanish in weights of half precision.
        trainable = trainable.float()
    trainer = Trainer(
        model=trainable,
        parts=parts,
        settings=settings,
        presets=presets,
        objective=Objective(settings, teacher),
        replacements=[swap.site for plan in opened.plans for swap in plan.swaps],
        classes=classes,
        identity=identity,
        team=team,
        folder=folder,
        callback=callback or Callback(),
        write=write,
    )
    if folder is not None and force and not resume:
        # Not sooner: this run may begin with the old one, and its settings may be impossible.
        team.first(folder.clear)
    progress = trainer.run(resume)
    assert trainer.best is not None
    result = _with_weights(opened.model, trainer.best)
    files: list[Path] = []
    if target is not None:
        team.first(lambda: save_checkpoint(target, result, header(progress)))
        files = [path for path in (target, folder.last if folder else target) if path.exists()]
    parameters = list(trainer.raw.parameters())
    report = TrainingReport(
        **described(progress),
        before=progress.before,
        best=progress.best,
        last=progress.last,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        device=str(trainer.accelerator.device),
        files=tuple(FileRow(str(path), path.stat().st_size) for path in dict.fromkeys(files)),
        notes=tuple(_notes(trainer)),
        seconds=time.perf_counter() - start,
        fed=feeding.fed,
        warnings=feeding.warnings,
    )
    return FineTuned(result, report, header(progress), base_of(opened))


def _check_places(target: Path | None, folder: RunFolder, resume: bool, force: bool) -> None:
    """Raise AsymswapError where something would be overwritten without leave."""
    if target is not None:
        check_suffix(target)
        # A finished run that is resumed writes its result again.
        check_output(target, force or (resume and folder.exists))
    check_folder(folder, resume, force)


def _with_weights(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Return a copy of the model, in eval mode, with these weights in its own dtypes and formats."""
    result = deep_copy(model).eval()
    own = result.state_dict()
    extra = extra_state.owners(result).keys()
    load_state_(result, {key: state[key].detach().to(value) for key, value in own.items() if key not in extra})
    extra_state.load_(result, {key: state[key] for key in extra})
    return result


def _notes(trainer: Trainer) -> Iterator[str]:
    progress = trainer.progress
    if trainer.note:
        yield trainer.note
    if progress.skipped_in_all:
        yield f"{progress.skipped_in_all} times an image could not be read and another was used instead"
    if progress.before is not None and progress.best is not None and progress.best.top1 < progress.before.top1:
        yield "no epoch was better than the initial weights: try a smaller `lr=…`, or more epochs"
    if progress.step < trainer.steps:
        yield f"stopped early: no better epoch since epoch {progress.best_epoch}"
