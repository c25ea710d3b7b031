"""The verbs `plan`, `convert` and `save`.

A model is a reference (`"resnet18"`), a file, an `nn.Module`, or the result of `open_model`, which takes more options;
it is never changed. Options of several verbs:

- `input_size`, `preprocessing`: as those of `open_model`;
- `overrides`: changes to the recipe: `{"order": "vertical-first", "budget.macs": 0.4}`;
- `progress`: called with the name of a stage, the steps done and the steps in all.

All raise AsymswapError, with a one-line reason, for what cannot be done.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from asymswap.api.conversion_report import calibration_row, check_promises, make_report
from asymswap.api.session import Clock, Session, check_finite
from asymswap.calibration.calibrate import fed_on, options_of
from asymswap.calibration.config import Calibration
from asymswap.checkpoint import Header, what_is_stored
from asymswap.data import accuracy
from asymswap.data.datasets import LabelledImages, open_data
from asymswap.data.normalization import fed_of, settle
from asymswap.data.predict import check_classifier
from asymswap.errors import AsymswapError
from asymswap.models.converted import save_checkpoint, versions
from asymswap.models.opened import sizes_assumed
from asymswap.models.opening import Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.planning.latency_budget import Timing
from asymswap.planning.plan import check_not_empty, plan_from_json
from asymswap.planning.recipe import Recipe, parse_recipe, read_recipe_text
from asymswap.results.convert import AccuracyRow, FileRow, Report
from asymswap.results.records import to_json
from asymswap.types import Plan, Progress, silent
from asymswap.utils.files import check_output


@dataclass
class Conversion:
    """A converted model, the plan that made it, and the report; `save` writes it."""

    model: nn.Module
    plan: Plan
    report: Report
    header: Header = field(repr=False)


def plan(
    model: Model,
    recipe: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    input_size: tuple[int, ...] | None = None,
    progress: Progress = silent,
) -> Plan:
    """Return what `convert` would do, without doing it; the plan is plain data and can be edited and replayed."""
    parsed = parse_recipe(*read_recipe_text(str(recipe)), overrides)
    opened = open_for_verb(model, progress, input_size=input_size)
    check_finite(opened)
    return Session(opened).plan(parsed, progress)[0]


def convert(
    model: Model,
    recipe: str | Path | None = None,
    *,
    plan: Plan | str | bytes | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    input_size: tuple[int, ...] | None = None,
    preprocessing: PreprocessingOptions | None = None,
    evaluate: str | None = None,
    timing: Timing | None = None,
    allow_drift: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Conversion:
    """Convert a model by a recipe, or by a plan (an object or its JSON), and measure what changed.

    `calibration` names images, without labels, on which ranks and weights are chosen: far more accurate than the
    weights alone; where it names a team of processes, all must call alike, and all get the same result. `evaluate` is a
    data reference on whose test part both models' accuracy is measured; `timing` says how latency is measured under a
    budget of it; `seed` is that of the probe batch. A kind that promises to preserve the function is held to it on the
    probe batch, unless `allow_drift`.
    """
    if (recipe is None) == (plan is None):
        raise AsymswapError("convert takes either a recipe or a plan")
    requested: Recipe | Plan
    name, text, budget = "a plan", "", None
    if recipe is None:
        requested = plan if isinstance(plan, Plan) else plan_from_json(plan, "the given plan")
    else:
        name, (text, where) = str(recipe), read_recipe_text(str(recipe))
        requested = parse_recipe(text, where, overrides)
        budget = requested.budget
    if calibration is not None and not isinstance(calibration, Calibration):
        raise AsymswapError(f"`calibration=` takes asymswap.Calibration(DATA), not {calibration!r}")
    in_time = budget is not None and budget.latency is not None
    if timing is not None and not in_time:
        raise AsymswapError("`timing=…` goes with a budget of latency: give `latency=…`, or leave it out")
    opened = open_for_verb(model, progress, input_size=input_size, preprocessing=options_of(preprocessing, calibration))
    clock = Clock(opened.seconds)
    check_finite(opened)
    feeding = None
    if evaluate is not None or (calibration is not None and calibration.data is not None):
        opened, feeding = settle(opened, *fed_on(calibration, str(evaluate)))
    data = None
    if evaluate is not None:
        data = open_data(evaluate, opened.preprocessing, "test")
        check_classifier(opened.model, data)
    clock.stop("load")
    session = Session(opened, calibration, clock)
    what_is_stored(opened.model)  # raises where it could not be written
    if calibration is not None:
        classes = None if data is None else len(data.classes)
        session.gather(session.sites_of([requested]), classes, progress)
    settled, latency = session.plan(requested, progress, timing=(timing or Timing()) if in_time else None)
    if isinstance(requested, Recipe):
        check_not_empty(settled, requested)
    converted = session.apply(settled, progress)

    def measured() -> Report:
        report = make_report(session, converted, name, None if budget is None else str(budget), seed)
        if not allow_drift:
            check_promises(report, opened.dtype())
        first = sizes_assumed([opened]) if feeding is None else feeding.warnings
        calibrated = calibration_row(session, converted, None if data is None else data.description)
        clock.stop("measure")
        scores = None
        if data is not None:
            scores = _accuracy(opened.model, converted.model, data, progress)
            clock.stop("evaluate")
        return replace(
            report,
            latency=latency,
            calibration=calibrated,
            accuracy=scores,
            warnings=(*first, *report.warnings),
            fed=fed_of(feeding),
            seconds=clock.seconds,
        )

    report = session.team.first(measured)
    provenance = {
        "versions": versions(opened.origin),
        "recipe": text,
        "overrides": dict(overrides or {}),
        "seed": seed,
        # Without wall times equal runs write equal files.
        "report": to_json(replace(report, seconds={})),
    }
    header = replace(opened.header(), plans=(*opened.plans, settled), provenance=provenance)
    return Conversion(converted.model, settled, report, header)


def _accuracy(original: nn.Module, converted: nn.Module, data: LabelledImages, progress: Progress) -> AccuracyRow:
    before = accuracy.evaluate(original, data, progress=functools.partial(progress, "evaluating before"))
    after = accuracy.evaluate(converted, data, progress=functools.partial(progress, "evaluating after"))
    scored, classes = before.scores, len(data.classes)
    note = "" if scored == classes else f"the model scores {scored} classes, the data has {classes}: do they agree?"
    return AccuracyRow(data.description, before.images, before.top1, after.top1, note)


def save(conversion: Conversion, path: str | Path, *, force: bool = False) -> Report:
    """Write a conversion to a `.pt` or `.safetensors` file and return its report with the file's size in it.

    An existing file is replaced only with `force`.
    """
    path = Path(path)
    check_output(path, force)
    start = time.perf_counter()
    save_checkpoint(path, conversion.model, conversion.header)
    seconds = {**conversion.report.seconds, "save": round(time.perf_counter() - start, 3)}
    written = FileRow(str(path), path.stat().st_size)
    conversion.report = replace(conversion.report, files=(*conversion.report.files, written), seconds=seconds)
    return conversion.report
