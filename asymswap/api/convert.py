"""The verbs `plan`, `convert`, `save` and `write_report`.

The options that several verbs share are described in docs/reference/python.md.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import asymswap
from asymswap import replacements
from asymswap.api.benchmark import time_conversion
from asymswap.api.progress import Shows, shows_progress
from asymswap.api.session import Clock, Converted, Session, check_finite
from asymswap.calibration.agreement import MEASURED, Against, on_held_back
from asymswap.calibration.calibrate import PROBED, options_of, settle_for, some_inputs
from asymswap.calibration.config import Calibration
from asymswap.checkpoint import Header, read_checkpoint, what_is_stored
from asymswap.data.metrics import EvaluatedBy, Evaluator, check_same, evaluator_of
from asymswap.errors import AsymswapError, CheckpointError, PlanError, listed
from asymswap.measure.fidelity import Fidelity, compared_parts, measure_fidelity
from asymswap.measure.macs import Costs
from asymswap.measure.runtimes import RUNTIMES
from asymswap.measure.timing import Timing
from asymswap.models.converted import base_of, save_checkpoint, versions
from asymswap.models.opened import input_warnings
from asymswap.models.opening import Made, Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.planning.drop_budget import Drop
from asymswap.planning.plan import check_not_empty, plan_from_json
from asymswap.planning.recipe import BUDGETS, Recipe, parse_recipe
from asymswap.planning.shipped import read_recipe_text
from asymswap.reporting import format as fmt
from asymswap.reporting.convert import check_suffix, to_html
from asymswap.reporting.tables import to_file
from asymswap.results import convert as results
from asymswap.results.records import read_provenance, read_report, to_json
from asymswap.types import Cost, Keep, Plan, Site, Swap
from asymswap.utils.files import check_output, write_file
from asymswap.utils.inputs import output_of, placed, portions, samples_in, samples_of, sizes
from asymswap.utils.tensors import device_of, exact_convs, list_tensors

# A loss that is told in the first line: points, decibels, and the relative change of outputs that nothing else judges.
_MUCH, _MUCH_CHANGED = {"%": 0.01, "dB": 0.3}, 0.2


@dataclass
class Conversion(Made):
    """A converted model, and the report; `save` writes it."""

    report: results.Report

    @property
    def plan(self) -> Plan:
        """The plan that made it."""
        return self.header.plans[-1]


@shows_progress
def plan(
    model: Model,
    recipe: str | Path,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    progress: Shows = True,
) -> Plan:
    """Return what `convert` would do, without doing it; the plan is plain data and can be edited and replayed."""
    overrides = _with_budget(overrides, macs=macs, params=params, latency=latency)
    parsed = parse_recipe(*read_recipe_text(str(recipe)), overrides)
    opened = open_for_verb(model, progress, input_size, example_inputs)
    check_finite(opened)
    return Session(opened).plan(parsed, progress)[0]


@shows_progress
@exact_convs()
def convert(
    model: Model,
    recipe: str | Path | None = None,
    *,
    plan: Plan | str | bytes | Path | Mapping[str, Any] | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    max_drop: float | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    preprocessing: PreprocessingOptions | None = None,
    evaluate: EvaluatedBy | None = None,
    crop_border: int = 0,
    time: bool | None = None,
    runtime: str | None = None,
    timing: Timing | None = None,
    allow_drift: bool = False,
    seed: int = 0,
    progress: Shows = True,
) -> Conversion:
    """Convert a model by a recipe, or by a plan (an object, its JSON or the path of a file), and measure what changed.

    `calibration` chooses ranks and weights on unlabelled images, far more accurately than by the weights alone; the
    processes of its team must make the same call, and get the same result. `evaluate` is a data reference, whose test
    part is used, a function of the model that returns a number or numbers by name, or a `Metric`: scores are measured
    before and after; `crop_border` is for `pairs:`. `time` measures time before and after in the runtimes that are
    installed, by default where `latency` is given, which is kept in `runtime`; `timing` says more of how. `seed` is for
    the probe batch. A `max_drop` is of the first score of `evaluate`, or else of what is measured on inputs of the
    calibration that are held back. Raises AsymswapError where a kind does not preserve the function on the probe batch
    as promised, unless `allow_drift`.
    """
    if recipe is not None and plan is not None:
        raise AsymswapError("give either `recipe=…` or `plan=…`, not both")
    if recipe is None and plan is None:
        raise AsymswapError("give `recipe=…` or `plan=…`; `asymswap recipes` lists the recipes that come with asymswap")
    overrides = _with_budget(overrides, macs=macs, params=params, latency=latency, max_drop=max_drop)
    if plan is not None and overrides:
        raise AsymswapError("a plan is settled: `overrides=…` and budgets go with a recipe; edit the plan instead")
    requested: Recipe | Plan
    text, budget = "", None
    if recipe is None:
        where = "the given plan"
        if isinstance(plan, Path):
            where = str(plan)
            try:
                plan = plan.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise PlanError(f"cannot read the plan {where}: {getattr(error, 'strerror', None) or error}") from None
        requested = plan if isinstance(plan, Plan) else plan_from_json(plan, where)
    else:
        text, where = read_recipe_text(str(recipe))
        requested = parse_recipe(text, where, overrides)
        budget = requested.budget
    if calibration is not None and not isinstance(calibration, Calibration):
        raise AsymswapError(f"`calibration=` takes asymswap.Calibration(DATA), not {calibration!r}")
    drop = None if budget is None or budget.max_drop is None else Drop.parse(budget.max_drop)
    if drop is not None and evaluate is None:
        if calibration is None or calibration.data is None:
            raise AsymswapError(
                "`max_drop=…` is measured: give `calibration=…` with data, of which a part is held back, or "
                "`evaluate=…`"
            )
        # As many as tenths of a point need.
        calibration = replace(calibration, held_back=calibration.held_back or MEASURED)
    in_time = budget is not None and budget.latency is not None
    if (timing is not None or runtime is not None) and not in_time and not time:
        raise AsymswapError(
            "options of time, such as `runtime=…`, go with `latency=…` or `time=True`; give one, or leave them out"
        )
    timing = timing or Timing()
    timing = timing if runtime is None else replace(timing, runtime=runtime)
    if in_time or time:
        RUNTIMES[timing.runtime].version()  # raises where it is not installed
    opened = open_for_verb(model, progress, input_size, example_inputs, options_of(preprocessing, calibration))
    timing = timing if opened.device is None else replace(timing, device=str(opened.device))
    if in_time and timing.multiple:
        requested = parse_recipe(text, where, {"multiple": timing.multiple, **overrides})
    clock = Clock(opened.seconds)
    check_finite(opened)
    given = settle_for(opened, calibration, evaluate)
    opened = given.on_device(choose=isinstance(evaluate, str) or (evaluate is None and calibration is not None))
    evaluator = None if evaluate is None else evaluator_of(evaluate, opened, crop_border)
    clock.stop("load")
    session = Session(opened, calibration, clock)
    what_is_stored(opened.model)  # raises where it could not be written
    judge = evaluator
    if drop is not None and judge is None and calibration is not None:
        judge = on_held_back(opened, calibration, session.traced, drop.unit)
    before = None
    if judge is not None:
        # Before calibration, which takes minutes.
        before = session.team.first(partial(judge.measured, opened.model, partial(progress, "evaluating before")))
        if drop is not None:
            if not before.scores:
                raise AsymswapError("`max_drop` cannot be measured: outputs cannot be compared; give `evaluate=…`")
            drop.allowed(before.scores[0])
        clock.stop("evaluate before")
    if calibration is not None:
        classes = None if evaluator is None else evaluator.classes
        session.gather(session.sites_of([requested]), classes, progress)
    kept, dropped, timed = None, None, None
    if drop is not None and judge is not None and before is not None and isinstance(requested, Recipe):
        converted, kept, dropped = session.convert_within(requested, drop, judge, before, progress)
    else:
        settled, timed = session.plan(requested, progress, timing=timing if in_time else None)
        if isinstance(requested, Recipe):
            check_not_empty(settled, requested)
        converted = session.apply(settled, progress)

    def measured() -> results.Report:
        asked = "a plan" if recipe is None else str(recipe), None if budget is None else str(budget)
        report = _make_report(session, converted, evaluator, *asked, seed)
        if not allow_drift:
            _check_promises(report, opened.dtype())
        against = judge if isinstance(judge, Against) else session.against()
        agreement = None if against is None else against.agreement(converted.model, partial(progress, "comparing"))
        clock.stop("measure")
        times = timed
        if time or (time is None and in_time):
            times = time_conversion(opened, converted.model, timing, timed, progress)
            clock.stop("time")
        scores = None
        if evaluator is not None and before is not None:
            after = kept.scores if kept else evaluator(converted.model, partial(progress, "evaluating after"))
            check_same(before.scores, after)
            value = {score.name: score.value for score in after}
            changes = [
                results.ScoreChange(s.name, s.value, value[s.name], s.unit, s.lower_is_better) for s in before.scores
            ]
            scores = results.AccuracyRow(evaluator.description, evaluator.images, tuple(changes), evaluator.note)
            clock.stop("evaluate")
        found = replace(
            report,
            latency=times,
            untimed="Time was not measured; give `time=True`." if times is None else "",
            accuracy=scores,
            agreement=agreement,
            drop=dropped,
            seconds=clock.seconds,
        )
        advice = _advice(found, converted.polished is not None)
        return replace(found, warnings=(*input_warnings(opened), *advice, *report.warnings))

    report = session.team.first(measured)
    provenance = {
        "versions": versions(opened.origin),
        "recipe": text,
        "overrides": dict(overrides or {}),
        "seed": seed,
        # Without wall times equal runs write equal files.
        "report": to_json(replace(report, seconds={})),
    }
    header = replace(opened.header(), plans=(*opened.plans, converted.plan), provenance=provenance)
    return Conversion(converted.model.to(device_of(given.model)), report, header, base_of(given))


def _advice(report: results.Report, polished: bool) -> Iterator[str]:
    """Yield what was lost, where that is much, and what of all that helps was not yet done."""
    accuracy, agreement, lost = report.accuracy, report.agreement, ""
    for one in accuracy.scores if accuracy else ():
        fall = (one.after - one.before) * (1 if one.lower_is_better else -1)
        if fall > _MUCH.get(one.unit, math.inf):
            lost = lost or f"{one.name} falls by {fmt.score_change(fall, one.unit).lstrip('+')}"
    same = next((one.value for one in agreement.outputs if one.measure == "top-1"), None) if agreement else None
    if accuracy is None and same is not None and 1 - same > _MUCH["%"]:
        lost = f"{100 * (1 - same):.1f} % of the held-back inputs get another answer than the original's"
    if accuracy is None and same is None and report.output.relative > _MUCH_CHANGED:
        lost = f"the output changes by {fmt.error(report.output.relative)}"
    times = report.latency.times if report.latency else ()
    if any(one.ratio and one.ratio.is_significant and one.ratio.value > 1 for one in times):
        yield "slower than before: ask for time in place of MACs, `latency=0.9`, which swaps only what pays"
    if not lost:
        return
    if report.calibration is None:
        yield f"{lost}: calibrate on some hundred images without labels, `calibration=DIR`"
    elif not polished:
        yield f"{lost}: polish it, `polish_minutes=5`, or ask for less"
    else:
        yield f"{lost}: fine-tune it with the original as its teacher (`asymswap finetune`), or ask for less"


def _with_budget(overrides: Mapping[str, Any] | None, **budgets: float | str | None) -> dict[str, Any]:
    """Return the overrides with the budget that is given; raise AsymswapError where two are."""
    given = {f"budget.{measure}": value for measure, value in budgets.items() if value is not None}
    every = [*(overrides or {}).items(), *given.items()]
    asked = {(key, value) for key, value in every if key.startswith("budget.") and key[7:] in BUDGETS}
    if len(asked) > 1:
        named = " and ".join(f"`{key[7:]}={value}`" for key, value in sorted(asked))
        raise AsymswapError(f"a recipe has one budget, and {named} are two; give one of them")
    return dict(every)


def save(conversion: Conversion, path: str | Path, *, force: bool = False) -> results.Report:
    """Write a conversion to a `.pt` or `.safetensors` file and return its report with the file's size in it.

    An existing file is replaced only with `force`.
    """
    path = Path(path)
    check_output(path, force)
    start = time.perf_counter()
    save_checkpoint(path, conversion.model, conversion.header)
    seconds = {**conversion.report.seconds, "save": round(time.perf_counter() - start, 3)}
    written = results.FileRow(str(path), path.stat().st_size)
    conversion.report = replace(conversion.report, files=(*conversion.report.files, written), seconds=seconds)
    return conversion.report


def write_report(of: Conversion | str | Path, path: str | Path, *, force: bool = False) -> None:
    """Write the report of a conversion, or of the one that a checkpoint holds, to a .html, .json or .md file.

    An existing file is replaced only with `force`. Raises OutputError where the file cannot be written, and
    CheckpointError where the checkpoint holds no report, or a damaged one.
    """
    path = Path(path)
    check_output(path, force)
    check_suffix(path)
    if isinstance(of, Conversion):
        provenance = read_provenance(of.header.provenance, "the conversion")
        text = to_file(of.report, path, partial(to_html, provenance=provenance))
    else:
        text = stored_report_text(read_checkpoint(Path(of)).header, Path(of), path)
    write_file(path, text)


def stored_report_text(header: Header, checkpoint: Path, path: Path) -> str:
    """Return the report in the header of a checkpoint, in the form of the ending of `path`."""
    report = read_report(header.provenance, str(checkpoint))
    report = replace(report, files=(*report.files, results.FileRow(str(checkpoint), checkpoint.stat().st_size)))
    provenance = read_provenance(header.provenance, str(checkpoint))
    try:
        return to_file(report, path, partial(to_html, provenance=provenance))
    except (ArithmeticError, ValueError) as error:
        # The file's numbers can be anything.
        raise CheckpointError(f"{checkpoint} has a damaged report: {error}") from None


def _make_report(
    session: Session, converted: Converted, evaluator: Evaluator | None, recipe: str, budget: str | None, seed: int
) -> results.Report:
    """Measure what has changed, on held-back or random images; raise AsymswapError where an output is not finite."""
    opened, traced, plan, before = session.opened, session.traced, converted.plan, session.costs
    gathered, calibrated, size = session.gathered, converted.calibration, ""
    if calibrated is not None:
        polished = [] if converted.polished is None else [str(converted.polished)]
        calibrated = replace(calibrated, notes=(*calibrated.notes, *polished, *session.notes_on(evaluator)))
    if gathered is not None and gathered.held_back is not None:
        inputs = samples_of(placed(opened.model, gathered.held_back.load(0)), 0, PROBED)
        probed = fmt.samples(samples_in(inputs), gathered.summary.data).replace("unlabelled ", "")
    else:
        inputs, probed = some_inputs(None, opened, seed, images=2)
    if session.calibration is not None and session.calibration.patch is not None:
        size = sizes(samples_of(inputs, 0, 1)).removeprefix("1x")
    parts = compared_parts(traced)
    if not traced.on_meta:
        probed += f", compared at the outputs of {len(parts)} parts"
    fidelity = measure_fidelity(opened.model, converted.model, plan, inputs, parts)
    if not math.isfinite(fidelity.output.largest):
        outputs = list_tensors([output_of(opened.model, portion) for portion in portions(inputs)])
        if all(bool(tensor.isfinite().all()) for tensor in outputs):
            raise AsymswapError(
                "the converted model's output is not finite, where the original's is, so nothing is written; give it "
                "a larger budget, or another dtype than half precision"
            )
    decided: list[Swap | Keep] = [*plan.keeps, *plan.swaps]
    entries, after = {one.site: one for one in decided}, converted.costs.by_name
    rows = tuple(_row(site, entries[site.name], before, after[site.name], fidelity) for site in traced.sites)
    return results.Report(
        asymswap=asymswap.__version__,
        model=results.ModelRow(
            reference=opened.reference,
            origin=opened.origin.reference,
            weights=opened.weights,
            traced_by=traced.by,
            input=opened.takes(),
            sha256=opened.sha256,
            notes=opened.notes + traced.notes + before.notes(),
        ),
        recipe=recipe,
        budget=budget,
        preserves={swap.kind: replacements.load(swap.kind).PRESERVES for swap in plan.swaps},
        sites=rows,
        rest=before.total - sum((row.before for row in rows), start=Cost(0, 0)),
        before=before.total,
        after=converted.costs.total,
        output=results.OutputChange(fidelity.output.relative, fidelity.output.largest, probed, size),
        warnings=tuple(_surprises(rows, fidelity)),
        multiplier=plan.multiplier,
        calibration=calibrated,
        fed=opened.fed,
        weights_bytes=(state_bytes(opened.model), state_bytes(converted.model)),
        files=() if opened.file is None else (results.FileRow(str(opened.file), opened.file.stat().st_size),),
    )


_PROMISED = 1e-4  # relative change of an output up to which it counts as preserved, or 8 steps of a coarser dtype
_SURPRISE = 5.0  # an error of more than this many times the predicted one has another cause


def _check_promises(report: results.Report, dtype: torch.dtype) -> None:
    """Raise AsymswapError where a kind, or all of them together, have not preserved what they promise."""
    allowed = max(_PROMISED, 8 * torch.finfo(dtype).eps)
    for row in report.swapped:
        if row.exact and row.output_error is not None and not row.output_error <= allowed:
            raise AsymswapError(
                f"{row.kind} promises to preserve {row.site}, but its output has changed by {row.output_error:.1e} "
                f"(allowed {allowed:.0e}); keep it by a rule, or give `allow_drift=True`"
            )
    if report.swapped and all(row.exact for row in report.swapped) and not report.output.relative <= 10 * allowed:
        raise AsymswapError(
            f"every swap promises to preserve the function, but the model's output has changed by "
            f"{report.output.relative:.1e}; `allow_drift=True` allows that"
        )


def _surprises(rows: Sequence[results.SiteRow], fidelity: Fidelity) -> Iterator[str]:
    """Warn where the error of a layer, or of the whole output, is far above the predicted one."""
    predicted = [row.predicted_error for row in rows if row.action == "swap"]
    far = [
        f"{row.site} {fmt.error(row.output_error)} instead of {fmt.error(row.predicted_error)}"
        for row in rows
        if row.predicted_error is not None
        and row.output_error is not None
        and not row.output_error <= max(_SURPRISE * row.predicted_error, _PROMISED)
    ]
    if far:
        yield f"the output error is far above the predicted one: {listed(far, 3)}; check these layers"
    # The layers' errors add up like this where the network does not dampen them, which it usually does.
    expected = math.sqrt(sum(error**2 for error in predicted if error is not None))
    known = bool(predicted) and None not in predicted
    if known and not fidelity.output.relative <= max(_SURPRISE * expected, _PROMISED):
        yield (
            f"the model's output changed by {fmt.error(fidelity.output.relative)}, where the errors of its layers "
            f"predict about {fmt.error(expected)}: its code may treat a replaced layer in another way than a Conv2d"
        )


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors of the state dict."""
    return sum(value.nbytes for value in model.state_dict().values() if isinstance(value, torch.Tensor))


def _row(site: Site, entry: Swap | Keep, before: Costs, after: Cost, fidelity: Fidelity) -> results.SiteRow:
    old, conv = before.by_name[site.name], site.conv.describe()
    row = results.SiteRow(
        site.name, conv, site.feature_map, len(site.calls), reason=entry.reason, before=old, after=after
    )
    if isinstance(entry, Keep):
        return row
    error = fidelity.site_outputs[site.name]
    kind, settings = replacements.load_swap(entry)
    fields = kind.settings.model_fields
    unusual = {key: value for key, value in entry.settings.items() if value != fields[key].default}
    return replace(
        row,
        action="swap",
        kind=entry.kind,
        becomes=fmt.settings(unusual if unusual.keys() - {"bias"} else {entry.kind: True, **unusual}),
        settings=dict(entry.settings),
        # The absorbed batch norm's cost stays with the rest of the model, so that the sums come out right.
        after=after if entry.absorbs is None else after - before.by_name[entry.absorbs],
        predicted_error=entry.predicted,
        kernel_error=fidelity.kernels.get(site.name),
        output_error=error.relative,
        output_largest=error.largest,
        exact=kind.preserves(site.conv, settings),
        absorbs=entry.absorbs,
    )
