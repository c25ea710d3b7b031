"""The verb `compare`: what each model costs, as `benchmark` counts it, and how it differs from the first."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import asymswap
from asymswap.api.benchmark import cost_row, time_in_turn
from asymswap.api.convert import state_bytes
from asymswap.api.evaluate import against_first
from asymswap.api.progress import shows_progress
from asymswap.calibration.agreement import Against
from asymswap.data.datasets import LabelledImages, open_data
from asymswap.data.metrics import Evaluator, check_same, evaluator_of, paired_kind
from asymswap.data.normalization import Feeding, all_warnings, fed_of, settle
from asymswap.data.predict import Predictions, check_classifier, judge
from asymswap.errors import AsymswapError, SourceError
from asymswap.measure.fidelity import Sums
from asymswap.measure.latency import machine
from asymswap.models.opened import OpenedModel, sizes_assumed
from asymswap.models.opening import Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.planning.latency_budget import Timing
from asymswap.results.compare import ComparedRow, Comparison, OutputGap, TimingRow
from asymswap.results.evaluate import AgainstFirst, Score
from asymswap.types import Progress
from asymswap.utils.inputs import Inputs, placed
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
    each model is compared with the first, as by `asymswap.evaluate`. On labelled images, or on `images` of them,
    outputs are compared too, each model with its own preprocessing; otherwise on random inputs. Latency is measured by
    `timing`, if given. Raises AsymswapError for fewer than two models, or one that cannot be opened.
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
    sets: list[LabelledImages] = []
    total = _RANDOM
    evaluators: list[Evaluator] = []
    if against_original:
        opened, feedings, against_first_one = Against.first_of(opened, data)
        evaluators += against_first_one
    elif isinstance(data, str):
        settled = [settle(one, data, "test") for one in opened]
        opened, feedings = [one for one, _ in settled], [feeding for _, feeding in settled]
    if isinstance(data, str) and paired_kind(data) is None and not crop_border and not evaluators:
        sets = [open_data(data, one.preprocessing, "test") for one in opened]
        total = min(images or len(sets[0]), len(sets[0]))
    elif images is not None:
        raise AsymswapError("`images=…` chooses of labelled images, `data=…`; leave it out")
    elif data is not None and not evaluators:
        evaluators = [evaluator_of(data, one, crop_border) for one in opened]
    costs = [cost_row(one) for one in opened]
    timed: list[Any] = [(None, None)] * len(opened)
    if timing is not None:
        timed = time_in_turn(opened, timing, progress)
    found = _on_data(opened, sets, total, seed, progress) if sets else _on_random(opened, seed)
    for number, evaluator in enumerate(evaluators):
        step = functools.partial(progress, f"evaluating {number + 1} of {len(opened)}")
        found[number].scores, found[number].refusal = evaluator(opened[number].model, step), evaluator.note or None
        check_same(found[0].scores, found[number].scores)
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
        threads, processor = torch.get_num_threads(), machine()["processor"]
        measured = TimingRow(timing.memory_format, timing.batch, threads, processor, timing.rounds)
    return Comparison(
        asymswap=asymswap.__version__,
        models=tuple(rows),
        outputs_on=f"{total:,} images of {data}" if sets else f"{total} random images (seed {seed})",
        data=sets[0].description if sets else evaluators[0].description if evaluators else None,
        images=total if sets and total != len(sets[0]) else None,
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
    parts: list[Sequence[Tensor]] = field(default_factory=list)
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
        found = self.sums.difference()
        agreement = None if self.against_first is None else self.against_first.agreement
        return OutputGap(found.relative, found.largest, agreement)


_RANDOM = 2
"""Random images on which outputs are compared where no data is given."""


def _on_random(opened: Sequence[OpenedModel], seed: int) -> list[_Outputs]:
    """Compare the outputs of those models that take the first's inputs."""
    first = opened[0]
    inputs = first.probe(_RANDOM, seed)
    reference = _run(first, inputs)
    every = [_Outputs() for _ in opened]
    for one, outputs in zip(opened[1:], every[1:], strict=True):
        form = one.preprocessing.form
        if (form, one.takes()) != (first.preprocessing.form, first.takes()):
            outputs.note = (
                f"it takes {one.takes()}, so its outputs cannot be compared with the first's; give `input_size=…`"
            )
        elif form == "image-list":
            outputs.note = "which boxes it keeps jumps where scores are close, so its outputs are not compared"
        else:
            outputs.add(reference, _run(one, inputs))
    return every


def _run(opened: OpenedModel, inputs: Inputs) -> Any:
    """Return the model's outputs in eval mode, on the processor."""
    with eval_mode(opened.model), torch.inference_mode():
        return map_tensors(opened.model(*placed(opened.model, inputs)), lambda tensor: tensor.cpu())


def _on_data(
    opened: Sequence[OpenedModel], sets: Sequence[LabelledImages], total: int, seed: int, progress: Progress
) -> list[_Outputs]:
    """Run all models on the same images in one pass, each with its own preprocessing."""
    every = [_Outputs() for _ in opened]
    for one, images, outputs in zip(opened, sets, every, strict=True):
        try:
            check_classifier(one.model, images)
        except SourceError as error:
            outputs.refusal = f"no accuracy: {error}"
    order = sorted(torch.randperm(len(sets[0]), generator=seeded(seed)).tolist()[:total])
    batch = max(4, min(128, 2**20 // max(math.prod(one.preprocessing.size) for one in opened)))
    # A generator of its own: the loader would otherwise draw from the global one.
    loaders = [DataLoader(Subset(one.images, order), batch, generator=torch.Generator()) for one in sets]
    done = 0
    for parts in zip(*loaders, strict=True):
        labels = parts[0][1]
        done += len(labels)
        answers = [_run(one, (images,)) for one, (images, _) in zip(opened, parts, strict=True)]
        for number, (outputs, answer) in enumerate(zip(every, answers, strict=True)):
            if number:
                outputs.add(answers[0], answer)
            if outputs.refusal is None:
                outputs.parts.append([*judge(answer, labels), torch.tensor([answer.shape[1]])])
        progress("running all models", done, total)
    first: Predictions | None = None
    for outputs in every:
        if outputs.refusal is None:
            columns = [torch.cat(column) for column in zip(*outputs.parts, strict=True)]
            labels, guesses, ranks, losses, scored = columns
            found = Predictions(torch.tensor(order), labels, guesses, ranks, losses, int(scored[0]), 0.0)
            outputs.scores = found.named
            if outputs is every[0]:
                first = found
            elif first is not None:
                outputs.against_first = against_first(found.labels, first.guesses, found.guesses)
    return every
