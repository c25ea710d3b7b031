"""The verb `finetune`: open the model, the data and the teacher, check that they fit, train, keep what is best."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from asymswap.checkpoint import Header, check_suffix, read_checkpoint, told
from asymswap.data.augmentation import presets_for
from asymswap.data.classes import check_class_count, check_class_names, known_classes
from asymswap.data.normalization import feeding_of
from asymswap.data.splits import Parts, open_parts
from asymswap.errors import CheckpointError
from asymswap.fileformats import extra_state
from asymswap.fileformats.detect import sha256
from asymswap.fileformats.state_dict import load_state_
from asymswap.models.converted import restore, save_checkpoint, versions
from asymswap.models.opening import build_named, prepared, stored_preprocessing
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.models.references import Request, describe_module
from asymswap.results.convert import FileRow
from asymswap.results.finetune import TrainingReport
from asymswap.training.callbacks import Callback
from asymswap.training.config import Training
from asymswap.training.distillation import Objective, Teacher
from asymswap.training.run_folder import RunFolder, check_folder
from asymswap.training.teacher import find_teacher
from asymswap.training.trainer import Progress, Trainer, Work
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.files import check_output, fail_if_modified
from asymswap.utils.tensors import deep_copy, first_not_finite


class Converted(Protocol):
    """A conversion or a fusion."""

    model: nn.Module
    header: Header


@dataclass
class FineTuned:
    """The fine-tuned model, in eval mode, with the report and the header for its checkpoint."""

    model: nn.Module
    report: TrainingReport
    header: Header = field(repr=False)


def finetune(
    checkpoint: str | Path | nn.Module | Converted,
    data: str,
    training: Training | None = None,
    *,
    output: str | Path | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    model: nn.Module | None = None,
    arch: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    trust_code: bool = False,
    input_size: tuple[int, ...] | None = None,
    preprocessing: PreprocessingOptions | None = None,
    team: Team = ALONE,
    callback: Callback | None = None,
) -> FineTuned:
    """Train a converted model (a checkpoint, a conversion, or any classifier) on a data reference.

    `output` is the checkpoint that is written at the end, `run` the folder from which an interrupted run can be
    resumed, by default beside it (`tuned.run` beside `tuned.pt`); with neither nothing is written. Images are prepared
    as the checkpoint says, but for `input_size` (channels, height, width) and `preprocessing`. `resume` continues a
    run, and begins one where there is none. `model` (or `arch`) is the unconverted model where only you can build it.
    In a `team` all processes must call alike. Raises AsymswapError, with a one-line reason, for what cannot be done.
    """
    start, settings = time.perf_counter(), training or Training()
    target = None if output is None else Path(output)
    place = Path(run) if run is not None else None if target is None else target.with_suffix(".run")
    folder = None if place is None else RunFolder(place)
    if folder is not None:
        team.first(lambda: _check_places(target, folder, resume, force))
    opened = _open(checkpoint, model, Request(arch=arch, arguments=arguments or {}, trust_code=trust_code))
    takes = prepared(stored_preprocessing(opened.header), input_size, preprocessing)
    if download:
        team.first(lambda: feeding_of(opened.model, takes, data, "train", opened.label, download=True))
    feeding = feeding_of(opened.model, takes, data, "train", opened.label)
    opened = replace(opened, header=replace(opened.header, preprocessing=feeding.preprocessing))

    def open_data(download: bool) -> Parts:
        return open_parts(data, feeding.preprocessing, settings.validation, settings.seed, download=download)

    if download:
        team.first(lambda: len(open_data(download=True).train))
    parts = open_data(download=False)
    known = known_classes(told(opened.header.provenance, opened.label), opened.header.origin)
    check_class_names(known, parts.train)
    classes = check_class_count(opened.model, parts.train)
    if settings.workers is None:
        settings = replace(settings, workers=_workers(parts))
    teacher = None
    if settings.distill is not None:
        beside = Path(checkpoint).parent if isinstance(checkpoint, str | Path) else None
        teacher = find_teacher(opened.header, settings.distill, opened.model, beside)
    presets = presets_for(data) if settings.augment is None else settings.augment
    about = {"data": data, "images": len(parts.train), "checkpoint": opened.sha256, "processes": team.size}
    identity = settings.identity() | {"augment": list(presets)} | about

    def header(progress: Progress) -> Header:
        return _header(opened, parts, identity, teacher, progress)

    def write(path: Path, trained: nn.Module, progress: Progress) -> None:
        save_checkpoint(path, _with_weights(opened.model, trained.state_dict()), header(progress))

    work = Work(
        model=_trainable(opened.model),
        parts=parts,
        settings=settings,
        presets=presets,
        objective=Objective(settings, teacher),
        replacements=[swap.site for plan in opened.header.plans for swap in plan.swaps],
        classes=classes,
        identity=identity,
        team=team,
        folder=folder,
        callback=callback or Callback(),
        write=write,
    )
    trainer = Trainer(work)
    if folder is not None and force and not resume:
        # Not sooner: the run may be what this one begins with, and what is asked for may be impossible.
        team.first(folder.clear)
    progress = trainer.run(resume)
    assert trainer.best is not None
    result = _with_weights(opened.model, trainer.best)
    report = replace(_report(opened, identity, teacher, trainer), fed=feeding.fed, warnings=feeding.warnings)
    if target is not None:
        team.first(lambda: save_checkpoint(target, result, header(progress)))
        written = [path for path in (target, folder.last if folder else target) if path.exists()]
        report = replace(report, files=tuple(FileRow(str(p), p.stat().st_size) for p in dict.fromkeys(written)))
    return FineTuned(result, replace(report, seconds=time.perf_counter() - start), header(progress))


@dataclass(frozen=True)
class _Opened:
    """The model before it is trained, how it is stored, what it is called, and the SHA-256 of its file."""

    model: nn.Module
    header: Header
    label: str
    sha256: str | None = None


def _open(checkpoint: str | Path | nn.Module | Converted, base: nn.Module | None, request: Request) -> _Opened:
    if isinstance(checkpoint, str | Path):
        path = Path(checkpoint)
        with fail_if_modified(path):
            stored, digest = read_checkpoint(path), sha256(path)
        base = base if base is not None else build_named(stored.header.origin, request)
        found = _Opened(restore(stored, str(path), base), stored.header, str(path), digest)
    elif isinstance(checkpoint, nn.Module):
        source = describe_module(checkpoint, "as given")
        header = Header(source.origin, (), source.preprocessing, skeleton=source.skeleton)
        found = _Opened(deep_copy(checkpoint).eval(), header, type(checkpoint).__name__)
    else:
        label = checkpoint.header.origin.reference
        found = _Opened(deep_copy(checkpoint.model).eval(), checkpoint.header, label)
    broken = first_not_finite(found.model)
    if broken is not None:
        raise CheckpointError(
            f"{found.label} cannot be trained: {broken[0]!r} holds {broken[1]}; use another checkpoint"
        )
    return found


def _trainable(model: nn.Module) -> nn.Module:
    """Return a copy to train, in float32: small steps vanish in weights of half precision."""
    trained = deep_copy(model)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return trained.float() if half else trained


def _with_weights(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Return a copy of the model, in eval mode, with these weights in its own dtypes and formats."""
    result = deep_copy(model).eval()
    own = result.state_dict()
    extra = extra_state.owners(result).keys()
    load_state_(result, {key: state[key].detach().to(value) for key, value in own.items() if key not in extra})
    extra_state.load_(result, {key: state[key] for key in extra})
    return result


def _check_places(target: Path | None, folder: RunFolder, resume: bool, force: bool) -> None:
    """Raise AsymswapError where something would be overwritten without leave."""
    if target is not None:
        check_suffix(target)
        # A finished run that is resumed writes its result again.
        check_output(target, force or (resume and folder.exists))
    check_folder(folder, resume, force)


def _workers(parts: Parts) -> int:
    """Return how many processes read images: none for images in memory, else one per core but one, at most four."""
    ready = parts.train.pictures is not None and parts.train.pictures.ready
    return 0 if ready else max(1, min(4, (os.cpu_count() or 1) - 1))


def _header(
    opened: _Opened, parts: Parts, identity: Mapping[str, Any], teacher: Teacher | None, progress: Progress
) -> Header:
    """Return the header with this training in its provenance; without times, so that equal runs write equal files."""
    scores = {name: getattr(progress, name) for name in ("before", "best", "last")}
    record = {
        "model": opened.label,
        "sha256": opened.sha256,
        "data": parts.train.description,
        "validation": None if parts.validation is None else parts.validation.description,
        "classes": list(parts.train.classes),
        "teacher": None if teacher is None else teacher.description,
        "settings": dict(identity),
        "epochs": progress.epoch,
        "steps": progress.step,
        "best_epoch": progress.best_epoch,
        "scores": {name: None if found is None else asdict(found) for name, found in scores.items()},
        "versions": versions(opened.header.origin),
    }
    before = opened.header.provenance.get("training", [])
    return replace(opened.header, provenance={**opened.header.provenance, "training": [*before, record]})


def _report(opened: _Opened, identity: Mapping[str, Any], teacher: Teacher | None, trainer: Trainer) -> TrainingReport:
    progress, parts = trainer.progress, trainer.work.parts
    parameters = list(trainer.raw.parameters())
    notes = [trainer.note] if trainer.note else []
    if progress.skipped_in_all:
        notes.append(f"{progress.skipped_in_all} times an image could not be read and another stood in for it")
    if progress.before is not None and progress.best is not None and progress.best.top1 < progress.before.top1:
        notes.append("no epoch was as good as the weights that it began with: try a smaller --lr, or more epochs")
    if progress.step < trainer.steps:
        notes.append(f"stopped early: no better epoch since epoch {progress.best_epoch}")
    return TrainingReport(
        model=opened.label,
        data=parts.train.description,
        validation=None if parts.validation is None else parts.validation.description,
        classes=parts.train.classes,
        settings=identity,
        teacher=None if teacher is None else teacher.description,
        epochs=progress.epoch,
        steps=progress.step,
        best_epoch=progress.best_epoch,
        before=progress.before,
        best=progress.best,
        last=progress.last,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        device=str(trainer.accelerator.device),
        notes=tuple(notes),
    )
