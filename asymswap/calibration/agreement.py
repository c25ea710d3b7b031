"""What models are measured by on held-back inputs without labels: how far they answer as a first one does.

Of a network that makes images more is known where the right ones are: before noise was added to them, or in `pairs:`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from asymswap.calibration.config import Calibration, OutputKind
from asymswap.calibration.gather import output_kind
from asymswap.data.datasets import paired_files
from asymswap.data.inputs import Batches, held_back_of, open_inputs, settle_on
from asymswap.data.metrics import Evaluator, Measured, Pairs, Steps, paired_kind, psnr
from asymswap.errors import AsymswapError, SourceError
from asymswap.graph.trace import Trace
from asymswap.measure.fidelity import WHOLE, compared_parts, measure_agreement
from asymswap.models.opened import OpenedModel
from asymswap.results.evaluate import Agreement, Score
from asymswap.utils.inputs import Inputs, copied, output_of, samples_in, samples_of

MEASURED = 4096  # samples to hold back where a loss of tenths of a point is to be seen; a half at most
_VALUES = 512  # samples of which values are compared, at most: each says more than the class of a sample does


class Against(Evaluator):
    """Compares models with a first one; each gets the held-back inputs in its own preprocessing."""

    def __init__(
        self, first: OpenedModel, calibration: Calibration, traced: Trace | None = None, kind: OutputKind | None = None
    ) -> None:
        self._first = first.model
        self._parts = WHOLE if traced is None else compared_parts(traced)
        held_back = _held_back(first, calibration)
        kind = kind or calibration.outputs or output_kind(first.model, lambda: enumerate(held_back))[0]
        self._scores = kind == "scores"
        self._held_back = self._own = held_back if self._scores else _some(held_back)
        self.description, self.images = self._held_back.description, self._held_back.count
        self._seen: dict[int, Any] = {}  # the first network's outputs

    def first_batch(self) -> Inputs:
        """Return the first held-back inputs, as the model gets them."""
        return self._own.load(0)

    @staticmethod
    def first_of(opened: Sequence[OpenedModel], data: Any) -> tuple[list[OpenedModel], list[Evaluator]]:
        """Return opened models with their preprocessing settled on the data, and what compares each with the first."""
        if len(opened) < 2:
            raise AsymswapError("there is nothing to agree with: give the original first, then the models to compare")
        calibration = data if isinstance(data, Calibration) else Calibration(data)
        models = [settle_on(one, calibration.given()) for one in opened]
        first = Against(models[0], calibration)
        others = [copy.copy(first) for _ in models[1:]]
        for other, model in zip(others, models[1:], strict=True):
            held_back = _held_back(model, calibration)
            other._own = held_back if first._scores else _some(held_back)
        return models, [first, *others]

    def agreement(self, model: nn.Module, progress: Steps) -> Agreement:
        """Return how far a model agrees with the first one."""
        # Networks that take other sizes get batches of other lengths.
        alike = self._held_back.counts == self._own.counts
        both = (one if alike else _singly(one) for one in (self._held_back, self._own))
        count, pairs = min(self._held_back.count, self._own.count), zip(*both, strict=alike)
        step = lambda done: progress(done, count)  # noqa: E731
        seen = self._seen if alike else {}  # which are of whole batches
        outputs = measure_agreement(self._first, model, pairs, self._scores, self._parts, step, seen)
        return Agreement(self.description, count, outputs)

    def measured(self, model: nn.Module, progress: Steps) -> Measured:
        found, scores = self.agreement(model, progress).outputs, []
        for one in found:
            name = f"{one.output} " if len(found) > 1 else ""
            if one.measure in ("top-1", "cosine"):
                what = "agreement" if one.measure == "top-1" else "cosine"
                scores.append(Score(f"{name}{what}", one.value, "%", interval=one.interval))
            else:  # also of images: decibels between equal ones have no best value
                scores.append(Score(f"{name}output error", one.relative, "%", lower_is_better=True))
        return Measured(tuple(scores))


class Restored(Evaluator):
    """PSNR of a network that takes noise out of images, on held-back ones: without the noise they are the right ones.

    Outputs are taken to be normalised as the inputs are, and are clamped to 0 to 1, as by `Pairs`.
    """

    def __init__(self, opened: OpenedModel, calibration: Calibration) -> None:
        without = replace(calibration, noise=None)
        noisy, clean = (_some(_held_back(opened, one)) for one in (calibration, without))
        self._batches = list(zip(noisy, clean, strict=True))
        known, self.images = opened.preprocessing, noisy.count
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (known.mean, known.std))
        self.description = noisy.description

    def suits(self, model: nn.Module) -> bool:
        """Return True if the network makes images of the size of its inputs."""
        (noisy, (clean,)) = self._batches[0]
        output = output_of(model, copied(noisy))
        return isinstance(output, Tensor) and isinstance(clean, Tensor) and output.shape == clean.shape

    def measured(self, model: nn.Module, progress: Steps) -> Measured:
        each: list[float] = []
        for noisy, (clean,) in self._batches:
            images, right = (one.cpu() * self._std + self._mean for one in (output_of(model, copied(noisy)), clean))
            each += psnr(images.clamp(0, 1), right)
            progress(len(each), self.images or 0)
        return Measured((Score("PSNR", sum(each) / len(each), "dB"),), tuple(each))


def on_held_back(opened: OpenedModel, calibration: Calibration, traced: Trace | None, unit: str = "") -> Evaluator:
    """Return what measures models on held-back inputs: PSNR where the right images are known, else the agreement.

    With the unit `%` errors of outputs are measured, even there.
    """
    given = calibration.given()
    reference = None if unit == "%" else given.reference
    in_pairs = paired_kind(reference or opened.model) == "pairs"
    if reference is not None and given.patches.noise and not in_pairs:
        restored = Restored(opened, calibration)
        if restored.suits(opened.model):
            return restored
    if reference is not None and in_pairs and not given.patches.noise:
        held_back = held_back_of(len(paired_files(reference)), given)[0][:_VALUES]
        # A network may take images of its own size alone, or make other ones than those.
        with contextlib.suppress(SourceError):
            Pairs(reference, opened.preprocessing, chosen=held_back[:1])(opened.model, lambda *_: None)
            return Pairs(reference, opened.preprocessing, chosen=held_back)
    return Against(opened, calibration, traced)


def _held_back(opened: OpenedModel, calibration: Calibration) -> Batches:
    return open_inputs(opened, calibration.given(), 1, memory_gib=calibration.memory_gib)[1]


def _singly(batches: Batches) -> Iterator[Inputs]:
    return (samples_of(batch, n, n + 1) for batch in batches for n in range(samples_in(batch)))


def _some(batches: Batches) -> Batches:
    """Return the first batches that hold enough samples to compare values."""
    enough = next((n for n, total in enumerate(accumulate(batches.counts), 1) if total >= _VALUES), len(batches.counts))
    return replace(batches, counts=batches.counts[:enough])
