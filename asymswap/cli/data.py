"""The options that name data: what models are measured by, and what conversions are calibrated on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asymswap.calibration.config import Calibration
from asymswap.cli.commands import Group
from asymswap.errors import AsymswapError
from asymswap.utils.options import option

if TYPE_CHECKING:
    from asymswap.data.task import Task
    from asymswap.utils.distributed import Team

_PANEL = "Metric"
LABELLED = "digits, a folder of class folders, cifar10:PATH (cifar100, mnist, fashion-mnist), or a tensor file."
"""Labelled images that every command takes, for the end of a help text."""
EVALUATION_FORMS = f"{LABELLED.replace(', or a', ', a')[:-1]}, pairs:INPUTS,TARGETS or masks:IMAGES,MASKS."
"""Data that models can be evaluated on, likewise."""


@dataclass(frozen=True)
class _Measured:
    metric: list[str] | None = option(
        None,
        "Measure by FILE.py:function or pkg.mod:function, which is run: it gets the model and returns a number, or "
        "numbers by name; can be repeated.",
        _PANEL,
    )
    crop_border: int = option(0, "Pixels to leave out at each border of pairs.", _PANEL, min=0)


@dataclass(frozen=True)
class _Compared(_Measured):
    against_original: bool = option(
        False,
        "Measure how far each model agrees with the first, without labels, on what `convert` holds back of the same "
        "--data, or of a task's calibration().",
        _PANEL,
    )


MEASURED: Any = Group(_Measured)
COMPARED: Any = Group(_Compared)
UNLABELLED: Any = Group(Calibration, given_only=True, only=("patch", "noise", "outputs"))
_FLAGS = {
    "data": "--calibrate",
    "images": "--calibration-images",
    "cache": "--calibration-cache",
    "polish_steps": "--polish",
    "memory_gib": "--calibration-memory",
}
CALIBRATION: Any = Group(Calibration, given_only=True, flags=_FLAGS)
INPUTS: Any = Group(
    Calibration, given_only=True, flags=_FLAGS, only=("data", "images", "patch", "patches", "noise", "outputs")
)


def measured_by(
    option: str, data: str | None, measured: Mapping[str, Any], task: Task, needed: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Return what `option`, `--metric` and a task ask to measure by, and more arguments of the verb; metrics are run.

    Raises AsymswapError where both are given, or none is although one is needed.
    """
    metrics, crop_border = measured["metric"] or [], measured["crop_border"]
    by = {option: data is not None, "--metric": metrics, f"evaluate() of {task.path}": task.evaluate}
    said = [name for name, given in by.items() if given]
    if len(said) > 1:
        raise AsymswapError(f"{said[0]} and {said[1]} both say what to measure by; give one of them")
    if needed and not said:
        raise AsymswapError(f"give {option}, --metric with a function of your own, or a --task with evaluate()")
    if crop_border and data is None:
        raise AsymswapError(f"--crop-border goes with {option} pairs:INPUTS,TARGETS; leave it out")
    if not metrics and task.evaluate is None:
        return data, {"crop_border": crop_border}
    from asymswap.data.metrics import Metric, read_metric

    if task.evaluate is not None:
        return Metric(task.evaluate, task.lower_is_better), {}
    return [read_metric(reference) for reference in metrics], {}


def compared_by(
    data: str | None, measured: Mapping[str, Any], unlabelled: Mapping[str, Any], task: Task, needed: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Return what `measured_by` does, or with --against-original the inputs on which models are to agree."""
    if not measured["against_original"]:
        if unlabelled:
            raise AsymswapError(f"`{next(iter(unlabelled))}=…` goes with --against-original; leave it out")
        return measured_by("--data", data, measured, task, needed)
    images = task.calibration if data is None else data
    if images is None:
        raise AsymswapError("--against-original needs inputs: give --data, or a --task with calibration()")
    return Calibration(images, inputs=task.inputs, **unlabelled), {"against_original": True}


def calibration_of(given: Mapping[str, Any], seed: int, team: Team, task: Task) -> Calibration | None:
    """Return the calibration that the options of `CALIBRATION` ask for; None where no data is given.

    The data may be that of a task. Raises AsymswapError where an option needs data, or two say which.
    """
    if task.calibration is not None and "data" in given:
        raise AsymswapError(f"--calibrate and calibration() of {task.path} both say what to calibrate on; give one")
    known = {"data": task.calibration, "inputs": task.inputs}
    given = dict(given) | {name: value for name, value in known.items() if value is not None}
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
    if "polish_steps" in given:
        text = given.pop("polish_steps")
        polish = re.fullmatch(r"(?P<steps>\d+)|(?P<minutes>\d+(\.\d+)?) ?m(in(utes)?)?", text)
        if polish is None:
            raise AsymswapError(f"--polish {text!r} is neither steps, such as 500, nor minutes, such as 5min")
        steps, minutes = polish["steps"], polish["minutes"]
        given |= {"polish_steps": int(steps)} if steps else {"polish_minutes": float(minutes)}
    return Calibration(**given, seed=seed, team=team)
