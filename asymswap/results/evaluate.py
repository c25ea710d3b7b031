"""What an evaluation or a comparison found, and how far one network answers as another."""

from dataclasses import dataclass
from typing import Literal

from asymswap.results.benchmark import BenchmarkedModel, Setting
from asymswap.types import Fed, Ratio, Seconds, Shown


@dataclass(frozen=True)
class Score:
    """What a metric gave for a model; with the unit `%` a fraction, which is shown in per cent."""

    name: str
    value: float
    unit: str = ""
    lower_is_better: bool = False
    interval: tuple[float, float] | None = None  # 95 % confidence, of an agreement


@dataclass(frozen=True)
class OutputAgreement:
    """How far one output of two networks agrees on inputs without labels."""

    output: str  # its name, empty if it is the only one
    # `top-1` is the fraction of samples, or of pixels, with the same class; `cosine` the mean cosine of the angle
    # between embeddings; `PSNR` decibels between images of this `peak`; `relative error` is `relative`.
    measure: Literal["top-1", "cosine", "PSNR", "relative error"]
    value: float
    relative: float  # the norm of the difference over the norm of the first network's output
    interval: tuple[float, float] | None = None  # Wilson's of 95 %, of top-1
    peak: float | None = None


@dataclass(frozen=True)
class Agreement:
    """How far two networks agree on `samples` held-back inputs, output by output."""

    inputs: str
    samples: int
    outputs: tuple[OutputAgreement, ...]


@dataclass(frozen=True)
class ClassRow:
    """The number of images of one class, and of those that the model gets right."""

    name: str
    images: int
    right: int


@dataclass(frozen=True)
class ConfusionRow:
    """The number of images of one class that were taken for another."""

    of: str
    taken_for: str
    images: int


@dataclass(frozen=True)
class AgainstFirst:
    """A model compared with the first on the same images."""

    agreement: float  # the fraction of images with the same predicted class
    only_first: int  # images that only the first gets right
    only_this: int
    p: float  # of McNemar's exact two-sided test


@dataclass(frozen=True)
class Classification:
    right: int
    interval: tuple[float, float]  # Wilson's of 95 %, of top-1
    loss: float  # the mean
    images_per_second: float
    outputs: int  # classes that the model scores
    classes: tuple[ClassRow, ...]
    confusions: tuple[ConfusionRow, ...]
    against_first: AgainstFirst | None = None


@dataclass(frozen=True)
class ModelScores:
    """One model: its scores, for a classifier top-1 and, of more than five classes, top-5."""

    model: str
    scores: tuple[Score, ...]
    classifier: Classification | None = None
    fed: Fed | None = None


@dataclass(frozen=True)
class EvaluationReport(Shown, view="screens.evaluation_view"):
    """All models on the same images, without the `unreadable` ones; a metric of the user's has its own images."""

    data: str
    images: int | None
    unreadable: int
    batch: int
    device: str
    models: tuple[ModelScores, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


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
class Comparison(Shown, view="screens.comparison_view"):
    """Models compared with the first of them."""

    asymswap: str
    models: tuple[ComparedRow, ...]
    outputs_on: str  # the inputs on which outputs were compared
    data: str | None = None  # what the scores were measured on
    images: int | None = None
    timing: TimingRow | None = None
    warnings: tuple[str, ...] = ()
