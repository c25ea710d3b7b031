"""Agreement as an evaluator: how far models answer as a first one does, on held-back inputs without labels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from asymswap.calibration.config import Calibration, OutputKind
from asymswap.calibration.gather import output_kind
from asymswap.data.inputs import Batches, open_inputs, settle_on
from asymswap.data.metrics import Evaluator, Steps
from asymswap.data.normalization import Feeding
from asymswap.errors import AsymswapError
from asymswap.graph.trace import Trace
from asymswap.measure.agreement import measure_agreement
from asymswap.measure.fidelity import WHOLE, compared_parts
from asymswap.models.opened import OpenedModel
from asymswap.results.agreement import Agreement, OutputAgreement
from asymswap.results.evaluate import Score


class Against(Evaluator):
    """Compares models with a first one; each gets the held-back inputs in its own preprocessing."""

    def __init__(
        self, first: OpenedModel, calibration: Calibration, traced: Trace | None = None, kind: OutputKind | None = None
    ) -> None:
        self._first, self._given = first.model, calibration.given()
        self._held_back = self._own = self._batches(first)
        self._parts = WHOLE if traced is None else compared_parts(traced)
        kind = kind or calibration.outputs or output_kind(first.model, lambda: enumerate(self._held_back))[0]
        self._scores = kind == "scores"
        self.description, self.images = self._held_back.description, self._held_back.count

    def _batches(self, opened: OpenedModel) -> Batches:
        return open_inputs(opened, self._given, 1)[1]

    def of(self, opened: OpenedModel) -> Against:
        """Return the same for a model that takes its inputs in its own preprocessing."""
        other = copy.copy(self)
        other._own = self._batches(opened)
        return other

    @staticmethod
    def first_of(
        opened: Sequence[OpenedModel], data: Any
    ) -> tuple[list[OpenedModel], list[Feeding | None], list[Against]]:
        """Return opened models with their preprocessing settled on the data, and what compares each with the first."""
        if len(opened) < 2:
            raise AsymswapError("there is nothing to agree with: give the original first, then the models to compare")
        calibration = data if isinstance(data, Calibration) else Calibration(data)
        settled = [settle_on(one, calibration.given()) for one in opened]
        first = Against(settled[0][0], calibration)
        models = [one for one, _ in settled]
        return models, [feeding for _, feeding in settled], [first, *map(first.of, models[1:])]

    def agreement(self, model: nn.Module, progress: Steps) -> Agreement:
        """Return how far a model agrees with the first one."""
        count, pairs = self._held_back.count, zip(self._held_back, self._own, strict=True)
        step = lambda done: progress(done, count)  # noqa: E731
        outputs = measure_agreement(self._first, model, pairs, self._scores, self._parts, step)
        return Agreement(self.description, count, outputs)

    def __call__(self, model: nn.Module, progress: Steps) -> tuple[Score, ...]:
        found = self.agreement(model, progress).outputs
        return tuple(_score(one, f"{one.output} " if len(found) > 1 else "") for one in found)


def _score(one: OutputAgreement, name: str) -> Score:
    """Return the figure of an output that has a best value: decibels between equal images have none."""
    if one.measure == "top-1":
        return Score(f"{name}agreement", one.value, "%", interval=one.interval)
    if one.measure == "cosine":
        return Score(f"{name}cosine", one.value)
    return Score(f"{name}output error", one.relative, "%", lower_is_better=True)
