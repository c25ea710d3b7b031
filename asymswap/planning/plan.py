"""From a recipe to a plan: which sites are swapped, by which settled settings, and why the others are kept.

And what could be saved at each site, by the cost formulas alone, without the weights.
"""

import bisect
import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, cast

from pydantic import TypeAdapter, ValidationError
from torch import nn

from asymswap import replacements
from asymswap.errors import PlanError, RecipeError, near_names, validation_text
from asymswap.planning.apply import NO_STATISTICS, Statistics, takes_room
from asymswap.planning.recipe import MEASURES, Budget, Recipe, Way
from asymswap.replacements import Original
from asymswap.replacements._pairs import Pair, SettledPair, full_rank
from asymswap.types import Candidate, Cost, Keep, Option, Plan, Progress, RankCost, Site, Swap
from asymswap.utils.tensors import side_by_side


@dataclass(frozen=True)
class CostModel:
    """What sites and their options cost, in whole units of what a budget bounds."""

    total: int  # of the whole original model
    keep: Callable[[Site], int]  # of a site as it is
    option: Callable[[Site, Option], int]  # of its replacement


def counted_costs(budget: Budget | None, whole: Cost) -> CostModel:
    """Return costs in MACs or parameters, as the budget counts; raises RecipeError for one that is to be measured."""
    measure = "macs" if budget is None else budget.measure
    if budget is not None and (budget.max_drop is not None or measure == "latency"):
        what = "latency" if budget.max_drop is None else "loss"
        raise RecipeError(f"a budget of {what} needs measuring: use asymswap.convert")
    count = attrgetter(measure)
    return CostModel(count(whole), lambda site: count(site.cost), lambda _, option: count(option.cost))


@dataclass(frozen=True)
class Matched:
    """A site that a rule (`"rule 1"`) swaps, and the ways to do it: the rule's kinds that can take the conv."""

    site: Site
    original: Original
    rule: str
    ways: tuple[Way, ...]

    def settle(self, choosing: bool) -> list[Option] | Option | Keep:
        """Return the option of the first way that pays, by the rule's own settings, or else keep the site.

        Where a budget is `choosing`, return all that pay. A way whose settings the conv cannot have offers nothing;
        raises RecipeError where it is the only one.
        """
        found: list[Option] = []
        reasons = {}
        for way in self.ways:
            asked = self.site, self.original, way.settings
            try:
                every = way.kind.options(*asked) if choosing and way.leaves_choice else [way.kind.resolve(*asked)]
            except RecipeError as error:
                if len(self.ways) == 1:
                    raise RecipeError(f"{self.rule}, {self.site.name} ({self.site.conv.describe()}): {error}") from None
                reasons[way.kind.name] = str(error)
                continue
            found += [option for option in every if way.settings.allow_growth or saves(option.cost, self.site.cost)]
            if found and not choosing:
                return found[0]
            reasons[way.kind.name] = "" if choosing else _no_gain(every[0], self.site.cost)
        return found if choosing else self.keep(join_reasons(reasons))

    def swap(self, option: Option) -> Swap:
        """Return the plan's entry for this option."""
        way = next(way for way in self.ways if way.kind.name == option.kind)
        settings, growth = dict(option.settings), way.settings.allow_growth
        if growth != type(way.settings).model_fields["allow_growth"].default:
            settings["allow_growth"] = growth
        return Swap(self.site.name, option.kind, settings, self.rule, math.sqrt(option.error), way.absorbs)

    def keep(self, reason: str) -> Keep:
        """Return the plan's entry for leaving the site as it is."""
        return Keep(self.site.name, f"{self.rule}, but {reason}")


def join_reasons(reasons: Mapping[str, str]) -> str:
    """Return why each kind leaves a conv as it is, by the names of the kinds; once if it is the same for all."""
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())


def saves(new: Cost, old: Cost) -> bool:
    """Return True if a replacement costs less by one measure and no more by the other."""
    return new != old and new.macs <= old.macs and new.params <= old.params


@dataclass(frozen=True)
class Choices:
    """What a recipe leaves to a budget, by the names of sites."""

    sites: Sequence[Site]
    recipe: Recipe
    matched: Sequence[Site]  # those that a rule swaps and one of its kinds accepts
    left_open: Mapping[str, tuple[Matched, Sequence[Option]]]  # each with all its options
    fixed: Mapping[str, tuple[Matched, Option]]  # those whose size a rule gives
    keeps: Mapping[str, Keep]


def find_choices(
    model: nn.Module, sites: Sequence[Site], recipe: Recipe, progress: Progress, statistics: Statistics = NO_STATISTICS
) -> Choices:
    """Decide all that does not depend on the budget, and settle all settings; nothing is changed.

    Raises RecipeError for a rule that matches nothing, or a setting that a matched conv cannot have.
    """
    decisions = _decide(model, sites, recipe, statistics)
    keeps = {decision.site: decision for decision in decisions if isinstance(decision, Keep)}
    matched = [decision for decision in decisions if isinstance(decision, Matched)]
    results = side_by_side(
        lambda item: item.settle(recipe.budget is not None and any(way.leaves_choice for way in item.ways)),
        matched,
        lambda done: progress("factorising", done, len(matched)),
        lambda item: takes_room(item.original),
    )
    found = list(zip(matched, results, strict=True))
    keeps |= {result.site: result for result in results if isinstance(result, Keep)}
    fixed = {item.site.name: (item, result) for item, result in found if isinstance(result, Option)}
    left_open = {item.site.name: (item, result) for item, result in found if isinstance(result, list)}
    return Choices(sites, recipe, [item.site for item in matched], left_open, fixed, keeps)


def choose(
    choices: Choices, costs: CostModel, fraction: float | None = None, undone: Mapping[str, str] | None = None
) -> Plan:
    """Decide about every site, and share the budget by the given costs; raises RecipeError if it cannot be reached.

    `fraction` takes the place of the budget's own; sites in `undone` are kept, for the reasons given there.
    """
    undone, budget, multiplier = undone or {}, choices.recipe.budget, None
    entries: dict[str, Swap | Keep] = {name: item.swap(option) for name, (item, option) in choices.fixed.items()}
    entries |= choices.keeps
    entries |= {name: choices.left_open[name][0].keep(reason) for name, reason in undone.items()}
    if budget is not None:
        shared = [entry for name, entry in choices.left_open.items() if name not in undone]
        # Keeping the site is the last point of each curve.
        curves = [
            [*(Point(costs.option(item.site, one), one.loss) for one in options), Point(costs.keep(item.site), 0.0)]
            for item, options in shared
        ]
        matched = sum(costs.keep(site) for site in choices.matched)
        whole = matched if budget.over == "matched" else costs.total
        untouched = whole - sum(costs.keep(item.site) for item, _ in shared)
        untouched += sum(costs.option(item.site, one) - costs.keep(item.site) for item, one in choices.fixed.values())
        least = untouched + sum(min(point.cost for point in curve) for curve in curves)
        fraction = fraction or budget.fraction
        if least > fraction * whole:
            left, ask = f"{least / whole:.3f}", f"{min(1.0, int(1000 * (least / whole) + 1) / 1000):.3f}"
            if budget.seconds is not None:
                left, ask = f"{1e-6 * least:.3g} ms", f"{math.ceil(1.01e-4 * least) / 100:g}ms"
            raise RecipeError(
                f"the budget of {budget} cannot be reached: the matched convs hold {matched / costs.total:.1%} of "
                f"the model's {MEASURES[budget.measure]}, and with the smallest swap everywhere {left} is left"
                + (f"; ask for at least {ask}" if least < whole else ", since none is faster than its conv")
                + (", or match more convs" if budget.over == "model" else "")
                + ("; a busy machine makes latency hard to measure" if budget.latency is not None else "")
            )
        if shared:
            chosen, multiplier = allocate(curves, int(fraction * whole) - untouched)
            for (item, options), index in zip(shared, chosen, strict=True):
                why = "the budget is better spent elsewhere" if options else "no rank saves anything"
                kept = index == len(options)
                entries[item.site.name] = item.keep(why) if kept else item.swap(options[index])
    ordered = [entries[site.name] for site in choices.sites if site.name in entries]
    return Plan(
        swaps=tuple(entry for entry in ordered if isinstance(entry, Swap)),
        keeps=tuple(entry for entry in ordered if isinstance(entry, Keep)),
        multiplier=multiplier,
    )


_UNMATCHED = "no rule matches"


def find_rule(sites: Sequence[Site], recipe: Recipe) -> dict[str, int | None]:
    """Return for each site the index of the first rule that matches it, or None.

    Raises RecipeError for a rule that matches no site at all, or asks for neighbours where nothing was traced.
    """
    asks = any(rule.match.followed_by or rule.match.preceded_by for rule in recipe.rules)
    if asks and all(site.after is None for site in sites):
        raise RecipeError("followed_by and preceded_by need a model that torch.fx can trace, and this one is not")
    found: dict[str, int | None] = dict.fromkeys((site.name for site in sites), None)
    for index, rule in enumerate(recipe.rules):
        names = rule.match.find(sites)
        if not names and not rule.optional:
            match = rule.match.model_dump(exclude_unset=True, mode="json")
            asked = ", ".join(f"{key} = {json.dumps(item)}" for key, item in match.items()) or "any conv"
            raise RecipeError(
                f"rule {index + 1} matches none of the model's {len(sites)} Conv2d ({asked}); "
                "`asymswap candidates MODEL` lists them"
            )
        found |= {name: index for name in names if found[name] is None}
    return found


def _decide(model: nn.Module, sites: Sequence[Site], recipe: Recipe, statistics: Statistics) -> list[Matched | Keep]:
    """Return for each site how its rule can swap it, or why it stays; raises RecipeError as `find_rule` does."""
    decisions: list[Matched | Keep] = []
    for site, index in zip(sites, find_rule(sites, recipe).values(), strict=True):
        if index is None:
            decisions.append(Keep(site.name, _UNMATCHED))
            continue
        rule = f"rule {index + 1}"
        found = {way.kind.name: _at_site(model, site, way) for way in recipe.rules[index].ways}
        ways = tuple(way for way in found.values() if isinstance(way, Way))
        if not found:
            decisions.append(Keep(site.name, f"{rule} keeps it"))
        elif not ways:
            why = join_reasons({kind: str(why) for kind, why in found.items()})
            decisions.append(Keep(site.name, f"{rule}, but {why}"))
        else:
            decisions.append(Matched(site, _original(model, site, statistics), rule, ways))
    return decisions


def _original(model: nn.Module, site: Site, statistics: Statistics = NO_STATISTICS) -> Original:
    return Original(cast(nn.Conv2d, model.get_submodule(site.name)), statistics.get(site.name))


def _at_site(model: nn.Module, site: Site, way: Way) -> Way | str:
    """Return the way with the batch norm that the kind folds in at the site, or why it cannot take the conv."""
    reason = site.refusal or way.kind.unsupported(site.conv) or (None if site.calls else "never runs in eval mode")
    norm = site.norm_behind
    if reason is not None or norm is None:
        return reason or way
    folded = way.kind.fold_norm(way.settings, model.get_submodule(norm))
    return way if folded is None else Way(way.kind, folded, norm)


def _no_gain(option: Option, old: Cost) -> str:
    chosen = ", ".join(f"{key} {value}" for key, value in option.settings.items())
    macs, params = option.cost.macs / max(old.macs, 1), option.cost.params / max(old.params, 1)
    return f"{chosen} would cost {macs:.2f} x the MACs and {params:.2f} x the parameters"


def plan_text(plan: Plan) -> str:
    """Return the plan as JSON text, to be written, edited and replayed."""
    return json.dumps(dataclasses.asdict(plan), indent=2) + "\n"


def plan_from_json(value: Any, where: str) -> Plan:
    """Check plan data from outside, JSON text or its value, down to each kind's settings; raises PlanError."""
    try:
        plan = TypeAdapter(Plan).validate_json(value if isinstance(value, str | bytes) else json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        keys = sorted({item.name for cls in (Plan, Swap, Keep) for item in dataclasses.fields(cls)})
        reason = validation_text(error, keys) if isinstance(error, ValidationError) else error
        raise PlanError(f"{where} is not a plan: {reason}") from None
    seen = Counter([swap.site for swap in plan.swaps] + [keep.site for keep in plan.keeps])
    twice = next((name for name, times in seen.items() if times > 1), None)
    if twice is not None:
        raise PlanError(f"{where} has {twice!r} twice")
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
    return [found.site for found in _decide(model, sites, recipe, NO_STATISTICS) if isinstance(found, Matched)]


def check_replay(model: nn.Module, sites: Sequence[Site], plan: Plan, statistics: Statistics = NO_STATISTICS) -> Plan:
    """Fit a plan from elsewhere to this model: settle settings and errors again, keep sites that it does not name.

    Raises PlanError for a site that the model lacks, that cannot be swapped so, or that would cost more although the
    swap's settings do not allow it.
    """
    by_name = {site.name: site for site in sites}
    given = {keep.site: keep for keep in plan.keeps}
    for what, name in [*(("swaps", swap.site) for swap in plan.swaps), *(("keeps", name) for name in given)]:
        if name not in by_name:
            raise PlanError(f"the plan {what} {name!r}, which the model lacks{near_names(name, by_name)}")
    swaps = {}
    for swap in plan.swaps:
        site = by_name[swap.site]
        try:
            asked = Way(replacements.load(swap.kind), replacements.parse_settings(swap.kind, swap.settings))
            way = _at_site(model, site, asked)
            if isinstance(way, str):
                raise RecipeError(way)
            if asked.lacks_size:
                raise RecipeError(f"it has no size; give one of {', '.join(way.kind.SIZES)}")
            if swap.absorbs not in (None, way.absorbs):
                instead = f"only {way.absorbs!r}" if way.absorbs else "no batch norm"
                raise RecipeError(f"it says absorbs = {swap.absorbs!r}, where {instead} can be taken over")
            original = _original(model, site, statistics)
            option = way.kind.resolve(site, original, asked.settings)
            if not (asked.settings.allow_growth or saves(option.cost, site.cost)):
                meant = 'where that is meant, give it "allow_growth": true among its settings'
                raise RecipeError(f"{_no_gain(option, site.cost)}; {meant}")
        except RecipeError as error:
            raise PlanError(f"the plan cannot swap {swap.site!r} by {swap.kind!r}: {error}") from None
        again = Matched(site, original, swap.reason, (dataclasses.replace(asked, absorbs=swap.absorbs),))
        swaps[swap.site] = again.swap(option)
    keeps = [given.get(site.name, Keep(site.name, "not in the plan")) for site in sites if site.name not in swaps]
    return dataclasses.replace(plan, swaps=tuple(swaps.values()), keeps=tuple(keeps))


def find_candidates(model: nn.Module, sites: Sequence[Site], recipe: Recipe | None) -> list[Candidate]:
    """Return every site in order, with the first kind, of those of its rule in a recipe, that could gain there."""
    rules = find_rule(sites, recipe) if recipe is not None else {}
    candidates = []
    for site in sites:
        number = rules.get(site.name)
        if recipe is None:
            kind = "low-rank" if site.conv.kernel == (1, 1) else "separable"
            found = [_candidate(model, site, Way(replacements.load(kind), replacements.parse_settings(kind, {})))]
        elif number is None:
            found = [Candidate(site, _UNMATCHED)]
        else:
            found = [_candidate(model, site, way) for way in recipe.rules[number].ways]
            found = found or [Candidate(site, f"rule {number + 1} keeps it")]
        reasons = {one.kind: one.reason for one in found if one.reason is not None}
        gaining = next((one for one in found if one.reason is None), None)
        candidates.append(gaining or dataclasses.replace(found[0], reason=join_reasons(reasons)))
    return candidates


def _candidate(model: nn.Module, site: Site, way: Way) -> Candidate:
    kind, found = way.kind, _at_site(model, site, way)
    if isinstance(found, str):
        return Candidate(site, found, kind=kind.name)
    if kind.SIZES and not isinstance(kind, Pair):
        return Candidate(site, kind=kind.name)
    if not isinstance(kind, Pair):
        # What approximates the conv is resolved from its weights, which would take as long as a plan.
        if kind.preserves(site.conv, way.settings):
            try:
                kind.resolve(site, _original(model, site), way.settings)
            except RecipeError as error:
                return Candidate(site, str(error), kind=kind.name)
        return Candidate(site, kind=kind.name, becomes=kind.cost(site, way.settings))
    best, half = max(
        (_break_even(site, kind, form) for form in kind.forms(way.settings)),
        key=lambda item: (item[0].rank, -item[0].cost.macs),
    )
    if best.rank < 2:
        # One column of weights for each input channel is no approximation that anybody keeps.
        why = "only rank 1 would save anything" if best.rank else "even rank 1 saves nothing"
        return Candidate(site, why, kind=kind.name)
    return Candidate(site, None, best, half, kind.name)


def _break_even(site: Site, kind: Pair, form: SettledPair) -> tuple[RankCost, RankCost]:
    """Return the largest rank at which a pair of this form costs less than the conv, 0 if none does, and half of it."""

    def at(rank: int) -> RankCost:
        return RankCost(rank, getattr(form, "order", None), kind.cost(site, form.model_copy(update={"rank": rank})))

    # Costs rise with the rank: the ranks that save come first.
    ranks = range(1, full_rank(site.conv, form) + 1)
    rank = bisect.bisect_left(ranks, True, key=lambda rank: not saves(at(rank).cost, site.cost))
    return at(rank), at(rank // 2)


class Point(NamedTuple):
    """One choice of a site: its cost and its error."""

    cost: int
    error: float


def allocate(curves: Sequence[Sequence[Point]], limit: int) -> tuple[tuple[int, ...], float]:
    """Choose a point of every curve such that costs sum to at most `limit`, which the cheapest points do not exceed.

    Returns their indices, and the multiplier: the error that one more unit of cost would save. For the smallest sum of
    errors, minimising `error + multiplier * cost` at each site alone, with one multiplier for all, is optimal on the
    lower convex hulls of the curves (Shoham and Gersho, 1988, eq. 8). So from the cheapest points we walk down the
    hulls, the step that buys the most error per cost first. What is left is smaller than one step, and is then spent on
    points off the hulls.
    """
    # Of every curve the points that are better than all cheaper ones, and those of them on its hull, by rising cost.
    ladders: list[list[int]] = []
    hulls: list[list[int]] = []
    for curve in curves:
        ladder: list[int] = []
        hull: list[int] = []
        for index in sorted(range(len(curve)), key=curve.__getitem__):
            if ladder and curve[index].error >= curve[ladder[-1]].error:
                continue
            ladder.append(index)
            while len(hull) > 1 and _slope(curve[hull[-2]], curve[hull[-1]]) <= _slope(curve[hull[-1]], curve[index]):
                hull.pop()
            hull.append(index)
        ladders.append(ladder)
        hulls.append(hull)
    chosen = [hull[0] for hull in hulls]
    rest = limit - sum(curve[index].cost for curve, index in zip(curves, chosen, strict=True))
    steps = sorted(
        (-_slope(curves[site][low], curves[site][high]), site, high)
        for site, hull in enumerate(hulls)
        for low, high in itertools.pairwise(hull)
    )
    multiplier = 0.0
    blocked: set[int] = set()
    for slope, site, new in steps:
        extra = curves[site][new].cost - curves[site][chosen[site]].cost
        if extra <= rest and site not in blocked:
            chosen[site] = new
            rest -= extra
        else:
            # Later steps of this site start from the point that was not reached.
            blocked.add(site)
            multiplier = multiplier or -slope
    # Single sites move to the best point that the rest pays for, the largest gain first.
    costs = [[curve[index].cost for index in ladder] for curve, ladder in zip(curves, ladders, strict=True)]
    while curves:
        moves = []
        for site, curve in enumerate(curves):
            now = curve[chosen[site]]
            index = ladders[site][bisect.bisect_right(costs[site], now.cost + rest) - 1]
            moves.append((now.error - curve[index].error, site, index))
        gain, site, index = max(moves, key=lambda move: move[0])
        if gain <= 0:
            break
        rest -= curves[site][index].cost - curves[site][chosen[site]].cost
        chosen[site] = index
    return tuple(chosen), multiplier


def _slope(low: Point, high: Point) -> float:
    """Return the error saved per unit of cost between two points of rising cost."""
    return (low.error - high.error) / max(high.cost - low.cost, 1)
