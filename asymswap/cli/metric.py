"""The options that say what models are measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from asymswap.calibration.config import Calibration
from asymswap.cli.fields import opt, options_of, parameters_of, takes
from asymswap.cli.options import DATA_FORMS
from asymswap.errors import AsymswapError

if TYPE_CHECKING:
    from asymswap.data.task import Task

_PANEL = "Metric"
EVALUATION_FORMS = f"{DATA_FORMS.replace(', or a', ', a')[:-1]}, pairs:INPUTS,TARGETS or masks:IMAGES,MASKS."
"""Data that models can be evaluated on, for the end of a help text."""


def _options(
    metric: Annotated[
        list[str] | None,
        opt(
            "Measure by FILE.py:function or pkg.mod:function, which is run: it gets the model and returns a number, or "
            "numbers by name; can be repeated.",
            _PANEL,
        ),
    ] = None,
    crop_border: Annotated[int, opt("Pixels to leave out at each border of pairs.", _PANEL, min=0)] = 0,
) -> None: ...


takes_metric = takes("measured", parameters_of(_options))


def measured_by(
    option: str, data: str | None, measured: Mapping[str, Any], task: Task | None, needed: bool = False
) -> dict[str, Any]:
    """Return what `option`, `--metric` and a task ask for, as the arguments `by` and `crop_border`; metrics are run.

    Raises AsymswapError where both are given, or none is although one is needed.
    """
    metrics, crop_border = measured["metric"] or [], measured["crop_border"]
    if data is not None and metrics:
        raise AsymswapError(f"{option} and --metric both say what to measure by; give one of them")
    own = None if task is None else task.evaluate
    if task is not None and own is not None and (data is not None or metrics):
        given = option if data is not None else "--metric"
        raise AsymswapError(f"{given} and evaluate() of {task.path} both say what to measure by; give one of them")
    if needed and data is None and not metrics and own is None:
        raise AsymswapError(f"give {option}, --metric with a function of your own, or a --task with evaluate()")
    if crop_border and data is None:
        raise AsymswapError(f"--crop-border goes with {option} pairs:INPUTS,TARGETS; leave it out")
    if not metrics and own is None:
        return {"by": data, "crop_border": crop_border}
    from asymswap.data.metrics import Metric, read_metric

    by: Any = [read_metric(reference) for reference in metrics]
    return {"by": by if task is None or own is None else Metric(own, task.lower_is_better), "crop_border": 0}


_UNLABELLED = {"patch", "noise", "outputs"}


def _against(
    against_original: Annotated[
        bool,
        opt(
            "Measure how far each model agrees with the first, without labels, on what `convert` holds back of the "
            "same --data, or of a task's calibration().",
            _PANEL,
            "--against-original",
        ),
    ] = False,
) -> bool:
    return against_original


takes_against = takes(
    "against",
    parameters_of(_against)
    | {name: one for name, one in options_of(Calibration, given_only=True).items() if name in _UNLABELLED},
)


def agreement_on(data: str | None, against: dict[str, Any], task: Task | None) -> Calibration | None:
    """Return the inputs without labels on which models are to agree; None where that is not asked for."""
    given = {name: against[name] for name in _UNLABELLED if against[name] is not None}
    if not against["against_original"]:
        if given:
            raise AsymswapError(f"`{next(iter(given))}=…` goes with --against-original; leave it out")
        return None
    inputs = None if task is None else task.inputs
    unlabelled = data if data is not None or task is None else task.calibration
    if unlabelled is None:
        raise AsymswapError("--against-original needs inputs: give --data, or a --task with calibration()")
    return Calibration(unlabelled, inputs=inputs, **given)
