from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conv_cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st
from patch_statistics import see_all
from torch import Tensor, nn

from asymswap.errors import RecipeError
from asymswap.factorize import covariance
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.trace import read_conv
from asymswap.replacements import Original, load, low_rank, parse_settings
from asymswap.replacements._pairs import SettledPair
from asymswap.types import ConvSpec

KIND = load("low-rank")


@st.composite
def pointwise(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Case:
    """A 1x1 conv of any stride, padding, padding mode, grouping and bias that is not depthwise."""
    return draw(cases(dtype=dtype, sides=(1,)).filter(lambda case: KIND.unsupported(case.site.conv) is None))


def most(case: Case) -> int:
    return min(case.site.conv.group_in, case.site.conv.group_out)


def convert(case: Case, statistics: SiteStatistics | None = None, **wish: object) -> tuple[nn.Sequential, SettledPair]:
    option = KIND.resolve(case.site, Original(case.conv, statistics), parse_settings("low-rank", wish))
    settled = SettledPair.model_validate(option.settings)
    pair = KIND.build(case.site.conv, settled)
    assert isinstance(pair, nn.Sequential)
    KIND.init_(pair, Original(case.conv, statistics), settled)
    return pair, settled


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


@given(case=pointwise())
def test_full_rank_is_exact_for_every_form_of_conv(case: Case) -> None:
    pair, settled = convert(case, rank=most(case))
    with torch.no_grad():
        got, expected = pair(case.x), case.conv(case.x)
    assert got.shape == expected.shape
    assert relative(got, expected) < 1e-5
    assert KIND.preserves(case.site.conv, settled)


@given(case=pointwise(dtype=torch.float64), data=st.data())
def test_fused_it_is_the_truncated_kernel_with_every_field_of_the_conv(case: Case, data: st.DataObject) -> None:
    """By torch's SVD of each group's matrix."""
    spec, rank = case.site.conv, data.draw(st.integers(1, most(case)))
    pair, settled = convert(case, rank=rank)
    fused = KIND.fuse(pair, spec, settled)
    assert fused is not None
    with torch.no_grad():
        assert relative(pair(case.x), fused(case.x)) < 1e-10
    assert read_conv(fused) == spec
    u, s, v = torch.linalg.svd(case.conv.weight.detach().flatten(1).unflatten(0, (spec.groups, -1)))
    truncated = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
    assert relative(fused.weight.flatten(), truncated.flatten()) < 1e-9


def test_the_first_conv_takes_the_stride_so_that_both_walk_over_less() -> None:
    """8 -> 16 at stride 2 on 10x12, rank 4: both convs on 5x6."""
    case = Case(nn.Conv2d(8, 16, 1, stride=2), torch.randn(1, 8, 10, 12))
    pair, settled = convert(case, rank=4)
    assert [(conv.stride, conv.in_channels, conv.out_channels) for conv in pair] == [((2, 2), 8, 4), ((1, 1), 4, 16)]
    assert KIND.cost(case.site, settled).macs == (8 * 4 + 4 * 16) * 5 * 6


def least_error(statistics: SiteStatistics, rank: int) -> float:
    """The least weighted squared error on the data of any kernel of a rank in each group, by Eckart and Young.

    With roots of both weights by eigenvectors: || P^1/2 (W - W') S^1/2 || is least for the truncated SVD.
    """

    def root(a_GMM: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a_GMM)
        return vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT

    whitened = root(statistics.output_weight()) @ statistics.target_GOD @ root(statistics.ridged())
    return float(torch.linalg.svdvals(whitened)[:, rank:].square().sum())


@given(case=pointwise(dtype=torch.float64), data=st.data(), weighted=st.booleans())
def test_on_data_no_kernel_of_the_rank_errs_less(case: Case, data: st.DataObject, weighted: bool) -> None:
    case = Case(case.conv, torch.randn(8, *case.x.shape[1:], dtype=torch.float64).cumsum(1))
    spec, rank = case.site.conv, data.draw(st.integers(1, most(case)))
    statistics = see_all(case, weighted=weighted).statistics
    pair, settled = convert(case, statistics, rank=rank)
    fused = KIND.fuse(pair, spec, settled)
    assert fused is not None
    gap = fused.weight.detach().flatten(1).unflatten(0, (spec.groups, -1)) - statistics.target_GOD
    error = float(torch.einsum("goa,gab,gpb,gop->", gap, statistics.ridged(), gap, statistics.output_weight()))
    whole = least_error(statistics, 0)
    assert error == pytest.approx(least_error(statistics, rank), rel=1e-6, abs=1e-8 * whole)
    # The bias gives each output the mean that it had.
    with torch.no_grad():
        means = [module(case.x).mean((0, 2, 3)) for module in (pair, case.conv)]
    assert torch.allclose(means[0], means[1], atol=1e-8)


def test_what_is_found_in_closed_form_is_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "descend", None)
    case = Case(nn.Conv2d(8, 6, 1), torch.randn(4, 8, 9, 9))
    convert(case, see_all(case).statistics, rank=3)
    square = Case(nn.Conv2d(2, 6, 2), torch.randn(4, 2, 9, 9))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        covariance.factors(covariance.arrange(see_all(square).statistics, (2, 2), True), 3)


@given(case=pointwise(dtype=torch.float64), calibrated=st.booleans())
def test_the_offered_errors_are_those_of_the_kernels(case: Case, calibrated: bool) -> None:
    statistics = see_all(case).statistics if calibrated else None
    options = KIND.options(case.site, Original(case.conv, statistics), parse_settings("low-rank", {}))
    assert [option.settings["rank"] for option in options] == list(range(1, most(case) + 1))
    assert all(one.error >= other.error - 1e-12 for one, other in itertools.pairwise(options))
    for option in options:
        pair, settled = convert(case, statistics, **option.settings)
        fused = KIND.fuse(pair, case.site.conv, settled)
        assert fused is not None
        weight = case.conv.weight.detach()
        inputs = torch.eye(weight.shape[1], dtype=torch.float64) if statistics is None else statistics.ridged()
        gap, kept = (
            w.flatten(1).unflatten(0, (case.conv.groups, -1)) for w in (fused.weight.detach() - weight, weight)
        )
        energy = [float((w @ inputs * w).sum()) for w in (gap, kept)]
        assert option.error == pytest.approx(energy[0] / energy[1], abs=1e-8)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (ConvSpec(4, 4, (3, 3)), "a 3x3 kernel is not 1x1"),
        (ConvSpec(4, 4, (1, 7)), "a 1x7 kernel is not 1x1"),
        (ConvSpec(4, 8, (1, 1), groups=4), "a depthwise 1x1 conv has only one weight for each output, nothing to"),
        (ConvSpec(4, 4, (1, 1), dtype="complex64"), "complex64 weights are not real floating-point numbers"),
        (ConvSpec(4, 4, (1, 1), groups=2), None),
        (ConvSpec(1, 4, (1, 1)), None),
    ],
)
def test_what_it_refuses(conv: ConvSpec, reason: str | None) -> None:
    found = KIND.unsupported(conv)
    assert found is None if reason is None else str(found).startswith(reason)


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ({"rank": 7}, "rank = 7 is above the full rank 6"),
        ({"ratio": 0.1}, r"ratio = 0.1 cannot be met: rank 1 keeps 0.292 of the MACs already"),
        ({"rank": 2, "ratio": 0.5}, "give one of rank, ratio and energy, not rank = 2 and ratio = 0.5"),
        ({"order": "auto"}, "unknown key 'order'"),
    ],
)
def test_settings_out_of_range(wish: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        convert(Case(nn.Conv2d(8, 6, 1), torch.randn(1, 8, 9, 9)), **wish)


def test_sizes_by_ratio_and_by_energy() -> None:
    """A diagonal kernel has its own entries as singular values."""
    conv = nn.Conv2d(4, 4, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))[..., None, None])
    case = Case(conv, torch.randn(1, 4, 5, 5))
    for energy, rank in ((0.5, 1), (0.8, 2), (0.9, 3), (1.0, 4)):
        assert convert(case, energy=energy)[1].rank == rank
    for ratio, rank in ((0.5, 1), (0.99, 1), (1.0, 2)):
        assert convert(case, ratio=ratio)[1].rank == rank
    pair, settled = convert(case, rank=2, bias=True)
    assert settled == SettledPair(rank=2, bias=True)
    assert read_conv(pair[1]) == replace(ConvSpec(2, 4, (1, 1)), bias=True)
    assert [name for name, _ in pair.named_children()] == ["reduce", "expand"]
    assert isinstance(KIND, low_rank.LowRank)
