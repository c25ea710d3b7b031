"""The verb `compare`: what each model costs, as `benchmark` counts it, and how it differs from the first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import asymswap
from asymswap.api.benchmark import cost_row, time_in_turn
from asymswap.api.conversion_report import state_bytes
from asymswap.api.evaluate import against_first
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
from asymswap.types import Progress, silent
from asymswap.utils.inputs import Inputs, probe
from asymswap.utils.tensors import eval_mode, list_tensors, map_tensors, seeded


def compare(
    models: Sequence[Model],
    *,
    data: str | None = None,
    images: int | None = None,
    timing: Timing | None = None,
    seed: int = 0,
    input_size: tuple[int, ...] | None = None,
    preprocessing: PreprocessingOptions | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Put two or more models beside each other: costs, latency, outputs and accuracy; none of them is changed.

    With `data`, a data reference, outputs and accuracy are those on its test part, or on `images` of them, each model
    with its own preprocessing; without, outputs are compared on random inputs. `timing` says how latency is measured;
    without one it is not.

    Raises AsymswapError where there are fewer than two models, or one of them cannot be opened.
    """
    if len(models) < 2:
        raise AsymswapError(f"compare takes two models or more, not {len(models)}")
    if images is not None and images < 1:
        raise AsymswapError(f"--images {images} leaves nothing to compare on; give 1 or more")
    opened = [open_for_verb(model, progress, input_size=input_size, preprocessing=preprocessing) for model in models]
    feedings: list[Feeding | None] = [None] * len(opened)
    sets: list[LabelledImages] = []
    total = None
    if data is not None:
        settled = [settle(one, data, "test") for one in opened]
        opened, feedings = [one for one, _ in settled], [feeding for _, feeding in settled]
        sets = [open_data(data, one.preprocessing, "test") for one in opened]
        total = min(images or len(sets[0]), len(sets[0]))
    costs = [cost_row(one) for one in opened]
    timed = None if timing is None else time_in_turn(opened, timing, progress)
    if total is None:
        found, outputs_on = _on_random(opened, seed), f"{_RANDOM} random images (seed {seed})"
    else:
        found, outputs_on = _on_data(opened, sets, total, seed, progress), f"{total:,} images of {data}"
    rows = []
    for number, (one, cost, finding) in enumerate(zip(opened, costs, found, strict=True)):
        random = ("its weights are random",) if one.weights == "random" else ()
        row = ComparedRow(
            model=cost.model,
            origin=cost.origin,
            weights=cost.weights,
            input=cost.input,
            cost=cost.cost,
            weights_bytes=state_bytes(one.model),
            file_bytes=None if one.file is None else one.file.stat().st_size,
            latency=None if timed is None else timed[number][0],
            latency_ratio=None if timed is None else timed[number][1],
            gap=finding.gap,
            accuracy=finding.accuracy,
            notes=(*cost.notes, *random, *finding.notes),
            fed=fed_of(feedings[number]),
        )
        rows.append(row)
    if timing is not None:
        threads, processor = torch.get_num_threads(), machine()["processor"]
        measured = TimingRow(timing.memory_format, timing.batch, threads, processor, timing.rounds)
    return Comparison(
        asymswap=asymswap.__version__,
        models=tuple(rows),
        outputs_on=outputs_on,
        data=sets[0].description if sets else None,
        images=total if sets and total != len(sets[0]) else None,
        timing=None if timing is None else measured,
        warnings=all_warnings(feedings) if data is not None else sizes_assumed(opened),
    )


@dataclass(frozen=True)
class _Finding:
    """What running a model has shown."""

    gap: OutputGap | None = None
    accuracy: Accuracy | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Outputs:
    """A model's outputs beside the first one's, batch by batch; `note` says why they cannot be compared."""

    sums: Sums = field(default_factory=Sums)
    guesses: list[Tensor] = field(default_factory=list)
    note: str | None = None

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

    def gap(self, agreement: float | None = None) -> OutputGap | None:
        """Return the difference over all batches."""
        if self.note is not None:
            return None
        gap = self.sums.difference()
        return OutputGap(gap.relative, gap.largest, agreement)


_RANDOM = 2
"""Random images on which outputs are compared where no data is given."""


def _on_random(opened: Sequence[OpenedModel], seed: int) -> list[_Finding]:
    """Compare the outputs of those models that take the first's inputs."""
    first = opened[0]
    expected = first.preprocessing
    inputs = probe(expected, first.dtype(), images=_RANDOM, seed=seed)
    reference = _run(first, inputs)
    findings = [_Finding()]
    for one in opened[1:]:
        outputs, own = _Outputs(), one.preprocessing
        if (own.form, own.describe()) != (expected.form, expected.describe()):
            outputs.note = (
                f"it takes {own.describe()}, so its outputs cannot be compared with the first's; give --input"
            )
        elif own.form == "image-list":
            outputs.note = "which boxes it keeps jumps where scores are close, so its outputs are not compared"
        else:
            outputs.add(reference, _run(one, inputs))
        findings.append(_Finding(outputs.gap(), notes=() if outputs.note is None else (outputs.note,)))
    return findings


def _run(opened: OpenedModel, inputs: Inputs) -> Any:
    """Return the model's outputs in eval mode, on the processor."""
    device, dtype = placement(opened.model)
    with eval_mode(opened.model), torch.inference_mode():
        placed = map_tensors(inputs, lambda tensor: tensor.to(device, dtype))
        return map_tensors(opened.model(*placed), lambda tensor: tensor.cpu())


def _on_data(
    opened: Sequence[OpenedModel], sets: Sequence[LabelledImages], total: int, seed: int, progress: Progress
) -> list[_Finding]:
    """Run all models on the same images in one pass, each with its own preprocessing."""
    refusals: list[str | None] = []
    for one, images in zip(opened, sets, strict=True):
        try:
            check_classifier(one.model, images)
            refusals.append(None)
        except SourceError as error:
            refusals.append(str(error))
    every = [_Outputs() for _ in opened]
    labels: list[Tensor] = []
    for batch_labels, answers in _batches(opened, sets, total, seed):
        labels.append(batch_labels)
        for outputs, answer, refusal in zip(every, answers, refusals, strict=True):
            outputs.add(answers[0], answer)
            if refusal is None:
                outputs.guesses.append(answer.argmax(1))
        progress("running all models", sum(map(len, labels)), total)
    truth = torch.cat(labels)
    findings = []
    for number, (outputs, refusal) in enumerate(zip(every, refusals, strict=True)):
        accuracy, agreement = None, None
        if refusal is None:
            guesses = torch.cat(outputs.guesses)
            top1 = int((guesses == truth).sum()) / len(truth)
            accuracy = Accuracy(top1)
            if number and refusals[0] is None:
                against = against_first(truth, torch.cat(every[0].guesses), guesses)
                accuracy = Accuracy(top1, against.only_this, against.only_first, against.p)
                agreement = against.agreement
        notes = (None if refusal is None else f"no accuracy: {refusal}", outputs.note)
        gap = outputs.gap(agreement) if number else None
        findings.append(_Finding(gap, accuracy, tuple(note for note in notes if note is not None)))
    return findings


def _batches(
    opened: Sequence[OpenedModel], sets: Sequence[LabelledImages], total: int, seed: int
) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield labels and all models' outputs, batch by batch."""
    order = sorted(torch.randperm(len(sets[0]), generator=seeded(seed)).tolist()[:total])
    largest = max(math.prod(one.preprocessing.size) for one in opened)
    batch = max(4, min(128, 2**20 // largest))
    # A generator of its own: the loader would otherwise draw from the global one.
    loaders = [DataLoader(Subset(one.images, order), batch, generator=torch.Generator()) for one in sets]
    for parts in zip(*loaders, strict=True):
        yield parts[0][1], [_run(one, (images,)) for one, (images, _) in zip(opened, parts, strict=True)]
