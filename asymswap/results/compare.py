"""What a comparison found."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.results.benchmark import BenchmarkedModel
from asymswap.types import Fed, Ratio, Seconds


@dataclass(frozen=True)
class OutputGap:
    """How far a model's outputs are from those of the first, relative and at most.

    `agreement` is the fraction of images whose highest score is the same class's; None where outputs are no scores.
    """

    relative: float
    largest: float
    agreement: float | None = None


@dataclass(frozen=True)
class Accuracy:
    """Top-1 as a fraction; how many images only this model gets right, and how many only the first does.

    `p_value` is that of McNemar's exact test: how likely so uneven a split is between two equally good models.
    """

    top1: float
    gained: int | None = None
    lost: int | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class ComparedRow(BenchmarkedModel):
    """One model and how it differs from the first; `weights_bytes` is the size of its tensors."""

    weights_bytes: int = 0
    file_bytes: int | None = None
    latency: Seconds | None = None
    latency_ratio: Ratio | None = None
    gap: OutputGap | None = None
    accuracy: Accuracy | None = None
    fed: Fed | None = None


@dataclass(frozen=True)
class TimingRow:
    """How latency was measured: all models in turn."""

    memory_format: str
    batch: int
    threads: int
    machine: str
    rounds: int


@dataclass(frozen=True)
class Comparison:
    """Everything that is known of the models, the first of which the others are compared with.

    `outputs_on` says on what the outputs were compared, `data` on which images accuracy was measured; `warnings` is
    what a reader must know before any figure.
    """

    asymswap: str
    models: tuple[ComparedRow, ...]
    outputs_on: str
    data: str | None = None
    images: int | None = None
    timing: TimingRow | None = None
    warnings: tuple[str, ...] = ()
