"""What a benchmark measured."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.types import Cost, Ratio, Seconds


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
    """How models were run; `memory_format` is None where the runtime has one of its own."""

    runtime: str
    batch: int
    threads: int
    memory_format: str | None


@dataclass(frozen=True)
class Result:
    """One model (its place among the models) in one setting (its place), or why it could not be run so.

    `ratio` is that to the first model in the same setting, `ready` the seconds of compiling or exporting, `rounds` the
    fastest pass of every round.
    """

    model: int
    setting: int
    seconds: Seconds | None = None
    images_per_second: float | None = None
    ratio: Ratio | None = None
    ready: float | None = None
    rounds: tuple[float, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class LayerRow:
    """Seconds and MACs of a layer, and of whatever has its name in another model, all calls in a pass together."""

    layer: str
    first: float
    own: float
    first_macs: int = 0
    macs: int = 0

    @property
    def excess(self) -> float:
        """Seconds more than the MACs promise; the same time is promised where there are none."""
        return self.own - self.first * (self.macs / self.first_macs if self.first_macs else 1.0)


@dataclass(frozen=True)
class Layers:
    """Layers that a model shares by name with the first one, in one setting, the greatest excess first.

    `rest` is what passes outside of them.
    """

    model: int
    setting: int
    rows: tuple[LayerRow, ...]
    rest: LayerRow


@dataclass(frozen=True)
class Gain:
    """The setting in which a model runs faster than in the other memory format, and how many times as fast."""

    model: int
    setting: int
    times: float


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured: `rounds` of them, while other programs kept `others` cores busy."""

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
    others: float | None
    versions: tuple[str, ...]
    warnings: tuple[str, ...] = ()


TITLES = {"eager": "PyTorch", "compile": "torch.compile", "onnx": "ONNX Runtime"}
