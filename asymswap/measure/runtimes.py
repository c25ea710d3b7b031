"""What runs a model: PyTorch as it is, torch.compile, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from asymswap.deploy.onnx_files import check_versions, feed, open_session, write_onnx
from asymswap.deploy.programs import failing_clearly, quiet, widest_gap
from asymswap.errors import AsymswapError
from asymswap.results.benchmark import TITLES
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import list_tensors

Runtime = Literal["eager", "compile", "onnx"]
RUNTIMES: tuple[Runtime, ...] = ("eager", "compile", "onnx")

Run = Callable[[], Any]
"""One forward pass."""

_MANY = 1 << 20
_NUMPY_HAS = (torch.float16, torch.float32, torch.float64)


def compiled(model: nn.Module, inputs: Inputs) -> Run:
    """The model compiled for these inputs' sizes and for the present number of threads; it must be in eval mode.

    Raises AsymswapError where it cannot be compiled.
    """
    run = torch.compile(model, dynamic=False)
    try:
        # One class of models is compiled once for each model, size and number of threads. Beyond a few torch would run
        # the others uncompiled, without a word.
        with quiet(), torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
            run(*inputs)
    except Exception as error:
        if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
            raise AsymswapError(
                "torch.compile finds no C++ compiler; install g++ or clang, or name it in CXX"
            ) from None
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise AsymswapError(f"torch.compile cannot compile it: {reason}") from error
    return lambda: run(*inputs)


def write_for_runtime(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write the ONNX file of a model in eval mode that takes any batch, as `asymswap export` does, but fusing nothing.

    Raises AsymswapError where the packages are missing or too old, or where ONNX cannot express the model.
    """
    check_versions()
    if any(isinstance(item, list) for item in inputs):
        raise AsymswapError("models that take lists of images are not exported to ONNX")
    dtypes = {tensor.dtype for tensor in list_tensors(inputs)}
    if not dtypes <= set(_NUMPY_HAS):
        raise AsymswapError(f"ONNX Runtime is not given {', '.join(_short(dtype) for dtype in dtypes)}")
    batch = torch.export.Dim("batch")
    write_onnx(model, inputs, tuple({0: batch} for _ in inputs), path)


def session_on(path: Path, inputs: Inputs, threads: int) -> Run:
    """An ONNX file in ONNX Runtime, with so many threads; raises AsymswapError where it cannot be loaded."""
    with failing_clearly("ONNX Runtime"):
        session = open_session(path, threads)
    values = feed(session, inputs)
    return lambda: [torch.as_tensor(value) for value in session.run(None, values)]


def check_same(found: Any, wanted: Any, runtime: Runtime) -> None:
    """Raise AsymswapError where a runtime has computed something else than PyTorch: its time would be worth nothing."""
    gap = widest_gap(wanted, found)
    if gap.share > 1:
        raise AsymswapError(
            f"{TITLES[runtime]} computes something else than PyTorch: {gap.largest:.1e} at most, where "
            f"{gap.allowed:.0e} are allowed"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
