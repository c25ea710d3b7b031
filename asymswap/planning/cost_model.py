"""What sites and their options cost by the measure of a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from asymswap.types import Cost, Option, Site


class Prices(Protocol):
    """Prices in whole units, of which a budget may be spent."""

    @property
    def what(self) -> str:
        """What is counted, for a message: `MACs`, `parameters`, `latency`."""

    @property
    def total(self) -> int:
        """What the whole model costs before."""

    def keep(self, site: Site) -> int:
        """What a site costs as it is."""

    def option(self, site: Site, kind: str, option: Option) -> int:
        """What it costs when it is swapped so."""


@dataclass(frozen=True)
class Counted:
    """MACs or parameters; `whole` is the cost of the model."""

    measure: Literal["macs", "params"]
    whole: Cost

    @property
    def what(self) -> str:
        return "MACs" if self.measure == "macs" else "parameters"

    @property
    def total(self) -> int:
        return self._of(self.whole)

    def keep(self, site: Site) -> int:
        return self._of(site.cost)

    def option(self, site: Site, kind: str, option: Option) -> int:  # noqa: ARG002 (other prices depend on these)
        return self._of(option.cost)

    def _of(self, cost: Cost) -> int:
        return int(getattr(cost, self.measure))
