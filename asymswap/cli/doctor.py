"""`asymswap doctor`: what a maintainer needs to know of a machine, for an issue."""

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

import typer

from asymswap.cli import options as o
from asymswap.planning import shipped

_PACKAGES = (
    "asymswap", "torch", "torchvision", "numpy", "safetensors", "pydantic", "typer", "rich", "timm", "transformers",
    "ultralytics", "onnx", "onnxscript", "onnxruntime", "openvino", "torchmetrics", "matplotlib",
)  # fmt: skip


def doctor(common: o.Common = o.PRINTING) -> None:
    """Example: asymswap doctor"""
    import torch

    from asymswap.measure.latency import machine
    from asymswap.measure.runtimes import RUNTIMES, installed
    from asymswap.planning.latency_budget import cache_folder

    known, versions = machine(), dict.fromkeys(_PACKAGES, "-")
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    found = {
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "processor": f"{known['processor']}, {known['cores']} cores, {known['threads']} threads",
        "GPUs": ", ".join(known["gpus"]) or "none that torch sees",
        "runtimes": ", ".join(installed(list(RUNTIMES))),
        **versions,
        "recipes": str(shipped.shipped_folder()),
        "published weights": str(Path(torch.hub.get_dir()) / "checkpoints"),
        "latency cache": str(cache_folder()),
        "variables": " ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith(("OMP_", "TORCH_"))) or "none",
    }
    if common.json:
        o.print_json(found)
    elif not common.quiet:
        typer.echo("\n".join(f"{name:<18}{value}" for name, value in found.items()))
