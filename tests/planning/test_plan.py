from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from planned import make_plan
from torch import nn
from torchvision.models import googlenet

from asymswap.errors import PlanError, RecipeError
from asymswap.graph.trace import Trace, trace
from asymswap.measure.macs import count_costs
from asymswap.models.networks import BUILDERS
from asymswap.planning.apply import apply_plan
from asymswap.planning.plan import (
    check_replay,
    choose,
    counted_costs,
    find_candidates,
    find_choices,
    plan_from_json,
    plan_text,
)
from asymswap.planning.recipe import parse_recipe
from asymswap.replacements import load_swap
from asymswap.types import Keep, Plan, Swap, silent

INPUTS = (torch.empty(1, 3, 32, 32),)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS["resnet20"]()


@pytest.fixture(scope="module")
def traced(resnet: nn.Module) -> Trace:
    return trace(resnet, INPUTS)


def planned(model: nn.Module, traced: Trace, rules: str, budget: str = "") -> Plan:
    return make_plan(model, traced.sites, parse_recipe(rules + budget, "r"), count_costs(model, INPUTS).total)


DENSE = '[[rules]]\nmatch = { kernel = "3x3", in_channels = { min = 16 } }\nswap = { kind = "separable" }\n'


@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("over", ["model", "matched"])
@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.3, 0.1])
def test_budgets_are_kept_and_used_up(
    resnet: nn.Module, traced: Trace, measure: str, over: str, fraction: float
) -> None:
    plan = planned(resnet, traced, DENSE, f'[budget]\n{measure} = {fraction}\nover = "{over}"\n')
    names = [site.name for site in traced.sites if site.conv.in_channels >= 16]
    before = count_costs(resnet, INPUTS, names)
    after = count_costs(apply_plan(resnet, plan), INPUTS, names)

    def spent(costs: object) -> int:
        rows = costs.by_name.values() if over == "matched" else [costs.total]  # type: ignore[attr-defined]
        return sum(getattr(cost, measure) for cost in rows)

    left = spent(after) / spent(before)
    assert left <= fraction
    assert left > fraction - 0.01  # smaller than one step of a rank


def test_a_plan_tells_of_every_site_once(resnet: nn.Module, traced: Trace) -> None:
    plan = planned(resnet, traced, DENSE, "[budget]\nmacs = 0.5\n")
    spoken = [swap.site for swap in plan.swaps] + [keep.site for keep in plan.keeps]
    assert sorted(spoken) == sorted(site.name for site in traced.sites)
    assert plan.multiplier is not None
    assert {keep.site: keep.reason for keep in plan.keeps}["conv1"] == "no rule matches"


def test_more_budget_is_never_worse(resnet: nn.Module, traced: Trace) -> None:
    errors = []
    for fraction in (0.2, 0.4, 0.6, 0.8):
        plan = planned(resnet, traced, DENSE, f"[budget]\nmacs = {fraction}\n")
        converted = apply_plan(resnet, plan)
        total = 0.0
        for swap in plan.swaps:
            separable, settings = load_swap(swap)
            site = next(site for site in traced.sites if site.name == swap.site)
            conv = resnet.get_submodule(swap.site)
            kernel = separable.fuse(converted.get_submodule(swap.site), site.conv, settings).weight
            total += float((kernel - conv.weight).detach().square().sum() / conv.weight.detach().square().sum())
        errors.append(total)
    assert errors == sorted(errors, reverse=True)


def test_unreachable_budget_tells_the_lowest(resnet: nn.Module, traced: Trace) -> None:
    text = r"hold .* of the model's MACs, and with the smallest swap everywhere 0\.\d+ is left; ask for at least 0\.\d"
    with pytest.raises(RecipeError, match=text) as caught:
        planned(resnet, traced, DENSE, "[budget]\nmacs = 0.01\n")
    least = float(str(caught.value).split("at least ")[1].split(",")[0])
    planned(resnet, traced, DENSE, f"[budget]\nmacs = {least}\n")


def test_first_matching_rule_wins_and_a_shadowed_one_is_no_error(resnet: nn.Module, traced: Trace) -> None:
    rules = '[[rules]]\nmatch = { names = "layer1.*" }\nkeep = true\n' + DENSE.replace(
        '"separable"', '"separable", rank = 4'
    )
    plan = planned(resnet, traced, rules)
    kept = {keep.site: keep.reason for keep in plan.keeps}
    assert kept["layer1.0.conv1"] == "rule 1 keeps it"
    assert all(swap.settings["rank"] == 4 and swap.reason == "rule 2" for swap in plan.swaps)


def test_a_rule_that_matches_nothing(resnet: nn.Module, traced: Trace) -> None:
    rules = '[[rules]]\nmatch = { kernel = "7x7" }\nswap = { kind = "separable", rank = 1 }\n'
    with pytest.raises(RecipeError, match=r"rule 1 matches none of the model's 19 Conv2d .kernel = "):
        planned(resnet, traced, rules)


def test_break_even_guard_and_its_override(resnet: nn.Module, traced: Trace) -> None:
    """At C = O and stride 1, rank kC/2 is the break-even: 24 for 16 channels."""
    rule = '[[rules]]\nmatch = { names = "layer1.0.conv1" }\nswap = { kind = "separable", rank = 24 }\n'
    plan = planned(resnet, traced, rule)
    assert not plan.swaps
    reason = next(keep.reason for keep in plan.keeps if keep.site == "layer1.0.conv1")
    assert "would cost 1.00 x the MACs and 1.00 x the parameters" in reason
    (swap,) = planned(resnet, traced, rule.replace("24", "24, allow_growth = true")).swaps
    assert swap.settings["rank"] == 24
    (swap,) = planned(resnet, traced, rule.replace("24", "23")).swaps
    assert swap.settings["rank"] == 23


def test_refused_sites_are_kept_with_the_reason() -> None:
    model = googlenet(init_weights=False)
    inputs = (torch.empty(1, 3, 224, 224),)
    sites = trace(model, inputs).sites
    recipe = parse_recipe('[[rules]]\nmatch = {}\nswap = { kind = "separable", ratio = 0.5 }\n', "r")
    kept = {keep.site: keep.reason for keep in make_plan(model, sites, recipe, count_costs(model, inputs).total).keeps}
    assert kept["inception3a.branch1.conv"] == "rule 1, but a 1x1 kernel has nothing to separate"
    model_with_aux = [name for name in kept if name.startswith("aux")]
    assert model_with_aux


def test_a_setting_that_a_matched_conv_cannot_have(resnet: nn.Module, traced: Trace) -> None:
    rules = '[[rules]]\nmatch = { in_channels = { min = 16 } }\nswap = { kind = "separable", rank = 60 }\n'
    with pytest.raises(RecipeError, match=r"rule 1, layer1.0.conv1 .16->16 3x3.: rank = 60 is above the full rank 48"):
        planned(resnet, traced, rules)


def test_graph_conditions_need_a_graph(resnet: nn.Module, traced: Trace) -> None:
    rules = '[[rules]]\nmatch = { followed_by = "add" }\nswap = { kind = "separable", rank = 4 }\n'
    assert [swap.site[-5:] for swap in planned(resnet, traced, rules).swaps] == ["conv2"] * 9


def test_plans_survive_json_and_replay(resnet: nn.Module, traced: Trace) -> None:
    plan = planned(resnet, traced, DENSE, "[budget]\nmacs = 0.5\n")
    again = plan_from_json(plan_text(plan), "plan.json")
    assert again == plan
    assert check_replay(resnet, traced.sites, again) == plan
    ours, theirs = apply_plan(resnet, plan).state_dict(), apply_plan(resnet, again).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"swaps": [{"site": "a", "kind": "sep", "settings": {}}]}, "site 'a': unknown kind 'sep'"),
        (
            {"swaps": [{"site": "a", "kind": "separable", "settings": {"rnk": 1}}]},
            "unknown key 'rnk'; did you mean rank",
        ),
        ({"swaps": [], "keeps": [{"site": "a"}, {"site": "a"}]}, "has 'a' twice"),
        ({"swaps": 3}, "p is not a plan: swaps: Input should be a valid array"),
        ({"swapz": []}, "p is not a plan"),
    ],
)
def test_damaged_plans(change: dict[str, object], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        plan_from_json(json.dumps(change), "p")


def test_replaying_a_plan_of_another_model(resnet: nn.Module, traced: Trace) -> None:
    settings = {"rank": 2, "order": "vertical-first"}
    with pytest.raises(PlanError, match=r"swaps 'layer1.0.conv3', which the model lacks; did you mean layer1.0.conv"):
        check_replay(resnet, traced.sites, Plan((Swap("layer1.0.conv3", "separable", settings),)))
    with pytest.raises(PlanError, match="cannot swap 'conv1' by 'separable': rank = 99 is above the full rank"):
        check_replay(resnet, traced.sites, Plan((Swap("conv1", "separable", {**settings, "rank": 99}),)))


def test_an_edited_plan_tells_the_errors_of_what_it_says_now(resnet: nn.Module, traced: Trace) -> None:
    plan = planned(resnet, traced, DENSE, "[budget]\nmacs = 0.5\n")
    first, *rest = plan.swaps
    settings = {"rank": 1, "order": "vertical-first"}
    edited = dataclasses.replace(first, settings=settings, predicted=1e-4)
    replayed = check_replay(resnet, traced.sites, dataclasses.replace(plan, swaps=(edited, *rest)))
    conv = resnet.get_submodule(first.site)
    assert isinstance(conv, nn.Conv2d)
    # The kernel's rows and columns, each with its channels, as a matrix: what the best pair of rank 1 leaves of it.
    matrix = conv.weight.detach().double().permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    values = torch.linalg.svdvals(matrix)
    wanted = float((values[1:].square().sum() / values.square().sum()).sqrt())
    assert replayed.swaps[0].predicted == pytest.approx(wanted, rel=1e-6)
    assert replayed.swaps[1:] == plan.swaps[1:]


def test_a_plan_makes_nothing_dearer_unless_it_says_so(resnet: nn.Module, traced: Trace) -> None:
    settings = {"rank": 64, "order": "vertical-first"}
    swap = Swap("layer2.0.conv2", "separable", settings)
    with pytest.raises(
        PlanError, match=r"cannot swap 'layer2.0.conv2' by 'separable': rank 64, .* would cost .* the MACs .*: true"
    ):
        check_replay(resnet, traced.sites, Plan((swap,)))
    allowed = dataclasses.replace(swap, settings={**settings, "allow_growth": True})
    assert check_replay(resnet, traced.sites, Plan((allowed,))).swaps[0].settings == allowed.settings


def test_a_budget_holds_where_no_conv_can_be_swapped() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, (1, 7), padding=(0, 3)), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    inputs = (torch.zeros(1, 8, 16, 16),)
    rules = '[[rules]]\nmatch = { names = "*" }\nswap = { kind = "separable" }\n[budget]\nmacs = 0.3\n'
    sites, total = trace(model, inputs).sites, count_costs(model, inputs).total
    with pytest.raises(RecipeError, match=r"the budget of 0.3 .* cannot be reached: .* 1.000 is left"):
        make_plan(model, sites, parse_recipe(rules, "r"), total)


def test_a_budget_that_rules_with_sizes_of_their_own_keep_has_nothing_to_share(
    resnet: nn.Module, traced: Trace
) -> None:
    rules = '[[rules]]\nmatch = { kernel = "3x3", position = "inner" }\nswap = { kind = "separable", ratio = 0.5 }\n'
    rules += '[[rules]]\nmatch = { kernel = "7x7" }\noptional = true\nswap = { kind = "separable" }\n'
    plan = planned(resnet, traced, rules, "[budget]\nmacs = 0.8\n")
    assert plan.swaps
    assert plan.multiplier is None


class Idle(nn.Module):
    """Has a conv that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_replaying_a_plan_that_swaps_what_never_runs() -> None:
    """As a recipe, which keeps it for that reason, a plan does not swap it."""
    model = Idle().eval()
    sites = trace(model, INPUTS).sites
    rules = '[[rules]]\nmatch = {}\nswap = { kind = "separable", rank = 2 }\n'
    plan = make_plan(model, sites, parse_recipe(rules, "r"), count_costs(model, INPUTS).total)
    assert plan.keeps == (Keep("unused", "rule 1, but never runs in eval mode"),)
    swap = Swap("unused", "separable", {"rank": 2, "order": "vertical-first"})
    with pytest.raises(PlanError, match="cannot swap 'unused' by 'separable': never runs in eval mode"):
        check_replay(model, sites, Plan((swap,)))


def test_replaying_a_plan_that_keeps_what_is_not_there(resnet: nn.Module, traced: Trace) -> None:
    with pytest.raises(PlanError, match="keeps 'cnv1', which the model lacks; did you mean conv1"):
        check_replay(resnet, traced.sites, Plan((), (Keep("cnv1"),)))


def test_unknown_keys_of_a_plan_have_near_names() -> None:
    with pytest.raises(PlanError, match="unknown key 'resaon' in keep 1; did you mean reason"):
        plan_from_json('{"swaps": [], "keeps": [{"site": "a", "resaon": ""}]}', "p")


def test_where_every_open_site_is_undone_only_the_fixed_ones_are_swapped(resnet: nn.Module, traced: Trace) -> None:
    fixed = '[[rules]]\nmatch = { names = "layer*" }\nswap = { kind = "separable", rank = 1 }\n'
    left_open = '[[rules]]\nmatch = { names = "conv1" }\nswap = { kind = "separable" }\n'
    recipe = parse_recipe(f"{fixed}{left_open}[budget]\nmacs = 0.9\n", "r")
    choices = find_choices(resnet, traced.sites, recipe, silent)
    total = count_costs(resnet, INPUTS).total
    plan = choose(choices, counted_costs(None, total), undone={"conv1": "it was slower"})
    assert {swap.site for swap in plan.swaps} == {site.name for site in traced.sites} - {"conv1"}
    assert plan.keeps == (Keep("conv1", "rule 2, but it was slower"),)


def test_candidates_of_other_kinds_tell_what_the_replacement_costs(resnet: nn.Module, traced: Trace) -> None:
    rules = '[[rules]]\nmatch = { names = "layer1.*" }\nswap = { kind = "acb" }\n' + DENSE
    recipe = parse_recipe(rules + "[budget]\nmacs = 0.9\n", "r")
    rows = {row.site.name: row for row in find_candidates(resnet, traced.sites, recipe)}
    one = rows["layer1.0.conv1"]
    assert (one.kind, one.reason, one.half) == ("acb", None, None)
    assert one.becomes is not None
    assert one.becomes.macs == pytest.approx(one.site.cost.macs * 15 / 9)
    other = rows["layer2.0.conv2"]
    assert other.becomes is None
    assert other.half is not None
    assert rows["conv1"].reason == "no rule matches"


def test_what_a_plan_cannot_settle_is_no_candidate(resnet: nn.Module, traced: Trace) -> None:
    rule = '[[rules]]\nmatch = { names = "conv1" }\nswap = { kind = "predicted-offset", offset_groups = 5 }\n'
    reason = "offset_groups = 5 does not divide the 3 input channels"
    with pytest.raises(RecipeError, match=reason):
        planned(resnet, traced, rule)
    rows = {row.site.name: row for row in find_candidates(resnet, traced.sites, parse_recipe(rule, "r"))}
    assert (rows["conv1"].reason, rows["conv1"].becomes) == (reason, None)
    fitting = parse_recipe(rule.replace("5", "3"), "r")
    assert find_candidates(resnet, traced.sites, fitting)[0].becomes is not None


def test_the_same_bits_on_one_thread_and_on_two(resnet: nn.Module, traced: Trace) -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            plan = planned(resnet, traced, "[[rules]]\nswap = { kind = 'separable' }\n", "[budget]\nmacs = 0.5\n")
            found.append((plan, apply_plan(resnet, plan).state_dict()))
    finally:
        torch.set_num_threads(threads)
    (plan, state), (other_plan, other_state) = found
    assert plan == other_plan
    assert all(torch.equal(tensor, other_state[key]) for key, tensor in state.items())


class Mixture(nn.Sequential):
    """Convs that different kinds suit: by `cross` and by `separable` no error, a 1x1 of rank 2, a strip, depthwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, conv in {
            "crossed": nn.Conv2d(8, 8, 3, padding=1),
            "outer": nn.Conv2d(8, 8, 3, padding=1),
            "point": nn.Conv2d(8, 8, 1),
            "strip": nn.Conv2d(8, 8, (1, 7), padding=(0, 3)),
            "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
            "scale": nn.Conv2d(8, 8, 1, groups=8),
        }.items():
            self.add_module(name, conv)
        with torch.no_grad():
            self.crossed.weight[:, :, ::2, ::2] = 0
            self.outer.weight.copy_(torch.einsum("ci,oj->ocij", torch.randn(8, 3), torch.randn(8, 3)))
            self.point.weight.copy_((torch.randn(8, 2) @ torch.randn(2, 8))[..., None, None])


def chosen(swap: str, budget: str = "", model: nn.Module | None = None) -> Plan:
    model = (model or Mixture()).eval()
    inputs = (torch.zeros(1, 8, 16, 16),)
    recipe = parse_recipe(f"[[rules]]\nswap = {swap}\n{budget}", "r")
    sites = trace(model, inputs).sites
    plan = make_plan(model, sites, recipe, count_costs(model, inputs).total)
    # It says all that it takes to do the same again.
    assert check_replay(model, sites, plan_from_json(plan_text(plan), "p")) == plan
    return plan


def kinds_of(plan: Plan) -> dict[str, str]:
    return {swap.site: swap.kind for swap in plan.swaps}


PLAIN_CROSS = '{ kind = "cross", correlation = 0 }'
CHOICE = f'[{{ kind = "separable" }}, {{ kind = "low-rank" }}, {PLAIN_CROSS}]'


def test_a_budget_takes_at_each_conv_the_kind_that_loses_least() -> None:
    """Of 1744 MACs a pixel 992 are left where nothing is lost: 384 for the cross, 48 and 32 for the pairs."""
    plan = chosen(CHOICE, "[budget]\nmacs = 0.57\n")
    assert kinds_of(plan).items() >= {"crossed": "cross", "outer": "separable", "point": "low-rank"}.items()
    exact = [swap.predicted for swap in plan.swaps if swap.site in ("crossed", "outer", "point")]
    assert exact == pytest.approx([0, 0, 0], abs=1e-6)
    # Without the cross something is lost.
    pairs = chosen('[{ kind = "separable" }, { kind = "low-rank" }]', "[budget]\nmacs = 0.57\n")
    lost = [sum((swap.predicted or 0.0) ** 2 for swap in found.swaps) for found in (plan, pairs)]
    assert lost[1] > lost[0] + 0.01


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.4])
def test_a_choice_keeps_the_budget(fraction: float) -> None:
    model, inputs = Mixture().eval(), (torch.zeros(1, 8, 16, 16),)
    plan = chosen(CHOICE, f"[budget]\nmacs = {fraction}\n")
    after = count_costs(apply_plan(model, plan), inputs).total.macs
    assert after <= fraction * count_costs(model, inputs).total.macs


def test_where_no_kind_of_a_choice_suits_the_reasons_of_all_are_told() -> None:
    kept = {keep.site: keep.reason for keep in chosen(CHOICE, "[budget]\nmacs = 0.5\n").keeps}
    assert kept["strip"] == (
        "rule 1, but separable: 1x7 is asymmetric already; low-rank: a 1x7 kernel is not 1x1; "
        "cross: 1x7 is asymmetric already"
    )
    assert kept["scale"].count(":") == 3
    same = chosen('[{ kind = "acb" }, { kind = "cross" }]')
    assert {keep.site: keep.reason for keep in same.keeps}["strip"] == "rule 1, but 1x7 is asymmetric already"


def test_without_a_budget_the_first_kind_that_saves_something_is_taken() -> None:
    half, cross = '{ kind = "separable", ratio = 0.5 }', '{ kind = "cross" }'
    spatial = ("crossed", "outer", "depthwise")
    # Rank 1 of the depthwise conv has two thirds of its MACs.
    assert kinds_of(chosen(f"[{half}, {cross}]")) == dict.fromkeys(spatial, "separable") | {"depthwise": "cross"}
    assert kinds_of(chosen(f"[{cross}, {half}]")) == dict.fromkeys(spatial, "cross")
    with pytest.raises(RecipeError, match=r"rule 1, depthwise .*: ratio = 0.5 cannot be met"):
        chosen(half)
    # Rank 12 costs as much as the conv.
    dear = '{ kind = "separable", rank = 12 }'
    assert kinds_of(chosen(f"[{dear}, {cross}]")) == dict.fromkeys(spatial, "cross")
    # What is left of a choice is as strict as a kind alone.
    two = f'[{dear}, {{ kind = "low-rank", rank = 1 }}]'
    kept = {keep.site: keep.reason for keep in chosen(two, 'match = { names = "crossed" }\n').keeps}
    assert kept["crossed"].startswith("rule 1, but rank 12, order vertical-first would cost 1.00 x the MACs")
    with pytest.raises(RecipeError, match=r"rule 1, depthwise .*: rank = 12 is above the full rank 3"):
        chosen(two)


def test_a_kind_with_its_own_size_is_one_option_of_the_budget() -> None:
    with_size = f'[{{ kind = "separable", rank = 3, order = "vertical-first" }}, {PLAIN_CROSS}]'
    plan = chosen(with_size, "[budget]\nmacs = 0.7\n")
    assert kinds_of(plan).items() >= {"crossed": "cross", "outer": "separable"}.items()
    assert {swap.settings["rank"] for swap in plan.swaps if swap.kind == "separable"} == {3}
    # Where all have their sizes it is as without a budget, and what the budget cannot change is not asked.
    fixed = '[{ kind = "separable", rank = 3 }, { kind = "acb" }]'
    rule = '[[rules]]\nmatch = { kernel = "1x1" }\nswap = { kind = "low-rank" }\noptional = true\n'
    plan = chosen(fixed, f'match = {{ names = "crossed" }}\n{rule}[budget]\nmacs = 0.95\n')
    assert kinds_of(plan)["crossed"] == "separable"


def test_a_choice_takes_over_a_batch_norm_for_the_kind_that_wants_it() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    too_large = '{ kind = "separable", rank = 99 }'
    (swap,) = chosen(f'[{too_large}, {{ kind = "acb", bn = "branch" }}]', model=model).swaps
    assert (swap.kind, swap.absorbs) == ("acb", "1")
    (swap,) = chosen('[{ kind = "separable", rank = 2 }, { kind = "acb", bn = "branch" }]', model=model).swaps
    assert (swap.kind, swap.absorbs) == ("separable", None)
