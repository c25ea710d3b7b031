"""The options of calibration, which every command that converts on data shares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asymswap.cli.options import DATA_FORMS, parse_polish
from asymswap.errors import AsymswapError

if TYPE_CHECKING:
    from asymswap.calibration.calibrate import Calibration
    from asymswap.utils.distributed import Team

PANEL = "Calibration (no labels needed)"

Calibrate = Annotated[
    str | None,
    typer.Option(
        help=f"Choose ranks and weights on images: any folder of them, {DATA_FORMS}",
        rich_help_panel=PANEL,
    ),
]
Images = Annotated[
    int | None,
    typer.Option("--calibration-images", help="How many of them.", rich_help_panel=PANEL, show_default="512"),
]
Sequential = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--no-sequential",
        help="Solve layer by layer on what each really gets.",
        rich_help_panel=PANEL,
        show_default="where there are images",
    ),
]
CalibrationCache = Annotated[
    Path | None,
    typer.Option(
        "--calibration-cache",
        help="File of what calibration learned: read if it exists, else written.",
        rich_help_panel=PANEL,
    ),
]
Polish = Annotated[
    str | None,
    typer.Option(
        help="Then learn from the original's outputs for so many steps (500) or minutes (5min).", rich_help_panel=PANEL
    ),
]
PolishImages = Annotated[
    int | None, typer.Option(help="On how many images, at most.", rich_help_panel=PANEL, show_default="5000")
]
Outputs = Annotated[
    str | None,
    typer.Option(
        help="What the network gives: scores (of classes) or values (of a regressor, an embedder, a denoiser).",
        metavar="KIND",
        rich_help_panel=PANEL,
        show_default="judged by them",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option("--calibration-memory", help="Memory limit in GiB.", rich_help_panel=PANEL, show_default="4"),
]


def wanted(
    data: str | None,
    images: int | None,
    cache: Path | None,
    sequential: bool | None,
    polish: str | None,
    polish_images: int | None,
    memory_gib: float | None,
    outputs: str | None,
    seed: int,
    team: Team,
) -> Calibration | None:
    """What the options come to; None where no data is given. Raises AsymswapError where they need some.

    What is None was not given, and is as `Calibration` has it by itself.
    """
    from asymswap.calibration.calibrate import Calibration

    if data is None and cache is None:
        given = {
            "--polish": polish,
            "--sequential" if sequential else "--no-sequential": sequential,
            "--calibration-images": images,
            "--polish-images": polish_images,
            "--calibration-memory": memory_gib,
            "--outputs": outputs,
        }
        useless = [option for option, value in given.items() if value is not None]
        if useless:
            raise AsymswapError(f"{useless[0]} is of calibration, which needs images: give --calibrate DATA")
        if team.size > 1:
            raise AsymswapError("torchrun has nothing to share out: several processes are for --calibrate DATA")
        return None
    if polish_images is not None and polish is None:
        raise AsymswapError("--polish-images is of polishing: give --polish STEPS or MINUTES")
    steps, minutes = parse_polish(polish)
    numbers: dict[str, Any] = {
        "images": images,
        "memory_gib": memory_gib,
        "polish_images": polish_images,
        "outputs": outputs,
    }
    return Calibration(
        data=data,
        cache=cache,
        sequential=sequential,
        seed=seed,
        polish_steps=steps,
        polish_minutes=minutes,
        team=team,
        **{name: value for name, value in numbers.items() if value is not None},
    )
