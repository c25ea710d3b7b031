"""What a comparison found."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.results.benchmark import BenchmarkedModel
from asymswap.results.evaluate import AgainstFirst, Score
from asymswap.types import Fed, Ratio, Seconds, Shown


@dataclass(frozen=True)
class OutputGap:
    """Difference of a model's outputs from the first's, relative and at most.

    `agreement` is the fraction of images with the same predicted class; None if outputs are not scores.
    """

    relative: float
    largest: float
    agreement: float | None = None


@dataclass(frozen=True)
class ComparedRow(BenchmarkedModel):
    """One model and how it differs from the first; `weights_bytes` is the size of its tensors.

    `against_first`: of a classifier, on the same images.
    """

    weights_bytes: int = 0
    file_bytes: int | None = None
    latency: Seconds | None = None
    latency_ratio: Ratio | None = None
    gap: OutputGap | None = None
    scores: tuple[Score, ...] = ()
    against_first: AgainstFirst | None = None
    fed: Fed | None = None


@dataclass(frozen=True)
class TimingRow:
    """How latency was measured: all models in turn; `memory_format` is None for a runtime with its own."""

    memory_format: str | None
    batch: int
    threads: int
    machine: str
    rounds: int
    runtime: str = "torch"


@dataclass(frozen=True)
class Comparison(Shown, view="compare.comparison_view"):
    """Models compared with the first of them.

    `outputs_on` names the inputs on which outputs were compared, `data` what the scores were measured on.
    """

    asymswap: str
    models: tuple[ComparedRow, ...]
    outputs_on: str
    data: str | None = None
    images: int | None = None
    timing: TimingRow | None = None
    warnings: tuple[str, ...] = ()
