"""From a recipe to a plan: which sites are swapped, by which settled settings, and why the others are kept."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from torch import nn

from asymswap import replacements
from asymswap.errors import PlanError, RecipeError, near_names, validation_text
from asymswap.factorize.statistics import SiteStatistics
from asymswap.planning.allocate import Allocation, Point, allocate, least_cost
from asymswap.planning.apply import takes_room
from asymswap.planning.cost_model import CostModel, CountedCost
from asymswap.planning.recipe import Recipe, Rule
from asymswap.replacements import KindSettings, Replacement
from asymswap.types import Cost, Keep, Option, Plan, Progress, Site, Swap, silent
from asymswap.utils.tensors import side_by_side


@dataclass(frozen=True)
class _Matched:
    """A site that a rule swaps and its kind accepts."""

    site: Site
    conv: nn.Conv2d
    rule: Rule
    number: int
    kind_name: str
    kind: Replacement
    settings: KindSettings
    statistics: SiteStatistics | None
    absorbs: str | None = None

    def options(self) -> list[Option]:
        """Return the sizes that pay, or all of them where the recipe allows growth."""
        every = self.kind.options(self.site, self.conv, self.settings, self.statistics)
        return [option for option in every if self.settings.allow_growth or saves(option.cost, self.site.cost)]

    def swap(self, option: Option) -> Swap:
        """Return the plan's entry for this option."""
        settings = {**option.settings, **_growth(self.settings)}
        predicted = math.sqrt(option.error)
        return Swap(self.site.name, self.kind_name, settings, f"rule {self.number}", predicted, self.absorbs)

    def keep(self, reason: str) -> Keep:
        """Return the plan's entry for leaving the site as it is."""
        return Keep(self.site.name, f"rule {self.number}, but {reason}")


def _growth(settings: KindSettings) -> dict[str, bool]:
    """Return the setting that allows growth, where it is not the kind's default."""
    usual = type(settings).model_fields["allow_growth"].default
    return {} if settings.allow_growth == usual else {"allow_growth": settings.allow_growth}


def saves(new: Cost, old: Cost) -> bool:
    """Whether a replacement costs less by one measure and no more by the other."""
    return new != old and new.macs <= old.macs and new.params <= old.params


@dataclass(frozen=True)
class Choices:
    """What a recipe leaves to a budget: the sites `left_open`, each with its `curve` of options.

    `fixed` holds the sites whose rules say the size, `keeps` those that stay.
    """

    sites: Sequence[Site]
    recipe: Recipe
    left_open: Sequence[_Matched]
    curves: Mapping[str, Sequence[Option]]
    fixed: Mapping[str, tuple[Swap | Keep, Option | None]]
    keeps: Mapping[str, Keep]

    @property
    def named_options(self) -> Mapping[str, tuple[str, Sequence[Option]]]:
        """Kind and options of each open site."""
        return {item.site.name: (item.kind_name, self.curves[item.site.name]) for item in self.left_open}


def make_plan(
    model: nn.Module,
    sites: Sequence[Site],
    recipe: Recipe,
    total: Cost,
    progress: Progress = silent,
    statistics: Mapping[str, SiteStatistics] | None = None,
) -> Plan:
    """Decide about every site, settle all settings, and share a budget of MACs, parameters or error.

    `total` is the cost of the whole model; `statistics` are those of each site. Nothing is changed. Raises RecipeError
    for a rule that matches nothing, a setting that a matched conv cannot have, or a budget that cannot be reached.
    """
    costs = CountedCost.of(recipe.budget, total)
    return choose(find_choices(model, sites, recipe, progress, statistics), costs)


def find_choices(
    model: nn.Module,
    sites: Sequence[Site],
    recipe: Recipe,
    progress: Progress = silent,
    statistics: Mapping[str, SiteStatistics] | None = None,
) -> Choices:
    """Decide all that does not depend on the budget; raises RecipeError as `make_plan` does."""
    matched: list[_Matched] = []
    keeps: dict[str, Keep] = {}
    for site, index in zip(sites, find_rule(sites, recipe).values(), strict=True):
        decision = _decide(model, site, recipe, index, (statistics or {}).get(site.name))
        if isinstance(decision, Keep):
            keeps[site.name] = decision
        else:
            matched.append(decision)
    left_open = [item for item in matched if recipe.budget is not None and item.rule.leaves_choice]
    decided = [item for item in matched if recipe.budget is None or not item.rule.leaves_choice]

    def step(done: int) -> None:
        progress("factorising", done, len(matched))

    def alone(item: _Matched) -> bool:
        return takes_room(item.conv)

    settled = side_by_side(_settle, decided, step, alone)
    curves = side_by_side(_Matched.options, left_open, lambda done: step(len(decided) + done), alone)
    return Choices(
        sites,
        recipe,
        left_open,
        curves={item.site.name: curve for item, curve in zip(left_open, curves, strict=True)},
        fixed={item.site.name: result for item, result in zip(decided, settled, strict=True)},
        keeps=keeps,
    )


def choose(
    choices: Choices, costs: CostModel, fraction: float | None = None, undone: Mapping[str, str] | None = None
) -> Plan:
    """Share the budget by the given costs, if there is one.

    `fraction` takes the place of the budget's own; sites in `undone` are kept, for the reasons given there. Raises
    RecipeError for a budget that cannot be reached.
    """
    undone = undone or {}
    entries: dict[str, Swap | Keep] = {name: entry for name, (entry, _) in choices.fixed.items()}
    entries |= choices.keeps
    allocation = None
    budget = choices.recipe.budget
    items = [item for item in choices.left_open if item.site.name not in undone]
    curves = [choices.curves[item.site.name] for item in items]
    # Keeping the site is the last point of each curve.
    points = [
        [
            *(Point(costs.option(item.site, item.kind_name, option), option.loss) for option in curve),
            Point(costs.keep(item.site), 0.0),
        ]
        for item, curve in zip(items, curves, strict=True)
    ]
    if budget is not None and budget.max_error is not None:
        others = [option.error for _, option in choices.fixed.values() if option is not None]
        allocation = _within_error(points, curves, budget.max_error, others)
    elif budget is not None:
        limit = _limit(choices, costs, fraction or budget.fraction, undone, least_cost(points))
        allocation = allocate(points, limit) if points else None
    if allocation is not None:
        for item, curve, index in zip(items, curves, allocation.chosen, strict=True):
            if index < len(curve):
                entries[item.site.name] = item.swap(curve[index])
            else:
                why = "the budget is better spent elsewhere" if curve else "no rank saves anything"
                entries[item.site.name] = item.keep(why)
    for item in choices.left_open:
        if item.site.name in undone:
            entries[item.site.name] = item.keep(undone[item.site.name])
    ordered = [entries[site.name] for site in choices.sites if site.name in entries]
    return Plan(
        swaps=tuple(entry for entry in ordered if isinstance(entry, Swap)),
        keeps=tuple(entry for entry in ordered if isinstance(entry, Keep)),
        multiplier=None if allocation is None else allocation.multiplier,
    )


def combined_error(errors: Iterable[float]) -> float:
    """Return the error of all layers together: sqrt(1 - product of (1 - error^2)).

    Of each layer's energy the share 1 - error^2 is right; the product of the shares is what a budget keeps large
    (Zhang, Zou, He and Sun, 2015, section 3.4).
    """
    return math.sqrt(max(0.0, 1 - math.prod(1 - min(error, 1.0) ** 2 for error in errors)))


def _within_error(
    points: Sequence[Sequence[Point]], curves: Sequence[Sequence[Option]], most: float, others: Sequence[float]
) -> Allocation:
    """Return the cheapest allocation found whose error, with the squared ones of `others`, is at most `most`.

    Raises RecipeError where even the most expensive has more.
    """

    def error_of(allocation: Allocation) -> float:
        pairs = zip(curves, allocation.chosen, strict=True)
        squares = [curve[index].error for curve, index in pairs if index < len(curve)]
        return combined_error(math.sqrt(square) for square in (*others, *squares))

    low, high = least_cost(points), sum(curve[-1].cost for curve in points)
    best = allocate(points, high)
    least = error_of(best)
    if least > most:
        raise RecipeError(
            f"max_error = {most:g} cannot be kept: the rules that say their own sizes come to a predicted error of "
            f"{_round_up(least)} by themselves; give them larger sizes, or the budget a larger max_error"
        )
    while low < high:
        middle = (low + high) // 2
        found = allocate(points, middle)
        if error_of(found) <= most:
            best, high = found, middle
        else:
            low = middle + 1
    return best


_UNMATCHED = "no rule matches"


def find_rule(sites: Sequence[Site], recipe: Recipe) -> dict[str, int | None]:
    """Return for each site the index of the first rule that matches it, or None.

    Raises RecipeError for a rule that matches no site at all, or asks for neighbours where nothing was traced.
    """
    if sites and any(rule.match.needs_graph for rule in recipe.rules) and all(site.after is None for site in sites):
        raise RecipeError("followed_by and preceded_by need a model that torch.fx can trace, and this one is not")
    found = [rule.match.find(sites) for rule in recipe.rules]
    for number, rule in enumerate(recipe.rules):
        if not found[number] and not rule.optional:
            if not sites:
                raise RecipeError("the model has no Conv2d, so there is nothing to swap")
            match = rule.match.model_dump(exclude_unset=True, mode="json")
            asked = ", ".join(f"{key} = {json.dumps(item)}" for key, item in match.items()) or "any conv"
            raise RecipeError(
                f"rule {number + 1} matches none of the model's {len(sites)} Conv2d ({asked}); "
                f"`asymswap candidates MODEL` lists them"
            )
    return {site.name: next((n for n, names in enumerate(found) if site.name in names), None) for site in sites}


def _decide(
    model: nn.Module, site: Site, recipe: Recipe, index: int | None, statistics: SiteStatistics | None
) -> _Matched | Keep:
    if index is None:
        return Keep(site.name, _UNMATCHED)
    rule, number = recipe.rules[index], index + 1
    if rule.swap is None:
        return Keep(site.name, f"rule {number} keeps it")
    kind_name = rule.swap["kind"]
    kind = replacements.load(kind_name)
    reason = refusal_of(site, kind)
    if reason is not None:
        return Keep(site.name, f"rule {number}, but {reason}")
    settings = replacements.parse_settings(kind_name, rule.swap_settings)
    conv = cast(nn.Conv2d, model.get_submodule(site.name))
    settings, absorbs = _fold_norm(model, site, kind, settings)
    return _Matched(site, conv, rule, number, kind_name, kind, settings, statistics, absorbs)


def refusal_of(site: Site, kind: Replacement) -> str | None:
    """Return the reason why this kind cannot replace the conv of a site, or None where it can."""
    return site.refusal or kind.unsupported(site.conv) or (None if site.calls else "never runs in eval mode")


def _fold_norm(
    model: nn.Module, site: Site, kind: Replacement, settings: KindSettings
) -> tuple[KindSettings, str | None]:
    """Return the settings, and the batch norm that the kind folds in at this site, if there is one."""
    name = site.norm_behind
    folded = None if name is None else kind.fold_norm(settings, model.get_submodule(name))
    return (settings, None) if folded is None else (folded, name)


def _settle(item: _Matched) -> tuple[Swap | Keep, Option | None]:
    """Return what a rule with a size of its own makes of a site, and by which option if it is swapped."""
    try:
        option = item.kind.resolve(item.site, item.conv, item.settings, item.statistics)
    except RecipeError as error:
        raise RecipeError(f"rule {item.number}, {item.site.name} ({item.site.conv.describe()}): {error}") from None
    if item.settings.allow_growth or saves(option.cost, item.site.cost):
        return item.swap(option), option
    return item.keep(_no_gain(option, item.site.cost)), None


def _no_gain(option: Option, old: Cost) -> str:
    chosen = ", ".join(f"{key} {value}" for key, value in option.settings.items())
    macs, params = option.cost.macs / max(old.macs, 1), option.cost.params / max(old.params, 1)
    return f"{chosen} would cost {macs:.2f} x the MACs and {params:.2f} x the parameters"


def _limit(choices: Choices, costs: CostModel, fraction: float, undone: Mapping[str, str], cheapest: int) -> int:
    """Return what the open sites may cost together; raises RecipeError where their `cheapest` options cost more."""
    budget = choices.recipe.budget
    assert budget is not None
    by_name = {site.name: site for site in choices.sites}
    matched_before = sum(costs.keep(by_name[name]) for name in (*choices.fixed, *choices.curves))
    settled = sum(costs.keep(by_name[name]) for name in undone)
    for name, (result, option) in choices.fixed.items():
        if isinstance(result, Swap) and option is not None:
            settled += costs.option(by_name[name], result.kind, option)
        else:
            settled += costs.keep(by_name[name])
    whole = matched_before if budget.over == "matched" else costs.total
    untouched = whole - matched_before + settled
    least = untouched + cheapest
    if least > fraction * whole:
        raise RecipeError(
            f"the budget of {budget} cannot be reached: the matched convs hold {matched_before / costs.total:.1%} of "
            f"the model's {costs.what}, and with the smallest swap everywhere {least / whole:.3f} is left; ask for at "
            f"least {_round_up(least / whole)}"
            + (", or match more convs" if budget.over == "model" else "")
            + ("; a busy machine makes latency hard to measure" if budget.latency is not None else "")
        )
    return int(fraction * whole) - untouched


def _round_up(fraction: float) -> str:
    return f"{min(1.0, int(fraction * 1000 + 1) / 1000):.3f}"


_PLAN = TypeAdapter(Plan)
_PLAN_KEYS = sorted({item.name for cls in (Plan, Swap, Keep) for item in dataclasses.fields(cls)})


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data."""
    return dataclasses.asdict(plan)


def plan_text(plan: Plan) -> str:
    """Return the plan as JSON text, to be written, edited and replayed."""
    return json.dumps(plan_to_json(plan), indent=2) + "\n"


def plan_from_json(value: Any, where: str) -> Plan:
    """Check plan data from outside, JSON text or its value, down to each kind's settings.

    Raises PlanError in one line.
    """
    try:
        plan = _PLAN.validate_json(value if isinstance(value, str | bytes) else json.dumps(value))
    except ValidationError as error:
        raise PlanError(f"{where} is not a plan: {validation_text(error, _PLAN_KEYS)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"{where} is not a plan: {error}") from None
    seen: set[str] = set()
    for name in [swap.site for swap in plan.swaps] + [keep.site for keep in plan.keeps]:
        if name in seen:
            raise PlanError(f"{where} speaks of {name!r} twice")
        seen.add(name)
    for swap in plan.swaps:
        try:
            replacements.parse_settings(swap.kind, swap.settings)
        except RecipeError as error:
            raise PlanError(f"{where}, site {swap.site!r}: {error}") from None
    return plan


def check_not_empty(plan: Plan, recipe: Recipe) -> None:
    """Raise RecipeError, with the reasons, for a plan by which nothing at all would be swapped."""
    if plan.swaps:
        return
    matched = [keep for keep in plan.keeps if keep.reason != _UNMATCHED]
    why = "; ".join(f"{keep.site}: {keep.reason}" for keep in matched[:2]) or "no rule matches a conv"
    more = f"; and {len(matched) - 2} more" if len(matched) > 2 else ""
    met = f"the budget of {recipe.budget} is met without a single swap" if recipe.budget else "nothing would be swapped"
    raise RecipeError(f"{met} ({why}{more}); `asymswap candidates` tells what each conv would save")


def matched_sites(model: nn.Module, sites: Sequence[Site], recipe: Recipe) -> list[Site]:
    """Return the sites that the recipe's rules may swap: those whose statistics are needed."""
    rules = find_rule(sites, recipe)
    return [site for site in sites if isinstance(_decide(model, site, recipe, rules[site.name], None), _Matched)]


def check_replay(
    model: nn.Module, sites: Sequence[Site], plan: Plan, statistics: Mapping[str, SiteStatistics] | None = None
) -> Plan:
    """Fit a plan from elsewhere to this model: settle settings and errors again, keep sites that it does not name.

    Raises PlanError for a site that the model lacks, that cannot be swapped so, or that would cost more although the
    swap's settings do not allow it.
    """
    by_name = {site.name: site for site in sites}
    swaps = []
    for swap in plan.swaps:
        site = by_name.get(swap.site)
        if site is None:
            raise PlanError(f"the plan swaps {swap.site!r}, which the model lacks{near_names(swap.site, by_name)}")
        kind = replacements.load(swap.kind)
        reason = refusal_of(site, kind)
        if reason is not None:
            raise PlanError(f"the plan cannot swap {swap.site!r} by {swap.kind!r}: {reason}")
        settings = replacements.parse_settings(swap.kind, swap.settings)
        if kind.SIZES and all(getattr(settings, size) is None for size in kind.SIZES):
            sizes = ", ".join(kind.SIZES)
            raise PlanError(f"the plan swaps {swap.site!r} by {swap.kind!r} and says no size; give one of {sizes}")
        try:
            conv = cast(nn.Conv2d, model.get_submodule(site.name))
            option = kind.resolve(site, conv, settings, (statistics or {}).get(site.name))
        except RecipeError as error:
            raise PlanError(f"the plan cannot swap {swap.site!r}: {error}") from None
        if not settings.allow_growth and not saves(option.cost, site.cost):
            raise PlanError(
                f"the plan cannot swap {swap.site!r}: {_no_gain(option, site.cost)}; where that is meant, give it "
                '"allow_growth": true among its settings'
            )
        absorbs = _fold_norm(model, site, kind, settings)[1] if swap.absorbs is not None else None
        if absorbs != swap.absorbs:
            raise PlanError(
                f"the plan cannot swap {swap.site!r}: it says absorbs = {swap.absorbs!r}, where "
                + (f"only {absorbs!r}" if absorbs else "no batch norm")
                + " can be taken over"
            )
        settled = {**option.settings, **_growth(settings)}
        swaps.append(dataclasses.replace(swap, settings=settled, predicted=math.sqrt(option.error)))
    given = {keep.site: keep for keep in plan.keeps}
    for name in given:
        if name not in by_name:
            raise PlanError(f"the plan keeps {name!r}, which the model lacks{near_names(name, by_name)}")
    swapped = {swap.site for swap in swaps}
    keeps = [given.get(site.name, Keep(site.name, "not in the plan")) for site in sites if site.name not in swapped]
    return dataclasses.replace(plan, swaps=tuple(swaps), keeps=tuple(keeps))
