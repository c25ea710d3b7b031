"""The reports of converting a model, of where its taps are, of merging it back into ordinary convs, of exporting it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from asymswap.results.evaluate import Agreement
from asymswap.types import Cost, Fed, Ratio, Seconds, Shown, Size

STILL = 0.05  # pixels below which a tap counts as not moved
_NOTHING = Cost(0, 0)


@dataclass(frozen=True)
class SiteRow:
    """One conv of the original model, and its replacement if there is one."""

    site: str
    conv: str
    feature_map: tuple[int, int] | None
    calls: int
    action: str = "keep"  # or `swap`
    kind: str | None = None
    becomes: str = ""  # the settings in short, without the usual ones
    settings: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    before: Cost = _NOTHING
    after: Cost = _NOTHING
    predicted_error: float | None = None  # the plan's: of the output with calibration, of the kernel without
    kernel_error: float | None = None  # the Frobenius norm of the kernel's change over that of the kernel
    output_error: float | None = None  # the same of the layer's output on the probe batch
    output_largest: float | None = None
    exact: bool | None = None  # the kind promises to preserve the function there
    absorbs: str | None = None  # the batch norm that the replacement holds now; `after` has not its parameters


@dataclass(frozen=True)
class OutputChange:
    """Change of the whole model's output on the probe batch, relative and at most, and what the probe was."""

    relative: float
    largest: float
    probe: str
    input: str = ""  # the size of one of its inputs; the model's if it is empty


@dataclass(frozen=True)
class ScoreChange:
    """A score before and after; with the unit `%` a fraction, which is shown in per cent."""

    name: str
    before: float
    after: float
    unit: str = ""
    lower_is_better: bool = False


@dataclass(frozen=True)
class AccuracyRow:
    """Scores before and after on the same data."""

    data: str
    images: int | None  # None for a metric of the user's
    scores: tuple[ScoreChange, ...]
    note: str = ""


@dataclass(frozen=True)
class CalibrationRow:
    """What the conversion was calibrated on."""

    data: str
    images: int
    sha256: str  # of the pixels
    seed: int
    sequential: bool  # solved layer by layer
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TimeRow:
    """Time of one forward pass in a runtime before and after, measured in turn, or the reason for having none."""

    runtime: str
    version: str = ""
    before: Seconds | None = None
    after: Seconds | None = None
    ratio: Ratio | None = None
    failure: str | None = None


@dataclass(frozen=True)
class LatencyRow:
    """Times before and after in each runtime, on `machine`."""

    times: tuple[TimeRow, ...]
    memory_format: str | None  # PyTorch's
    batch: int
    threads: int
    machine: str
    wanted: float | None = None  # what a budget asked for in the first of the runtimes: a fraction, or seconds
    undone: tuple[str, ...] = ()  # convs whose swaps were slower, and were taken back
    in_seconds: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class DropRow:
    """How much of a score was allowed to be lost, and what the network lost, in the score's own values."""

    score: str
    unit: str
    lower_is_better: bool
    allowed: float
    lost: float
    interval: tuple[float, float] | None  # of 95 %, where there is one
    data: str
    samples: int | None  # None of a metric of the user's
    share: float  # the fraction of the MACs left
    solves: int
    smallest: bool = False  # no rank could be lower


@dataclass(frozen=True)
class FileRow:
    """A file read or written, and its size in bytes."""

    path: str
    bytes: int = 0


@dataclass(frozen=True)
class ModelRow:
    """Which model was converted, and how it was read."""

    reference: str = ""
    origin: str = ""
    weights: str = ""
    traced_by: str = ""
    input: str = ""
    sha256: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report(Shown, view="convert.report_view"):
    """Everything about a conversion; the totals are the sums of the rows and of `rest`."""

    asymswap: str
    model: ModelRow
    recipe: str
    budget: str | None
    preserves: Mapping[str, str]
    sites: tuple[SiteRow, ...]
    rest: Cost  # outside of the sites
    before: Cost
    after: Cost
    output: OutputChange
    warnings: tuple[str, ...] = ()  # each format shows them first
    multiplier: float | None = None
    latency: LatencyRow | None = None
    untimed: str = ""  # how to measure time if it was not
    calibration: CalibrationRow | None = None
    accuracy: AccuracyRow | None = None
    agreement: Agreement | None = None
    drop: DropRow | None = None
    fed: Fed | None = None  # how images were prepared, if there were any
    weights_bytes: tuple[int, int] = (0, 0)
    files: tuple[FileRow, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def swapped(self) -> tuple[SiteRow, ...]:
        """The rows of swapped sites."""
        return tuple(row for row in self.sites if row.action == "swap")


@dataclass(frozen=True)
class OffsetRow:
    """The offsets of one layer, (down, right) in pixels of its input, for each tap row by row."""

    derived: ClassVar = ("average", "still")

    site: str
    kind: str
    kernel: Size
    dilation: Size
    mean: tuple[tuple[float, float], ...]  # over all pixels and images, where offsets are predicted from the input
    spread: tuple[tuple[float, float], ...]  # their standard deviation
    largest: float  # the longest single offset
    limit: float | None = None  # along an axis; None if unbounded

    @property
    def average(self) -> float:
        """The mean length of the mean offsets."""
        return sum(math.hypot(*offset) for offset in self.mean) / len(self.mean)

    @property
    def still(self) -> bool:
        """True if no tap has moved."""
        return self.largest < STILL


@dataclass(frozen=True)
class OffsetReport(Shown, view="offsets.offsets_view"):
    """The layers of one model whose taps can move; `probe` describes the inputs."""

    model: str
    rows: tuple[OffsetRow, ...]
    probe: str
    fed: Fed | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class FusionRow:
    """One replacement: `fused` to the original form of conv, `resized` to one conv of another, or `left` and why."""

    site: str
    kind: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class FusionReport(Shown, view="screens.fusion_view"):
    """Costs of the converted and the fused model, and the difference of their outputs on `probe`."""

    model: str
    origin: str
    sites: tuple[FusionRow, ...]
    before: Cost
    after: Cost
    relative: float
    largest: float
    probe: str
    as_original: bool  # the state dict fits the unconverted model again
    files: tuple[FileRow, ...] = ()
    fed: Fed | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One run of the written file beside PyTorch."""

    inputs: str  # their sizes
    largest: float  # difference of an output
    allowed: float  # 1e-4 of the largest output, and at least 1e-4


@dataclass(frozen=True)
class ExportReport(Shown, view="screens.export_view"):
    model: str
    form: str  # `onnx`, `pt2` or `state-dict`
    runner: str  # what ran it for the checks
    fused: int  # replacements fused before
    checks: tuple[Check, ...]
    dynamic: tuple[str, ...] = ()  # dimensions of inputs that may have any size
    int8: Agreement | None = None  # of the file with the model
    rotated: int = 0  # pairs whose channels in between were mixed before
    opset: int | None = None
    files: tuple[FileRow, ...] = ()
    versions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
