"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.types import Fed


@dataclass(frozen=True)
class ClassRow:
    """One class: its images, and how many of them the model gets right."""

    name: str
    images: int
    right: int


@dataclass(frozen=True)
class ConfusionRow:
    """So many images of a class were taken for another."""

    of: str
    taken_for: str
    images: int


@dataclass(frozen=True)
class AgainstFirst:
    """A model beside the first on the same images.

    `agreement` is the fraction of images that both give the same class; `only_first` and `only_this` are right of the
    one alone; `p` is McNemar's exact two-sided one.
    """

    agreement: float
    only_first: int
    only_this: int
    p: float


@dataclass(frozen=True)
class ModelScores:
    """One model: fractions of images, its mean loss, and images a second through its forward passes.

    `interval` is Wilson's of top-1 at 95 %; `top5` is None where the model has five classes or fewer.
    """

    model: str
    top1: float
    right: int
    interval: tuple[float, float]
    top5: float | None
    loss: float
    images_per_second: float
    scores: int
    classes: tuple[ClassRow, ...]
    confusions: tuple[ConfusionRow, ...]
    against_first: AgainstFirst | None = None
    fed: Fed | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """All models on the same images; `unreadable` ones are left out, `batch` is that of the forward passes.

    `warnings` is what a reader must know before any figure.
    """

    data: str
    images: int
    unreadable: int
    batch: int
    device: str
    models: tuple[ModelScores, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
