"""What sites and their options cost by the measure of a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from asymswap.errors import RecipeError
from asymswap.planning.recipe import Budget
from asymswap.types import Cost, Option, Site


class CostModel(Protocol):
    """Costs in whole units of what a budget bounds."""

    @property
    def what(self) -> str:
        """What is counted, for a message: `MACs`, `parameters`, `latency`."""

    @property
    def total(self) -> int:
        """The cost of the whole original model."""

    def keep(self, site: Site) -> int:
        """Return the cost of a site as it is."""

    def option(self, site: Site, kind: str, option: Option) -> int:
        """Return the cost of a site that is swapped so."""


@dataclass(frozen=True)
class CountedCost:
    """MACs or parameters; `whole` is the cost of the model."""

    measure: Literal["macs", "params"]
    whole: Cost

    @classmethod
    def of(cls, budget: Budget | None, whole: Cost) -> CountedCost:
        """Return the cost model of a budget; raises RecipeError for one of latency."""
        measure = "macs" if budget is None else budget.measure
        if measure == "latency":
            raise RecipeError("a budget of latency needs measuring: use asymswap.convert")
        return cls(measure, whole)

    @property
    def what(self) -> str:
        return "MACs" if self.measure == "macs" else "parameters"

    @property
    def total(self) -> int:
        return int(getattr(self.whole, self.measure))

    def keep(self, site: Site) -> int:
        return int(getattr(site.cost, self.measure))

    def option(self, site: Site, kind: str, option: Option) -> int:  # noqa: ARG002 (other cost models need these)
        return int(getattr(option.cost, self.measure))
