"""asymswap: surgery on trained CNNs.

Chosen `nn.Conv2d` layers become asymmetric convolutions initialised from the original weights. Importing this package
does not load torch; the public names below are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asymswap.api.benchmark import benchmark
    from asymswap.api.candidates import candidates
    from asymswap.api.compare import compare
    from asymswap.api.convert import Conversion, convert, plan, save, write_report
    from asymswap.api.evaluate import evaluate
    from asymswap.api.export import as_yolo, export
    from asymswap.api.finetune import FineTuned, finetune
    from asymswap.api.fuse import Fusion, fuse, offsets, save_fused
    from asymswap.api.sweep import sweep
    from asymswap.calibration.config import Calibration
    from asymswap.data.metrics import Metric
    from asymswap.errors import AsymswapError
    from asymswap.measure.timing import Timing
    from asymswap.models.converted import load
    from asymswap.models.opened import OpenedModel
    from asymswap.models.opening import open_model
    from asymswap.models.preprocessing import PreprocessingOptions
    from asymswap.training.config import Training

__version__ = "0.2.0"

_HOMES = {
    "api.benchmark": ["benchmark"],
    "api.candidates": ["candidates"],
    "api.compare": ["compare"],
    "api.convert": ["Conversion", "convert", "plan", "save", "write_report"],
    "api.evaluate": ["evaluate"],
    "api.export": ["as_yolo", "export"],
    "api.finetune": ["FineTuned", "finetune"],
    "api.fuse": ["Fusion", "fuse", "offsets", "save_fused"],
    "api.sweep": ["sweep"],
    "calibration.config": ["Calibration"],
    "data.metrics": ["Metric"],
    "errors": ["AsymswapError"],
    "models.converted": ["load"],
    "models.opened": ["OpenedModel"],
    "models.opening": ["open_model"],
    "models.preprocessing": ["PreprocessingOptions"],
    "measure.timing": ["Timing"],
    "training.config": ["Training"],
}
_MODULES = {name: f"asymswap.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "AsymswapError", "Calibration", "Conversion", "FineTuned", "Fusion", "Metric", "OpenedModel",
    "PreprocessingOptions", "Timing", "Training", "__version__", "as_yolo", "benchmark", "candidates", "compare",
    "convert", "evaluate", "export", "finetune", "fuse", "load", "offsets", "open_model", "plan", "save",
    "save_fused", "sweep", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'asymswap' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
