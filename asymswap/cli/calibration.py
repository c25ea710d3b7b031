"""The options of calibration, which every command that converts on data shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asymswap.calibration.config import Calibration
from asymswap.cli.fields import takes_fields
from asymswap.cli.options import parse_polish
from asymswap.errors import AsymswapError

if TYPE_CHECKING:
    from asymswap.data.task import Task
    from asymswap.utils.distributed import Team

FLAGS = {
    "data": "--calibrate",
    "images": "--calibration-images",
    "cache": "--calibration-cache",
    "polish_steps": "--polish",
    "memory_gib": "--calibration-memory",
}
takes_calibration = takes_fields("calibration", Calibration, given_only=True, names=FLAGS)


def calibration_of(values: Mapping[str, Any], seed: int, team: Team, task: Task | None = None) -> Calibration | None:
    """Return the calibration that the options of `takes_calibration` ask for; None where no data is given.

    The data may be that of a task. Raises AsymswapError where an option needs data, or two say which.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if task is not None:
        if task.calibration is not None and "data" in given:
            raise AsymswapError(f"--calibrate and calibration() of {task.path} both say what to calibrate on; give one")
        known = {"data": task.calibration, "inputs": task.inputs}
        given |= {name: value for name, value in known.items() if value is not None}
    if not given.keys() & {"data", "cache"}:
        # What a task says of inputs is for other data, too.
        given.pop("inputs", None)
        if given:
            name, value = next(iter(given.items()))
            about = f"`{name}={value}` is of calibration"
            raise AsymswapError(f"{about}, which needs images: give --calibrate DATA, or a --task with calibration()")
        if team.size > 1:
            raise AsymswapError("torchrun has nothing to share out: several processes are for --calibrate DATA")
        return None
    if "polish_images" in given and "polish_steps" not in given:
        raise AsymswapError("--polish-images needs polishing: give --polish STEPS or MINUTES")
    given["polish_steps"], given["polish_minutes"] = parse_polish(given.get("polish_steps"))
    return Calibration(**given, seed=seed, team=team)
