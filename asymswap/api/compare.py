"""The verb `compare`: what each model costs, as `benchmark` counts it, and how it differs from the first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import asymswap
from asymswap.api.benchmark import cost_row, time_in_turn
from asymswap.api.convert import state_bytes
from asymswap.api.evaluate import against_first
from asymswap.api.progress import shows_progress
from asymswap.calibration.agreement import Against
from asymswap.data.datasets import open_data
from asymswap.data.metrics import Evaluator, Labelled, check_same, evaluator_of, paired_kind
from asymswap.data.normalization import Feeding, all_warnings, fed_of, settle
from asymswap.data.predict import Predictions
from asymswap.errors import AsymswapError, SourceError
from asymswap.measure.fidelity import Sums
from asymswap.measure.latency import machine
from asymswap.measure.runtimes import RUNTIMES
from asymswap.measure.timing import Timing
from asymswap.models.opened import OpenedModel, sizes_assumed
from asymswap.models.opening import Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.results.compare import ComparedRow, Comparison, OutputGap, TimingRow
from asymswap.results.evaluate import AgainstFirst, Score
from asymswap.types import Progress
from asymswap.utils.inputs import Inputs, placed, portions
from asymswap.utils.tensors import eval_mode, list_tensors, map_tensors, seeded


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
    progress: Progress | bool = True,
) -> Comparison:
    """Compare two or more models: costs, latency, outputs and scores; none of them is changed.

    `data` is what `asymswap.convert` takes as `evaluate`, or with `against_original` inputs without labels, on which
    each model is compared with the first, as by `asymswap.evaluate`. Of labelled images `images` are taken; outputs are
    compared on at most 32 of those, each model with its own preprocessing, and otherwise on random inputs. Latency is
    measured by `timing`, if given. Raises AsymswapError for fewer than two models, or one that cannot be opened.
    """
    assert callable(progress)  # `shows_progress` makes it one
    if len(models) < 2:
        raise AsymswapError(f"compare takes two models or more, not {len(models)}")
    if images is not None and images < 1:
        raise AsymswapError(f"`images={images}` leaves nothing to compare on; give 1 or more")
    opened = [
        open_for_verb(
            model, progress, input_size=input_size, example_inputs=example_inputs, preprocessing=preprocessing
        )
        for model in models
    ]
    feedings: list[Feeding | None] = [None] * len(opened)
    evaluators: list[Evaluator] = []
    if against_original:
        opened, feedings, against_first_one = Against.first_of(opened, data)
        evaluators += against_first_one
    elif isinstance(data, str):
        settled = [settle(one, data, "test") for one in opened]
        opened, feedings = [one for one, _ in settled], [feeding for _, feeding in settled]
    description, total, outputs_on = None, None, f"{_RANDOM} random images (seed {seed})"
    inputs = [one.probe(_RANDOM, seed) for one in opened]
    if isinstance(data, str) and paired_kind(data) is None and not crop_border and not evaluators:
        sets = [open_data(data, one.preprocessing, "test") for one in opened]
        total = min(images or len(sets[0]), len(sets[0]))
        chosen = torch.randperm(len(sets[0]), generator=seeded(seed)).tolist()[:total]
        evaluators += [Labelled(one.some(sorted(chosen), one.description)) for one in sets]
        compared = chosen[:_COMPARED]
        outputs_on = f"{len(compared)} images of {data}"
        inputs = [(torch.stack([one.images[index][0] for index in compared]),) for one in sets]
    elif images is not None:
        raise AsymswapError("`images=…` chooses of labelled images, `data=…`; leave it out")
    elif data is not None and not evaluators:
        evaluators += [evaluator_of(data, one, crop_border) for one in opened]
    if evaluators:
        description = evaluators[0].description
    costs = [cost_row(one) for one in opened]
    timed: list[Any] = [(None, None)] * len(opened)
    if timing is not None:
        timed = time_in_turn(opened, timing, progress)
    found = _outputs(opened, inputs, on_data=bool(total))
    _measure(opened, evaluators, found, progress)
    rows = []
    for one, cost, times, outputs, feeding in zip(opened, costs, timed, found, feedings, strict=True):
        notes = ("its weights are random" if one.weights == "random" else None, outputs.refusal, outputs.note)
        row = ComparedRow(
            **{**vars(cost), "notes": (*cost.notes, *(note for note in notes if note is not None))},
            weights_bytes=state_bytes(one.model),
            file_bytes=None if one.file is None else one.file.stat().st_size,
            latency=times[0],
            latency_ratio=times[1],
            gap=outputs.gap(),
            scores=outputs.scores,
            against_first=outputs.against_first,
            fed=fed_of(feeding),
        )
        rows.append(row)
    measured = None
    if timing is not None:
        setting, processor = RUNTIMES[timing.runtime].setting(timing), machine()["processor"]
        measured = TimingRow(
            setting.memory_format, timing.batch, setting.threads, processor, timing.rounds, timing.runtime
        )
    return Comparison(
        asymswap=asymswap.__version__,
        models=tuple(rows),
        outputs_on=outputs_on,
        data=description,
        images=total if total and total != len(sets[0]) else None,
        timing=measured,
        warnings=all_warnings(feedings) if any(feedings) else sizes_assumed(opened),
    )


@dataclass
class _Outputs:
    """A model's outputs beside the first one's; `note` and `refusal` say why they, or its scores, are missing."""

    note: str | None = None
    refusal: str | None = None
    scores: tuple[Score, ...] = ()
    against_first: AgainstFirst | None = None
    sums: Sums = field(default_factory=Sums)

    def add(self, first: Any, own: Any) -> None:
        """Compare both models' outputs of a batch."""
        ones, others = list_tensors(first), list_tensors(own)
        before, after = (["x".join(map(str, t.shape[1:])) for t in tensors] for tensors in (ones, others))
        if before != after:
            shapes = (", ".join(sizes) or "nothing" for sizes in (after, before))
            self.note = "its outputs ({}) cannot be compared with the first's ({})".format(*shapes)
            return
        for one, other in zip(ones, others, strict=True):
            self.sums.add(one, other)

    def gap(self) -> OutputGap | None:
        """Return the difference over all batches; None for the first model, and for one that cannot be compared."""
        if self.note is not None or not self.sums.tensors:
            return None
        found = self.sums
        agreement = None if self.against_first is None else self.against_first.agreement
        return OutputGap(found.relative, found.largest, agreement)


_RANDOM, _COMPARED = 2, 32
"""Images on which outputs are compared: random ones where no labelled images are given, or the first of those."""


def _outputs(opened: Sequence[OpenedModel], inputs: Sequence[Inputs], on_data: bool) -> list[_Outputs]:
    """Compare the outputs of models on the same images, each in its own preprocessing.

    Random ones are compared only where a model takes the first's inputs.
    """
    first = opened[0]
    reference = [_run(first, batch) for batch in portions(inputs[0])]
    every = [_Outputs() for _ in opened]
    for one, own, outputs in zip(opened[1:], inputs[1:], every[1:], strict=True):
        form, takes = one.preprocessing.form, one.takes()
        if not on_data and (form, takes) != (first.preprocessing.form, first.takes()):
            outputs.note = f"it takes {takes}, so its outputs cannot be compared with the first's; give `input_size=…`"
        elif form == "image-list":
            outputs.note = "which boxes it keeps jumps where scores are close, so its outputs are not compared"
        else:
            for known, batch in zip(reference, portions(own), strict=True):
                outputs.add(known, _run(one, batch))
    return every


def _run(opened: OpenedModel, inputs: Inputs) -> Any:
    """Return the model's outputs in eval mode, on the processor."""
    with eval_mode(opened.model), torch.inference_mode():
        return map_tensors(opened.model(*placed(opened.model, inputs)), lambda tensor: tensor.cpu())


def _measure(
    opened: Sequence[OpenedModel], evaluators: Sequence[Evaluator], every: Sequence[_Outputs], progress: Progress
) -> None:
    """Add the models' scores; a model that is no classifier has none on labelled images, and a note says why."""
    first: Predictions | None = None
    for number, evaluator in enumerate(evaluators):
        model, outputs = opened[number].model, every[number]
        step = functools.partial(progress, f"evaluating {number + 1} of {len(opened)}")
        if not isinstance(evaluator, Labelled):
            outputs.scores, outputs.refusal = evaluator(model, step), evaluator.note or None
            check_same(every[0].scores, outputs.scores)
            continue
        try:
            found = evaluator.predict(model, step)
        except SourceError as error:
            outputs.refusal = f"no accuracy: {error}"
            continue
        outputs.scores = found.named
        if number == 0:
            first = found
        elif first is not None:
            outputs.against_first = against_first(found.labels, first.guesses, found.guesses)
