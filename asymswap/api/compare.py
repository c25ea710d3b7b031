"""Models beside each other: what each costs on its own, and how it differs from the first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import asymswap
from asymswap.api.conversion_report import state_bytes
from asymswap.data.datasets import LabelledImages, open_data
from asymswap.data.normalization import Feeding, all_warnings, fed_of, settle
from asymswap.data.predict import check_classifier, placement
from asymswap.errors import AsymswapError, SourceError
from asymswap.measure.fidelity import Sums
from asymswap.measure.latency import forward, in_format, inputs_like, ratio_of, seconds_of, take_turns
from asymswap.measure.machine import machine
from asymswap.measure.statistics import mcnemar_exact
from asymswap.models.opened import OpenedModel, costs_of, sizes_assumed
from asymswap.models.opening import Model, open_for_verb
from asymswap.planning.latency_budget import Timing
from asymswap.results.compare import Accuracy, ComparedRow, Comparison, OutputGap, TimingRow
from asymswap.types import Progress, Ratio, Seconds, silent
from asymswap.utils.inputs import Inputs, probe
from asymswap.utils.tensors import eval_mode, list_tensors, map_tensors, seeded


def compare(
    models: Sequence[Model],
    *,
    data: str | None = None,
    images: int | None = None,
    timing: Timing | None = None,
    seed: int = 0,
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
    opened = [open_for_verb(model, progress) for model in models]
    feedings: list[Feeding | None] = [None] * len(opened)
    if data is not None:
        settled = [settle(one, data, "test") for one in opened]
        opened, feedings = [one for one, _ in settled], [feeding for _, feeding in settled]
    rows = [_row(one) for one in opened]
    timed = None if timing is None else _times(opened, timing, progress)
    outcome = _on_random(opened, seed) if data is None else _on_data(opened, data, images, seed, progress)
    return Comparison(
        asymswap=asymswap.__version__,
        models=tuple(
            replace(
                row,
                latency=None if timed is None else timed[number][0],
                latency_ratio=None if timed is None else timed[number][1],
                gap=outcome.gaps[number],
                accuracy=outcome.accuracies[number],
                fed=fed_of(feedings[number]),
                notes=(*row.notes, *outcome.notes[number]),
            )
            for number, row in enumerate(rows)
        ),
        outputs_on=outcome.on,
        data=outcome.data,
        images=outcome.images,
        timing=None if timing is None else _timing_row(timing),
        warnings=all_warnings(feedings) if data is not None else sizes_assumed(opened),
    )


def _row(opened: OpenedModel) -> ComparedRow:
    costs = costs_of(opened)
    return ComparedRow(
        model=opened.reference,
        origin=opened.origin.reference,
        weights=opened.weights,
        input=opened.preprocessing.describe(),
        cost=costs.total,
        weights_bytes=state_bytes(opened.model),
        file_bytes=None if opened.file is None else opened.file.stat().st_size,
        notes=(*opened.notes, *costs.notes(), *(("its weights are random",) if opened.weights == "random" else ())),
    )


def _times(opened: Sequence[OpenedModel], timing: Timing, progress: Progress) -> list[tuple[Seconds, Ratio | None]]:
    turns = {
        number: forward(
            in_format(one.model, timing.memory_format).eval(),
            inputs_like(one.example(), timing.memory_format, timing.batch),
        )
        for number, one in enumerate(opened)
    }
    found = take_turns(turns, rounds=timing.rounds, progress=progress)
    return [(seconds_of(own), ratio_of(own, found[0]) if number else None) for number, own in found.items()]


def _timing_row(timing: Timing) -> TimingRow:
    return TimingRow(
        memory_format=timing.memory_format,
        batch=timing.batch,
        threads=torch.get_num_threads(),
        machine=machine()["processor"],
        rounds=timing.rounds,
    )


@dataclass
class _Outcome:
    """What running the models has shown, one entry a model."""

    on: str
    gaps: list[OutputGap | None]
    accuracies: list[Accuracy | None]
    notes: list[list[str]]
    data: str | None = None
    images: int | None = None


@dataclass
class _Tally:
    """What is counted of one model beside the first, batch by batch."""

    outputs: Sums = field(default_factory=Sums)
    agreed: int = 0
    right: int = 0
    gained: int = 0
    lost: int = 0
    seen: int = 0
    note: str | None = None

    def add_outputs(self, first: Any, own: Any) -> None:
        """Take in both models' outputs of a batch."""
        ones, others = list_tensors(first), list_tensors(own)
        before, after = (tuple("x".join(map(str, t.shape[1:])) for t in tensors) for tensors in (ones, others))
        if before != after:
            said = (", ".join(shapes) or "nothing" for shapes in (after, before))
            self.note = "its outputs ({}) cannot be compared with the first's ({})".format(*said)
            return
        for one, other in zip(ones, others, strict=True):
            self.outputs.add(one, other)

    def gap(self, scores: bool) -> OutputGap | None:
        """The difference over all batches."""
        if self.note is not None:
            return None
        gap = self.outputs.difference()
        return OutputGap(gap.relative, gap.largest, self.agreed / self.seen if scores and self.seen else None)


def _on_random(opened: Sequence[OpenedModel], seed: int) -> _Outcome:
    """The outputs on two random inputs, of those models that take the first's."""
    count = 2
    first = opened[0]
    outcome = _Outcome(f"{count} random images (seed {seed})", [], [None] * len(opened), [[] for _ in opened])
    wanted = first.preprocessing
    inputs = probe(wanted, first.dtype(), images=count, seed=seed)
    reference = _run(first, inputs)
    for number, one in enumerate(opened):
        tally, own = _Tally(), one.preprocessing
        if (own.form, own.describe()) != (wanted.form, wanted.describe()):
            tally.note = f"it takes {own.describe()}, so its outputs cannot be compared with the first's; give --input"
        elif own.form == "image-list" and number:
            tally.note = "which boxes it keeps jumps where scores are close, so its outputs are not compared"
        elif number:
            tally.add_outputs(reference, _run(one, inputs))
        outcome.gaps.append(None if number == 0 else tally.gap(scores=False))
        outcome.notes[number] += [] if tally.note is None else [tally.note]
    return outcome


def _run(opened: OpenedModel, inputs: Inputs) -> Any:
    """The model's outputs in eval mode, on the processor."""
    device, dtype = placement(opened.model)
    with eval_mode(opened.model), torch.inference_mode():
        placed = map_tensors(inputs, lambda tensor: tensor.to(device, dtype))
        return map_tensors(opened.model(*placed), lambda tensor: tensor.cpu())


def _on_data(
    opened: Sequence[OpenedModel], reference: str, wanted: int | None, seed: int, progress: Progress
) -> _Outcome:
    """One pass of all models through the same images, each with its own preprocessing."""
    data = [open_data(reference, one.preprocessing, "test") for one in opened]
    refusals = [_refusal(one.model, images) for one, images in zip(opened, data, strict=True)]
    tallies = [_Tally() for _ in opened]
    total = min(wanted or len(data[0]), len(data[0]))
    for done, labels, outputs in _batches(opened, data, total, seed):
        answers = [None if why else output.argmax(1) for output, why in zip(outputs, refusals, strict=True)]
        for tally, output, own in zip(tallies, outputs, answers, strict=True):
            tally.add_outputs(outputs[0], output)
            tally.seen += len(labels)
            if own is None:
                continue
            right = own == labels
            tally.right += int(right.sum())
            if answers[0] is not None:
                also = answers[0] == labels
                tally.agreed += int((own == answers[0]).sum())
                tally.gained += int((right & ~also).sum())
                tally.lost += int((also & ~right).sum())
        progress("running all models", done, total)
    scored = [why is None and refusals[0] is None for why in refusals]
    return _Outcome(
        on=f"{total:,} images of {reference}",
        gaps=[None, *(tally.gap(scores) for tally, scores in zip(tallies[1:], scored[1:], strict=True))],
        accuracies=[
            _accuracy(tally, why, number, scored[number])
            for number, (tally, why) in enumerate(zip(tallies, refusals, strict=True))
        ],
        notes=[
            [*([] if why is None else [f"no accuracy: {why}"]), *([] if tally.note is None else [tally.note])]
            for tally, why in zip(tallies, refusals, strict=True)
        ],
        data=data[0].description,
        images=total if total < len(data[0]) else None,
    )


def _batches(
    opened: Sequence[OpenedModel], data: Sequence[LabelledImages], total: int, seed: int
) -> Iterator[tuple[int, Tensor, list[Any]]]:
    """How many images are done, their labels, and all models' outputs, batch by batch."""
    order = sorted(torch.randperm(len(data[0]), generator=seeded(seed)).tolist()[:total])
    largest = max(math.prod(one.preprocessing.size) for one in opened)
    batch = max(4, min(128, 2**20 // largest))
    # A generator of its own: the loader would otherwise draw from the global one.
    loaders = [DataLoader(Subset(one.images, order), batch, generator=torch.Generator()) for one in data]
    done = 0
    for together in zip(*loaders, strict=True):
        labels = together[0][1]
        done += len(labels)
        outputs = [_run(one, (images,)) for one, (images, _) in zip(opened, together, strict=True)]
        yield done, labels, outputs


def _refusal(model: nn.Module, data: LabelledImages) -> str | None:
    """Why the model's accuracy on the data cannot be told, if it cannot."""
    try:
        check_classifier(model, data)
    except SourceError as error:
        return str(error)
    return None


def _accuracy(tally: _Tally, refusal: str | None, number: int, paired: bool) -> Accuracy | None:
    if refusal is not None:
        return None
    top1 = tally.right / tally.seen
    if number == 0 or not paired:
        return Accuracy(top1)
    return Accuracy(top1, tally.gained, tally.lost, mcnemar_exact(tally.gained, tally.lost))
