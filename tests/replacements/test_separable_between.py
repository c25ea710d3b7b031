from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conv_cases import Case, cases
from hypothesis import assume, given
from hypothesis import strategies as st
from pairs import full_rank, pair_cost
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import asymswap
from asymswap.calibration.gather import Images
from asymswap.calibration.sequential import refine_
from asymswap.errors import RecipeError
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.trace import read_conv, trace
from asymswap.planning.apply import apply_plan
from asymswap.replacements import Original, load, parse_settings, separable
from asymswap.types import Call, Plan, Site, Swap

KIND = load("separable")
ORDERS = ("vertical-first", "horizontal-first")
BETWEEN = ("relu", "bn", "bn-relu")
RELUS = st.sampled_from(["relu", "bn-relu"])
NORMS = st.sampled_from(["bn", "bn-relu"])


def see(case: Case, target_of: nn.Conv2d | None = None) -> SiteStatistics:
    """Statistics from all patches of the case's input, which torch's own unfold cuts out."""
    conv, other = case.conv, target_of or case.conv
    patches = patches_of(conv, case.x)
    mean = patches.mean(2)
    kernel = other.weight.detach().double().flatten(1).unflatten(0, (conv.groups, -1))
    wanted = torch.einsum("god,gd->go", kernel, mean)
    if other.bias is not None:
        wanted = wanted + other.bias.detach().double().unflatten(0, (conv.groups, -1))
    covariance = torch.stack([torch.atleast_2d(torch.cov(group, correction=0)) for group in patches])
    return SiteStatistics(mean, covariance, kernel, wanted, None, patches.shape[2])


def patches_of(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches (G, D, N) in the order of the kernel."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x.double(), conv._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = (cast(Any, field) for field in (conv.kernel_size, conv.dilation, conv.stride))
    columns = F.unfold(padded, kernel, dilation=dilation, stride=stride)
    return columns.unflatten(1, (conv.groups, -1)).permute(1, 2, 0, 3).flatten(2)


def convert(
    case: Case, statistics: SiteStatistics | None = None, **wish: object
) -> tuple[nn.Sequential, separable.Settled]:
    wanted = parse_settings("separable", wish)
    option = KIND.resolve(case.site, Original(case.conv, statistics), wanted)
    settled = separable.Settled.model_validate(option.settings)
    pair = KIND.build(case.site.conv, settled)
    KIND.init_(pair, Original(case.conv, statistics), settled)
    return pair.eval(), settled


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


def before(pair: nn.Sequential, name: str, x: Tensor) -> Tensor:
    """What a module of the pair gets."""
    with torch.no_grad():
        for own, module in pair.named_children():
            if own == name:
                return x
            x = module(x)
    raise AssertionError(name)


def lopsided(case: Case) -> bool:
    """Whether the conv pads more zeros on one side than on the other, which no conv but `same` can do."""
    conv = case.conv
    odd = any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return conv.padding == "same" and conv.padding_mode == "zeros" and odd


@given(case=cases(), order=st.sampled_from(ORDERS), calibrated=st.booleans())
def test_a_batch_norm_is_exact_at_full_rank_borders_included(
    case: Case, order: separable.Order, calibrated: bool
) -> None:
    statistics = see(case) if calibrated else None
    rank = full_rank(case.site.conv, order)
    pair, settled = convert(case, statistics, rank=rank, order=order, between="bn")
    with torch.no_grad():
        expected, got = case.conv(case.x), pair(case.x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    # The ridge of the statistics keeps what it does not know at the conv's own weights, so that both are exact.
    assert relative(got, expected) < 1e-4
    assert KIND.preserves(case.site.conv, settled)


@given(case=cases(dtype=torch.float64), data=st.data(), order=st.sampled_from(ORDERS), calibrated=st.booleans())
def test_a_batch_norm_changes_nothing_at_any_rank(
    case: Case, data: st.DataObject, order: separable.Order, calibrated: bool
) -> None:
    statistics = see(case) if calibrated else None
    rank = data.draw(st.integers(1, full_rank(case.site.conv, order)))
    plain, _ = convert(case, statistics, rank=rank, order=order)
    pair, settled = convert(case, statistics, rank=rank, order=order, between="bn")
    x = 3 * case.x + 1
    with torch.no_grad():
        torch.testing.assert_close(pair(x), plain(x), rtol=1e-9, atol=1e-9)
    fused = KIND.fuse(pair, case.site.conv, settled)
    assert fused is not None
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)
    assert fused.bias is None or pair[-1].bias is not None


@given(case=cases(dtype=torch.float64), data=st.data(), order=st.sampled_from(ORDERS), between=RELUS)
def test_a_relu_that_cuts_nothing_changes_nothing(
    case: Case, data: st.DataObject, order: separable.Order, between: separable.Between
) -> None:
    """At any rank, of any conv, borders included, whatever is padded."""
    assume(not lopsided(case))
    calibrated = data.draw(st.booleans())
    statistics = see(case) if calibrated else None
    rank = data.draw(st.integers(1, full_rank(case.site.conv, order)))
    # The start of the plain pair is solved for the same statistics, with a bias to hold the mean where there is one.
    plain, _ = convert(case, statistics, rank=rank, order=order)
    pair, _ = convert(case, statistics, rank=rank, order=order, between=between)
    # About the mean, that of the inputs that are assumed where there is no statistics being zero, nothing is cut.
    middle = case.x.mean() if calibrated else 0.0
    x = middle + 0.02 * (case.x - middle)
    assume(bool((before(pair, "relu", x) >= 0).all()))
    with torch.no_grad():
        torch.testing.assert_close(pair(x), plain(x), rtol=1e-8, atol=1e-8)


def test_a_relu_may_stand_in_a_conv_that_pads_zeros() -> None:
    """The usual conv, by hand: close to the mean nothing is cut, and the borders come out right too."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    x = torch.relu(torch.randn(2, 4, 9, 9))
    case = Case(conv, x)
    for between in ("relu", "bn-relu"):
        pair, settled = convert(case, see(case), rank=12, order="vertical-first", between=between)
        small = x.mean() + 0.02 * (x - x.mean())
        assert float(before(pair, "relu", small).min()) >= 0
        with torch.no_grad():
            assert relative(pair(small), conv(small)) < 1e-4
        assert not KIND.preserves(read_conv(conv), settled)


@pytest.mark.parametrize("between", ["relu", "bn-relu"])
def test_zeros_that_are_padded_pass_where_the_mean_is_far_above_them(between: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)
    case = Case(conv, 50 + torch.randn(2, 3, 8, 8, dtype=torch.float64))
    statistics = see(Case(_like(conv, 3, 0, "zeros"), case.x), conv)
    plain, _ = convert(case, statistics, rank=9, order="vertical-first")
    pair, _ = convert(case, statistics, rank=9, order="vertical-first", between=between)
    assert float(before(pair, "relu", case.x)[..., 1:-1].mean((0, 2, 3)).max()) > 10
    with torch.no_grad():
        # All columns: the second conv reads what was padded beside them. A row at the border is half empty itself.
        assert relative(pair(case.x)[..., 1:-1, :], plain(case.x)[..., 1:-1, :]) < 1e-2


def test_only_lopsided_padding_loses_its_borders() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, (3, 4), padding="same")
    case = Case(conv, torch.randn(2, 4, 9, 9))
    pair, _ = convert(case, rank=12, order="vertical-first", between="relu")
    x = 0.02 * case.x
    assert float(before(pair, "relu", x).min()) >= 0
    with torch.no_grad():
        got, wanted = pair(x), conv(x)
    # The kernel reaches one pixel before and two after.
    assert relative(got[..., 1:-2], wanted[..., 1:-2]) < 1e-4
    assert relative(got, wanted) > 0.01


@given(case=cases(dtype=torch.float64), data=st.data(), order=st.sampled_from(ORDERS), between=RELUS)
def test_a_relu_cuts_no_more_than_any_distribution_must(
    case: Case, data: st.DataObject, order: separable.Order, between: separable.Between
) -> None:
    """Cantelli: at most 1 / (1 + 3^2) of any distribution lies three deviations below its mean."""
    case = Case(_like(case.conv, case.conv.kernel_size, (0, 0), "zeros"), case.x)
    rank = data.draw(st.integers(1, full_rank(case.site.conv, order)))
    pair, _ = convert(case, see(case), rank=rank, order=order, between=between)
    # A patch reads one value a tap of the second conv, and all that are read are those that the statistics is of.
    axis = 3 if order == "vertical-first" else 2
    got, wanted = before(pair, "relu", case.x), case.conv(case.x)
    step = cast(Any, case.conv.dilation)[axis - 2]
    taps = [step * tap for tap in range(case.conv.kernel_size[axis - 2])]
    read = torch.cat([got.narrow(axis, start, wanted.shape[axis]).flatten(2) for start in taps], 2)
    assert float((read < -1e-9).double().mean((0, 2)).max()) <= 0.1 + 1e-9


def _like(conv: nn.Conv2d, kernel: Any, padding: Any, padding_mode: Any) -> nn.Conv2d:
    """A conv at stride 1 with the other fields of this one."""
    return nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel,
        padding=padding,
        dilation=cast(Any, conv.dilation),
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=padding_mode,
        dtype=conv.weight.dtype,
    )


@given(case=cases(dtype=torch.float64), data=st.data(), order=st.sampled_from(ORDERS))
def test_the_statistics_are_what_torch_gathers(case: Case, data: st.DataObject, order: separable.Order) -> None:
    """Of a map that one tap reads just as it is: padded by half of the kernel, and walked pixel by pixel."""
    kernel = [data.draw(st.sampled_from([3, 5])) for _ in range(2)]
    padding = [d * (k - 1) // 2 for d, k in zip(case.conv.dilation, kernel, strict=True)]
    mode = case.conv.padding_mode if min(case.x.shape[2:]) > max(padding) else "zeros"
    x = case.x + torch.randn(case.x.shape[1], 1, 1, dtype=torch.float64)
    case = Case(_like(case.conv, kernel, padding, mode), x)
    rank = data.draw(st.integers(1, full_rank(case.site.conv, order)))
    pair, _ = convert(case, see(case), rank=rank, order=order, between="bn")
    norm = cast(nn.BatchNorm2d, pair.norm)
    seen = before(pair, "norm", case.x)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3), correction=0), rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        still, moving = pair(case.x), copy.deepcopy(pair).train()(case.x)
    torch.testing.assert_close(moving, still, rtol=1e-7, atol=1e-7)


@given(case=cases(dtype=torch.float64), data=st.data(), order=st.sampled_from(ORDERS), between=NORMS)
def test_the_statistics_are_those_of_the_parts_of_real_patches(
    case: Case, data: st.DataObject, order: separable.Order, between: separable.Between
) -> None:
    """Of any conv: the first conv's weights applied to the rows or columns of patches that see no padding, or least."""
    conv, spec = case.conv, case.site.conv
    rank = data.draw(st.integers(1, full_rank(spec, order)))
    pair, _ = convert(case, see(case), rank=rank, order=order, between=between)
    axis = 1 if order == "vertical-first" else 0
    early = cast(Any, pair[0]).padding
    pads_early = not isinstance(early, str) and early[axis] > 0
    marks = torch.zeros_like(case.x)  # where the patches see padding: zeros among ones
    ones = F.pad(marks + 1, conv._reversed_padding_repeated_twice)
    bare = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, dilation=conv.dilation, groups=conv.groups)
    seen = patches_of(bare.double(), ones).unflatten(1, (-1, *spec.kernel)).mean((0, 1, 4))
    share = seen.amax(1 - axis)  # how much of each tap's row or column is real
    taps = range(spec.kernel[axis])
    chosen = [tap for tap in taps if pads_early or share[tap] >= share.max() - 1e-12]
    parts = patches_of(conv, case.x).unflatten(1, (-1, *spec.kernel)).select
    v = cast(nn.Conv2d, pair[0]).weight.detach().flatten(1).unflatten(0, (spec.groups, -1))
    values = torch.cat([v @ parts(3 if axis else 2, tap).flatten(1, 2) for tap in chosen], 2).flatten(0, 1)
    norm = cast(nn.BatchNorm2d, pair.norm)
    torch.testing.assert_close(norm.running_mean, values.mean(1), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(norm.running_var, values.var(1, correction=0), rtol=1e-8, atol=1e-9)


def test_in_train_mode_it_does_about_the_same_on_the_images_of_the_statistics() -> None:
    """A ReLU's batch norm sees the padding too, which the patches tell of only in part."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    case = Case(conv, torch.relu(torch.randn(8, 8, 24, 24)))
    for between, allowed in (("bn", 1e-5), ("bn-relu", 0.1)):
        pair, _ = convert(case, see(case), rank=8, order="vertical-first", between=between)
        with torch.no_grad():
            assert relative(copy.deepcopy(pair).train()(case.x), pair(case.x)) < allowed
    assumed, _ = convert(case, rank=8, order="vertical-first", between="bn")
    with torch.no_grad():
        assert relative(copy.deepcopy(assumed).train()(case.x), assumed(case.x)) > 0.1


def test_without_statistics_white_inputs_are_assumed() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, bias=False)
    case = Case(conv, torch.randn(64, 6, 20, 20))
    pair, _ = convert(case, rank=5, order="horizontal-first", between="bn-relu")
    seen = before(pair, "norm", case.x)
    norm = cast(nn.BatchNorm2d, pair.norm)
    torch.testing.assert_close(norm.running_mean, torch.zeros(5))
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), rtol=0.05, atol=0.0)
    with torch.no_grad():
        assert relative(copy.deepcopy(pair).train()(case.x), pair(case.x)) < 0.05


@given(
    case=cases(),
    data=st.data(),
    order=st.sampled_from(ORDERS),
    between=st.sampled_from(BETWEEN),
    calibrated=st.booleans(),
)
def test_offered_cost_is_the_cost_counted_by_torch(
    case: Case, data: st.DataObject, order: separable.Order, between: separable.Between, calibrated: bool
) -> None:
    statistics = see(case) if calibrated else None
    wish = parse_settings("separable", {"order": order, "between": between, "multiple": 1})
    offered = KIND.options(case.site, Original(case.conv, statistics), wish)
    assert [option.settings["rank"] for option in offered] == list(range(1, full_rank(case.site.conv, order) + 1))
    option = data.draw(st.sampled_from(offered))
    settled = separable.Settled.model_validate(option.settings)
    pair = KIND.build(case.site.conv, settled).eval()
    KIND.init_(pair, Original(case.conv, statistics), settled)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pair(case.x[:1])
    assert counter.get_total_flops() == option.cost.flops == KIND.cost(case.site, settled).flops
    assert sum(p.numel() for p in pair.parameters()) == option.cost.params == KIND.cost(case.site, settled).params
    assert (
        KIND.resolve(case.site, Original(case.conv, statistics), parse_settings("separable", option.settings)) == option
    )


def test_what_a_relu_adds_to_the_cost_by_hand() -> None:
    """4 -> 6 channels, 3x3 padded by 1 on 10 x 12, rank 2, vertical first: the first conv walks 14 columns."""
    site = Site("c", read_conv(nn.Conv2d(4, 6, 3, padding=1, bias=False)), (Call((10, 12), (10, 12)),))
    weights = 2 * 4 * 3 + 6 * 2 * 3
    names: list[separable.Between] = ["none", "bn", "relu", "bn-relu"]
    plain, norm, relu, both = (pair_cost(site, 2, "vertical-first", between=between) for between in names)
    assert plain.macs == norm.macs == 2 * 4 * 3 * 10 * 12 + 6 * 2 * 3 * 10 * 12
    assert relu.macs == both.macs == 2 * 4 * 3 * 10 * 14 + 6 * 2 * 3 * 10 * 12
    assert [cost.params - weights for cost in (plain, norm, relu, both)] == [0, 4, 2 + 6, 4 + 6]
    mirrored = replace(site, conv=replace(site.conv, padding_mode="reflect"))
    assert pair_cost(mirrored, 2, "vertical-first", between="relu") == replace(relu, macs=plain.macs)


@given(case=cases(dtype=torch.float64), data=st.data(), order=st.sampled_from(ORDERS))
def test_a_trained_batch_norm_fuses_where_no_zeros_are_padded_behind_it(
    case: Case, data: st.DataObject, order: separable.Order
) -> None:
    spec = case.site.conv
    rank = data.draw(st.integers(1, full_rank(spec, order)))
    pair, settled = convert(case, see(case), rank=rank, order=order, between="bn")
    norm = cast(nn.BatchNorm2d, pair.norm)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            cast(Tensor, tensor).copy_(0.5 + torch.rand(tensor.shape, dtype=torch.float64))
        got, wanted = KIND.fuse(pair, spec, settled), pair(case.x)
    second = cast(Any, pair[-1])
    padded = second._reversed_padding_repeated_twice
    if spec.padding_mode == "zeros" and any(padded):
        assert got is None
        return
    assert got is not None
    assert got.bias is not None
    with torch.no_grad():
        torch.testing.assert_close(got(case.x), wanted, rtol=1e-9, atol=1e-9)


def test_a_batch_norm_that_was_just_made_fuses_though_float32_rounds() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    case = Case(conv, 30 + 5 * torch.randn(2, 16, 9, 9))
    statistics = see(case)
    pair, settled = convert(case, statistics, rank=20, order="vertical-first", between="bn")
    fused = KIND.fuse(pair, case.site.conv, settled)
    assert fused is not None
    with torch.no_grad():
        assert relative(fused(case.x), pair(case.x)) < 1e-5


@pytest.mark.parametrize("between", ["relu", "bn-relu"])
def test_a_relu_fuses_with_nothing(between: str) -> None:
    case = Case(nn.Conv2d(3, 3, 3), torch.randn(1, 3, 6, 6))
    pair, settled = convert(case, rank=2, order="vertical-first", between=between)
    assert KIND.fuse(pair, case.site.conv, settled) is None


def test_variances_beyond_the_range_of_float16_are_undone() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 4, 3), 3000 * torch.randn(4, 4, 9, 9)
    statistics = see(Case(conv, x))
    half = copy.deepcopy(conv).half().eval()
    pair, _ = convert(Case(half, x.half()), statistics, rank=12, between="bn")
    with torch.no_grad():
        assert float(pair[0](x.half()).float().var((0, 2, 3)).max()) > 65504  # the largest number in float16
        assert relative(pair(x.half()).float(), conv(x)) < 0.01
    assert all(bool(torch.isfinite(tensor).all()) for tensor in pair.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("between", BETWEEN)
def test_half_precision_stays_what_it_is_and_is_not_promised(between: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = Case(nn.Conv2d(4, 4, 3, padding=1, dtype=dtype), torch.randn(2, 4, 8, 8, dtype=dtype))
    pair, settled = convert(case, rank=12, order="vertical-first", between=between)
    assert {p.dtype for p in pair.parameters()} == {dtype}
    with torch.no_grad():
        got, wanted = pair(case.x), case.conv(case.x)
    assert got.dtype == dtype
    assert relative(got.float(), wanted.float()) < (0.05 if dtype == torch.float16 else 0.12)
    assert not KIND.preserves(case.site.conv, settled)
    fused = KIND.fuse(pair, case.site.conv, settled)
    assert (fused is not None and fused.weight.dtype == dtype) == (between == "bn")


class TestSettled:
    def test_only_what_is_not_usual_is_held(self) -> None:
        case = Case(nn.Conv2d(4, 4, 3), torch.randn(1, 4, 8, 8))
        for between in ("none", *BETWEEN):
            wish = parse_settings("separable", {"rank": 2, "between": between})
            held = KIND.resolve(case.site, Original(case.conv), wish).settings
            assert held.get("between", "none") == between
            assert ("between" in held) == (between != "none")

    def test_settings_of_before_build_what_they_did(self) -> None:
        """A plan that knows of no `between`, and the names and shapes that its file holds."""
        settled = separable.Settled.model_validate({"rank": 2, "order": "horizontal-first"})
        state = KIND.build(read_conv(nn.Conv2d(4, 5, 3)), settled).state_dict()
        assert {key: tuple(value.shape) for key, value in state.items()} == {
            "horizontal.weight": (2, 4, 1, 3),
            "vertical.weight": (5, 2, 3, 1),
            "vertical.bias": (5,),
        }

    def test_what_stands_between_stands_between(self) -> None:
        for between, names in (("relu", ["relu"]), ("bn", ["norm"]), ("bn-relu", ["norm", "relu"])):
            wish = {"rank": 2, "order": "vertical-first", "between": between}
            pair = KIND.build(read_conv(nn.Conv2d(4, 4, 3, bias=False)), separable.Settled.model_validate(wish))
            assert [name for name, _ in pair.named_children()] == ["vertical", *names, "horizontal"]
            assert (cast(Any, pair.vertical).bias is not None) == (between == "relu")
            assert (cast(Any, pair.horizontal).bias is not None) == (between != "bn")

    def test_a_wrong_name_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="between: Input should be 'none', 'relu', 'bn' or 'bn-relu'"):
            parse_settings("separable", {"between": "batchnorm"})

    @pytest.mark.parametrize("between", BETWEEN)
    def test_building_draws_no_random_numbers(self, between: str) -> None:
        state = torch.get_rng_state()
        wish = {"rank": 2, "order": "vertical-first", "between": between}
        KIND.build(read_conv(nn.Conv2d(4, 4, 3, device="meta")), separable.Settled.model_validate(wish))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("between", BETWEEN)
def test_a_conv_of_zeros_stays_zero_and_finite(between: str) -> None:
    conv = nn.Conv2d(3, 3, 3, bias=False)
    nn.init.zeros_(conv.weight)
    case = Case(conv, torch.randn(4, 3, 6, 6))
    for statistics in (None, see(case)):
        pair, _ = convert(case, statistics, rank=2, between=between)
        for mode in (False, True):
            with torch.no_grad():
                assert float(pair.train(mode)(case.x).abs().max()) < 1e-6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))
        return y


@pytest.mark.parametrize("between", BETWEEN)
def test_solving_layer_by_layer_sets_it_anew(between: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second conv's batch norm, or shift, is for the inputs that the converted network gives it."""
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(16, 3, 8, 8)
    monkeypatch.setattr("asymswap.calibration.gather._POSITIONS", 64)  # every pixel is looked at
    sites = trace(model, (x[:1],)).sites
    with torch.no_grad():
        hidden = torch.relu(model.one(x))
    statistics = {"one": see(Case(model.one, x)), "two": see(Case(model.two, hidden))}
    held = {"order": "vertical-first", "between": between, "bias": True}
    plan = Plan(tuple(Swap(name, "separable", {**held, "rank": 2}) for name in ("one", "two")))
    converted = apply_plan(model, plan, statistics=statistics)
    one_pass = copy.deepcopy(converted)
    used, kind = [], type(load("separable"))
    init_ = kind.init_
    monkeypatch.setattr(
        kind, "init_", lambda self, module, original, *how: [used.append(original), init_(self, module, original, *how)]
    )
    refine_(model, converted, sites, plan, statistics, Images(lambda: [(0, (x,))], len(x)), (x[:1],))
    monkeypatch.undo()
    with torch.no_grad():
        now = torch.relu(converted.get_submodule("one")(x))
    pair = cast(nn.Sequential, converted.get_submodule("two"))
    solved, _ = convert(Case(model.two, now), used[-1].statistics, **held, rank=2)
    for key, value in pair.state_dict().items():
        torch.testing.assert_close(value, solved.state_dict()[key])
    if between == "bn":
        seen, norm = before(pair, "norm", now), cast(nn.BatchNorm2d, pair.norm)
        torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        assert relative(cast(Any, one_pass.get_submodule("two")).norm.running_mean, norm.running_mean) > 1e-3
    with torch.no_grad():
        assert relative(converted(x), model(x)) < relative(one_pass(x), model(x))


@pytest.mark.parametrize(
    "between", [pytest.param(each, marks=[pytest.mark.nightly] * (each != "bn")) for each in BETWEEN]
)
def test_a_conversion_is_written_and_read_again(between: str, tmp_path: Path) -> None:
    wanted = {"between": between, "budget.macs": 0.6}
    conversion = asymswap.convert("digits-resnet", "half-macs", overrides=wanted)
    report = conversion.report
    assert report.after.macs / report.before.macs <= 0.6
    assert all(row.settings["between"] == between and between in row.becomes for row in report.swapped)
    assert all(row.exact is False for row in report.swapped)
    assert "without a ReLU between" in report.preserves["separable"]
    assert all((row.kernel_error is not None) == (between == "bn") for row in report.swapped)
    asymswap.save(conversion, tmp_path / "out.pt")
    loaded = asymswap.load(tmp_path / "out.pt")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x), conversion.model.eval()(x))


@pytest.mark.parametrize(
    "between", [pytest.param(each, marks=[pytest.mark.nightly] * (each != "bn-relu")) for each in BETWEEN]
)
def test_a_calibrated_network_works_before_any_training(between: str) -> None:
    wanted = {"between": between, "budget.macs": 0.4}
    calibration = asymswap.Calibration("digits", images=128, sequential=False)
    report = asymswap.convert(
        "digits-resnet", "half-macs", overrides=wanted, calibration=calibration, evaluate="digits"
    ).report
    assert report.accuracy is not None
    assert report.accuracy.scores[0].after > 0.95
