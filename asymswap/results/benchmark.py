"""What a benchmark measured."""

from dataclasses import dataclass, field

from asymswap.types import Cost, Ratio, Seconds, Shown

TITLES = {  # the runtimes by their names
    "torch": "PyTorch",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "openvino": "OpenVINO",
}


@dataclass(frozen=True)
class BenchmarkedModel:
    """One model: what it is and what it costs."""

    model: str
    origin: str
    weights: str
    input: str
    cost: Cost
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    runtime: str
    batch: int
    threads: int
    memory_format: str | None  # None for a runtime with its own
    device: str = field(default="cpu", kw_only=True)


@dataclass(frozen=True)
class Result:
    """One model in one setting, by their indices, or the reason why it could not be run."""

    model: int
    setting: int
    seconds: Seconds | None = None
    images_per_second: float | None = None
    ratio: Ratio | None = None  # to the first model in the same setting
    ready: float | None = None  # the seconds of compiling or exporting
    rounds: tuple[float, ...] = ()  # the fastest pass of each
    failure: str | None = None
    version: str = ""  # of the runtime, with the precision that it has chosen


@dataclass(frozen=True)
class LayerRow:
    """Seconds and MACs of a layer in the first model and of its namesake, summed over all calls of a pass."""

    layer: str
    first: float
    own: float
    first_macs: int = 0
    macs: int = 0

    @property
    def excess(self) -> float:
        """The seconds beyond the time in proportion to the MACs, or beyond the same time if there are none."""
        return self.own - self.first * (self.macs / self.first_macs if self.first_macs else 1.0)


@dataclass(frozen=True)
class Layers:
    """Layers that a model shares by name with the first, in one setting, the greatest excess first, and the rest."""

    model: int
    setting: int
    rows: tuple[LayerRow, ...]
    rest: LayerRow


@dataclass(frozen=True)
class Gain:
    """The setting in which a model is faster than in the other memory format, and the factor."""

    model: int
    setting: int
    times: float


@dataclass(frozen=True)
class Benchmark(Shown, view="benchmark.benchmark_view"):
    asymswap: str
    models: tuple[BenchmarkedModel, ...]
    settings: tuple[Setting, ...]
    results: tuple[Result, ...]
    layers: tuple[Layers, ...]
    gains: tuple[Gain, ...]
    dtype: str
    machine: str
    cores: int | None
    rounds: int
    others: float | None  # cores that other programs kept busy meanwhile
    versions: tuple[str, ...]
    warnings: tuple[str, ...] = ()
