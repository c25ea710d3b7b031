"""Reports of networks that never were: every field filled, for what reads reports and needs no model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asymswap.results.convert import (
    AccuracyRow,
    CalibrationRow,
    FileRow,
    LatencyRow,
    ModelRow,
    OutputChange,
    Report,
    ScoreChange,
    SiteRow,
    TimeRow,
)
from asymswap.results.records import Provenance
from asymswap.types import Cost, Ratio, Seconds


def site(number: int, **changes: Any) -> SiteRow:
    """The row of a swapped conv; every number tells rows apart."""
    row = SiteRow(
        site=f"layer{1 + number // 8}.{number % 8}.conv2",
        conv="64->64 3x3",
        feature_map=(56 - number % 8, 56),
        calls=1,
        action="swap",
        kind="separable",
        becomes=f"rank {number + 5}, vertical",
        settings={"rank": number + 5, "order": "vertical-first"},
        reason="rule 1",
        before=Cost(10_000_000 + 1_000 * number, 36_864 + number),
        after=Cost(5_000_000 - 1_000 * number, 18_000 - number),
        predicted_error=0.05 + number / 1000,
        kernel_error=0.2 - number / 1000,
        output_error=0.06 + (number * 7 % 11) / 1000,
        output_largest=1.5,
        exact=False,
    )
    return replace(row, **changes)


def kept(number: int, reason: str = "a 1x1 kernel has nothing to separate", **changes: Any) -> SiteRow:
    """The row of a conv that stays."""
    cost = Cost(3_000_000 + 10 * number, 4_096)
    changes.setdefault("site", f"layer{1 + number // 8}.{number % 8}.conv1")
    return site(
        number,
        conv="256->64 1x1",
        action="keep",
        kind=None,
        becomes="",
        settings={},
        reason=reason,
        before=cost,
        after=cost,
        predicted_error=None,
        kernel_error=None,
        output_error=None,
        output_largest=None,
        exact=None,
        **changes,
    )


TIMES = (
    TimeRow("torch", "2.14.1", Seconds(0.0262, 0.027, 0.01), Seconds(0.0193, 0.0199, 0.01), Ratio(0.74, 0.73, 0.75)),
    TimeRow("openvino", failure="OpenVINO cannot express this model: no operator Bessel"),
)
REST = Cost(2_000_000, 2_050_000)


def report(*rows: SiteRow, rest: Cost = REST, **changes: Any) -> Report:
    """A report of these rows, whose totals are theirs and the rest's, with all that a report may hold."""
    before = sum((row.before for row in rows), start=rest)
    after = sum((row.after for row in rows), start=rest)
    whole = Report(
        asymswap="0.1.0",
        model=ModelRow(
            "mine.pt", "torchvision:resnet50", "file mine.pt", "torch.fx", "3x224x224", "ab" * 32, ("a note of it",)
        ),
        recipe="half-macs",
        budget="macs <= 0.5",
        preserves={"separable": "the function approximately"},
        sites=rows,
        rest=rest,
        before=before,
        after=after,
        output=OutputChange(0.123, 4.5, "32 images of photos"),
        warnings=("the images were taken as they are",),
        latency=LatencyRow(TIMES, "channels-last", 1, 2, "Some Processor", 0.7, ("layer1.0.conv2",)),
        calibration=CalibrationRow("photos", 512, "cd" * 32, 0, True, ("all went well",)),
        accuracy=AccuracyRow(
            "folder photos: 2,000 images of 10 classes", 2000, (ScoreChange("top-1", 0.878, 0.867, "%"),)
        ),
        weights_bytes=(100_000_000, 60_000_000),
        files=(FileRow("mine.pt", 102_000_000),),
        seconds={"load": 0.5, "plan": 2.25},
    )
    return replace(whole, **changes)


PROVENANCE = Provenance(
    recipe='summary = "half"\n\n[[rules]]\nmatch = { kernel = "3x3" }\n',
    overrides={"budget.macs": 0.5},
    seed=0,
    command="asymswap convert mine.pt --recipe half-macs --macs 0.5",
    versions={"torch": "2.14.1"},
)


def like_resnet50() -> Report:
    """Fifty-three convs, every third of them swapped."""
    rows = [site(number) if number % 3 == 1 else kept(number) for number in range(53)]
    return report(*rows)
