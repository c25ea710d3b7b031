"""What a conversion has to say: numbers and text only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asymswap.types import Cost, Fed


@dataclass(frozen=True)
class SiteRow:
    """One conv of the original model: what it was, what became of it, what both cost, and what the change did.

    `action` is `swap` or `keep`; `becomes` says the settings in short, what is usual left out; `predicted_error` is
    what the plan expected (of the output with calibration, of the kernel without); `kernel_error` is the Frobenius norm
    of the kernel's change over that of the kernel, `output_error` the same of the layer's output on the probe batch.
    `exact` says whether the kind promises to preserve the function there; `absorbs` names a batch norm that the
    replacement holds now, whose parameters are not counted in `after`.
    """

    site: str
    conv: str
    feature_map: tuple[int, int] | None
    calls: int
    action: str
    kind: str | None
    becomes: str
    settings: Mapping[str, Any]
    reason: str
    before: Cost
    after: Cost
    predicted_error: float | None = None
    kernel_error: float | None = None
    output_error: float | None = None
    output_largest: float | None = None
    exact: bool | None = None
    absorbs: str | None = None


@dataclass(frozen=True)
class OutputChange:
    """How far the whole model's output moved on the probe batch, relative and at most, and what the probe was."""

    relative: float
    largest: float
    probe: str


@dataclass(frozen=True)
class AccuracyRow:
    """Top-1 accuracy before and after on the same images, as fractions."""

    data: str
    images: int
    before: float
    after: float
    note: str = ""


@dataclass(frozen=True)
class CalibrationRow:
    """What the conversion was calibrated on; `sha256` is that of the pixels, `sequential` whether layer by layer."""

    data: str
    images: int
    sha256: str
    seed: int
    sequential: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LatencyRow:
    """Seconds of one forward pass before and after, measured in turn on `machine`, the minimum of several rounds.

    `wanted` is the fraction that was asked for; `undone` names the convs whose swaps were measured to be slower than
    the conv itself, and were taken back.
    """

    before: float
    after: float
    memory_format: str
    batch: int
    threads: int
    machine: str
    wanted: float | None = None
    undone: tuple[str, ...] = ()


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
class Report:
    """Everything that a conversion has to say.

    `rest` is the cost of everything outside of the sites, so that the totals are the sums of the rows and it;
    `warnings` is what a reader must know before any figure: each format shows it first. `fed` is what images became
    before the networks saw them, where there were any.
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
    calibration: CalibrationRow | None = None
    accuracy: AccuracyRow | None = None
    fed: Fed | None = None
    weights_bytes: tuple[int, int] = (0, 0)
    files: tuple[FileRow, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def swapped(self) -> tuple[SiteRow, ...]:
        """The rows of swapped sites."""
        return tuple(row for row in self.sites if row.action == "swap")
