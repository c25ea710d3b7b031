"""What a training run tells while it lasts and at its end: numbers and text, and who listens."""

from __future__ import annotations

from typing import Protocol

from asymswap.results.finetune import EpochRow, Outset, StepRow


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
