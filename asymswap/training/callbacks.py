"""What a training run calls while it lasts."""

from __future__ import annotations

from asymswap.results.finetune import EpochRow, RunStart, StepRow


class Callback:
    """Follows a training run; override what you need. In a team only the first process calls `step` and `epoch`."""

    def begin(self, start: RunStart) -> None:
        """Called before the next step of a run, new or resumed."""

    def step(self, row: StepRow) -> None:
        """Called after a step."""

    def epoch(self, row: EpochRow) -> None:
        """Called after an epoch and its validation."""
