"""ONNX files of models, and ONNX Runtime to run them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from asymswap.deploy.programs import failing_clearly, quiet
from asymswap.errors import AsymswapError
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import list_tensors

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_NEEDED = {"onnx": (1, 17), "onnxscript": (0, 7, 1), "onnxruntime": (1, 25)}
"""Versions from which deformable convs are written and run on the processor."""

OPSET = 20


def write_onnx(model: nn.Module, inputs: Inputs, shapes: tuple[dict[int, Any], ...], path: Path) -> None:
    """Write a model in eval mode, and have the file checked; `shapes` says of each input which sizes may vary.

    Raises AsymswapError where ONNX cannot express it.
    """
    import onnx

    with quiet(), failing_clearly("ONNX"):
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[f"input_{number}" for number in range(len(inputs))] if len(inputs) > 1 else ["input"],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        program.save(str(path))
        onnx.checker.check_model(str(path), full_check=True)


def open_session(path: Path, threads: int | None = None) -> InferenceSession:
    """The file in ONNX Runtime on the processor, with so many threads; otherwise with as many as it likes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(session: InferenceSession, inputs: Inputs) -> dict[str, Any]:
    """The inputs under the names that the file gives them."""
    keys = [item.name for item in session.get_inputs()]
    return {key: tensor.numpy() for key, tensor in zip(keys, list_tensors(inputs), strict=True)}


def check_versions() -> tuple[str, ...]:
    """Raise AsymswapError where what ONNX needs is missing or too old; else the names and versions."""
    found = []
    for name, needed in _NEEDED.items():
        try:
            version = importlib.import_module(name).__version__
        except ImportError:
            raise AsymswapError(f"ONNX needs {name}; pip install 'asymswap[onnx]'") from None
        if _numbers(version) < needed:
            wanted = ".".join(map(str, needed))
            raise AsymswapError(f"{name} {version} is too old for ONNX, which needs {wanted}; pip install -U {name}")
        found.append(f"{name} {version}")
    return tuple(found)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:3]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)
