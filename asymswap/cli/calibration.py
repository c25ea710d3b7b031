"""The options of calibration, which every command that converts on data shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asymswap.calibration.config import Calibration
from asymswap.cli.fields import takes_fields
from asymswap.cli.options import parse_polish
from asymswap.errors import AsymswapError

if TYPE_CHECKING:
    from asymswap.utils.distributed import Team

takes_calibration = takes_fields("calibration", Calibration, given_only=True)


def calibration_of(values: Mapping[str, Any], seed: int, team: Team) -> Calibration | None:
    """Return what the options of `takes_calibration` amount to; None where no data is given.

    Raises AsymswapError where an option needs data.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if not given.keys() & {"data", "cache"}:
        if given:
            flags = {
                "polish_steps": "--polish",
                "sequential": "--sequential" if given.get("sequential") else "--no-sequential",
                "images": "--calibration-images",
                "polish_images": "--polish-images",
                "memory_gib": "--calibration-memory",
                "outputs": "--outputs",
            }
            useless = next(flag for name, flag in flags.items() if name in given)
            raise AsymswapError(f"{useless} is of calibration, which needs images: give --calibrate DATA")
        if team.size > 1:
            raise AsymswapError("torchrun has nothing to share out: several processes are for --calibrate DATA")
        return None
    if "polish_images" in given and "polish_steps" not in given:
        raise AsymswapError("--polish-images is of polishing: give --polish STEPS or MINUTES")
    given["polish_steps"], given["polish_minutes"] = parse_polish(given.get("polish_steps"))
    return Calibration(**given, seed=seed, team=team)
