"""How a file was made, as it is written into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asymswap.results.fuse import FusionRow


@dataclass(frozen=True)
class Making:
    """The recipe's text, what was changed of it, the command line and versions; what was fused since, if anything.

    `command` is empty where the conversion was asked for from Python.
    """

    recipe: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[FusionRow, ...] = ()
