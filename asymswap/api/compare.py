"""The verb `compare`: what each model costs, as `benchmark` counts it, and how it differs from the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import asymswap
from asymswap.api.benchmark import cost_row, time_in_turn
from asymswap.api.convert import state_bytes
from asymswap.api.evaluate import against_first
from asymswap.api.progress import shows_progress
from asymswap.data.datasets import LabelledImages, open_data
from asymswap.data.normalization import Feeding, all_warnings, fed_of, settle
from asymswap.data.predict import check_classifier, placement
from asymswap.errors import AsymswapError, SourceError
from asymswap.measure.fidelity import Sums
from asymswap.measure.latency import machine
from asymswap.models.opened import OpenedModel, sizes_assumed
from asymswap.models.opening import Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.planning.latency_budget import Timing
from asymswap.results.compare import Accuracy, ComparedRow, Comparison, OutputGap, TimingRow
from asymswap.types import Progress
from asymswap.utils.inputs import Inputs, probe
from asymswap.utils.tensors import eval_mode, list_tensors, map_tensors, seeded


@shows_progress
def compare(
    models: Sequence[Model],
    *,
    data: str | None = None,
    images: int | None = None,
    timing: Timing | None = None,
    seed: int = 0,
    input_size: tuple[int, ...] | None = None,
    preprocessing: PreprocessingOptions | None = None,
    progress: Progress | bool = True,
) -> Comparison:
    """Compare two or more models: costs, latency, outputs and accuracy; none of them is changed.

    Outputs and accuracy are measured on the test part of `data`, a data reference, or on `images` of them, each model
    with its own preprocessing; without `data`, outputs are compared on random inputs. Latency is measured by `timing`,
    if given. Raises AsymswapError for fewer than two models, or one that cannot be opened.
    """
    assert callable(progress)  # `shows_progress` makes it one
    if len(models) < 2:
        raise AsymswapError(f"compare takes two models or more, not {len(models)}")
    if images is not None and images < 1:
        raise AsymswapError(f"`images={images}` leaves nothing to compare on; give 1 or more")
    opened = [open_for_verb(model, progress, input_size=input_size, preprocessing=preprocessing) for model in models]
    feedings: list[Feeding | None] = [None] * len(opened)
    sets: list[LabelledImages] = []
    total = _RANDOM
    if data is not None:
        settled = [settle(one, data, "test") for one in opened]
        opened, feedings = [one for one, _ in settled], [feeding for _, feeding in settled]
        sets = [open_data(data, one.preprocessing, "test") for one in opened]
        total = min(images or len(sets[0]), len(sets[0]))
    costs = [cost_row(one) for one in opened]
    timed: list[Any] = [(None, None)] * len(opened)
    if timing is not None:
        timed = time_in_turn(opened, timing, progress)
    found = _on_data(opened, sets, total, seed, progress) if sets else _on_random(opened, seed)
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
            accuracy=outputs.accuracy,
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
        data=sets[0].description if sets else None,
        images=total if sets and total != len(sets[0]) else None,
        timing=measured,
        warnings=all_warnings(feedings) if sets else sizes_assumed(opened),
    )


@dataclass
class _Outputs:
    """A model's outputs beside the first one's; `note` and `refusal` say why they, or its accuracy, are missing."""

    note: str | None = None
    refusal: str | None = None
    accuracy: Accuracy | None = None
    agreement: float | None = None
    guesses: list[Tensor] = field(default_factory=list)
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
        return OutputGap(found.relative, found.largest, self.agreement)


_RANDOM = 2
"""Random images on which outputs are compared where no data is given."""


def _on_random(opened: Sequence[OpenedModel], seed: int) -> list[_Outputs]:
    """Compare the outputs of those models that take the first's inputs."""
    first, expected = opened[0], opened[0].preprocessing
    inputs = probe(expected, first.dtype(), images=_RANDOM, seed=seed)
    reference = _run(first, inputs)
    every = [_Outputs() for _ in opened]
    for one, outputs in zip(opened[1:], every[1:], strict=True):
        own = one.preprocessing
        if (own.form, own.describe()) != (expected.form, expected.describe()):
            takes = own.describe()
            outputs.note = f"it takes {takes}, so its outputs cannot be compared with the first's; give `input_size=…`"
        elif own.form == "image-list":
            outputs.note = "which boxes it keeps jumps where scores are close, so its outputs are not compared"
        else:
            outputs.add(reference, _run(one, inputs))
    return every


def _run(opened: OpenedModel, inputs: Inputs) -> Any:
    """Return the model's outputs in eval mode, on the processor."""
    device, dtype = placement(opened.model)
    with eval_mode(opened.model), torch.inference_mode():
        placed = map_tensors(inputs, lambda tensor: tensor.to(device, dtype))
        return map_tensors(opened.model(*placed), lambda tensor: tensor.cpu())


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
    labels: list[Tensor] = []
    for parts in zip(*loaders, strict=True):
        labels.append(parts[0][1])
        answers = [_run(one, (images,)) for one, (images, _) in zip(opened, parts, strict=True)]
        for number, (outputs, answer) in enumerate(zip(every, answers, strict=True)):
            if number:
                outputs.add(answers[0], answer)
            if outputs.refusal is None:
                outputs.guesses.append(answer.argmax(1))
        progress("running all models", sum(map(len, labels)), total)
    truth = torch.cat(labels)
    for outputs in every:
        if outputs.refusal is None:
            guesses = torch.cat(outputs.guesses)
            outputs.accuracy = Accuracy(int((guesses == truth).sum()) / len(truth))
            if outputs is not every[0] and every[0].refusal is None:
                against = against_first(truth, torch.cat(every[0].guesses), guesses)
                outputs.agreement = against.agreement
                outputs.accuracy = replace(
                    outputs.accuracy, gained=against.only_this, lost=against.only_first, p_value=against.p
                )
    return every
