"""One opened model to make plans for and apply them to: `plan`, `convert` and `sweep` are thin over it."""

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from asymswap.calibration.agreement import Against
from asymswap.calibration.calibrate import UNSEEN, Gathered, convert_on, gather_statistics, in_own_precision, polish
from asymswap.calibration.config import Calibration, OutputKind
from asymswap.calibration.polish import Polished
from asymswap.data.metrics import Evaluator, Measured, check_same
from asymswap.errors import AsymswapError, RecipeError, SourceError
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.trace import check_runs, trace
from asymswap.measure.fidelity import check_stand_ins, describe_calls
from asymswap.measure.macs import Costs, count_costs, count_swapped
from asymswap.measure.statistics import mean_interval
from asymswap.measure.timing import Timing
from asymswap.models.opened import OpenedModel, costs_of
from asymswap.planning import plan as planning
from asymswap.planning.apply import apply_plan
from asymswap.planning.drop_budget import Drop, Search
from asymswap.planning.latency_budget import plan_in_time
from asymswap.planning.recipe import Budget, Recipe
from asymswap.reporting import format as fmt
from asymswap.results.convert import CalibrationRow, DropRow, LatencyRow
from asymswap.types import Plan, Progress, Site, Swap
from asymswap.utils.distributed import ALONE
from asymswap.utils.inputs import output_of, portions
from asymswap.utils.tensors import device_of, first_not_finite

_PARTS = 1024  # of all MACs: the least fraction that can be kept is a number of them
_STEPS = 40  # fractions at which plans are made, to see what they predict
_POLISHED = 3  # networks polished to keep a `max_drop`, at most: each takes minutes


class Clock:
    """Wall time of consecutive stages, which may come again; the first one began `spent` seconds ago."""

    def __init__(self, spent: float = 0.0) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter() - spent

    def stop(self, stage: str) -> None:
        """Add the seconds since the last stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 3)
        self._last = now


@dataclass(frozen=True)
class Converted:
    """A converted model, its plan and costs, and what it was calibrated on."""

    model: nn.Module
    plan: Plan
    costs: Costs
    calibration: CalibrationRow | None = None
    polished: Polished | None = None


class Session:
    """A model that is traced, counted and calibrated once, for any number of plans; it is never changed.

    In a team of processes all must make the same calls, and all get the same results.
    """

    def __init__(self, opened: OpenedModel, calibration: Calibration | None = None, clock: Clock | None = None) -> None:
        self.opened, self.calibration, self.clock = opened, calibration, clock or Clock()
        self.team = ALONE if calibration is None else calibration.team
        if device_of(opened.model).type == "mps":
            raise AsymswapError(
                "mps computes nothing in float64, which solving needs: give `device=cpu`, then evaluate or train on mps"
            )
        self.traced = trace(opened.model, opened.example())
        check_runs(self.traced, opened.model, opened.example())
        norms = [site.norm_behind for site in self.traced.sites if site.norm_behind is not None]
        self.costs = costs_of(opened, [*(site.name for site in self.traced.sites), *norms])
        self.gathered: Gathered | None = None
        self._statistics: Mapping[str, SiteStatistics] = {}
        self._choices: planning.Choices | None = None
        self.clock.stop("trace")

    def sites_of(self, swapped_by: Sequence[Recipe | Plan]) -> list[Site]:
        """Return the sites that one of these recipes or plans may swap."""
        names: set[str] = set()
        for one in swapped_by:
            if isinstance(one, Plan):
                names |= {swap.site for swap in one.swaps}
            else:
                names |= {site.name for site in planning.matched_sites(self.opened.model, self.traced.sites, one)}
        return [site for site in self.traced.sites if site.name in names and site.calls]

    def gather(self, sites: Sequence[Site], classes: int | None, progress: Progress) -> None:
        """Gather the calibration statistics of these sites; `classes` is the number in the evaluation data."""
        assert self.calibration is not None
        self.gathered = gather_statistics(self.opened, sites, self.calibration, progress, classes)
        self._statistics = self.gathered.by_site
        self.traced = self.traced.refusing(self.gathered.summary.unseen, UNSEEN)
        self.clock.stop("calibrate")

    def against(self) -> Against | None:
        """Return what measures how far a converted model agrees with this one; None without inputs."""
        gathered, calibration = self.gathered, self.calibration
        if calibration is None or gathered is None or gathered.held_back is None:
            return None
        kind: OutputKind = "scores" if gathered.summary.outputs.startswith("class scores") else "values"
        return Against(self.opened, calibration, self.traced, kind)

    def notes_on(self, evaluator: Evaluator | None) -> tuple[str, ...]:
        """Warn where scores are of the images that the session is calibrated on."""
        held_back = None if self.gathered is None else self.gathered.held_back
        same = held_back is not None and evaluator is not None and held_back.description == evaluator.inputs
        return ("calibrated and evaluated on the same images: the accuracy is too good to be trusted",) if same else ()

    def plan(
        self, requested: Recipe | Plan, progress: Progress, budget: Budget | None = None, timing: Timing | None = None
    ) -> tuple[Plan, LatencyRow | None]:
        """Plan by a recipe, under its own budget or another one, or replay a plan.

        With `timing` the budget is one of latency; what was measured is returned too. Raises RecipeError where the
        recipe does not fit the model or the budget cannot be reached, PlanError where the plan does not fit.
        """

        def planned() -> tuple[Plan, LatencyRow | None]:
            if isinstance(requested, Plan):
                return planning.check_replay(self.opened.model, self.traced.sites, requested, self._statistics), None
            choices = self.choices(requested, progress)
            if budget is not None:
                choices = replace(choices, recipe=requested.model_copy(update={"budget": budget}))
            if timing is not None:
                with _running_converted():
                    return plan_in_time(self.opened.model, self.opened.example(), choices, timing, progress)
            return planning.choose(choices, planning.counted_costs(choices.recipe.budget, self.costs.total)), None

        found = self.team.first(planned)
        self.clock.stop("plan")
        return found

    def choices(self, recipe: Recipe, progress: Progress) -> planning.Choices:
        """Decide all that does not depend on the budget, once for all budgets of a recipe."""
        if self._choices is None or self._choices.recipe is not recipe:
            model, sites = self.opened.model, self.traced.sites
            self._choices = planning.find_choices(model, sites, recipe, progress, self._statistics)
        return self._choices

    def curve(self, recipe: Recipe, progress: Progress) -> list[tuple[float, float]]:
        """Return fractions of the MACs, from the least, whose plans swap anything, with the sum of squared errors."""
        choices, costs = self.choices(recipe, progress), planning.counted_costs(None, self.costs.total)

        def swapped(fraction: float) -> tuple[Swap, ...] | None:
            with suppress(RecipeError):
                return planning.choose(choices, costs, fraction).swaps
            return None

        least = bisect_left(range(_PARTS), True, lo=1, key=lambda part: swapped(part / _PARTS) is not None) / _PARTS
        fractions = [least + (1.0 - least) * step / _STEPS for step in range(_STEPS + 1)]
        swaps = [(fraction, swapped(fraction)) for fraction in fractions]
        return [(fraction, sum((one.predicted or 0.0) ** 2 for one in some)) for fraction, some in swaps if some]

    def apply(self, plan: Plan, progress: Progress, polished: bool = True) -> Converted:
        """Convert a copy of the model by a plan, solved on the statistics and polished if the calibration asks for it.

        Without `polished` it is only solved. Raises AsymswapError where the converted model does not run as before, or
        holds NaN or infinity.
        """
        opened, gathered, calibration = self.opened, self.gathered, self.calibration
        # Each conversion has notes of its own.
        gathered = None if gathered is None else replace(gathered, notes=[*gathered.notes])
        names = [name for swap in plan.swaps for name in (swap.site, swap.absorbs) if name is not None]
        check_stand_ins(opened.model, names, opened.example())
        row = trained = None
        if gathered is None or calibration is None:
            # If nobody else holds the original, unchanged weights need not be held twice.
            converted = apply_plan(opened.model, plan, progress, share=opened.may_share)
            self.clock.stop("convert")
        else:
            converted, sequential = convert_on(self.traced, plan, gathered, calibration, progress)
            self.clock.stop("convert")
            if calibration.polishes and polished:
                trained = self.team.first(lambda: polish(gathered, converted, plan, calibration, progress))
                self.team.follow_(converted)
                self.clock.stop("polish")
            converted = in_own_precision(opened, plan, converted, gathered)
            on = gathered.summary
            row = CalibrationRow(on.data, on.images, on.sha256, on.seed, sequential, tuple(gathered.notes))
        found = first_not_finite(converted)
        if found is not None:
            raise AsymswapError(
                f"the converted model's {found[0]!r} holds {found[1]}, so nothing is written; keep that conv by a rule "
                "with keep = true, and report it as a bug"
            )
        sites = self.traced.sites
        with _running_converted():
            if self.traced.on_meta:
                costs = count_costs(converted, opened.example(), [site.name for site in sites])
            else:
                output_of(converted, next(portions(opened.probe())))
                costs = count_swapped(self.costs, converted, sites)
        for site in sites if self.traced.on_meta else ():
            change = describe_calls(site.name, costs.calls[site.name], site.calls)
            if change is not None:
                raise AsymswapError(f"in the converted model {change}; keep that conv by a rule with keep = true")
        return Converted(converted, plan, costs, row, trained)

    def convert_within(
        self, recipe: Recipe, drop: Drop, evaluator: Evaluator, before: Measured, progress: Progress
    ) -> tuple[Converted, Measured, DropRow]:
        """Return the smallest network whose loss is at most `drop`, with its scores and what the report says of it.

        `before` is what the original measured. With polish a first search, without it, says where to begin; then up to
        three networks are polished. Raises RecipeError where every network that swaps anything loses more.
        """
        first = before.scores[0]
        allowed = drop.allowed(first)
        curve = self.team.first(partial(self.curve, recipe, progress))
        if not curve:
            planning.check_not_empty(self.plan(recipe, progress, Budget.model_validate({"macs": 1.0}))[0], recipe)
        fractions, predicted = zip(*curve, strict=True)
        # A share of images moves by one of them.
        grain = 1 / evaluator.images if first.unit == "%" and evaluator.images else 0.0
        polishes = self.calibration is not None and self.calibration.polishes
        search = Search(fractions, predicted, allowed, grain=grain)
        kept, solves = None, 0
        for polished in (False, True) if polishes else (False,):
            if polished:
                start = fractions[-1] if search.best is None else search.best[0]
                search = replace(search, start=start, first_slope=search.slope, tries=_POLISHED, tried=[])
            while (fraction := search.next()) is not None:
                solves += 1
                step = prefixed(progress, f"try {solves}, {fraction:.2f} of the MACs: ")
                plan, _ = self.plan(recipe, step, Budget.model_validate({"macs": fraction}))
                converted = self.apply(plan, step, polished)
                after = self.team.first(partial(evaluator.measured, converted.model, partial(step, "measuring")))
                self.clock.stop("measure")
                check_same(before.scores, after.scores)
                lost, interval = _lost(before, after)
                search.add(fraction, lost)
                if search.best == (fraction, lost):
                    kept = converted, after, lost, interval, fraction <= fractions[0]
        if kept is None:
            share, least = min(search.tried, key=lambda one: one[1])
            raise RecipeError(
                f"the budget of {recipe.budget} cannot be kept: at {share:.3f} of the MACs {fmt.lost(least, first)} of "
                f"{first.name} are lost; allow more" + ("" if polishes else ", or polish")
            )
        converted, after, lost, interval, smallest = kept
        row = DropRow(
            score=first.name,
            unit=first.unit,
            lower_is_better=first.lower_is_better,
            allowed=allowed,
            lost=lost,
            interval=interval,
            data=evaluator.description,
            samples=evaluator.images,
            share=converted.costs.total.macs / self.costs.total.macs,
            solves=solves,
            smallest=smallest,
        )
        return converted, after, row


def _lost(before: Measured, after: Measured) -> tuple[float, tuple[float, float] | None]:
    """Return how much of the first score is lost, with its 95 % interval where there is one."""
    first, now = before.scores[0], next(one for one in after.scores if one.name == before.scores[0].name)
    sign = -1 if first.lower_is_better else 1
    lost = sign * (first.value - now.value)
    if before.each and len(before.each) == len(after.each):
        changes = [sign * (one - other) for one, other in zip(before.each, after.each, strict=True)]
        # Of images that are right or wrong, one more of each kind of change: Bonett and Price (2012).
        return lost, mean_interval([*changes, -1.0, 1.0] if first.unit == "%" else changes)
    if now.interval is not None:
        low, high = now.interval
        return lost, (first.value - high, first.value - low)
    return lost, None


def prefixed(progress: Progress, place: str) -> Progress:
    """Return progress that puts a place before the name of every stage."""
    return lambda stage, done, total: progress(place + stage, done, total)


def check_finite(opened: OpenedModel, done: str = "converted") -> None:
    """Raise SourceError where a weight of a model that is to be `done` is NaN or infinite."""
    found = first_not_finite(opened.model)
    if found is not None:
        raise SourceError(f"{opened.reference} cannot be {done}: {found[0]!r} holds {found[1]}; use another checkpoint")


@contextmanager
def _running_converted() -> Iterator[None]:
    """Raise AsymswapError where the model's code uses attributes of a Conv2d that its replacement lacks."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise AsymswapError(
            f"the converted model does not run ({error}): its code uses more of a replaced layer than its output; keep "
            "that conv by a rule with keep = true"
        ) from error
