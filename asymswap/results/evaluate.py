"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.types import Fed, Shown


@dataclass(frozen=True)
class Score:
    """What a metric gave for a model; with the unit `%` a fraction, which is shown in per cent.

    `interval`: 95 % confidence, of an agreement.
    """

    name: str
    value: float
    unit: str = ""
    lower_is_better: bool = False
    interval: tuple[float, float] | None = None


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
class Classification:
    """More about a classifier: the images that it gets right, the mean loss, and images a second.

    `interval` is Wilson's 95 % interval of top-1, `outputs` the number of classes that the model scores.
    """

    right: int
    interval: tuple[float, float]
    loss: float
    images_per_second: float
    outputs: int
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
