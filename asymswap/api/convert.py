"""The verbs `plan`, `convert` and `save`.

A model is a reference (`"resnet18"`), a file, an `nn.Module`, or what `open_model` has made of one of them with further
options; it is never changed. Options that several verbs share:

- `overrides`: changes to the recipe, as `--set`: `{"order": "vertical-first", "budget.macs": 0.4}`;
- `progress`: called with the name of a stage, the steps done and the steps in all.

All raise AsymswapError, with a one-line reason, for what cannot be done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymswap.api.conversion_report import check_finite, check_output_finite, check_promises, make_report, state_bytes
from asymswap.calibration.calibrate import (
    UNSEEN,
    Calibration,
    Gathered,
    Polished,
    convert_on,
    fed_on,
    gather_statistics,
    in_own_precision,
    polish,
)
from asymswap.checkpoint import Header, what_is_stored
from asymswap.data.normalization import fed_of, settle
from asymswap.errors import AsymswapError, SourceError
from asymswap.graph.trace import Trace, check_runs, trace
from asymswap.measure.fidelity import compared_parts, measure_fidelity
from asymswap.measure.macs import Costs, count_costs, count_swapped
from asymswap.measure.stand_ins import check_stand_ins, describe_calls
from asymswap.models.converted import save_checkpoint, versions
from asymswap.models.opened import OpenedModel, costs_of, sizes_assumed
from asymswap.models.opening import Model, open_for_verb
from asymswap.planning.apply import apply_plan
from asymswap.planning.latency_budget import Timing, plan_in_time
from asymswap.planning.plan import check_not_empty, check_replay, find_choices, make_plan, matched_sites, plan_from_json
from asymswap.planning.recipe import Recipe, parse_recipe, read_recipe_text
from asymswap.results.convert import AccuracyRow, CalibrationRow, FileRow, LatencyRow, Report
from asymswap.results.records import to_json
from asymswap.types import Origin, Plan, Progress, Site, silent
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.files import check_output
from asymswap.utils.inputs import Inputs, portions, probe
from asymswap.utils.tensors import eval_mode, first_not_finite


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
    progress: Progress = silent,
) -> Plan:
    """Decide what `convert` would do, without doing it; the plan is plain data and can be edited and replayed."""
    wanted = parse_recipe(*read_recipe_text(str(recipe)), overrides)
    opened = open_for_verb(model, progress)
    _check_finite(opened)
    traced = trace(opened.model, opened.example())
    check_runs(traced, opened.model, opened.example())
    total = costs_of(opened).total
    return make_plan(opened.model, traced.sites, wanted, total, progress)


def convert(
    model: Model,
    recipe: str | Path | None = None,
    *,
    plan: Plan | str | bytes | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
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
    replay = plan if isinstance(plan, Plan) or plan is None else plan_from_json(plan, "the given plan")
    text, where = ("", "a plan") if recipe is None else read_recipe_text(str(recipe))
    wanted = parse_recipe(text, where, overrides) if recipe is not None else replay
    assert wanted is not None
    if calibration is not None and not isinstance(calibration, Calibration):
        raise AsymswapError(f"calibration= takes asymswap.Calibration(DATA), not {calibration!r}")
    if timing is not None and not _in_time(wanted):
        raise AsymswapError("a memory format to time in goes with a budget of latency: give --latency, or leave it out")
    opened = open_for_verb(model, progress)
    clock = _Clock(opened.seconds)
    _check_finite(opened)
    feeding = None
    reference = None if calibration is None else calibration.data
    if reference is not None or evaluate is not None:
        opened, feeding = settle(opened, *fed_on(calibration, str(evaluate)))
    data = None if evaluate is None else _open_data(evaluate, opened)
    clock.stop("load")
    classes = None if data is None else len(data.classes)
    done = _carry_out(opened, wanted, calibration, timing or Timing(), classes, clock, progress)

    first = sizes_assumed([opened]) if feeding is None else feeding.warnings

    def measured() -> Report:
        name = where if recipe is None else str(recipe)
        report = _report(opened, done, name, wanted, seed)
        if not allow_drift:
            check_promises(report, opened.dtype())
        report = replace(
            report,
            latency=done.latency,
            calibration=_calibration_row(done, data),
            warnings=(*first, *report.warnings),
            fed=fed_of(feeding),
        )
        clock.stop("measure")
        if data is not None:
            report = replace(report, accuracy=_accuracy(opened.model, done.model, data, progress))
            clock.stop("evaluate")
        return replace(report, seconds=clock.seconds)

    report = _team(calibration).first(measured)
    header = replace(
        opened.header(),
        plans=(*opened.plans, done.plan),
        provenance=_provenance(report, text, overrides or {}, seed, opened.origin),
    )
    return Conversion(done.model, done.plan, report, header)


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


class _Clock:
    """Wall time of consecutive stages, of the first of which `spent` seconds have passed."""

    def __init__(self, spent: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter() - spent

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


def _check_finite(opened: OpenedModel) -> None:
    found = first_not_finite(opened.model)
    if found is not None:
        name, what = found
        raise SourceError(f"{opened.reference} cannot be converted: {name!r} holds {what}; use another checkpoint")


def _open_data(reference: str, opened: OpenedModel) -> Any:
    from asymswap.data.datasets import open_data
    from asymswap.data.predict import check_classifier

    data = open_data(reference, opened.preprocessing, "test")
    # Now, and not when the conversion has been made.
    check_classifier(opened.model, data)
    return data


def _accuracy(original: nn.Module, converted: nn.Module, data: Any, progress: Progress) -> AccuracyRow:
    from asymswap.data.accuracy import evaluate

    results = []
    for stage, model in (("evaluating before", original), ("evaluating after", converted)):

        def step(done: int, total: int, stage: str = stage) -> None:
            progress(stage, done, total)

        results.append(evaluate(model, data, progress=step))
    scored, classes = results[0].scores, len(data.classes)
    note = "" if scored == classes else f"the model scores {scored} classes, the data has {classes}: do they agree?"
    return AccuracyRow(data.description, results[0].images, results[0].top1, results[1].top1, note)


@dataclass(frozen=True)
class _Done:
    """What a conversion has come to before it is measured."""

    model: nn.Module
    plan: Plan
    traced: Trace
    before: Costs
    after: Costs
    gathered: Gathered | None
    sequential: bool
    polished: Polished | None
    latency: LatencyRow | None


def _carry_out(
    opened: OpenedModel,
    wanted: Recipe | Plan,
    calibration: Calibration | None,
    timing: Timing,
    classes: int | None,
    clock: _Clock,
    progress: Progress,
) -> _Done:
    """Trace, calibrate, plan and convert."""
    traced = trace(opened.model, opened.example())
    check_runs(traced, opened.model, opened.example())
    what_is_stored(opened.model)  # raises where it could not be written
    norms = [site.norm_behind for site in traced.sites if site.norm_behind is not None]
    before = costs_of(opened, [*(site.name for site in traced.sites), *norms])
    clock.stop("trace")
    gathered, sequential, polished = None, False, None
    if calibration is not None:
        gathered = gather_statistics(opened, _sites_to_learn(opened, traced, wanted), calibration, progress, classes)
        traced = traced.refusing(gathered.summary.unseen, UNSEEN)
        clock.stop("calibrate")
    statistics = {} if gathered is None else gathered.by_site

    def planned() -> tuple[Plan, LatencyRow | None]:
        if isinstance(wanted, Plan):
            return check_replay(opened.model, traced.sites, wanted, statistics), None
        if not _in_time(wanted):
            return make_plan(opened.model, traced.sites, wanted, before.total, progress, statistics), None
        choices = find_choices(opened.model, traced.sites, wanted, progress, statistics)
        with _of_the_converted_model():
            return plan_in_time(opened.model, opened.example(), choices, timing, progress)

    team = _team(calibration)
    plan, latency = team.first(planned)
    if isinstance(wanted, Recipe):
        check_not_empty(plan, wanted)
    replaced = [name for swap in plan.swaps for name in (swap.site, swap.absorbs) if name is not None]
    check_stand_ins(opened.model, replaced, opened.example())
    clock.stop("plan")
    if gathered is not None and calibration is not None:
        converted, sequential = convert_on(traced, plan, gathered, calibration, progress)
    else:
        # Weights that stay as they are need not be held twice where nobody else holds the original.
        converted = apply_plan(opened.model, plan, progress, share=opened.may_share)
    clock.stop("convert")
    if gathered is not None and calibration is not None:
        if calibration.polishes:
            polished = team.first(lambda: polish(gathered, converted, calibration, progress))
            team.follow_(converted)
            clock.stop("polish")
        converted = in_own_precision(opened, plan, converted, gathered)
    check_finite(opened.model, converted)
    after = _costs_after(opened, converted, traced, before)
    return _Done(converted, plan, traced, before, after, gathered, sequential, polished, latency)


def _in_time(wanted: Recipe | Plan) -> bool:
    """Whether latency is to be kept."""
    return isinstance(wanted, Recipe) and wanted.budget is not None and wanted.budget.latency is not None


def _team(calibration: Calibration | None) -> Team:
    return ALONE if calibration is None else calibration.team


def _sites_to_learn(opened: OpenedModel, traced: Trace, wanted: Recipe | Plan) -> list[Site]:
    """The sites of which statistics is needed: all that the recipe or the plan may swap."""
    if not isinstance(wanted, Plan):
        return matched_sites(opened.model, traced.sites, wanted)
    swapped = {swap.site for swap in wanted.swaps}
    return [site for site in traced.sites if site.name in swapped and site.calls]


def _costs_after(opened: OpenedModel, converted: nn.Module, traced: Trace, before: Costs) -> Costs:
    """What the converted model costs, found by running it; raises AsymswapError where it does not run."""
    with _of_the_converted_model():
        if traced.on_meta:
            after = count_costs(converted, opened.example(), [site.name for site in traced.sites])
            for site in traced.sites:
                told = describe_calls(site.name, after.calls[site.name], site.calls)
                if told is not None:
                    raise AsymswapError(f"in the converted model {told}; keep that conv by a rule with keep = true")
            return after
        inputs = probe(opened.preprocessing, opened.dtype())
        with eval_mode(converted), torch.no_grad():
            converted(*next(iter(portions(inputs))))
        return count_swapped(before, converted, traced.sites)


def _report(opened: OpenedModel, done: _Done, recipe: str, wanted: Recipe | Plan, seed: int) -> Report:
    """Measure what has changed."""
    inputs, probe_text = _probe(opened, done.gathered, seed)
    parts = compared_parts(done.traced)
    if not done.traced.on_meta:
        probe_text += f", compared at the outputs of {len(parts)} parts"
    fidelity = measure_fidelity(opened.model, done.model, done.plan, inputs, parts)
    check_output_finite(opened.model, fidelity, inputs)
    return make_report(
        opened,
        done.traced,
        done.plan,
        recipe,
        None if isinstance(wanted, Plan) or wanted.budget is None else str(wanted.budget),
        (done.before, done.after),
        fidelity,
        probe_text,
        (state_bytes(opened.model), state_bytes(done.model)),
    )


@contextmanager
def _of_the_converted_model() -> Iterator[None]:
    """Raise AsymswapError where the model cannot run with its replacements, which lack what a Conv2d has beside."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise AsymswapError(
            f"the converted model does not run ({error}): its code asks a layer that was replaced for more than its "
            "output; keep that conv by a rule with keep = true"
        ) from error


def _probe(opened: OpenedModel, gathered: Gathered | None, seed: int) -> tuple[Inputs, str]:
    """The inputs on which outputs are compared, and what they are: real images where there are some."""
    if gathered is not None and gathered.held_back is not None:
        return (gathered.held_back.to(opened.dtype()),), f"{len(gathered.held_back)} images of {gathered.summary.data}"
    inputs = probe(opened.preprocessing, opened.dtype(), seed=seed)
    return inputs, f"{len(inputs[0])} random images (seed {seed})"


def _calibration_row(done: _Done, data: Any) -> CalibrationRow | None:
    gathered, polished = done.gathered, done.polished
    if gathered is None:
        return None
    notes = list(gathered.notes)
    if polished is not None:
        notes.append(
            f"polished for {polished.steps} steps on {polished.images} images: difference of the outputs on held-back "
            f"ones {polished.before:.3g} -> {polished.after:.3g} (the weights of step {polished.kept_step})"
        )
    if data is not None and data.description == gathered.description:
        notes.append("calibrated and evaluated on the same images: the accuracy is too good to be trusted")
    summary = gathered.summary
    return CalibrationRow(summary.data, summary.images, summary.sha256, summary.seed, done.sequential, tuple(notes))


def _provenance(report: Report, recipe: str, overrides: Mapping[str, Any], seed: int, origin: Origin) -> dict[str, Any]:
    """What the checkpoint tells of how it came to be; wall times are left out, so that equal runs write equal files."""
    data = to_json(replace(report, seconds={}))
    return {
        "versions": versions(origin),
        "recipe": recipe,
        "overrides": dict(overrides),
        "seed": seed,
        "report": data,
    }
