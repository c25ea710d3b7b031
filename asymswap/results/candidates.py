"""What could be done at each conv of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asymswap.results.records import plain
from asymswap.types import Candidate, Cost, Shown


@dataclass(frozen=True)
class Candidates(Shown, view="candidates.candidates_view"):
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

    def to_plain(self) -> dict[str, Any]:
        """Return everything that is known of each conv, and the sums over the candidates, as plain data."""
        held, total = self.held, self.total
        sums = {
            "convs": sum(row.reason is None for row in self.rows),
            **plain(held),
            "macs_share": held.macs / total.macs if total.macs else 0.0,
            "params_share": held.params / total.params if total.params else 0.0,
        }
        sites = [
            {
                **plain(row.site),
                "cost": plain(row.site.cost),
                "candidate": row.reason is None,
                **{name: plain(getattr(row, name)) for name in ("reason", "break_even", "half", "kind", "becomes")},
            }
            for row in self.rows
        ]
        known = {name: plain(getattr(self, name)) for name in ("warnings", "traced_by", "input", "notes", "total")}
        return {"model": self.reference, **known, "candidates": sums, "sites": sites}
