"""asymswap: surgery on trained CNNs.

Chosen `nn.Conv2d` layers become asymmetric convolutions initialised from the original weights. Importing this package
does not load torch; the public names below are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asymswap.api.benchmark import benchmark as benchmark
    from asymswap.api.candidates import candidates as candidates
    from asymswap.api.compare import compare as compare
    from asymswap.api.convert import Conversion as Conversion
    from asymswap.api.convert import convert as convert
    from asymswap.api.convert import plan as plan
    from asymswap.api.convert import save as save
    from asymswap.api.convert import write_report as write_report
    from asymswap.api.evaluate import evaluate as evaluate
    from asymswap.api.export import as_yolo as as_yolo
    from asymswap.api.export import export as export
    from asymswap.api.finetune import FineTuned as FineTuned
    from asymswap.api.finetune import finetune as finetune
    from asymswap.api.fuse import Fusion as Fusion
    from asymswap.api.fuse import fuse as fuse
    from asymswap.api.fuse import offsets as offsets
    from asymswap.api.fuse import save_fused as save_fused
    from asymswap.api.sweep import sweep as sweep
    from asymswap.calibration.config import Calibration as Calibration
    from asymswap.data.metrics import Metric as Metric
    from asymswap.errors import AsymswapError as AsymswapError
    from asymswap.measure.timing import Timing as Timing
    from asymswap.models.converted import load as load
    from asymswap.models.opened import OpenedModel as OpenedModel
    from asymswap.models.opening import open_model as open_model
    from asymswap.models.preprocessing import PreprocessingOptions as PreprocessingOptions
    from asymswap.training.config import Training as Training

__version__ = "0.1.0"

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

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'asymswap' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
