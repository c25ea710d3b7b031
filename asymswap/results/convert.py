"""The report of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asymswap.results.agreement import Agreement
from asymswap.types import Cost, Fed, Ratio, Seconds, Shown

_NOTHING = Cost(0, 0)


@dataclass(frozen=True)
class SiteRow:
    """One conv of the original model, and its replacement if there is one.

    `action` is `swap` or `keep`; `becomes` is the settings in short, without the usual ones; `predicted_error` is the
    plan's (of the output with calibration, of the kernel without); `kernel_error` is the Frobenius norm of the kernel's
    change over that of the kernel, `output_error` the same of the layer's output on the probe batch. `exact`: the kind
    promises to preserve the function there; `absorbs`: the batch norm that the replacement holds now, whose parameters
    are not counted in `after`.
    """

    site: str
    conv: str
    feature_map: tuple[int, int] | None
    calls: int
    action: str = "keep"
    kind: str | None = None
    becomes: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    before: Cost = _NOTHING
    after: Cost = _NOTHING
    predicted_error: float | None = None
    kernel_error: float | None = None
    output_error: float | None = None
    output_largest: float | None = None
    exact: bool | None = None
    absorbs: str | None = None


@dataclass(frozen=True)
class OutputChange:
    """Change of the whole model's output on the probe batch, relative and at most, and what the probe was.

    `input` is the size of one of its inputs, the model's if it is empty.
    """

    relative: float
    largest: float
    probe: str
    input: str = ""


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
    """Scores before and after on the same data; `images` is None for a metric of the user's."""

    data: str
    images: int | None
    scores: tuple[ScoreChange, ...]
    note: str = ""


@dataclass(frozen=True)
class CalibrationRow:
    """What the conversion was calibrated on; `sha256` of the pixels; `sequential`: solved layer by layer."""

    data: str
    images: int
    sha256: str
    seed: int
    sequential: bool
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
    """Times before and after in each runtime, on `machine`; `memory_format` is PyTorch's.

    `wanted` is what a budget asked for in the first of the runtimes: a fraction, or with `in_seconds` seconds; `undone`
    names the convs whose swaps were slower, and were taken back.
    """

    times: tuple[TimeRow, ...]
    memory_format: str | None
    batch: int
    threads: int
    machine: str
    wanted: float | None = None
    undone: tuple[str, ...] = ()
    in_seconds: bool = False


@dataclass(frozen=True)
class DropRow:
    """How much of a score was allowed to be lost, and what the network lost, in the score's own values.

    `interval` is the 95 % interval, where there is one; `data` are the `samples` measured on, None of a metric of the
    user's; `share` is the fraction of the MACs left, after so many `solves`. `smallest`: no rank could be lower.
    """

    score: str
    unit: str
    lower_is_better: bool
    allowed: float
    lost: float
    interval: tuple[float, float] | None
    data: str
    samples: int | None
    share: float
    solves: int
    smallest: bool = False


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
    """Everything about a conversion.

    `rest` is the cost outside of the sites: the totals are the sums of the rows and it. Each format shows `warnings`
    first. `fed` is how images were prepared, if there were any; `untimed` says how to measure time if it was not.
    """

    asymswap: str
    model: ModelRow
    recipe: str
    budget: str | None
    preserves: Mapping[str, str]
    sites: tuple[SiteRow, ...]
    rest: Cost
    before: Cost
    after: Cost
    output: OutputChange
    warnings: tuple[str, ...] = ()
    multiplier: float | None = None
    latency: LatencyRow | None = None
    untimed: str = ""
    calibration: CalibrationRow | None = None
    accuracy: AccuracyRow | None = None
    agreement: Agreement | None = None
    drop: DropRow | None = None
    fed: Fed | None = None
    weights_bytes: tuple[int, int] = (0, 0)
    files: tuple[FileRow, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def swapped(self) -> tuple[SiteRow, ...]:
        """The rows of swapped sites."""
        return tuple(row for row in self.sites if row.action == "swap")
