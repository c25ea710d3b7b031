"""asymswap: surgery on trained CNNs.

Chosen `nn.Conv2d` layers become asymmetric convolutions initialised from the original weights. Importing this package
loads no torch; the public verbs below do so when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asymswap.api import Calibration, Conversion, Timing, candidates, convert, load, plan, save
    from asymswap.errors import AsymswapError

__all__ = [
    "AsymswapError",
    "Calibration",
    "Conversion",
    "Timing",
    "__version__",
    "candidates",
    "convert",
    "load",
    "plan",
    "save",
]

_HOMES = dict.fromkeys(
    ("Calibration", "Conversion", "Timing", "candidates", "convert", "load", "plan", "save"), "asymswap.api"
)
_HOMES["AsymswapError"] = "asymswap.errors"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'asymswap' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
