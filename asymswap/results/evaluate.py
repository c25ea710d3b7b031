"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.types import Fed, Shown


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
    """A model compared with the first on the same images.

    `agreement` is the fraction of images with the same predicted class, `only_first` and `only_this` the numbers of
    images that only one of them gets right, `p` the p-value of McNemar's exact two-sided test.
    """

    agreement: float
    only_first: int
    only_this: int
    p: float


@dataclass(frozen=True)
class ModelScores:
    """One model: fractions of images, mean loss, and images a second.

    `interval` is Wilson's 95 % interval of top-1; `top5` is None for five classes or fewer.
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
class EvaluationReport(Shown, view="screens.evaluation_view"):
    """All models on the same images, without the `unreadable` ones."""

    data: str
    images: int
    unreadable: int
    batch: int
    device: str
    models: tuple[ModelScores, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
