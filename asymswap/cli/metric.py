"""The options that say what models are measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from asymswap.cli.fields import opt, parameters_of, takes
from asymswap.cli.options import DATA_FORMS
from asymswap.errors import AsymswapError

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


def measured_by(option: str, data: str | None, measured: Mapping[str, Any], needed: bool = False) -> dict[str, Any]:
    """Return what `option` and `--metric` ask for, as the arguments `by` and `crop_border`; metrics are run.

    Raises AsymswapError where both are given, or none is although one is needed.
    """
    metrics, crop_border = measured["metric"] or [], measured["crop_border"]
    if data is not None and metrics:
        raise AsymswapError(f"{option} and --metric both say what to measure by; give one of them")
    if needed and data is None and not metrics:
        raise AsymswapError(f"give {option}, or --metric with a function of your own")
    if crop_border and data is None:
        raise AsymswapError(f"--crop-border goes with {option} pairs:INPUTS,TARGETS; leave it out")
    if metrics:
        from asymswap.data.metrics import read_metric

        return {"by": [read_metric(reference) for reference in metrics], "crop_border": 0}
    return {"by": data, "crop_border": crop_border}
