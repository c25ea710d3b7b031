"""asymswap: surgery on trained CNNs.

Chosen `nn.Conv2d` layers become asymmetric convolutions initialised from the original weights. Importing this package
loads no torch; the public verbs below do so when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asymswap.api.benchmark import benchmark
    from asymswap.api.candidates import candidates
    from asymswap.api.compare import compare
    from asymswap.api.convert import Conversion, convert, plan, save, write_report
    from asymswap.api.evaluate import evaluate
    from asymswap.api.export import export
    from asymswap.api.finetune import FineTuned, finetune
    from asymswap.api.fuse import Fusion, fuse, save_fused
    from asymswap.api.load import load
    from asymswap.api.offsets import offsets
    from asymswap.api.sweep import sweep
    from asymswap.calibration.config import Calibration
    from asymswap.errors import AsymswapError
    from asymswap.models.opened import OpenedModel
    from asymswap.models.opening import open_model
    from asymswap.models.preprocessing import PreprocessingOptions
    from asymswap.planning.latency_budget import Timing
    from asymswap.training.config import Training

__all__ = [
    "AsymswapError",
    "Calibration",
    "Conversion",
    "FineTuned",
    "Fusion",
    "OpenedModel",
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
    "open_model",
    "plan",
    "save",
    "save_fused",
    "sweep",
    "write_report",
]

_HOMES = {
    "benchmark": "asymswap.api.benchmark",
    "candidates": "asymswap.api.candidates",
    "compare": "asymswap.api.compare",
    "Conversion": "asymswap.api.convert",
    "convert": "asymswap.api.convert",
    "plan": "asymswap.api.convert",
    "save": "asymswap.api.convert",
    "evaluate": "asymswap.api.evaluate",
    "export": "asymswap.api.export",
    "FineTuned": "asymswap.api.finetune",
    "finetune": "asymswap.api.finetune",
    "Fusion": "asymswap.api.fuse",
    "fuse": "asymswap.api.fuse",
    "save_fused": "asymswap.api.fuse",
    "load": "asymswap.api.load",
    "offsets": "asymswap.api.offsets",
    "write_report": "asymswap.api.convert",
    "sweep": "asymswap.api.sweep",
    "Calibration": "asymswap.calibration.config",
    "AsymswapError": "asymswap.errors",
    "OpenedModel": "asymswap.models.opened",
    "open_model": "asymswap.models.opening",
    "PreprocessingOptions": "asymswap.models.preprocessing",
    "Timing": "asymswap.planning.latency_budget",
    "Training": "asymswap.training.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'asymswap' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
