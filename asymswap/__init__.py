"""asymswap: surgery on trained CNNs.

Chosen `nn.Conv2d` layers become asymmetric convolutions initialised from the original weights. Importing this package
loads no torch; the public verbs below do so when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asymswap.api import (
        Calibration,
        Conversion,
        FineTuned,
        Fusion,
        PreprocessingOptions,
        Timing,
        Training,
        candidates,
        convert,
        evaluate,
        finetune,
        fuse,
        load,
        plan,
        save,
        save_fused,
    )
    from asymswap.benchmarking import benchmark
    from asymswap.comparison import compare
    from asymswap.deploy.export import export
    from asymswap.deploy.offsets import offsets
    from asymswap.errors import AsymswapError
    from asymswap.reports import write_report
    from asymswap.tradeoff import sweep

__all__ = [
    "AsymswapError",
    "Calibration",
    "Conversion",
    "FineTuned",
    "Fusion",
    "PreprocessingOptions",
    "Timing",
    "Training",
    "__version__",
    "benchmark",
    "candidates",
    "compare",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "fuse",
    "load",
    "offsets",
    "plan",
    "save",
    "save_fused",
    "sweep",
    "write_report",
]

_HOMES = dict.fromkeys(__all__, "asymswap.api") | {
    "AsymswapError": "asymswap.errors",
    "benchmark": "asymswap.benchmarking",
    "compare": "asymswap.comparison",
    "export": "asymswap.deploy.export",
    "offsets": "asymswap.deploy.offsets",
    "sweep": "asymswap.tradeoff",
    "write_report": "asymswap.reports",
}
del _HOMES["__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'asymswap' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
