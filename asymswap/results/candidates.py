"""What could be done at each conv of a model."""

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
        known, held, total = plain(self), self.held, self.total
        sums = {
            "convs": sum(row.reason is None for row in self.rows),
            **plain(held),
            "macs_share": held.macs / total.macs if total.macs else 0.0,
            "params_share": held.params / total.params if total.params else 0.0,
        }
        sites = [
            {**row.pop("site"), "cost": plain(one.site.cost), "candidate": one.reason is None, **row}
            for row, one in zip(known.pop("rows"), self.rows, strict=True)
        ]
        return {"model": known.pop("reference"), **known, "candidates": sums, "sites": sites}
