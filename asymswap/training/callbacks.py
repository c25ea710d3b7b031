"""What a training run tells while it lasts and at its end: numbers and text, and who listens."""

from __future__ import annotations

from typing import Protocol

from asymswap.results.finetune import EpochRow, RunStart, StepRow


class Callback(Protocol):
    """Who is told of a run while it lasts."""

    def begin(self, outset: RunStart) -> None:
        """The run begins, or goes on."""

    def step(self, row: StepRow) -> None:
        """A step is done."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch is done and validated."""


class NoCallback:
    """The watcher that does nothing."""

    def begin(self, outset: RunStart) -> None:
        """Nothing."""

    def step(self, row: StepRow) -> None:
        """Nothing."""

    def epoch(self, row: EpochRow) -> None:
        """Nothing."""
