"""The verb `evaluate`: classifiers on labelled images, each by itself and beside the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from asymswap.data.classes import check_class_names, known_classes, published_classes
from asymswap.data.datasets import LabelledImages, open_data
from asymswap.data.normalization import Feeding, all_warnings, settle
from asymswap.data.predict import Predictions, predict
from asymswap.data.splits import open_parts
from asymswap.errors import AsymswapError, SourceError, check_choice
from asymswap.measure.statistics import mcnemar_exact, wilson_interval
from asymswap.models.opened import OpenedModel
from asymswap.models.opening import Model, open_for_verb
from asymswap.results.evaluate import AgainstFirst, ClassRow, ConfusionRow, EvaluationReport, ModelScores
from asymswap.results.provenance import read_history
from asymswap.types import Preprocessing, Progress, silent
from asymswap.utils.tensors import deep_copy

PARTS = ("test", "validation", "train")


def evaluate(
    models: Model | Sequence[Model],
    data: str,
    *,
    part: str = "test",
    validation: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    workers: int = 0,
    confusions: int = 10,
    strict: bool = False,
    download: bool = False,
    device: str | None = None,
    progress: Progress = silent,
) -> EvaluationReport:
    """Measure one classifier or several on the test, validation or train part of data.

    The validation part is the one that `finetune` holds back for the same `validation` and `seed`. Each model gets the
    images in its own preprocessing. Images that cannot be read are left out and counted, or an error with `strict`.
    Raises AsymswapError, with a one-line reason, for what cannot be done.
    """
    check_choice("--part", part, PARTS)
    if batch_size < 1 or confusions < 0 or workers < 0:
        raise AsymswapError("--batch-size must be above 0, --confusions and --workers at least 0")
    several = list(models) if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    if not several:
        raise AsymswapError("give at least one model to evaluate")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # All are opened, and checked, before the first is measured.
    opened = [open_for_verb(model, progress) for model in several]
    settled = [settle(one, data, "test" if part == "test" else "train", download) for one in opened]
    opened = [one for one, _ in settled]
    images = [_open(one.preprocessing, data, part, validation, seed, download) for one in opened]
    for one, mine in zip(opened, images, strict=True):
        _check_names(one, mine)
    found = []
    for number, (one, mine) in enumerate(zip(opened, images, strict=True), start=1):
        found.append(_predict(one, mine, place, batch_size, workers, strict, _told(progress, number, len(opened))))
    return _report(opened, images, [feeding for _, feeding in settled], found, confusions, batch_size, place)


def _told(progress: Progress, number: int, count: int) -> Any:
    stage = "evaluating" if count == 1 else f"evaluating {number} of {count}"
    return lambda done, total: progress(stage, done, total)


def _open(
    preprocessing: Preprocessing, data: str, part: str, validation: str | None, seed: int, download: bool
) -> LabelledImages:
    if part == "test" or (part == "train" and validation is None):
        name: Literal["train", "test"] = "test" if part == "test" else "train"
        return open_data(data, preprocessing, name, download=download)
    parts = open_parts(data, preprocessing, validation, seed, download=download)
    if part == "train":
        return parts.train
    if parts.validation is None:
        raise SourceError("--part validation needs images that are held back; leave out --validation none")
    return parts.validation


def _check_names(opened: OpenedModel, images: LabelledImages) -> None:
    known = known_classes(read_history(opened.provenance, opened.reference), opened.origin)
    check_class_names(known or published_classes(opened.origin.reference, opened.weights), images)


def _predict(
    opened: OpenedModel, images: LabelledImages, place: torch.device, batch: int, workers: int, strict: bool, told: Any
) -> Predictions:
    model = opened.model
    # A module of the caller's stays where it is.
    if opened.weights != "as given":
        model = (model if opened.handed_over else deep_copy(model)).to(place)
    try:
        return predict(model, images, batch_size=batch, workers=workers, strict=strict, progress=told)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise AsymswapError(
            f"not enough memory for --batch-size {batch}; try --batch-size {max(1, batch // 2)}"
        ) from None


def _report(
    opened: Sequence[OpenedModel],
    images: Sequence[LabelledImages],
    feedings: Sequence[Feeding],
    found: Sequence[Predictions],
    confusions: int,
    batch: int,
    place: torch.device,
) -> EvaluationReport:
    first = found[0]
    rows = []
    for one, mine, feeding, predictions in zip(opened, images, feedings, found, strict=True):
        against = None if predictions is first else _against(first, predictions)
        scores = _scores(one.reference, mine.classes, predictions, confusions, against)
        rows.append(replace(scores, fed=feeding.fed))
    notes = []
    for one, predictions in zip(opened, found, strict=True):
        if predictions.scores != len(images[0].classes):
            notes.append(
                f"the data has {len(images[0].classes)} classes, {one.reference} scores {predictions.scores}: "
                "do they agree?"
            )
        notes += _seen(one, images[0])
    return EvaluationReport(
        images[0].description,
        len(first),
        first.unreadable,
        batch,
        str(place),
        tuple(rows),
        tuple(dict.fromkeys(notes)),
        all_warnings(feedings),
    )


def _seen(opened: OpenedModel, images: LabelledImages) -> list[str]:
    """Say where a model was trained on images of this very description."""
    training = read_history(opened.provenance, opened.reference).training
    if not training or images.description not in training[-1].data or training[-1].validation == images.description:
        return []
    return [
        f"{opened.reference} was trained on images of the same place: its accuracy here is too good to be trusted "
        "(--part validation measures on those that were held back)"
    ]


def _scores(
    name: str, classes: Sequence[str], found: Predictions, confusions: int, against: AgainstFirst | None
) -> ModelScores:
    right = int((found.guesses == found.labels).sum())
    return ModelScores(
        model=name,
        top1=right / len(found),
        right=right,
        interval=wilson_interval(right, len(found)),
        top5=None if found.scores <= 5 else int((found.ranks < 5).sum()) / len(found),
        loss=float(found.losses.mean()),
        images_per_second=len(found) / found.seconds if found.seconds else 0.0,
        scores=found.scores,
        classes=_by_class(classes, found.labels, found.guesses),
        confusions=_most_confused(classes, found.labels, found.guesses, confusions),
        against_first=against,
    )


def _by_class(classes: Sequence[str], labels: Tensor, guesses: Tensor) -> tuple[ClassRow, ...]:
    images = torch.bincount(labels, minlength=len(classes)).tolist()
    right = torch.bincount(labels[guesses == labels], minlength=len(classes)).tolist()
    return tuple(ClassRow(*row) for row in zip(classes, images, right, strict=True))


def _most_confused(classes: Sequence[str], labels: Tensor, guesses: Tensor, most: int) -> tuple[ConfusionRow, ...]:
    wrong = guesses != labels
    pairs = Counter(zip(labels[wrong].tolist(), guesses[wrong].tolist(), strict=True))
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:most]
    return tuple(ConfusionRow(_class(classes, of), _class(classes, as_), count) for (of, as_), count in ranked)


def _class(classes: Sequence[str], number: int) -> str:
    return classes[number] if number < len(classes) else f"class {number}"


def _against(first: Predictions, other: Predictions) -> AgainstFirst:
    # The same data in the same order, so the same images are unreadable.
    assert torch.equal(first.numbers, other.numbers)
    one, two = first.guesses == first.labels, other.guesses == other.labels
    only_first, only_this = int((one & ~two).sum()), int((~one & two).sum())
    agreement = int((first.guesses == other.guesses).sum()) / len(first)
    return AgainstFirst(agreement, only_first, only_this, mcnemar_exact(only_first, only_this))
