"""The verb `finetune`: open the model, the data and the teacher, check that they fit, train, keep what is best."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from asymswap import replacements
from asymswap.api.progress import Shows, shows_progress
from asymswap.api.session import check_finite
from asymswap.checkpoint import Header, check_suffix
from asymswap.data import batches
from asymswap.data.datasets import LabelledImages, image_transform, open_parts, own_samples
from asymswap.data.metrics import EvaluatedBy, check_class_names, check_classifier, known_classes
from asymswap.data.normalization import settle
from asymswap.errors import AsymswapError
from asymswap.fileformats import extra_state
from asymswap.fileformats.state_dict import load_state_
from asymswap.models.converted import base_of, save_checkpoint, versions
from asymswap.models.opened import OpenedModel
from asymswap.models.opening import Made, Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.results.convert import FileRow
from asymswap.results.finetune import TrainingRecord, TrainingReport
from asymswap.results.records import plain
from asymswap.training.config import Callback, Training
from asymswap.training.distillation import ORIGINAL, find_teacher, given_original
from asymswap.training.objective import Objective, Validator, by_labels, by_loss, by_user
from asymswap.training.run_folder import RunFolder, check_folder
from asymswap.training.trainer import Progress, Trainer
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.files import check_output
from asymswap.utils.inputs import output_of
from asymswap.utils.tensors import deep_copy


@dataclass
class FineTuned(Made):
    """The fine-tuned model, in eval mode, with the report and the header for its checkpoint."""

    report: TrainingReport


@dataclass(frozen=True)
class _Material:
    """What is trained on and validated by, and what the records say of it."""

    source: batches.Source
    held_back: LabelledImages | batches.Source | None
    data: str
    validation: str | None = None
    classes: tuple[str, ...] = ()  # whose labels a classifier learns; without them it learns something else
    presets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@shows_progress
def finetune(
    model: Model,
    data: Any,
    training: Training | None = None,
    *,
    inputs: Callable[[Any], Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    evaluate: EvaluatedBy | None = None,
    teacher: Model | None = None,
    output: str | Path | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    input_size: tuple[int, ...] | None = None,
    preprocessing: PreprocessingOptions | None = None,
    team: Team = ALONE,
    callback: Callback | None = None,
    progress: Shows = True,
) -> FineTuned:
    """Train a converted model, or any other network; the given model is not changed.

    - `data`: a data reference; a Dataset or a tensor of inputs; a DataLoader, any other iterable of batches that can be
      read again, or a function that returns one. A classifier learns the labels of a data reference without more;
    - `inputs(batch)`: the forward's arguments, as a tensor, a tuple, or a dict by their names. By default a tensor is
      the input, of a pair (inputs, labels) the first, and of a dict the entries that the forward has;
    - `loss(outputs, batch)`: what to minimise, a scalar tensor. Without it, and without labels, the outputs of the
      teacher, `Training(distill=…)`, are learned;
    - `evaluate(model)`: validates, in eval mode: a number, or a dict of them. The first decides which epoch is the
      best. Higher is better; `asymswap.Metric(function, lower_is_better=…)` says otherwise;
    - `teacher`: a model to learn from in place of what `Training(distill=…)` names. Its `original` is also the module
      that `convert` got;
    - `output`: the checkpoint that is written at the end; `run`: the folder of what is needed to go on after an
      interruption, by default beside it; with neither nothing is written;
    - `resume`: go on where a run is, and begin where there is none.

    Batches of your own are read in order: every reading must give the same ones for the same state of the random
    generators, which are seeded before each batch. An interrupted run reads on from the start of its epoch. In a `team`
    all processes must call alike. `callback` sees the run in place of the person at the terminal or notebook, to whom
    nothing is shown without `progress`. Raises AsymswapError, with a one-line reason, for what cannot be done.
    """
    start, settings = time.perf_counter(), training or Training()
    if teacher is not None and settings.distill is None:
        settings = replace(settings, distill=ORIGINAL)
    target = None if output is None else Path(output)
    place = Path(run) if run is not None else None if target is None else target.with_suffix(".run")
    folder = None if place is None else RunFolder(place)

    def check_places() -> None:
        if target is not None:
            check_suffix(target)
            # A finished run that is resumed writes its result again.
            check_output(target, force or (resume and folder is not None and folder.exists))
        if folder is not None:
            check_folder(folder, resume, force)

    team.first(check_places)
    opened = open_for_verb(model, input_size=input_size, preprocessing=preprocessing)
    if not opened.may_share:
        opened = replace(opened, model=deep_copy(opened.model).eval())
    check_finite(opened, "trained")
    if evaluate is not None and settings.validation is not None:
        raise AsymswapError(f"give either `evaluate=…` or `validation={settings.validation}`")
    held_back = settings.validation if evaluate is None else "none"
    if isinstance(data, str | Path):
        data = str(data)
        if download:
            # The first process alone downloads, which settling and opening the parts then find.
            known, seed = opened.preprocessing, settings.seed
            team.first(lambda: len(open_parts(data, known, held_back, seed, download=True)[0]))
        opened = settle(opened, data, "train")
    if isinstance(data, str | torch.Tensor | Dataset) and not isinstance(data, IterableDataset):
        settings, material = _samples(opened, data, settings, held_back, loss is not None, team)
    else:
        material = _batches(data, settings, held_back, team)
    if material.classes and inputs is not None:
        raise AsymswapError("`inputs=…` is for a loss of yours or a teacher; a classifier's input is the image")
    if loss is None and settings.distill is None and not material.classes:
        raise AsymswapError(
            f"nothing says what to learn from {material.data}: give `loss=…`, a function of the outputs and the batch, "
            "or a teacher, `distill=…`"
        )
    if teacher is None and settings.distill == ORIGINAL:
        teacher = given_original(opened)
    named = settings.distill if teacher is None else teacher
    beside = None if opened.file is None else opened.file.parent
    taught = None if named is None else find_teacher(opened.header(), named, opened.model, beside)
    identity = settings.identity() | {"augment": list(material.presets)}
    identity |= {"data": data if isinstance(data, str) else material.data, "images": material.source.count}
    identity |= {"checkpoint": opened.sha256, "processes": team.size}
    for name, function in {"inputs": inputs, "loss": loss, "evaluate": evaluate}.items():
        if function is not None:
            identity[name] = getattr(function, "name", getattr(function, "__qualname__", type(function).__name__))
    if material.source.unit == "batches":
        identity["batch_size"] = None

    def described(progress: Progress) -> dict[str, Any]:
        """Return what the report and the checkpoint both say of the run so far."""
        return {
            "model": opened.reference,
            "data": material.data,
            "validation": material.validation if evaluate is None else f"{identity['evaluate']}(model)",
            "classes": material.classes or known_classes(opened),
            "settings": identity,
            "teacher": None if taught is None else taught.description,
            "epochs": progress.epoch,
            "steps": progress.step,
            "best_epoch": progress.best_epoch,
        }

    def header(progress: Progress) -> Header:
        # Without times, so that equal runs are equal.
        record = TrainingRecord(
            **described(progress),
            sha256=opened.sha256,
            scores={"before": progress.before, "best": progress.best, "last": progress.last},
            versions=versions(opened.origin),
        )
        trainings = [*opened.provenance.get("training", []), plain(record)]
        return replace(opened.header(), provenance={**opened.provenance, "training": trainings})

    mix = batches.mixing(material.presets, len(material.classes)) if material.classes else None
    objective = Objective(settings, taught, bool(material.classes), mix, inputs, loss)
    validator: Validator | None = None
    if evaluate is not None:
        validator = by_user(evaluate, team, settings.seed)
    elif isinstance(material.held_back, LabelledImages):
        validator = by_labels(material.held_back, settings, team)
    elif material.held_back is not None:
        validator = by_loss(objective, material.held_back, team)
    if validator is None and settings.patience is not None:
        raise AsymswapError(
            f"`patience={settings.patience}` needs a validation: give `evaluate=…`, a function of the model"
        )
    trainable = deep_copy(opened.model)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in trainable.parameters()):
        # Small steps vanish in weights of half precision.
        trainable = trainable.float()
    trainer = Trainer(
        model=trainable,
        source=material.source,
        settings=settings,
        objective=objective,
        validator=validator,
        replacements=_added(opened),
        identity=identity,
        team=team,
        folder=folder,
        callback=callback or Callback(),
        write=lambda path, trained, progress: save_checkpoint(
            path, _with_weights(opened.model, trained.state_dict()), header(progress)
        ),
        device=opened.device,
    )
    if folder is not None and force and not resume:
        # Not sooner: this run may begin with the old one, and its settings may be impossible.
        team.first(folder.clear)
    progress = trainer.run(resume)
    assert trainer.best is not None
    result = _with_weights(opened.model, trainer.best)
    if target is not None:
        team.first(lambda: save_checkpoint(target, result, header(progress)))
    files = [path for path in (target, folder.last) if path.exists()] if target and folder else []
    notes = [*material.notes, *trainer.notes]
    if progress.skipped_in_all:
        notes.append(f"{progress.skipped_in_all} times an image could not be read and another was used instead")
    before, best = progress.before, progress.best
    if before and best and validator is not None and validator.rank(best)[0] < validator.rank(before)[0]:
        notes.append("no epoch was better than the initial weights: try a smaller `lr=…`, or more epochs")
    if progress.step < trainer.steps:
        notes.append(f"stopped early: no better epoch since epoch {progress.best_epoch}")
    parameters = list(trainer.raw.parameters())
    report = TrainingReport(
        **described(progress),
        before=before,
        best=best,
        last=progress.last,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        device=str(trainer.accelerator.device),
        files=tuple(FileRow(str(path), path.stat().st_size) for path in files),
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
        fed=opened.fed,
        warnings=opened.fed_warnings,
    )
    return FineTuned(result, report, header(progress), base_of(opened))


def _added(opened: OpenedModel) -> list[str]:
    """Return the modules that conversions have added."""
    swaps = [swap for plan in opened.plans for swap in plan.swaps]
    parts = [(swap.site, replacements.load(swap.kind).added(opened.model.get_submodule(swap.site))) for swap in swaps]
    return [f"{site}.{part}".removesuffix(".") for site, some in parts for part in some]


def _samples(
    opened: OpenedModel, data: Any, settings: Training, validation: str | None, own_loss: bool, team: Team
) -> tuple[Training, _Material]:
    """Open images, with labels for a classifier alone, or samples of the user's, which are taken as they are."""
    distills, named = settings.distill is not None, isinstance(data, str)
    if not named:
        _check_plain(settings, ("augment", "label_smoothing", "strict"))
        data = own_samples(data, opened.preprocessing)

    images = partial(open_parts, data, opened.preprocessing, validation, settings.seed)
    train, held = images(unlabelled=distills or own_loss)
    labels = not own_loss and bool(train.classes)
    if labels and distills:
        # They are learned where the model gives class scores for an image.
        known = opened.preprocessing
        output = output_of(opened.model, (torch.zeros(1, known.channels, *known.size),))
        labels = isinstance(output, torch.Tensor) and output.ndim == 2
    if labels:
        images(unlabelled=False)  # which checks the classes
        check_class_names(known_classes(opened), train)
        check_classifier(opened.model, train, exact=True)
    if settings.workers is None:
        # None for images in memory, else one for each core but one.
        settings = replace(settings, workers=0 if train.ready else max(1, min(4, (os.cpu_count() or 1) - 1)))
    given = settings.augment
    presets = (batches.presets_for(data) if given is None else batches.parse_presets(given)) if named else ()
    mixed = [name for name in presets if name in batches.MIXES]
    if mixed and not labels:
        raise AsymswapError(f"`augment={mixed[0]}` mixes class labels, which are not learned here; leave it out")

    def source(images: LabelledImages, transform: Any, batch: int, accumulate: int, team: Team) -> batches.Source:
        dtype = torch.promote_types(opened.dtype(), torch.float32) if named else None
        transform = transform if named else nn.Identity()
        made = batches.TrainingImages(images, transform, settings.seed, settings.strict or not named, dtype)
        return batches.Reader(made, batch, accumulate, team, settings.workers or 0)

    prepared = train.preprocessing
    return settings, _Material(
        source(train, batches.training_transform(prepared, presets), settings.batch, settings.accumulate, team),
        held if held is None or labels else source(held, image_transform(prepared), 2 * settings.batch, 1, ALONE),
        train.description,
        None if held is None else held.description,
        train.classes if labels else (),
        presets,
    )


def _batches(data: Any, settings: Training, validation: str | None, team: Team) -> _Material:
    """Open batches of the user's, which are taken as they are."""
    _check_plain(settings, ("augment", "label_smoothing", "strict", "batch_size", "workers"))
    if validation not in (None, "none", "0"):
        raise AsymswapError(
            f"`validation={validation}` would hold back batches, which may share samples with others; give a Dataset, "
            "or `evaluate=…`"
        )
    given = batches.Batches(data, settings.accumulate, team, settings.seed, settings.steps)
    kept = "the last weights are kept: to keep the best give `evaluate=…`, or a Dataset to hold back from"
    number = "1 batch" if given.count == 1 else f"{given.count} batches"
    return _Material(given, None, f"{number} of a {given.name}", notes=(kept,) if validation is None else ())


def _check_plain(settings: Training, names: Sequence[str]) -> None:
    """Raise AsymswapError for a setting that data of the user's own leaves no room for."""
    for name in names:
        value = getattr(settings, name)
        if value:
            raise AsymswapError(f"`{name}={value}` changes nothing in data of your own: it is taken as it is")


def _with_weights(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Return a copy of the model, in eval mode, with these weights in its own dtypes and formats."""
    result = deep_copy(model).eval()
    own = result.state_dict()
    extra = extra_state.owners(result).keys()
    load_state_(result, {key: state[key].detach().to(value) for key, value in own.items() if key not in extra})
    extra_state.load_(result, {key: state[key] for key in extra})
    return result
