"""The trade-off curve: one look at the calibration images, then a conversion and an evaluation for each budget."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from asymswap.api.progress import Shows, shows_progress
from asymswap.api.session import Session, check_finite, prefixed
from asymswap.calibration.agreement import on_held_back
from asymswap.calibration.calibrate import options_of, settle_for
from asymswap.calibration.config import Calibration
from asymswap.calibration.gather import model_hash
from asymswap.data.metrics import EvaluatedBy, Evaluator, check_same, evaluator_of
from asymswap.errors import AsymswapError, RecipeError, check_choice
from asymswap.measure.fidelity import check_stand_ins
from asymswap.measure.timing import Timing
from asymswap.models.opened import input_warnings
from asymswap.models.opening import Model, open_for_verb
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.planning.drop_budget import Drop
from asymswap.planning.plan import check_not_empty
from asymswap.planning.recipe import parse_recipe
from asymswap.planning.shipped import read_recipe_text
from asymswap.reporting import format as fmt
from asymswap.results.records import plain
from asymswap.results.sweep import Measure, Point, Tradeoff
from asymswap.types import Patches
from asymswap.utils.tensors import exact_convs

TOLERANCES = {"%": "1%", "dB": "0.1dB"}  # how much of a score the advice allows to lose, by its unit
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@shows_progress
@exact_convs()
def sweep(
    model: Model,
    recipes: Sequence[str | Path],
    data: EvaluatedBy | None = None,
    *,
    crop_border: int = 0,
    budgets: Sequence[float] = BUDGETS,
    measure: Measure = "macs",
    timing: Timing | None = None,
    calibration: Calibration | None = None,
    tolerance: float | str | None = None,
    known: Tradeoff | None = None,
    on_point: Callable[[Tradeoff], None] = lambda _: None,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    preprocessing: PreprocessingOptions | None = None,
    progress: Shows = True,
) -> Tradeoff:
    """Convert a model by each recipe to each budget (a fraction of its MACs, parameters or latency), and measure each.

    Calibration statistics are gathered once. `data` is what `asymswap.convert` takes as `evaluate`; without it what
    `max_drop` limits is measured, on inputs of the calibration that are held back. `tolerance` is how much of the first
    score the advice allows to lose, given as a `max_drop` is (1 point, 0.1 dB, or a hundredth of the original's).
    `timing` says how latency is measured, and in which runtime. `on_point` gets the sweep so far after each point;
    `known`, a sweep with the same settings, is resumed. The other options are those of `asymswap.convert`. A budget
    that a recipe cannot reach is a point with the reason. Raises AsymswapError for everything else.
    """
    check_choice("the measure", measure, get_args(Measure))
    if timing is not None and measure != "latency":
        raise AsymswapError('`timing=…` goes with `measure="latency"`; leave it out')
    timing = (timing or Timing()) if measure == "latency" else None
    wrong = [budget for budget in budgets if not 0 < budget < 1]
    if wrong or not budgets:
        raise AsymswapError(f"budgets are fractions between 0 and 1, not {wrong[0] if wrong else 'none at all'}")
    read = {str(recipe): read_recipe_text(str(recipe)) for recipe in recipes}
    parsed = {name: parse_recipe(*text, {f"budget.{measure}": budgets[0]}) for name, text in read.items()}
    opened = open_for_verb(model, progress, input_size, example_inputs, options_of(preprocessing, calibration))
    check_finite(opened)
    opened = settle_for(opened, calibration, data).on_device(choose=data is None or isinstance(data, str))
    if timing is not None and opened.device is not None:
        timing = replace(timing, device=str(opened.device))
    if timing is not None and timing.multiple:
        settled = {f"budget.{measure}": budgets[0], "multiple": timing.multiple}
        parsed = {name: parse_recipe(*text, settled) for name, text in read.items()}
    # Before the model runs: a mistake in the data is not to be hidden by one in its input.
    evaluator = None if data is None else evaluator_of(data, opened, crop_border)
    if evaluator is None and (calibration is None or calibration.data is None):
        raise AsymswapError("a sweep needs something to measure by: give `evaluate=…`, or `calibration=…` with data")
    session = Session(opened, calibration)
    if evaluator is None and calibration is not None:
        evaluator = on_held_back(opened, calibration, session.traced)
    assert evaluator is not None
    on = data if isinstance(data, str) else evaluator.description
    setting = {"data": on, "measure": measure, **_setting(session, evaluator, read)}
    if timing is not None:
        # Sweeps of earlier versions knew no devices and no precision.
        usual = {"cache": timing.cache, "precision": None, "device": "cpu"}
        setting["timing"] = {name: value for name, value in vars(timing).items() if (name, value) not in usual.items()}
    if known is not None:
        # Recipes may be added to a sweep; other settings must be as they were.
        old, new = dict(known.setting), dict(setting)
        before, added = old.pop("recipes", {}), new.pop("recipes")
        differing = [name for name in new if old.get(name) != new[name]]
        differing += [f"recipe {name}" for name in before if added.get(name, before[name]) != before[name]]
        if differing:
            raise AsymswapError(f"the sweep to resume has other settings ({differing[0]}); `force=True` starts again")
        known = replace(known, setting={**setting, "recipes": {**before, **added}})
    else:
        known = Tradeoff(
            model=opened.reference,
            measure=measure,
            before=session.costs.total,
            scores=evaluator(opened.model, partial(progress, "evaluating the original")),
            images=evaluator.images,
            data=evaluator.description,
            tolerance=0.0,
            setting=setting,
        )
    if tolerance is None:
        tolerance = TOLERANCES.get(known.first.unit, abs(known.first.value) / 100)
    tolerated = Drop.parse(tolerance).allowed(known.first)
    result = replace(known, tolerance=tolerated, warnings=input_warnings(opened), fed=opened.fed)
    done = {(point.recipe, point.budget) for point in result.points}
    lacking = [(name, budget) for name in parsed for budget in budgets if (name, budget) not in done]
    sites = session.sites_of([parsed[name] for name, _ in lacking])
    if lacking:
        # Before calibration, which takes minutes.
        check_stand_ins(opened.model, [site.name for site in sites], opened.example())
        if calibration is not None:
            session.gather(sites, evaluator.classes, progress)
    seconds: list[float] = []
    notes = {"not calibrated: ranks and weights were chosen by the weights alone": None}
    if session.gathered is not None and calibration is not None:
        summary = session.gathered.summary
        notes = {f"calibrated on {fmt.samples(summary.images, summary.data)} (seed {summary.seed})": None}
        if calibration.polishes:
            notes[f"then polished on up to {calibration.polish_images} of them"] = None
        notes |= dict.fromkeys([*session.notes_on(evaluator), *session.gathered.notes])
    for name, fraction in lacking:
        place = f"{fraction:g} ({len(seconds) + 1} of {len(lacking)}"
        if seconds:
            left = round((len(lacking) - len(seconds)) * sum(seconds) / len(seconds))
            place += f", {left // 60}:{left % 60:02} left"
        step = prefixed(progress, f"{place}): ")
        session.choices(parsed[name], progress)
        start = time.perf_counter()
        try:
            budget = parsed[name].budget
            assert budget is not None
            budget = budget.model_copy(update={budget.measure: fraction})
            plan, timed = session.plan(parsed[name], step, budget, timing)
            check_not_empty(plan, parsed[name].model_copy(update={"budget": budget}))
        except RecipeError as error:
            point = Point(name, fraction, failed=str(error))
        else:
            converted = session.apply(plan, step)
            notes |= dict.fromkeys(() if converted.calibration is None else converted.calibration.notes)
            scores = evaluator(converted.model, partial(step, "evaluating"))
            # An older sweep knows top-1 alone.
            found = [score for score in scores if score.name in {known.name for known in result.scores}]
            check_same(result.scores, found)
            values = {score.name: score.value for score in found}
            point = Point(name, fraction, converted.costs.total, values, len(plan.swaps))
            if timed is not None and timed.times[0].ratio is not None:
                point = replace(point, time=timed.times[0].ratio.value)
        seconds.append(time.perf_counter() - start)
        point = replace(point, seconds=round(seconds[-1], 2))
        result = replace(result.with_point(point), notes=(*notes, *filter(None, [evaluator.note])))
        on_point(result)
    return result


_SETTINGS = ("images", "sequential", "seed", "polish_steps", "polish_minutes", "polish_images", "outputs")
"""The fields of a calibration that change the results."""


def _setting(session: Session, evaluator: Evaluator, recipes: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Return what else the results depend on; of images their number and labels, not their pixels."""
    calibration = session.calibration
    calibrated: dict[str, Any] | None = None
    if calibration is not None:
        given = calibration.given()
        calibrated = {"data": given.reference or f"a {type(given.data).__name__}"}
        calibrated |= {name: getattr(calibration, name) for name in _SETTINGS}
        calibrated |= {} if given.patches == Patches() else {"patches": plain(given.patches)}
        calibrated |= {"held_back": given.held_back} if given.held_back else {}
    return {
        "weights": model_hash(session.opened.model),
        "input": plain(session.opened.preprocessing),
        "images": evaluator.images,
        "labels": evaluator.fingerprint,
        "calibration": calibrated,
        "recipes": {name: hashlib.sha256(text.encode()).hexdigest() for name, (text, _) in recipes.items()},
    }
