"""Runtimes: what networks run in once they are deployed. Each is one class; its outputs are checked against PyTorch's.

To add one, write a class with `open` and, for budgets of latency, `probe`, and give it a title in
`asymswap.results.benchmark`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from asymswap.errors import AsymswapError, reason_of
from asymswap.graph.surgery import fold_norms, swap
from asymswap.measure import programs
from asymswap.measure.latency import Timed, Turn, in_format, inputs_like, is_in_format, stopwatch, time_once
from asymswap.measure.programs import failing_clearly, quiet, widest_gap
from asymswap.measure.timing import MemoryFormat, Timing
from asymswap.results.benchmark import TITLES, Setting
from asymswap.types import Progress, silent
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import deep_copy, list_tensors, map_tensors

Once = Callable[[], Any]
"""One forward pass, which returns the outputs."""

Key = tuple[int, int]
"""Indices of a network and of a setting."""

_MANY = 1 << 20
_ON_CPU = {"float16", "float32", "float64"}


class Network:
    """A network as it is deployed: in eval mode on the processor, its batch norms folded where that computes the same.

    Of the `example`, one input, only sizes count. `folder` is where its ONNX file is written, once for all settings.
    """

    def __init__(self, model: nn.Module, example: Inputs, folder: Path, dtype: torch.dtype | None = None) -> None:
        self._model, self._example, self._folder, self.dtype = model, example, folder, dtype
        self._copies: dict[MemoryFormat, nn.Module] = {}
        self._written: float | AsymswapError | None = None

    @property
    def takes_lists(self) -> bool:
        """True for detectors: which boxes they keep jumps where scores are close."""
        return any(isinstance(item, list) for item in self._example)

    @functools.cached_property
    def _folded(self) -> nn.Module:
        elsewhere = any(parameter.device.type != "cpu" for parameter in self._model.parameters())
        model = deep_copy(self._model).to("cpu") if elsewhere else self._model
        plain, folded = swap(model, {}, share=True).eval(), fold_norms(model, self._example)
        if self.takes_lists or not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            return folded
        inputs = inputs_like(self._example, "contiguous")
        with torch.inference_mode():
            return folded if widest_gap(plain(*inputs), folded(*inputs)).share <= 1 else plain

    def placed(self, setting: Setting) -> tuple[nn.Module, Inputs]:
        """Return the network in a memory format, and random inputs, the same ones every time."""
        form: MemoryFormat = "channels-last" if setting.memory_format == "channels-last" else "contiguous"
        if form not in self._copies:
            ready = is_in_format(self._folded, form, self.dtype)
            # A copy is only made where something changes: networks to be timed may share their weights.
            self._copies[form] = self._folded if ready else in_format(self._folded, form).to("cpu", self.dtype)
        example: Inputs = map_tensors(
            self._example, lambda one: one.to(self.dtype or one.dtype) if one.is_floating_point() else one
        )
        return self._copies[form], inputs_like(example, form, setting.batch)

    def onnx(self) -> Path:
        """Write the network's ONNX file, for any batch size, unless it is there; raise AsymswapError if impossible."""
        path = self._folder / f"{id(self)}.onnx"
        if self._written is None:
            start = time.perf_counter()
            try:
                # With a single image, the batch would count as a number that never varies.
                model, inputs = self.placed(Setting("", 2, 1, None))
                if self.takes_lists:
                    raise AsymswapError("models that take lists of images are not exported to ONNX")
                dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in list_tensors(inputs)}
                if not dtypes <= _ON_CPU:
                    raise AsymswapError(f"ONNX is not given {', '.join(sorted(dtypes))} here")
                batch = torch.export.Dim("batch")
                programs.write_onnx(model, inputs, tuple({0: batch} for _ in inputs), path)
                self._written = time.perf_counter() - start
            except AsymswapError as error:
                self._written = error
        if isinstance(self._written, AsymswapError):
            raise self._written
        return path

    @property
    def exporting(self) -> float:
        """The seconds that it took to write the ONNX file; 0 where there is none."""
        return self._written if isinstance(self._written, float) else 0.0


@dataclass(frozen=True)
class Run:
    """A network that is ready: its turn, which measures seconds, in what it runs, and how long it took to make."""

    turn: Turn
    version: str
    ready: float | None = None


class Runtime(ABC):
    """Where networks run."""

    name: ClassVar[str]
    extra: ClassVar[str] = ""
    """The extra of asymswap that installs it."""
    needs: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """The packages that it needs, each with its lowest version."""
    pool: ClassVar[str] = "torch"
    """The library whose threads compute."""
    has_formats: ClassVar[bool] = False
    """True if the memory format of weights and inputs is the caller's to choose."""
    takes_time: ClassVar[bool] = True
    """True if it takes long to make a network ready."""

    @property
    def title(self) -> str:
        return TITLES[self.name]

    def version(self) -> str:
        """Return the package in which networks run, and its version; raise AsymswapError where one is missing."""
        return [f"torch {torch.__version__}", *programs.check_installed(self.title, self.extra, self.needs)][-1]

    def setting(self, timing: Timing) -> Setting:
        """Return the setting in this runtime that a timing asks for."""
        form = timing.memory_format if self.has_formats else None
        return Setting(self.name, timing.batch, timing.threads or torch.get_num_threads(), form)

    def prepare(self, network: Network, setting: Setting) -> Run:
        """Make a network ready, and check once that it computes what it does in PyTorch; raise AsymswapError if not."""
        version = self.version()
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
        return Run(Turn(stopwatch(once), setting.threads, self.pool), version, ready)

    @abstractmethod
    def open(self, network: Network, setting: Setting) -> tuple[Once, str]:
        """Return a function of one pass, which returns its outputs, and the precision if it is not the network's."""

    def check(self, network: Network, setting: Setting, once: Once, expected: Any) -> None:
        """Raise AsymswapError where the outputs are not PyTorch's: the time would mean nothing."""
        gap = widest_gap(expected, once())
        if gap.share > 1:
            raise AsymswapError(
                f"{self.title} computes something else than PyTorch: {gap.largest:.1e} at most, where "
                f"{gap.allowed:.0e} are allowed"
            )

    def probe(self, network: Network, setting: Setting, names: Sequence[str]) -> Turn:
        """Return a turn that measures the named modules in the running network; raise AsymswapError if impossible."""
        raise AsymswapError(
            f"{self.title} does not tell the time of single layers, which a budget of latency needs; give another "
            "`runtime=…`"
        )


class Torch(Runtime):
    """PyTorch as it is; layers are timed by hooks, which take some microseconds each."""

    name = "torch"
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
    has_formats = True

    def open(self, network: Network, setting: Setting) -> tuple[Once, str]:
        with torch.inference_mode():
            return compiled(*network.placed(setting)), ""


class OnnxRuntime(Runtime):
    """ONNX Runtime on the file of `asymswap export`; its own profiler times layers."""

    name = pool = "onnxruntime"
    extra, needs = "onnx", programs.ONNX_RUNTIME

    def open(self, network: Network, setting: Setting) -> tuple[Once, str]:
        with failing_clearly(self.title):
            session = programs.open_session(network.onnx(), setting.threads)
        return programs.forward_in(session, network.placed(setting)[1]), ""

    def probe(self, network: Network, setting: Setting, names: Sequence[str]) -> Turn:
        path = network.onnx()
        owners = programs.layers_of(path, names)
        with failing_clearly(self.title):
            session = programs.open_session(path, setting.threads, profile=path.with_suffix(""))
        run, number = programs.forward_in(session, network.placed(setting)[1]), itertools.count()

        def measure() -> int:
            run()
            return next(number)

        @functools.cache
        def passes() -> list[Timed]:
            found, seconds = list[Timed](), dict.fromkeys(names, 0.0)
            for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
                if event["name"] == "model_run":
                    found.append(Timed.of(1e-6 * event["dur"], seconds))
                    seconds = dict.fromkeys(names, 0.0)
                elif event["name"].endswith("_kernel_time"):
                    # What it has fused goes by the name of a node, or of the tensor that comes out last.
                    node = event["name"].removeprefix("fused ").removesuffix("_kernel_time").removesuffix("_nchwc")
                    if node in owners:
                        seconds[owners[node]] += 1e-6 * event["dur"]
            return found

        return Turn(measure, setting.threads, self.pool, lambda place: passes()[place])


class OpenVino(Runtime):
    """OpenVINO on the processor, on the same file, made for one batch size; it tells the time of each layer.

    Without a dtype that is asked for it computes in the precision that it chooses, which may be bfloat16.
    """

    name = pool = "openvino"
    extra, needs = "openvino", {**programs.ONNX, "openvino": (2025, 4)}

    def open(self, network: Network, setting: Setting) -> tuple[Once, str]:
        once, program, _ = self._compiled(network, setting, exact=network.dtype is not None)
        precision = program.get_property("INFERENCE_PRECISION_HINT").to_string()
        return once, {"bf16": "bfloat16", "f16": "float16"}.get(precision, "")

    def check(self, network: Network, setting: Setting, once: Once, expected: Any) -> None:
        # bfloat16 has rounding errors that say nothing about the program.
        super().check(network, setting, self._compiled(network, setting, exact=True)[0], expected)

    def probe(self, network: Network, setting: Setting, names: Sequence[str]) -> Turn:
        owners = programs.layers_of(network.onnx(), names)
        once, program, request = self._compiled(network, setting, network.dtype is not None, PERF_COUNT=True)
        parts: dict[str, str] = {}
        for node in program.get_runtime_model().get_ordered_ops():
            was = node.get_rt_info()
            fused = str(was["originalLayersNames"].value).split(",") if "originalLayersNames" in was else []
            parts |= {node.get_friendly_name(): owners[name] for name in fused[::-1] if name in owners}

        def measure() -> Timed:
            start = time.perf_counter()
            once()
            whole, seconds = time.perf_counter() - start, dict.fromkeys(names, 0.0)
            for node in request.get_profiling_info():
                if node.node_name in parts:
                    seconds[parts[node.node_name]] += node.real_time.total_seconds()
            return Timed.of(whole, seconds)

        return Turn(measure, setting.threads, self.pool)

    def _compiled(self, network: Network, setting: Setting, exact: bool, **more: Any) -> tuple[Once, Any, Any]:
        with quiet(), failing_clearly(self.title):
            core, inputs = programs.imported("openvino").Core(), list_tensors(network.placed(setting)[1])
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


RUNTIMES: Mapping[str, Runtime] = {kind.name: kind() for kind in (Torch, Compile, OnnxRuntime, OpenVino)}


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
) -> tuple[dict[Key, Run], dict[Key, str]]:
    """Make all networks ready in all settings; return those that are, and the reasons of the others."""
    runs: dict[Key, Run] = {}
    failures: dict[Key, str] = {}
    keys = list(itertools.product(range(len(settings)), range(len(networks))))
    for done, (place, number) in enumerate(keys):
        progress("making ready", done, len(keys))
        setting = settings[place]
        try:
            runs[number, place] = RUNTIMES[setting.runtime].prepare(networks[number], setting)
        except Exception as error:
            # The model's code can raise anything.
            failures[number, place] = _reason(error)
    return runs, failures


def compiled(model: nn.Module, inputs: Inputs) -> Once:
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
        raise AsymswapError(f"torch.compile cannot compile it: {reason_of(error, 200)}") from error
    return lambda: run(*inputs)


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Let torch use a number of threads while the block lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AsymswapError):
        return text
    # torch has no error of its own for this.
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "there is not enough memory"
    return f"the model fails with {type(error).__name__}: {text[:200]}"
