from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conv_cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st
from pairs import full_rank, pair_cost
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from asymswap.errors import PlanError, RecipeError
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.trace import read_conv
from asymswap.replacements import Original, load, load_swap, parse_settings, separable
from asymswap.types import Call, ConvSpec, Site, Swap

KIND = load("separable")
ORDERS = ("vertical-first", "horizontal-first")


def convert(case: Case, **wish: object) -> tuple[nn.Sequential, separable.Settled]:
    wanted = parse_settings("separable", wish)
    option = KIND.resolve(case.site, Original(case.conv), wanted)
    settled = separable.Settled.model_validate(option.settings)
    pair = KIND.build(case.site.conv, settled)
    KIND.init_(pair, Original(case.conv), settled)
    return pair, settled


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


@given(case=cases(), order=st.sampled_from(ORDERS))
def test_full_rank_is_exact_for_every_form_of_conv(case: Case, order: separable.Order) -> None:
    pair, _ = convert(case, rank=full_rank(case.site.conv, order), order=order)
    with torch.no_grad():
        expected, got = case.conv(case.x), pair(case.x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert relative(got, expected) < 1e-5


@given(case=cases(dtype=torch.float64), order=st.sampled_from(ORDERS), data=st.data())
def test_output_is_that_of_the_truncated_kernel(case: Case, order: separable.Order, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, full_rank(case.site.conv, order)))
    pair, settled = convert(case, rank=rank, order=order)
    fused = KIND.fuse(pair, case.site.conv, settled)
    with torch.no_grad():
        assert relative(pair(case.x), fused(case.x)) < 1e-10
    assert read_conv(fused) == case.site.conv


@given(case=cases(dtype=torch.float64), order=st.sampled_from(ORDERS))
def test_kernel_error_is_what_numpy_style_svd_leaves_out(case: Case, order: separable.Order) -> None:
    """Eckart-Young, by another route: torch's SVD of matrices that are put together tap by tap."""
    spec = case.site.conv
    w = case.conv.weight.detach().reshape(spec.groups, spec.group_out, spec.group_in, *spec.kernel)
    vertical = order == "vertical-first"
    along, across = (3, 4) if vertical else (4, 3)
    matrices = [torch.movedim(g[None], (2, along, 1, across), (1, 2, 3, 4))[0] for g in w]
    spectra = [torch.linalg.svdvals(m.reshape(m.shape[0] * m.shape[1], -1)) for m in matrices]
    total = sum(float(s.square().sum()) for s in spectra)
    options = KIND.options(case.site, Original(case.conv), parse_settings("separable", {"order": order}))
    assert [option.settings["rank"] for option in options] == list(range(1, full_rank(spec, order) + 1))
    for option in options:
        left = sum(float(s[option.settings["rank"] :].square().sum()) for s in spectra)
        assert option.error == pytest.approx(left / total, abs=1e-9)


@given(case=cases(dtype=torch.float64))
def test_error_falls_with_rank_and_the_measured_kernel_agrees(case: Case) -> None:
    for order in ORDERS:
        wish = parse_settings("separable", {"order": order})
        options = KIND.options(case.site, Original(case.conv), wish)
        for one, other in itertools.pairwise(options):
            assert other.error <= one.error + 1e-12
        middle = options[len(options) // 2]
        pair, settled = convert(case, **middle.settings)
        fused = KIND.fuse(pair, case.site.conv, settled)
        measured = relative(fused.weight.detach(), case.conv.weight.detach()) ** 2
        assert measured == pytest.approx(middle.error, abs=1e-9)


@given(case=cases(), order=st.sampled_from(ORDERS), data=st.data())
def test_offered_cost_is_the_cost_counted_by_torch(case: Case, order: separable.Order, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, full_rank(case.site.conv, order)))
    pair, _ = convert(case, rank=rank, order=order)
    cost = pair_cost(case.site, rank, order)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pair(case.x[:1])
    assert counter.get_total_flops() == cost.flops
    assert sum(p.numel() for p in pair.parameters()) == cost.params


@given(case=cases(), ratio=st.floats(0.05, 1.0))
def test_ratio_is_the_largest_rank_that_keeps_within_it(case: Case, ratio: float) -> None:
    if all(pair_cost(case.site, 1, o).macs > ratio * case.site.cost.macs for o in ORDERS):
        with pytest.raises(RecipeError, match="cannot be met: rank 1 keeps"):
            convert(case, ratio=ratio)
        return
    pair, settled = convert(case, ratio=ratio)
    assert settled.rank is not None
    order = "vertical-first" if next(iter(pair.named_children()))[0] == "vertical" else "horizontal-first"
    assert pair_cost(case.site, settled.rank, order).macs <= ratio * case.site.cost.macs
    if settled.rank < full_rank(case.site.conv, order):
        assert pair_cost(case.site, settled.rank + 1, order).macs > ratio * case.site.cost.macs


@given(case=cases(dtype=torch.float64), energy=st.floats(0.05, 1.0))
def test_energy_is_the_smallest_rank_that_keeps_it(case: Case, energy: float) -> None:
    pair, settled = convert(case, energy=energy)
    assert settled.rank is not None
    fused = KIND.fuse(pair, case.site.conv, settled)
    kept = 1 - relative(fused.weight.detach(), case.conv.weight.detach()) ** 2
    assert kept >= energy - 1e-9
    if settled.rank > 1:
        less, settings_ = convert(case, rank=settled.rank - 1, order=settled.order)
        kept = 1 - relative(KIND.fuse(less, case.site.conv, settings_).weight, case.conv.weight) ** 2
        assert float(kept) < energy + 1e-9


def test_auto_takes_the_better_order_at_equal_cost() -> None:
    """A kernel that is one horizontal line of taps has rank 1 in one order, whatever the channels do."""
    conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    with torch.no_grad():
        # w[o, c, i, j] = a[c, i] b[o, j]: rank 1 with the vertical conv first, up to 3 the other way round.
        conv.weight.copy_(torch.einsum("ci,oj->ocij", torch.randn(6, 3), torch.randn(6, 3)))
    case = Case(conv, torch.randn(1, 6, 8, 8))
    assert KIND.resolve(case.site, Original(conv), parse_settings("separable", {"rank": 1})).settings == {
        "rank": 1,
        "order": "vertical-first",
    }
    conv.weight.data = conv.weight.data.mT.contiguous()
    assert KIND.resolve(case.site, Original(conv), parse_settings("separable", {"rank": 1})).settings["order"] == (
        "horizontal-first"
    )


def test_auto_takes_the_cheaper_order_at_equal_error() -> None:
    """With stride (2, 1) the vertical conv first halves the rows that the second one sees."""
    conv = nn.Conv2d(4, 4, 3, stride=(2, 1), padding=1)
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("oc,i,j->ocij", torch.randn(4, 1) * torch.randn(4), *torch.randn(2, 3)))
    case = Case(conv, torch.randn(1, 4, 16, 16))
    settled = KIND.resolve(case.site, Original(conv), parse_settings("separable", {"rank": 1})).settings
    costs = {order: pair_cost(case.site, 1, order).macs for order in ORDERS}
    assert costs["vertical-first"] < costs["horizontal-first"]
    assert settled["order"] == "vertical-first"


@pytest.mark.parametrize("kernel", [(1, 1), (1, 7), (7, 1)])
def test_refuses_what_has_nothing_to_separate(kernel: tuple[int, int]) -> None:
    reason = KIND.unsupported(ConvSpec(4, 4, kernel))
    assert reason is not None
    assert "x".join(map(str, kernel)) in reason


def test_refuses_weights_that_are_not_real() -> None:
    assert "complex64 weights" in str(KIND.unsupported(ConvSpec(4, 4, (3, 3), dtype="complex64")))


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ({"rank": 0}, "rank: Input should be greater than or equal to 1 .got 0."),
        ({"rank": 2, "energy": 0.5}, "give one of rank, ratio and energy, not rank = 2 and energy = 0.5"),
        ({"ratio": 1.5}, "ratio: Input should be less than or equal to 1"),
        ({"rank": "8"}, "rank: Input should be a valid integer"),
        ({"ordr": "auto"}, "unknown key 'ordr'; did you mean order"),
    ],
)
def test_settings_out_of_range(wish: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_settings("separable", wish)


def test_rank_above_the_full_one() -> None:
    conv = nn.Conv2d(4, 8, 3)
    site = Site("c", read_conv(conv), (Call((8, 8), (6, 6)),))
    with pytest.raises(RecipeError, match="rank = 13 is above the full rank 12"):
        KIND.resolve(site, Original(conv), parse_settings("separable", {"rank": 13}))


def test_unsettled_settings_are_refused() -> None:
    with pytest.raises(PlanError, match="needs a settled rank and order"):
        load_swap(Swap("conv", "separable", {"energy": 0.5}))


def test_building_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    KIND.build(ConvSpec(4, 4, (3, 3)), separable.Settled(rank=2, order="vertical-first"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_conv_of_zeros_stays_zero_and_finite() -> None:
    conv = nn.Conv2d(3, 3, 3, bias=False)
    nn.init.zeros_(conv.weight)
    pair, _ = convert(Case(conv, torch.randn(1, 3, 6, 6)), rank=2)
    assert all(bool(torch.isfinite(p).all()) for p in pair.parameters())
    with torch.no_grad():
        assert float(pair(torch.randn(1, 3, 6, 6)).abs().max()) == 0.0


def test_both_convs_share_the_scale() -> None:
    case = Case(nn.Conv2d(8, 8, 3), torch.randn(1, 8, 9, 9))
    pair, _ = convert(case, rank=5)
    first, second = (module.weight.detach() for module in pair.children())
    assert float(first.norm()) == pytest.approx(float(second.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("channels", "size", "step"),
    [(64, 56, 16), (128, 28, 16), (512, 14, 16), (16, 112, 4), (64, 8, 1), (16, 32, 1)],
)
def test_a_budget_chooses_round_ranks_of_large_convs_only(channels: int, size: int, step: int) -> None:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    site = Site("conv", read_conv(conv), (Call((size, size), (size, size)),))
    wish = {"order": "vertical-first"}
    ranks = {
        option.settings["rank"] for option in KIND.options(site, Original(conv), parse_settings("separable", wish))
    }
    full = 3 * channels
    assert {rank for rank in ranks if rank >= step} == {*range(step, full + 1, step), full}
    assert {rank for rank in ranks if rank < step} == {rank for rank in (1, 2, 4, 8) if rank < step}
    every = KIND.options(site, Original(conv), parse_settings("separable", {**wish, "multiple": 1}))
    assert len(every) == full


def test_the_ranks_on_statistics_cost_what_eigenvalues_made_by_hand_leave_out() -> None:
    """Every entry of the kernel is alone in its row of the first conv's inputs: their squares are the eigenvalues."""
    conv = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 0, 0], conv.weight[1, 0, 1, 0], conv.weight[2, 0, 2, 0], conv.weight[0, 1, 0, 1] = 4, 3, 2, 1
    site = Site("conv", read_conv(conv), (Call((8, 8), (8, 8)),))
    zeros, eye = torch.zeros(1, 18, dtype=torch.float64), torch.eye(18, dtype=torch.float64)[None]
    weight = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))[None]
    statistics = SiteStatistics(zeros, eye, conv.weight.detach().flatten(1)[None], torch.zeros(1, 3), weight, 1000)
    wish = parse_settings("separable", {"order": "vertical-first", "multiple": 1})
    errors = [14 / 30, 5 / 30, 1 / 30, 0, 0, 0]
    # A twentieth of the mean weight is added to each, a thousandth of the mean variance to each variance.
    floor = 0.05 * 14 / 3
    weighted = [9 * (4 + floor), 4 * (9 + floor), 16 * (1 + floor), 1 + floor, 0, 0]
    nats = [0.5 * 1.001 * sum(weighted[rank:]) for rank in range(1, 7)]
    found = KIND.options(site, Original(conv, statistics), wish)
    assert [option.settings["rank"] for option in found] == [1, 2, 3, 4, 5, 6]
    assert [option.error for option in found] == pytest.approx(errors, abs=1e-9)
    expected = [math.sqrt(-math.log1p(-error) * nat) for error, nat in zip(errors, nats, strict=True)]
    assert [option.loss for option in found] == pytest.approx(expected, abs=1e-6)
    unweighted = KIND.options(site, Original(conv, replace(statistics, weight_GOO=None)), wish)
    assert [option.loss for option in unweighted] == pytest.approx([-math.log1p(-error) for error in errors], abs=1e-9)
