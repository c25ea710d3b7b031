"""The options of calibration, which every command that converts on data shares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asymswap.cli.options import DATA_FORMS, parse_polish
from asymswap.errors import AsymswapError

if TYPE_CHECKING:
    from asymswap.calibrate import Calibration
    from asymswap.distributed import Team

PANEL = "Calibration (no labels needed)"

Calibrate = Annotated[
    str | None,
    typer.Option(
        help=f"Choose ranks and weights on images: any folder of them, {DATA_FORMS}",
        rich_help_panel=PANEL,
    ),
]
Images = Annotated[int, typer.Option("--calibration-images", help="How many of them.", rich_help_panel=PANEL)]
Sequential = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--no-sequential",
        help="Solve layer by layer on what each really gets.",
        rich_help_panel=PANEL,
        show_default="where the model traces whole",
    ),
]
EvidenceFile = Annotated[
    Path | None,
    typer.Option(
        "--evidence", help="File of what calibration learned: read if it exists, else written.", rich_help_panel=PANEL
    ),
]
Polish = Annotated[
    str | None,
    typer.Option(
        help="Then learn from the original's outputs for so many steps (500) or minutes (5min).", rich_help_panel=PANEL
    ),
]
PolishImages = Annotated[int, typer.Option(help="On how many images, at most.", rich_help_panel=PANEL)]
Memory = Annotated[float, typer.Option("--calibration-memory", help="Memory limit in GiB.", rich_help_panel=PANEL)]


def wanted(
    data: str | None,
    images: int,
    evidence: Path | None,
    sequential: bool | None,
    polish: str | None,
    polish_images: int,
    memory_gib: float,
    seed: int,
    team: Team,
) -> Calibration | None:
    """What the options come to; None where no data is given. Raises AsymswapError where they need some."""
    from asymswap.calibrate import Calibration

    if data is None and evidence is None:
        if polish is not None or sequential:
            raise AsymswapError("--polish and --sequential need images: give --calibrate DATA")
        if team.size > 1:
            raise AsymswapError("torchrun has nothing to share out: several processes are for --calibrate DATA")
        return None
    steps, minutes = parse_polish(polish)
    return Calibration(
        data=data,
        images=images,
        evidence=evidence,
        sequential=sequential,
        memory_gib=memory_gib,
        seed=seed,
        polish_steps=steps,
        polish_minutes=minutes,
        polish_images=polish_images,
        team=team,
    )
