"""Models as programs of other libraries: writing ONNX, opening it, and comparing outputs with PyTorch's."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymswap.errors import AsymswapError, reason_of
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import list_tensors

OPSET = 20
SAME = 1e-4
"""Largest difference of a program's outputs from PyTorch's, relative to the largest number among them, or to 1.

Eight times the precision of the output's dtype, if that is more.
"""

_TELEMETRY = "openvino_telemetry"
_ACTIVATIONS = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid")
# Versions from which deformable convs are written and run on the CPU.
ONNX = {"onnx": (1, 17), "onnxscript": (0, 7, 1)}
ONNX_RUNTIME = {**ONNX, "onnxruntime": (1, 25)}


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


def open_session(path: Path, threads: int | None = None, profile: Path | None = None) -> Any:
    """Return an InferenceSession of a file on the CPU, by default with its own number of threads.

    With `profile`, the beginning of a file name, it writes how long every operator takes.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def forward_in(session: Any, inputs: Inputs) -> Callable[[], Any]:
    """Return a function that runs the file on these inputs."""
    keys = [item.name for item in session.get_inputs()]
    values = {key: tensor.numpy() for key, tensor in zip(keys, list_tensors(inputs), strict=True)}
    return lambda: [torch.as_tensor(value) for value in session.run(None, values)]


def layers_of(path: Path, names: Collection[str]) -> dict[str, str]:
    """Return which of the named modules the nodes of an ONNX file, and the tensors that they make, belong to."""
    import onnx

    found: dict[str, str] = {}
    convs: dict[str, str] = {}
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        scopes = next((item.value for item in node.metadata_props if item.key.endswith(".name_scopes")), "[]")
        owner = next((scope for scope in ast.literal_eval(scopes) if scope in names), None)
        if owner is not None:
            found |= dict.fromkeys((node.name, *node.output), owner)
            convs |= dict.fromkeys(node.output, owner) if node.op_type == "Conv" else {}
        elif node.op_type in _ACTIVATIONS and node.input[0] in convs:
            # Fused with the conv before it, this tensor names both.
            found[node.output[0]] = convs[node.input[0]]
    return found


def imported(name: str) -> Any:
    """Import a package, OpenVINO without its telemetry: each import would fork this process, to tell its makers."""
    modules: dict[str, Any] = sys.modules  # where None stands for a package that is not to be found
    kept = modules.setdefault(_TELEMETRY, None)
    try:
        return importlib.import_module(name)
    finally:
        if kept is None:
            del modules[_TELEMETRY]


def check_installed(what: str, extra: str, needed: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the packages that `what` needs, with their versions; raise AsymswapError for one missing or too old."""
    found = []
    for name, lowest in needed.items():
        try:
            with quiet():
                version = re.split("[-+]", imported(name).__version__)[0]
        except ImportError:
            raise AsymswapError(f"{what} needs {name}; pip install 'asymswap[{extra}]'") from None
        if tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:3]) < lowest:
            least = ".".join(map(str, lowest))
            raise AsymswapError(f"{name} {version} is too old for {what}, which needs {least}; pip install -U {name}")
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
        # An exporter may fail in any of its many passes, with any error; what it wraps says why.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        operator = re.search(r"target=torch\.ops\.([\w.]+)\]", str(cause.__context__ or error))
        where = "" if operator is None else f", at the operator {operator[1]}"
        reason = reason_of(str(cause).strip().partition("\n")[0], 200) if str(cause) else type(cause).__name__
        raise AsymswapError(f"{what} cannot express this model{where}: {reason} (`debug=True` shows more)") from error
