"""What a comparison found."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.results.benchmark import BenchmarkedModel, Setting
from asymswap.results.evaluate import AgainstFirst, Score
from asymswap.types import Fed, Ratio, Seconds, Shown


@dataclass(frozen=True)
class OutputGap:
    """Difference of a model's outputs from the first's."""

    relative: float
    largest: float
    agreement: float | None = None  # the fraction of images with the same predicted class, where outputs are scores


@dataclass(frozen=True)
class ComparedRow(BenchmarkedModel):
    """One model and how it differs from the first."""

    weights_bytes: int = 0  # of the tensors
    file_bytes: int | None = None
    latency: Seconds | None = None
    latency_ratio: Ratio | None = None
    gap: OutputGap | None = None
    scores: tuple[Score, ...] = ()
    against_first: AgainstFirst | None = None  # of a classifier, on the same images
    fed: Fed | None = None


@dataclass(frozen=True)
class TimingRow(Setting):
    """How latency was measured: all models in turn."""

    machine: str
    rounds: int


@dataclass(frozen=True)
class Comparison(Shown, view="compare.comparison_view"):
    """Models compared with the first of them."""

    asymswap: str
    models: tuple[ComparedRow, ...]
    outputs_on: str  # the inputs on which outputs were compared
    data: str | None = None  # what the scores were measured on
    images: int | None = None
    timing: TimingRow | None = None
    warnings: tuple[str, ...] = ()
