"""Runtimes: what networks run in once they are deployed. Each is one class; its outputs are checked against PyTorch's.

To add one, write a class with `open` and, for budgets of latency, `probe`, and give it a title in
`asymswap.results.benchmark`.
"""

import ast
import contextlib
import functools
import importlib
import io
import itertools
import json
import logging
import math
import re
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from asymswap.errors import AsymswapError, reason_of
from asymswap.graph.surgery import fold_norms, swap
from asymswap.measure.latency import FORMATS, Parts, Turn, in_format, inputs_like, parts_of, stopwatch, time_once
from asymswap.measure.timing import MemoryFormat, Timing
from asymswap.results.benchmark import TITLES, Setting
from asymswap.types import Progress, silent
from asymswap.utils.inputs import Inputs, placed
from asymswap.utils.tensors import deep_copy, device_of, list_tensors, on_threads

OPSET = 20
# Largest difference of outputs from PyTorch's, relative to the largest number among them, or to 1.
_SAME = 1e-4
_TELEMETRY = "openvino_telemetry"
_ACTIVATIONS = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid")
# Versions from which deformable convs are written and run on the CPU.
_ONNX = {"onnx": (1, 17), "onnxscript": (0, 7, 1)}
ONNX_RUNTIME = {**_ONNX, "onnxruntime": (1, 25)}
_MANY = 1 << 20
_ON_CPU = {"float16", "float32", "float64"}

Once = Callable[[], Any]  # one forward pass, which returns the outputs
Key = tuple[int, int]  # indices of a network and of a setting


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


def nodes_of(path: Path) -> Any:
    """Return the nodes of an ONNX file."""
    import onnx

    return onnx.load(str(path), load_external_data=False).graph.node


def open_session(
    path: Path, threads: int | None = None, profile: Path | None = None, provider: str = "CPUExecutionProvider"
) -> Any:
    """Return a file's InferenceSession; where `profile` begins a file name, it writes how long every operator takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads or 0
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=[provider])


def forward_in(session: Any, inputs: Inputs) -> Callable[[], Any]:
    """Return a function that runs the file on these inputs."""
    keys = [item.name for item in session.get_inputs()]
    values = {key: tensor.cpu().numpy() for key, tensor in zip(keys, list_tensors(inputs), strict=True)}
    return lambda: [torch.as_tensor(value) for value in session.run(None, values)]


def layers_of(path: Path, names: Collection[str]) -> dict[str, str]:
    """Return which of the named modules the nodes of an ONNX file, and the tensors that they make, belong to."""
    found: dict[str, str] = {}
    convs: dict[str, str] = {}
    for node in nodes_of(path):
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


def widest_gap(expected: Any, found: Any) -> tuple[float, float]:
    """Return the difference of the output that is farthest from PyTorch's, and what is allowed there.

    That is `_SAME`, or more for a coarse dtype. The difference may be NaN, and is infinite where outputs do not match.
    """
    ours, theirs = list_tensors(expected), list_tensors(found)
    if [one.shape for one in ours] != [other.shape for other in theirs]:
        return math.inf, _SAME
    gaps = [(0.0, _SAME)]
    for one, other in zip(ours, theirs, strict=True):
        if one.numel():
            precision = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
            exact = one.double()
            largest, scale = float((exact - other.double()).abs().max()), float(exact.abs().max())
            allowed = max(_SAME, 8 * precision) * max(1.0, scale)
            gaps.append((largest, allowed if math.isfinite(largest) else _SAME))
    return max(gaps, key=lambda gap: gap[0] / gap[1] if math.isfinite(gap[0]) else math.inf)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters and compilers, which log their internals; checks follow."""
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()), ExitStack() as ending:
        ending.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        yield


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
        # OpenVINO says first where in its own code it was, and last what it does not know.
        lines = [line for line in str(cause).strip().splitlines() if not line.startswith(("Exception from", "Check '"))]
        unknown = [line for line in lines if "No conversion rule" in line]
        reason = reason_of(" ".join((unknown or lines)[:1]), 200) or type(cause).__name__
        raise AsymswapError(f"{what} cannot express this model{where}: {reason} (`debug=True` shows more)") from error


class Network:
    """A network as it is deployed: in eval mode, its batch norms folded where that computes the same.

    Of the `example`, one input, only sizes count. `folder` is where its ONNX file is written, once for all settings.
    """

    def __init__(self, model: nn.Module, example: Inputs, folder: Path, dtype: torch.dtype | None = None) -> None:
        self._model, self._example, self._folder, self.dtype = model, example, folder, dtype
        self._copies: dict[tuple[MemoryFormat, str], nn.Module] = {}
        self.exporting = 0.0  # seconds that it took to write the ONNX file
        # As detectors do: which boxes they keep jumps where scores are close.
        self.takes_lists = any(isinstance(item, list) for item in example)

    @functools.cached_property
    def _folded(self) -> nn.Module:
        model = self._model if device_of(self._model).type == "cpu" else deep_copy(self._model).to("cpu")
        plain, folded = swap(model, {}, share=True).eval(), fold_norms(model, self._example)
        if self.takes_lists or not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            return folded
        inputs = inputs_like(self._example, "contiguous")
        with torch.inference_mode():
            largest, allowed = widest_gap(plain(*inputs), folded(*inputs))
        return folded if largest <= allowed else plain

    def placed(self, setting: Setting) -> tuple[nn.Module, Inputs]:
        """Return the network on a device in a memory format, and random inputs, the same ones every time."""
        form: MemoryFormat = "channels-last" if setting.memory_format == "channels-last" else "contiguous"
        place = form, setting.device
        if place not in self._copies:
            # A copy is only made where something changes: networks to be timed may share their weights.
            fits = all(
                one.device == torch.device(setting.device)
                and (self.dtype in (None, one.dtype) or not one.is_floating_point())
                and (one.dim() != 4 or one.is_contiguous(memory_format=FORMATS[form]))
                for one in (*self._folded.parameters(), *self._folded.buffers())
            )
            self._copies[place] = self._folded if fits else in_format(self._folded, form).to(setting.device, self.dtype)
        model = self._copies[place]
        return model, placed(model, inputs_like(self._example, form, setting.batch))

    @functools.cached_property
    def _file(self) -> Path | AsymswapError:
        """The network's ONNX file, or why it has none."""
        start, path = time.perf_counter(), self._folder / f"{id(self)}.onnx"
        # With a single image, the batch would count as a number that never varies.
        model, inputs = self.placed(Setting("", 2, 1, None))
        if self.takes_lists:
            return AsymswapError("models that take lists of images are not exported to ONNX")
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in list_tensors(inputs)}
        if not dtypes <= _ON_CPU:
            return AsymswapError(f"ONNX is not given {', '.join(sorted(dtypes))} here")
        try:
            write_onnx(model, inputs, ({0: torch.export.Dim("batch")},) * len(inputs), path)
        except AsymswapError as error:
            return error
        self.exporting = time.perf_counter() - start
        return path

    def onnx(self) -> Path:
        """Return the ONNX file, for any batch size, written at the first call; raise AsymswapError if impossible."""
        if isinstance(self._file, AsymswapError):
            raise self._file
        return self._file


class Runtime(ABC):
    """Where networks run."""

    name: ClassVar[str]
    extra: ClassVar[str] = ""  # of asymswap, which installs it
    needs: ClassVar[Mapping[str, tuple[int, ...]]] = {}  # packages, each with its lowest version
    pool: ClassVar[str] = "torch"  # the library whose threads compute
    has_formats: ClassVar[bool] = False  # the memory format of weights and inputs is the caller's to choose
    takes_time: ClassVar[bool] = True  # to make a network ready
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    @property
    def title(self) -> str:
        return TITLES[self.name]

    def version(self) -> str:
        """Return the package in which networks run, and its version; raise AsymswapError where one is missing."""
        return [f"torch {torch.__version__}", *check_installed(self.title, self.extra, self.needs)][-1]

    def setting(self, timing: Timing) -> Setting:
        """Return the setting in this runtime that a timing asks for."""
        form = timing.memory_format if self.has_formats else None
        return Setting(self.name, timing.batch, timing.threads or torch.get_num_threads(), form, device=timing.device)

    def prepare(self, network: Network, setting: Setting) -> Turn:
        """Make a network ready, and check once that it computes what it does in PyTorch; raise AsymswapError if not."""
        version = self.version()
        if torch.device(setting.device).type not in self.devices:
            raise AsymswapError(f"{self.title} runs on {' and '.join(self.devices)} here, not on {setting.device}")
        module, inputs = network.placed(setting)
        with on_threads(setting.threads):
            with torch.inference_mode():
                expected = module(*inputs)
            start, exported = time.perf_counter(), network.exporting
            once, precision = self.open(network, setting)
            ready = time.perf_counter() - start + exported if self.takes_time else None
            if not network.takes_lists:
                with torch.inference_mode():
                    self.check(network, setting, once, expected)
        version += f" (in {precision})" if precision else ""
        return Turn(stopwatch(once, setting.device), setting.threads, self.pool, version=version, ready=ready)

    @abstractmethod
    def open(self, network: Network, setting: Setting) -> tuple[Once, str]:
        """Return a function of one pass, which returns its outputs, and the precision if it is not the network's."""

    def check(self, network: Network, setting: Setting, once: Once, expected: Any) -> None:
        """Raise AsymswapError where the outputs are not PyTorch's: the time would mean nothing."""
        largest, allowed = widest_gap(expected, once())
        if not largest <= allowed:
            what = f"{self.title} computes something else than PyTorch"
            raise AsymswapError(f"{what}: {largest:.1e} at most, where {allowed:.0e} are allowed")

    def probe(self, network: Network, setting: Setting, names: Sequence[str]) -> Turn:
        """Return a turn that measures the named modules in the running network; raise AsymswapError if impossible."""
        raise AsymswapError(
            f"{self.title} does not tell the time of single layers, which a budget of latency needs; give another "
            "`runtime=…`"
        )


class Torch(Runtime):
    """PyTorch as it is; layers are timed by hooks, which take some microseconds each."""

    name = "torch"
    devices = ("cpu", "cuda", "mps")
    has_formats = True
    takes_time = False

    def open(self, network: Network, setting: Setting) -> tuple[Once, str]:
        module, inputs = network.placed(setting)
        return (lambda: module(*inputs)), ""

    def probe(self, network: Network, setting: Setting, names: Sequence[str]) -> Turn:
        return Turn(functools.partial(time_once, *network.placed(setting), names), setting.threads, self.pool)


class Compile(Runtime):
    """torch.compile, in its default mode, for each size, memory format and number of threads."""

    name = "compile"
    devices = ("cpu", "cuda", "mps")
    has_formats = True

    def open(self, network: Network, setting: Setting) -> tuple[Once, str]:
        model, inputs = network.placed(setting)
        run = torch.compile(model, dynamic=False)
        # A class is compiled for each model, size and number of threads. Beyond a few torch would silently run the
        # others uncompiled.
        without_limit = torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY)
        try:
            with torch.inference_mode(), quiet(), without_limit:
                run(*inputs)
        except Exception as error:
            if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
                raise AsymswapError("torch.compile finds no C++ compiler; install g++ or clang, or set CXX") from None
            raise AsymswapError(f"torch.compile cannot compile it: {reason_of(error, 200)}") from error
        return (lambda: run(*inputs)), ""


class OnnxRuntime(Runtime):
    """ONNX Runtime on the file of `asymswap export`; its own profiler times layers."""

    name = pool = "onnxruntime"
    extra, needs = "onnx", ONNX_RUNTIME
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    providers: ClassVar[Mapping[str, str]] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

    def provider(self, device: str) -> str:
        """Return what runs a file there; raise AsymswapError where this onnxruntime has no such thing."""
        import onnxruntime

        found = self.providers[torch.device(device).type]
        if found not in onnxruntime.get_available_providers():
            raise AsymswapError(f"this onnxruntime has no {found}; pip install onnxruntime-gpu in its place")
        return found

    def _session(self, path: Path, setting: Setting, profile: Path | None = None) -> Any:
        with failing_clearly(self.title):
            return open_session(path, setting.threads, profile, self.provider(setting.device))

    def open(self, network: Network, setting: Setting) -> tuple[Once, str]:
        return forward_in(self._session(network.onnx(), setting), network.placed(setting)[1]), ""

    def probe(self, network: Network, setting: Setting, names: Sequence[str]) -> Turn:
        path = network.onnx()
        owners, session = layers_of(path, names), self._session(path, setting, path.with_suffix(""))
        run, number = forward_in(session, network.placed(setting)[1]), itertools.count()

        def measure() -> int:
            run()
            return next(number)

        @functools.cache
        def passes() -> list[Parts]:
            found, seconds = list[Parts](), dict.fromkeys(names, 0.0)
            for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
                if event["name"] == "model_run":
                    found.append(parts_of(1e-6 * event["dur"], seconds))
                    seconds = dict.fromkeys(names, 0.0)
                elif event["name"].endswith("_kernel_time"):
                    # What it has fused goes by the name of a node, or of the tensor that comes out last.
                    node = event["name"].removeprefix("fused ").removesuffix("_kernel_time").removesuffix("_nchwc")
                    if node in owners:
                        seconds[owners[node]] += 1e-6 * event["dur"]
            return found

        return Turn(measure, setting.threads, self.pool, lambda place: passes()[place])


class TensorRt(OnnxRuntime):
    """TensorRT, as a part of ONNX Runtime, on the same file; the copies to and from the GPU count."""

    name = "tensorrt"
    devices = ("cuda",)
    providers: ClassVar[Mapping[str, str]] = {"cuda": "TensorrtExecutionProvider"}

    def version(self) -> str:
        found = super().version()
        self.provider("cuda")
        return found


class OpenVino(Runtime):
    """OpenVINO on the processor, on the same file, made for one batch size; it tells the time of each layer.

    Without a dtype that is asked for it computes in the precision that it chooses, which may be bfloat16.
    """

    name = pool = "openvino"
    extra, needs = "openvino", {**_ONNX, "openvino": (2025, 4)}

    def open(self, network: Network, setting: Setting) -> tuple[Once, str]:
        once, program, _ = self._compiled(network, setting, exact=network.dtype is not None)
        precision = program.get_property("INFERENCE_PRECISION_HINT").to_string()
        return once, {"bf16": "bfloat16", "f16": "float16"}.get(precision, "")

    def check(self, network: Network, setting: Setting, once: Once, expected: Any) -> None:
        # bfloat16 has rounding errors that say nothing about the program.
        super().check(network, setting, self._compiled(network, setting, exact=True)[0], expected)

    def probe(self, network: Network, setting: Setting, names: Sequence[str]) -> Turn:
        owners = layers_of(network.onnx(), names)
        once, program, request = self._compiled(network, setting, network.dtype is not None, PERF_COUNT=True)
        parts: dict[str, str] = {}
        for node in program.get_runtime_model().get_ordered_ops():
            was = node.get_rt_info()
            fused = str(was["originalLayersNames"].value).split(",") if "originalLayersNames" in was else []
            parts |= {node.get_friendly_name(): owners[name] for name in fused[::-1] if name in owners}

        def measure() -> Parts:
            start = time.perf_counter()
            once()
            whole, seconds = time.perf_counter() - start, dict.fromkeys(names, 0.0)
            for node in request.get_profiling_info():
                if node.node_name in parts:
                    seconds[parts[node.node_name]] += node.real_time.total_seconds()
            return parts_of(whole, seconds)

        return Turn(measure, setting.threads, self.pool)

    def _compiled(self, network: Network, setting: Setting, exact: bool, **more: Any) -> tuple[Once, Any, Any]:
        with quiet(), failing_clearly(self.title):
            core, inputs = imported("openvino").Core(), list_tensors(network.placed(setting)[1])
            model = core.read_model(network.onnx())
            model.reshape({one: list(tensor.shape) for one, tensor in zip(model.inputs, inputs, strict=True)})
            config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": setting.threads, **more}
            if exact:
                config["INFERENCE_PRECISION_HINT"] = "f16" if network.dtype == torch.float16 else "f32"
            program = core.compile_model(model, "CPU", config)
            request, values = program.create_infer_request(), [tensor.numpy() for tensor in inputs]

        def once() -> Any:
            request.infer(values, share_inputs=True)
            return [torch.as_tensor(output.data) for output in request.output_tensors]

        return once, program, request


RUNTIMES: Mapping[str, Runtime] = {kind.name: kind() for kind in (Torch, Compile, OnnxRuntime, TensorRt, OpenVino)}


def installed(names: Sequence[str]) -> list[str]:
    """Return those of these runtimes that are installed."""
    found = []
    for name in names:
        with contextlib.suppress(AsymswapError):
            RUNTIMES[name].version()
            found.append(name)
    return found


def prepare_all(
    networks: Sequence[Network], settings: Sequence[Setting], progress: Progress = silent
) -> tuple[dict[Key, Turn], dict[Key, str]]:
    """Make all networks ready in all settings; return those that are, and the reasons of the others."""
    runs: dict[Key, Turn] = {}
    failures: dict[Key, str] = {}
    keys = list(itertools.product(range(len(settings)), range(len(networks))))
    for done, (place, number) in enumerate(keys):
        progress("making ready", done, len(keys))
        setting = settings[place]
        try:
            runs[number, place] = RUNTIMES[setting.runtime].prepare(networks[number], setting)
        except AsymswapError as error:
            failures[number, place] = " ".join(str(error).split())
        except Exception as error:
            # The model's code can raise anything, and torch has no error of its own for a lack of memory.
            no_memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
            why = f"the model fails with {type(error).__name__}: {reason_of(error, 200)}"
            failures[number, place] = "there is not enough memory" if no_memory else why
    return runs, failures
