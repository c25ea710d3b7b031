"""The verb `compare`: what each model costs, as `benchmark` counts it, and how it differs from the first."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

import asymswap
from asymswap.api.benchmark import cost_row, time_in_turn
from asymswap.api.convert import state_bytes
from asymswap.api.evaluate import against_first, settle_each
from asymswap.api.progress import Shows, shows_progress
from asymswap.calibration.agreement import Against
from asymswap.data.datasets import open_data
from asymswap.data.metrics import Labelled, Predictions, check_same, evaluator_of, paired_kind
from asymswap.errors import AsymswapError, SourceError
from asymswap.measure.fidelity import Sums
from asymswap.measure.latency import machine
from asymswap.measure.runtimes import RUNTIMES
from asymswap.measure.timing import Timing
from asymswap.models.opened import OpenedModel, input_warnings
from asymswap.models.opening import Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.results.benchmark import Result
from asymswap.results.evaluate import ComparedRow, Comparison, OutputGap, Score, TimingRow
from asymswap.utils.inputs import Inputs, output_of, portions, samples_in
from asymswap.utils.tensors import list_tensors, map_tensors, seeded


@shows_progress
def compare(
    models: Sequence[Model],
    *,
    data: Any = None,
    against_original: bool = False,
    crop_border: int = 0,
    images: int | None = None,
    timing: Timing | None = None,
    seed: int = 0,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    preprocessing: PreprocessingOptions | None = None,
    progress: Shows = True,
) -> Comparison:
    """Compare two or more models: costs, latency, outputs and scores; none of them is changed.

    `data` is what `asymswap.convert` takes as `evaluate`, or with `against_original` inputs without labels, on which
    each model is compared with the first, as by `asymswap.evaluate`. Of labelled images `images` are taken. Outputs are
    compared on at most 32 of those or on the first batch of such inputs, each model with its own preprocessing, and
    otherwise on random inputs. Latency is measured by `timing`, if given. Raises AsymswapError for fewer than two
    models, or one that cannot be opened.
    """
    if (count := len(models) if isinstance(models, Sequence) and not isinstance(models, str) else 1) < 2:
        raise AsymswapError(f"compare takes two models or more, not {count}")
    if images is not None and images < 1:
        raise AsymswapError(f"`images={images}` leaves nothing to compare on; give 1 or more")
    opened = [open_for_verb(model, progress, input_size, example_inputs, preprocessing) for model in models]
    opened, evaluators = settle_each(opened, data, against_original)
    total, outputs_on = None, f"{_RANDOM} random images (seed {seed})"
    inputs = [one.probe(_RANDOM, seed) for one in opened]
    if against_original:
        inputs = [cast(Against, one).first_batch() for one in evaluators]
        outputs_on = f"{samples_in(inputs[0])} of {evaluators[0].description}"
    if isinstance(data, str) and paired_kind(data) is None and not crop_border and not evaluators:
        sets = [open_data(data, one.preprocessing, "test") for one in opened]
        total = min(images or len(sets[0]), len(sets[0]))
        chosen = torch.randperm(len(sets[0]), generator=seeded(seed)).tolist()[:total]
        evaluators += [Labelled(one.some(sorted(chosen), one.description)) for one in sets]
        compared = chosen[:_COMPARED]
        outputs_on = f"{len(compared)} images of {data}"
        inputs = [(torch.stack([one[index][0] for index in compared]),) for one in sets]
    elif images is not None:
        raise AsymswapError("`images=…` chooses of labelled images, `data=…`; leave it out")
    elif data is not None and not evaluators:
        evaluators += [evaluator_of(data, one, crop_border) for one in opened]
    costs = [cost_row(one) for one in opened]
    measured: TimingRow | None = None
    timed = [Result(number, 0) for number in range(len(opened))]
    if timing is not None:
        timed = time_in_turn(opened, timing, progress)
        setting = RUNTIMES[timing.runtime].setting(timing)
        measured = TimingRow(**vars(setting), machine=machine()["processor"], rounds=timing.rounds)
    rows: list[ComparedRow] = []
    first: Predictions | None = None
    reference = [_run(opened[0], batch) for batch in portions(inputs[0])]
    for number, (one, own) in enumerate(zip(opened, inputs, strict=True)):
        gap, missing = _gap(opened[0], reference, one, own, against_original or bool(total)) if number else (None, "")
        scores, refusal, against = tuple[Score, ...](), "", None
        step = partial(progress, f"evaluating {number + 1} of {len(opened)}")
        evaluator = evaluators[number] if evaluators else None
        if isinstance(evaluator, Labelled):
            # A model that is no classifier has no scores on labelled images.
            try:
                found = evaluator.predict(one.model, step)
            except SourceError as error:
                refusal = f"no accuracy: {error}"
            else:
                scores = found.named
                if number == 0:
                    first = found
                elif first is not None:
                    against = against_first(found.labels, first.guesses, found.guesses)
        elif evaluator is not None:
            scores, refusal = evaluator(one.model, step), evaluator.note
            check_same(rows[0].scores if rows else scores, scores)
        notes = ("its weights are random" if one.weights == "random" else "", refusal, missing)
        rows.append(
            ComparedRow(
                **{**vars(costs[number]), "notes": (*costs[number].notes, *filter(None, notes))},
                weights_bytes=state_bytes(one.model),
                file_bytes=None if one.file is None else one.file.stat().st_size,
                latency=timed[number].seconds,
                latency_ratio=timed[number].ratio,
                gap=gap and replace(gap, agreement=None if against is None else against.agreement),
                scores=scores,
                against_first=against,
                fed=one.fed,
            )
        )
    return Comparison(
        asymswap=asymswap.__version__,
        models=tuple(rows),
        outputs_on=outputs_on,
        data=evaluators[0].description if evaluators else None,
        images=total if total and total != len(sets[0]) else None,
        timing=measured,
        warnings=input_warnings(*opened),
    )


_RANDOM, _COMPARED = 2, 32
"""Images on which outputs are compared: random ones where no labelled images are given, or the first of those."""


def _gap(
    first: OpenedModel, reference: Sequence[Any], one: OpenedModel, own: Inputs, on_data: bool
) -> tuple[OutputGap | None, str]:
    """Return how a model's outputs differ from the first's, or why they cannot be compared.

    Each gets the same images in its own preprocessing, random ones only where it takes the first's inputs.
    """
    form, takes = one.preprocessing.form, one.takes()
    if not on_data and (form, takes) != (first.preprocessing.form, first.takes()):
        return None, f"it takes {takes}, so its outputs cannot be compared with the first's; give `input_size=…`"
    if form == "image-list":
        return None, "which boxes it keeps jumps where scores are close, so its outputs are not compared"
    sums = Sums()
    for known, batch in zip(reference, portions(own), strict=True):
        ones, others = list_tensors(known), list_tensors(_run(one, batch))
        before, after = (["x".join(map(str, t.shape[1:])) for t in tensors] for tensors in (ones, others))
        if before != after:
            shapes = (", ".join(sizes) or "nothing" for sizes in (after, before))
            return None, "its outputs ({}) cannot be compared with the first's ({})".format(*shapes)
        for expected, other in zip(ones, others, strict=True):
            sums.add(expected, other)
    return OutputGap(sums.relative, sums.largest) if sums.tensors else None, ""


def _run(opened: OpenedModel, inputs: Inputs) -> Any:
    """Return the model's outputs in eval mode, on the processor."""
    return map_tensors(output_of(opened.model, inputs), lambda tensor: tensor.cpu())
