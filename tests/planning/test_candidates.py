"""What is a candidate, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from asymswap.errors import RecipeError
from asymswap.graph.trace import trace
from asymswap.planning.plan import check_not_empty, find_candidates
from asymswap.planning.recipe import parse_recipe
from asymswap.types import Keep, Plan, Site


def sites_of(model: nn.Module, size: int = 8) -> tuple[Site, ...]:
    return trace(model.eval(), (torch.empty(1, 3, size, size),)).sites


def recipe_of(*rules: str) -> object:
    return parse_recipe('summary = "r"\n' + "\n".join(f"[[rules]]\n{rule}" for rule in rules), "r")


def test_a_rule_that_keeps_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    recipe = recipe_of('match = { names = "0" }\nkeep = true', 'match = {}\nswap = { kind = "separable", rank = 2 }')
    first, second = find_candidates(net, sites_of(net), recipe)  # type: ignore[arg-type]
    assert (first.reason, first.kind) == ("rule 1 keeps it", "separable")
    assert second.reason is None


def test_a_refusal_says_for_which_kind() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, (3, 1)), nn.Conv2d(8, 8, 4))
    strip, even = find_candidates(net, sites_of(net), recipe_of('match = {}\nswap = { kind = "acb" }'))  # type: ignore[arg-type]
    for found in (strip, even):
        assert found.site.name in ("0", "1")
        assert found.reason
        assert found.kind == "acb"


def test_settings_that_do_not_suit_the_conv_are_told() -> None:
    """A kind that is exact there is settled, so what its settings lack shows in the list."""
    net = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2))
    recipe = recipe_of('match = {}\nswap = { kind = "resized", kernel = [3, 3] }')
    (found,) = find_candidates(net, sites_of(net), recipe)  # type: ignore[arg-type]
    assert found.kind == "resized"
    assert found.reason is not None or found.becomes is not None
    assert found.site.name == "0"


@pytest.mark.parametrize(("channels", "expected"), [((1, 1), True), ((2, 2), True), ((4, 4), False)])
def test_rank_one_is_no_candidate(channels: tuple[int, int], expected: bool) -> None:
    """A 3x3 conv of C channels in and out has 9 C^2 weights, a pair 6 C R: it saves below R = 1.5 C."""
    net = nn.Sequential(nn.Conv2d(3, channels[0], 1), nn.Conv2d(*channels, 3, padding=1))
    _, found = find_candidates(net, sites_of(net), None)
    most = int((9 * channels[0] * channels[1] - 1) // (3 * sum(channels)))
    assert (found.break_even.rank if found.break_even else 0) == (most if most > 1 else 0)
    assert (found.reason is not None) == (most <= 1)


def test_more_than_two_reasons_are_counted() -> None:
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))
    recipe = recipe_of('match = {}\nswap = { kind = "separable", rank = 1 }')
    sites = sites_of(net)
    plan = Plan((), tuple(Keep(site.name, f"reason {number}") for number, site in enumerate(sites)))
    with pytest.raises(RecipeError) as caught:
        check_not_empty(plan, recipe)  # type: ignore[arg-type]
    assert "(0: reason 0; 1: reason 1; and 2 more)" in str(caught.value)
    with pytest.raises(RecipeError, match=r"\(0: reason 0; 1: reason 1\)"):
        check_not_empty(Plan((), plan.keeps[:2]), recipe)  # type: ignore[arg-type]


def test_both_pairs_are_candidates_without_a_recipe() -> None:
    """8 -> 8 channels: 64 weights of a 1x1 conv against 16 R, 576 of a 3x3 conv against 48 R."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 3, padding=1)
    )
    _, point, scale, dense = find_candidates(net, sites_of(net), None)
    assert point.break_even is not None
    assert dense.break_even is not None
    assert (point.kind, point.break_even.rank, point.break_even.order) == ("low-rank", 3, None)
    assert (dense.kind, dense.break_even.rank) == ("separable", 11)
    assert point.half is not None
    assert point.half.cost.params == 8 * 1 + 1 * 8 + 8
    assert (scale.kind, scale.break_even) == ("low-rank", None)
    assert str(scale.reason).startswith("a depthwise 1x1 conv")


def test_of_a_choice_the_first_kind_that_gains_is_told() -> None:
    last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (1, 3))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 5, padding=2, groups=8), *last)
    recipe = recipe_of('match = {}\nswap = [{ kind = "low-rank", ratio = 0.5 }, { kind = "cross" }]')
    stem, depthwise, point, strip = find_candidates(net, sites_of(net), recipe)  # type: ignore[arg-type]
    assert [row.kind for row in (stem, depthwise, point)] == ["cross", "cross", "low-rank"]
    assert depthwise.becomes is not None
    assert point.break_even is not None
    assert strip.reason == "low-rank: a 1x3 kernel is not 1x1; cross: 1x3 is asymmetric already"
