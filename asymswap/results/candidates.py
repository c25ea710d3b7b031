"""What could be done at each conv of a model."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.types import Candidate, Cost


@dataclass(frozen=True)
class Candidates:
    """Every Conv2d of a model, what could be saved at it, and what the candidates hold of the model's cost."""

    reference: str
    traced_by: str
    input: str
    rows: tuple[Candidate, ...]
    total: Cost
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def held(self) -> Cost:
        """The cost of all candidates together."""
        return sum((row.site.cost for row in self.rows if row.reason is None), start=Cost(0, 0))
