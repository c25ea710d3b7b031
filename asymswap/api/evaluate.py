"""The verb `evaluate`: models on the same data, each by itself and beside the first."""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymswap.api.progress import Shows, shows_progress
from asymswap.calibration.agreement import Against
from asymswap.data import metrics
from asymswap.data.datasets import open_data, open_parts
from asymswap.data.normalization import settle
from asymswap.errors import AsymswapError, SourceError, check_choice
from asymswap.measure.statistics import mcnemar_exact, wilson_interval
from asymswap.models.opened import OpenedModel, input_warnings
from asymswap.models.opening import Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.results import evaluate as results
from asymswap.results.records import read_provenance
from asymswap.utils.tensors import device_of


@shows_progress
def evaluate(
    models: Model | Sequence[Model],
    data: Any,
    *,
    against_original: bool = False,
    crop_border: int = 0,
    part: str = "test",
    validation: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    workers: int = 0,
    confusions: int = 10,
    strict: bool = False,
    download: bool = False,
    input_size: tuple[int, ...] | None = None,
    preprocessing: PreprocessingOptions | None = None,
    progress: Shows = True,
) -> results.EvaluationReport:
    """Measure one model or several on `data`, which is what `asymswap.convert` takes as `evaluate`.

    With `against_original` no labels are needed: `data` is a `Calibration`, or what it takes as data, and each model is
    compared with the first on the inputs that a conversion on it holds back. Each model gets the images in its own
    preprocessing. For classifiers: `part` is test, validation (the one that `finetune` holds back for the same
    `validation` and `seed`) or train; images that cannot be read are left out and counted, or an error with `strict`.
    Raises AsymswapError, with a one-line reason, for what cannot be done.
    """
    check_choice("`part=…`", part, ("test", "validation", "train"))
    if batch_size < 1 or confusions < 0 or workers < 0:
        raise AsymswapError("`batch_size=…` must be above 0, `confusions=…` and `workers=…` at least 0")
    several = list(models) if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    if not several:
        raise AsymswapError("give at least one model to evaluate")
    # Open and check all before measuring the first.
    opened = [open_for_verb(model, progress, input_size, preprocessing=preprocessing) for model in several]
    if against_original and (part != "test" or crop_border):
        raise AsymswapError("`part=…` and `crop_border=…` are for data with labels; leave them out")
    opened, evaluators = settle_each(opened, data, against_original, part, download)
    for one in opened if not evaluators else ():
        if isinstance(data, str) and metrics.paired_kind(data) is None and not crop_border:
            if part == "validation" or (part == "train" and validation is not None):
                train, held_back = open_parts(data, one.preprocessing, validation, seed, download=download)
                mine = train if part == "train" else held_back
                if mine is None:
                    raise SourceError('`part="validation"` needs held-back images; leave out `validation="none"`')
            else:
                mine = open_data(data, one.preprocessing, "test" if part == "test" else "train", download=download)
            metrics.check_class_names(metrics.known_classes(one), mine)
            evaluators.append(metrics.Labelled(mine, batch_size=batch_size, workers=workers, strict=strict))
        elif part != "test":
            raise AsymswapError(f'`part="{part}"` is for labelled images; leave it out')
        else:
            evaluators.append(metrics.evaluator_of(data, one, crop_border))
    rows: list[results.ModelScores] = []
    notes: list[str] = []
    first: metrics.Predictions | None = None
    for one, evaluator in zip(opened, evaluators, strict=True):
        stage = "evaluating" if len(opened) == 1 else f"evaluating {len(rows) + 1} of {len(opened)}"
        step = functools.partial(progress, stage)
        try:
            if not isinstance(evaluator, metrics.Labelled):
                rows.append(results.ModelScores(one.reference, evaluator(one.model, step), fed=one.fed))
                metrics.check_same(rows[0].scores, rows[-1].scores)
                notes += [evaluator.note] if evaluator.note else []
                continue
            found = evaluator.predict(one.model, step)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise AsymswapError(
                f"not enough memory for `batch_size={batch_size}`; try `batch_size={max(1, batch_size // 2)}`"
            ) from None
        first = found if first is None else first
        # The same data in the same order, so the same images are unreadable.
        assert torch.equal(first.numbers, found.numbers)
        classes, labels, wrong = evaluator.data.classes, found.labels, found.guesses != found.labels
        images_by_class = torch.bincount(labels, minlength=len(classes)).tolist()
        right_by_class = torch.bincount(labels[~wrong], minlength=len(classes)).tolist()
        confused = Counter(zip(labels[wrong].tolist(), found.guesses[wrong].tolist(), strict=True))
        most_confused = sorted(confused.items(), key=lambda item: (-item[1], item[0]))[:confusions]
        # A model may score more classes than the data has.
        names = [*classes, *(f"class {number}" for number in range(len(classes), found.scores))]
        about = results.Classification(
            right=found.correct,
            interval=wilson_interval(found.correct, len(found)),
            loss=float(found.losses.mean()),
            images_per_second=len(found) / found.seconds if found.seconds else 0.0,
            outputs=found.scores,
            classes=tuple(results.ClassRow(*row) for row in zip(classes, images_by_class, right_by_class, strict=True)),
            confusions=tuple(results.ConfusionRow(names[of], names[as_], n) for (of, as_), n in most_confused),
            against_first=None if found is first else against_first(found.labels, first.guesses, found.guesses),
        )
        rows.append(results.ModelScores(one.reference, found.named, about, one.fed))
        if found.scores != evaluator.classes:
            notes.append(
                f"the data has {evaluator.classes} classes, {one.reference} scores {found.scores}: do they agree?"
            )
        training = read_provenance(one.provenance, one.reference).training
        description = evaluators[0].description
        if training and description in training[-1].data and training[-1].validation != description:
            notes.append(
                f"{one.reference} was trained on images of the same place: its accuracy here is too good to be trusted "
                '(`part="validation"` measures on the held-back ones)'
            )
    return results.EvaluationReport(
        data=evaluators[0].description,
        images=evaluators[0].images if first is None else len(first),
        unreadable=0 if first is None else first.unreadable,
        batch=batch_size,
        device=str(device_of(opened[0].model)),
        models=tuple(rows),
        notes=tuple(dict.fromkeys(notes)),
        warnings=input_warnings(*opened),
    )


def against_first(labels: Tensor, first: Tensor, other: Tensor) -> results.AgainstFirst:
    """Compare the guesses of two models on the same images, all class numbers."""
    right, also = first == labels, other == labels
    only_first, only_other = int((right & ~also).sum()), int((~right & also).sum())
    agreement = int((first == other).sum()) / len(labels)
    return results.AgainstFirst(agreement, only_first, only_other, mcnemar_exact(only_first, only_other))


def settle_each(
    opened: Sequence[OpenedModel], data: Any, against_original: bool, part: str = "test", download: bool = False
) -> tuple[list[OpenedModel], list[metrics.Evaluator]]:
    """Return models where they run, prepared for the data, and what compares each with the first if asked."""
    opened = [one.on_device(choose=against_original or isinstance(data, str)) for one in opened]
    if against_original:
        return Against.first_of(opened, data)
    if not isinstance(data, str):
        return opened, []
    return [settle(one, data, "test" if part == "test" else "train", download) for one in opened], []
