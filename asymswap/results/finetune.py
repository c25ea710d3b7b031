"""The report of a training run, and what it reports while it lasts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asymswap.results.convert import FileRow
from asymswap.types import Fed, Shown

Scores = Mapping[str, float]
"""By name: the mean `loss`, of classes also the fraction `top1`; or what the user's `evaluate` returned."""


@dataclass(frozen=True)
class _Run:
    """A training run: its model, data and settings (all that determines the result), and how long it was."""

    model: str = ""
    data: str = ""
    validation: str | None = None
    classes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    epochs: int = 0
    steps: int = 0
    best_epoch: int = 0


@dataclass(frozen=True)
class TrainingReport(_Run, Shown, view="screens.training_view"):
    """The report of a training run; its scores are on the validation images, None without validation."""

    before: Scores | None = None
    best: Scores | None = None  # of the weights that were kept
    last: Scores | None = None  # of the last epoch
    trained: int = 0  # parameters
    total: int = 0
    device: str = ""
    files: tuple[FileRow, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    fed: Fed | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingRecord(_Run):
    """A training run as the checkpoint records it; the defaults are for older files."""

    sha256: str | None = None  # of the file that was trained
    scores: Mapping[str, Scores | None] = field(default_factory=dict)  # `before`, `best` and `last`
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunStart:
    """A run before its next step: its length, the steps done, and the scores of the initial weights."""

    epochs: int
    steps: int
    done: int
    before: Scores | None
    note: str = ""


@dataclass(frozen=True)
class StepRow:
    """One step, counted from one, and the scores of the epoch so far."""

    epoch: int
    step: int
    train: Scores
    lr: float
    images_per_second: float
    unit: str = "images"  # or the samples or batches that are counted instead


@dataclass(frozen=True)
class EpochRow(StepRow):
    """One epoch, counted from one."""

    validation: Scores | None = None
    best: bool = False  # it is the best so far
    seconds: float = 0.0
    skipped: int = 0  # unreadable images
