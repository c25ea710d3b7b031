"""Runtimes: PyTorch as it is, torch.compile, ONNX Runtime; programs are checked against PyTorch."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from asymswap.errors import AsymswapError
from asymswap.results.benchmark import TITLES
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import list_tensors

Runtime = Literal["eager", "compile", "onnx"]
RUNTIMES: tuple[Runtime, ...] = ("eager", "compile", "onnx")

Run = Callable[[], Any]
"""One forward pass."""

OPSET = 20
SAME = 1e-4
"""Largest difference of a program's outputs from PyTorch's, relative to the largest number among them, or to 1.

Eight times the precision of the output's dtype, if that is more.
"""

_MANY = 1 << 20
# Versions from which deformable convs are written and run on the CPU.
_NEEDED = {"onnx": (1, 17), "onnxscript": (0, 7, 1), "onnxruntime": (1, 25)}


def compiled(model: nn.Module, inputs: Inputs) -> Run:
    """Compile a model in eval mode for these input sizes and the current number of threads, or raise AsymswapError."""
    run = torch.compile(model, dynamic=False)
    try:
        # A class is compiled for each model, size and number of threads. Beyond a few torch would silently run the
        # others uncompiled.
        with quiet(), torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
            run(*inputs)
    except Exception as error:
        if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
            raise AsymswapError("torch.compile finds no C++ compiler; install g++ or clang, or set CXX") from None
        raise AsymswapError(f"torch.compile cannot compile it: {_one_line(error)}") from error
    return lambda: run(*inputs)


def write_for_runtime(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write the ONNX file of a model in eval mode, unfused, for any batch size; raise AsymswapError if impossible."""
    check_versions()
    if any(isinstance(item, list) for item in inputs):
        raise AsymswapError("models that take lists of images are not exported to ONNX")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in list_tensors(inputs)}
    if not dtypes <= {"float16", "float32", "float64"}:
        raise AsymswapError(f"ONNX Runtime is not given {', '.join(dtypes)}")
    batch = torch.export.Dim("batch")
    write_onnx(model, inputs, tuple({0: batch} for _ in inputs), path)


def write_onnx(model: nn.Module, inputs: Inputs, shapes: tuple[dict[int, Any], ...], path: Path) -> None:
    """Write a model in eval mode and check the file; `shapes` are the dynamic sizes of each input."""
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


def open_session(path: Path, threads: int | None = None) -> Any:
    """Return an InferenceSession of a file on the CPU, by default with its own number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def forward_in(session: Any, inputs: Inputs) -> Run:
    """Return a function that runs the file on these inputs."""
    keys = [item.name for item in session.get_inputs()]
    values = {key: tensor.numpy() for key, tensor in zip(keys, list_tensors(inputs), strict=True)}
    return lambda: [torch.as_tensor(value) for value in session.run(None, values)]


def session_on(path: Path, inputs: Inputs, threads: int) -> Run:
    """Open an ONNX file for these inputs on a number of threads, or raise AsymswapError."""
    with failing_clearly("ONNX Runtime"):
        session = open_session(path, threads)
    return forward_in(session, inputs)


def check_versions() -> tuple[str, ...]:
    """Return the packages that ONNX needs, with their versions; raise AsymswapError for one missing or too old."""
    found = []
    for name, needed in _NEEDED.items():
        try:
            version = importlib.import_module(name).__version__
        except ImportError:
            raise AsymswapError(f"ONNX needs {name}; pip install 'asymswap[onnx]'") from None
        parts = version.split("+")[0].split(".")[:3]
        if tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts) < needed:
            lowest = ".".join(map(str, needed))
            raise AsymswapError(f"{name} {version} is too old for ONNX, which needs {lowest}; pip install -U {name}")
        found.append(f"{name} {version}")
    return tuple(found)


@dataclass(frozen=True)
class Gap:
    """The largest difference between an output of a program and PyTorch's, and the largest that is allowed."""

    largest: float
    allowed: float

    @property
    def share(self) -> float:
        """The difference as a share of what is allowed; infinite for NaN and infinity."""
        return self.largest / self.allowed if math.isfinite(self.largest) else math.inf


def widest_gap(expected: Any, found: Any) -> Gap:
    """Return the gap of the output that is farthest from PyTorch's, as a share of what is allowed there."""
    ours, theirs = list_tensors(expected), list_tensors(found)
    if [one.shape for one in ours] != [other.shape for other in theirs]:
        return Gap(math.inf, SAME)
    gaps = []
    for one, other in zip(ours, theirs, strict=True):
        if one.numel():
            precision = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
            exact = one.double()
            largest, scale = float((exact - other.double()).abs().max()), float(exact.abs().max())
            gaps.append(Gap(largest, max(SAME, 8 * precision) * max(1.0, scale)))
    return max(gaps, key=lambda gap: gap.share, default=Gap(0.0, SAME))


def check_same(found: Any, expected: Any, runtime: Runtime) -> None:
    """Raise AsymswapError where a runtime computes something else than PyTorch: its time would mean nothing."""
    gap = widest_gap(expected, found)
    if gap.share > 1:
        raise AsymswapError(
            f"{TITLES[runtime]} computes something else than PyTorch: {gap.largest:.1e} at most, where "
            f"{gap.allowed:.0e} are allowed"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters and compilers, which log their internals; checks follow."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def failing_clearly(what: str) -> Iterator[None]:
    """Turn any failure of `what` into an AsymswapError of one line."""
    try:
        yield
    except (AsymswapError, OSError):
        raise
    except Exception as error:
        # An exporter may fail in any of its many passes, with any error.
        raise AsymswapError(
            f"{what} cannot express this model: {_one_line(error)} (`debug=True` shows where)"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
