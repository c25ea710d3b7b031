"""The trade-off curve: one look at the calibration images, then a conversion and an evaluation for each budget."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from asymswap.api.conversion_report import check_finite
from asymswap.calibration.calibrate import (
    UNSEEN,
    Calibration,
    Gathered,
    convert_on,
    fed_on,
    gather_statistics,
    in_own_precision,
    polish,
)
from asymswap.calibration.gather import model_hash
from asymswap.data.accuracy import evaluate
from asymswap.data.datasets import LabelledImages, open_data
from asymswap.data.normalization import settle
from asymswap.data.predict import check_classifier
from asymswap.errors import AsymswapError, RecipeError, check_choice
from asymswap.graph.trace import Trace, check_runs, trace
from asymswap.measure.macs import count_costs
from asymswap.measure.stand_ins import check_stand_ins
from asymswap.models.opened import OpenedModel, costs_of
from asymswap.models.opening import Model, open_for_verb
from asymswap.planning.apply import apply_plan
from asymswap.planning.cost_model import Counted
from asymswap.planning.plan import Choices, check_not_empty, choose, find_choices, matched_sites
from asymswap.planning.recipe import Recipe, parse_recipe, read_recipe_text
from asymswap.results.records import plain
from asymswap.results.sweep import Point, Tradeoff
from asymswap.types import Cost, Plan, Progress, silent

Measure = Literal["macs", "params"]
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def sweep(
    model: Model,
    recipes: Sequence[str | Path],
    data: str,
    *,
    budgets: Sequence[float] = BUDGETS,
    measure: Measure = "macs",
    calibration: Calibration | None = None,
    tolerance: float = 0.01,
    known: Tradeoff | None = None,
    on_point: Callable[[Tradeoff], None] = lambda _: None,
    progress: Progress = silent,
) -> Tradeoff:
    """Convert a model by each recipe to each budget (a fraction of its MACs or parameters), and measure the accuracy.

    Calibration statistics are gathered once for all of them. `data` is a data reference on whose test part top-1 is
    measured; `tolerance` is the loss of accuracy that the advice allows, as a fraction. `on_point` gets the sweep so
    far after each point; a sweep of the same setting given as `known` is gone on with. Raises AsymswapError where
    `known` is of another setting, or anything cannot be done at all; a budget that a recipe cannot reach is a point
    that says so.
    """
    check_choice("the measure", measure, get_args(Measure))
    wrong = [budget for budget in budgets if not 0 < budget < 1]
    if wrong or not budgets:
        raise AsymswapError(f"budgets are fractions between 0 and 1, not {wrong[0] if wrong else 'none at all'}")
    read = {str(recipe): read_recipe_text(str(recipe)) for recipe in recipes}
    parsed = {name: parse_recipe(*text, {f"budget.{measure}": budgets[0]}) for name, text in read.items()}
    opened = open_for_verb(model, progress)
    opened, feeding = settle(opened, *fed_on(calibration, data))
    images = open_data(data, opened.preprocessing, "test")
    check_classifier(opened.model, images)
    setting = _setting(opened, {name: text for name, (text, _) in read.items()}, images, data, measure, calibration)
    known = None if known is None else _go_on(known, setting)
    bench = _Bench(opened, images, measure, calibration, progress)
    result = replace(known or bench.unchanged(setting), tolerance=tolerance, warnings=feeding.warnings, fed=feeding.fed)
    done = {(point.recipe, point.budget) for point in result.points}
    lacking = {name: [budget for budget in budgets if (name, budget) not in done] for name in parsed}
    bench.gather([recipe for name, recipe in parsed.items() if lacking[name]])
    bench.points_to_come = sum(map(len, lacking.values()))
    for name, recipe in parsed.items():
        for point in bench.points(name, recipe, lacking[name]):
            result = replace(result.with_point(point), notes=bench.notes())
            on_point(result)
    return result


_SETTINGS = ("data", "images", "sequential", "seed", "polish_steps", "polish_minutes", "polish_images", "outputs")
"""What of a calibration changes figures; where statistics is kept and in how much memory does not."""


def _setting(
    opened: OpenedModel,
    recipes: Mapping[str, str],
    images: LabelledImages,
    data: str,
    measure: Measure,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """All that the figures of a sweep depend on, as plain data; of images their number and labels, not their pixels."""
    labels = () if images.pictures is None else images.pictures.labels
    return {
        "weights": model_hash(opened.model),
        "input": plain(opened.preprocessing),
        "data": data,
        "images": len(images),
        "labels": hashlib.sha256(repr((images.classes, [int(label) for label in labels])).encode()).hexdigest(),
        "measure": measure,
        "calibration": None if calibration is None else {name: getattr(calibration, name) for name in _SETTINGS},
        "recipes": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in recipes.items()},
    }


def _go_on(known: Tradeoff, setting: Mapping[str, Any]) -> Tradeoff:
    """A sweep to go on with, if its figures were made as the new ones will be; recipes may be added to it."""
    old = dict(known.setting)
    recipes = {**old.get("recipes", {}), **setting["recipes"]}
    wrong = [name for name in setting if name != "recipes" and old.get(name) != setting[name]]
    wrong += [f"recipe {name}" for name, text in old.get("recipes", {}).items() if recipes[name] != text]
    if wrong:
        raise AsymswapError(f"the sweep to go on with is of another setting ({wrong[0]}); start anew with --force")
    return replace(known, setting={**setting, "recipes": recipes})


class _Bench:
    """One network, on which conversions are made and measured in turn."""

    def __init__(
        self,
        opened: OpenedModel,
        images: LabelledImages,
        measure: Measure,
        calibration: Calibration | None,
        progress: Progress,
    ) -> None:
        self._opened, self._images, self._measure = opened, images, measure
        self._calibration, self._progress = calibration, progress
        self._traced: Trace = trace(opened.model, opened.example())
        check_runs(self._traced, opened.model, opened.example())
        self._before = costs_of(opened).total
        self._gathered: Gathered | None = None
        self.points_to_come = 0
        self._taken: list[float] = []
        self._doing = ""

    def unchanged(self, setting: Mapping[str, Any]) -> Tradeoff:
        """The sweep without a point yet."""
        found = evaluate(self._opened.model, self._images, progress=self._step("evaluating the original"))
        return Tradeoff(
            model=self._opened.reference,
            measure=self._measure,
            before=self._before,
            accuracy=found.top1,
            images=found.images,
            data=self._images.description,
            tolerance=0.0,
            setting=setting,
        )

    def gather(self, recipes: Sequence[Recipe]) -> None:
        """Statistics of every site that one of the recipes may swap, once it is known that the model lets it be."""
        if not recipes:
            return
        wanted = [matched_sites(self._opened.model, self._traced.sites, recipe) for recipe in recipes]
        names = {site.name for sites in wanted for site in sites}
        sites = [site for site in self._traced.sites if site.name in names]
        check_stand_ins(self._opened.model, [site.name for site in sites], self._opened.example())
        if self._calibration is None:
            return
        classes = len(self._images.classes)
        self._gathered = gather_statistics(self._opened, sites, self._calibration, self._progress, classes)
        self._traced = self._traced.refusing(self._gathered.summary.unseen, UNSEEN)

    def notes(self) -> tuple[str, ...]:
        """How it was calibrated."""
        if self._gathered is None or self._calibration is None:
            return ("not calibrated: ranks and weights were chosen by the weights alone",)
        summary = self._gathered.summary
        notes = [f"calibrated on {summary.images} unlabelled images of {summary.data} (seed {summary.seed})"]
        if self._calibration.polishes:
            notes.append(f"then polished on up to {self._calibration.polish_images} of them")
        if self._gathered.description == self._images.description:
            notes.append("calibrated and evaluated on the same images: the accuracy is too good to be trusted")
        return (*notes, *dict.fromkeys(self._gathered.notes))

    def points(self, name: str, recipe: Recipe, budgets: Sequence[float]) -> Iterator[Point]:
        """A point for each budget; what does not depend on the budget is done once."""
        if not budgets:
            return
        statistics = {} if self._gathered is None else self._gathered.by_site
        choices = find_choices(self._opened.model, self._traced.sites, recipe, self._progress, statistics)
        for budget in budgets:
            start = time.perf_counter()
            self._doing = self._place(budget)
            point = self._point(name, choices, budget)
            self._taken.append(time.perf_counter() - start)
            yield replace(point, seconds=round(self._taken[-1], 2))

    def _place(self, budget: float) -> str:
        """Which point is being measured, and how long all will take if they take as long as those before."""
        done, total = len(self._taken), self.points_to_come
        left = round((total - done) * sum(self._taken) / done) if done else None
        return f"{budget:g} ({done + 1} of {total}" + (")" if left is None else f", {left // 60}:{left % 60:02} left)")

    def _point(self, name: str, choices: Choices, budget: float) -> Point:
        assert choices.recipe.budget is not None
        limits = choices.recipe.budget.model_copy(update={self._measure: budget})
        choices = replace(choices, recipe=choices.recipe.model_copy(update={"budget": limits}))
        try:
            plan = choose(choices, Counted(self._measure, self._before))
            check_not_empty(plan, choices.recipe)
        except RecipeError as error:
            return Point(name, budget, failed=str(error))
        converted = self._convert(plan)
        return Point(
            recipe=name,
            budget=budget,
            cost=self._cost(converted),
            accuracy=evaluate(converted, self._images, progress=self._step("evaluating")).top1,
            swapped=len(plan.swaps),
        )

    def _convert(self, plan: Plan) -> nn.Module:
        if self._gathered is None or self._calibration is None:
            converted = apply_plan(self._opened.model, plan, self._tell)
        else:
            converted, _ = convert_on(self._traced, plan, self._gathered, self._calibration, self._tell)
            if self._calibration.polishes:
                polish(self._gathered, converted, self._calibration, self._tell)
            converted = in_own_precision(self._opened, plan, converted, self._gathered)
        check_finite(self._opened.model, converted)
        return converted

    def _cost(self, converted: nn.Module) -> Cost:
        return count_costs(converted, self._opened.example()).total

    def _step(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self._tell(stage, done, total)

    def _tell(self, stage: str, done: int, total: int) -> None:
        self._progress(f"{self._doing}: {stage}" if self._doing else stage, done, total)
