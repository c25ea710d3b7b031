"""What a training run tells while it lasts and at its end: numbers and text, and who listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Scores:
    """The mean loss on some images, and the fraction of them whose highest score is their class's."""

    loss: float
    top1: float


@dataclass(frozen=True)
class Outset:
    """A run before its next step: how long it is, how much of it is done, and how good the weights were at first."""

    epochs: int
    steps: int
    done: int
    before: Scores | None


@dataclass(frozen=True)
class StepRow:
    """One step: its number from one on, in which epoch, and how the images of the epoch went until now."""

    epoch: int
    step: int
    train: Scores
    lr: float
    images_per_second: float


@dataclass(frozen=True)
class EpochRow:
    """One epoch, from one on; `skipped` counts images that could not be read, `best` says whether it is so far."""

    epoch: int
    step: int
    train: Scores
    validation: Scores | None
    best: bool
    lr: float
    images_per_second: float
    seconds: float
    skipped: int = 0


class Watcher(Protocol):
    """Who is told of a run while it lasts."""

    def begin(self, outset: Outset) -> None:
        """The run begins, or goes on."""

    def step(self, row: StepRow) -> None:
        """A step is done."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch is done and validated."""


class Unwatched:
    """The watcher that does nothing."""

    def begin(self, outset: Outset) -> None:
        """Nothing."""

    def step(self, row: StepRow) -> None:
        """Nothing."""

    def epoch(self, row: EpochRow) -> None:
        """Nothing."""
