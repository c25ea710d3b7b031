"""Agreement as an evaluator: how far models answer as a first one does, on held-back inputs without labels."""

from __future__ import annotations

import copy

from torch import nn

from asymswap.calibration.config import Calibration, OutputKind
from asymswap.calibration.gather import output_kind
from asymswap.data.inputs import Batches, open_inputs
from asymswap.data.metrics import Evaluator, Steps
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
        return Score(f"{name}agreement", one.value, "%")
    if one.measure == "cosine":
        return Score(f"{name}cosine", one.value)
    return Score(f"{name}output error", one.relative, "%", lower_is_better=True)
