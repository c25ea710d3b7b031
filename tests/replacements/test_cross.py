from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conv_cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st
from patch_statistics import see_all
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from asymswap.errors import RecipeError
from asymswap.factorize import cross as mathematics
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.trace import read_conv, trace
from asymswap.replacements import Original, cross, load, parse_settings
from asymswap.types import ConvSpec, Option

KIND = load("cross")
ODD = (3, 5)


def convert(
    case: Case, statistics: SiteStatistics | None = None, **wish: object
) -> tuple[cross.CrossConv2d, cross.Settings, Option]:
    option = KIND.resolve(case.site, Original(case.conv, statistics), parse_settings("cross", wish))
    settled = parse_settings("cross", option.settings)
    module = KIND.build(case.site.conv, settled)
    KIND.init_(module, Original(case.conv, statistics), settled)
    return module, settled, option


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


def smooth(seed: int, channels: int, size: int = 20) -> torch.Tensor:
    """Images whose pixels are alike their neighbours, with a mean: as feature maps are."""
    g = torch.Generator().manual_seed(seed)
    return F.avg_pool2d(torch.randn(12, channels, size, size, generator=g, dtype=torch.float64), 3, 1, 1) * 2 + 0.7


@given(case=cases(dtype=torch.float64, sides=ODD))
def test_without_correlation_it_is_the_kernel_without_its_corners(case: Case) -> None:
    module, settled, option = convert(case, correlation=0)
    conv, spec = case.conv, case.site.conv
    cropped = copy.deepcopy(conv)
    mask = torch.zeros(spec.kernel)
    mask[spec.kernel[0] // 2] = 1
    mask[:, spec.kernel[1] // 2] = 1
    cropped.weight.data *= mask
    fused = KIND.fuse(module, spec, settled)
    assert module(case.x).shape == conv(case.x).shape
    for other in (module(case.x), fused(case.x)):
        assert relative(other, cropped(case.x)) < 1e-10
    assert read_conv(fused) == spec
    assert option.error == pytest.approx(relative(fused.weight, conv.weight) ** 2, abs=1e-12)


@given(case=cases(dtype=torch.float64, sides=ODD), correlation=st.floats(0.0, 0.9))
def test_each_channel_is_fitted_to_inputs_of_the_correlation(case: Case, correlation: float) -> None:
    """Against numpy's lstsq, the covariance being that of the columns of its Cholesky factor."""
    module, settled, option = convert(case, correlation=correlation)
    spec = case.site.conv
    fused = KIND.fuse(module, spec, settled).weight.detach().numpy()
    steps = [
        correlation ** (d * np.abs(np.subtract.outer(*[np.arange(k)] * 2)))
        for d, k in zip(spec.dilation, spec.kernel, strict=True)
    ]
    root = np.linalg.cholesky(np.kron(*steps))
    on_cross = np.zeros(spec.kernel, dtype=bool)
    on_cross[spec.kernel[0] // 2] = on_cross[:, spec.kernel[1] // 2] = True
    taps = on_cross.flatten()
    planes = case.conv.weight.detach().numpy().reshape(-1, taps.size)
    expected = np.zeros_like(planes)
    expected[:, taps] = np.linalg.lstsq(root[taps].T, (planes @ root).T, rcond=None)[0].T
    np.testing.assert_allclose(fused.reshape(planes.shape), expected, atol=1e-8)
    error = np.square(planes - expected).sum() / np.square(planes).sum()
    assert option.error == pytest.approx(min(error, 1.0), abs=1e-9)


@given(case=cases(sides=ODD))
def test_fuses_to_one_conv_after_any_training(case: Case) -> None:
    module, settled, _ = convert(case, see_all(case).statistics)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    fused = KIND.fuse(module, case.site.conv, settled)
    assert relative(fused(case.x), module(case.x)) < 1e-5
    assert read_conv(fused) == replace(case.site.conv, bias=True)


@given(case=cases(dtype=torch.float64, sides=ODD))
def test_statistics_never_errs_more_than_copying_and_corrects_the_mean(case: Case) -> None:
    case = Case(case.conv, torch.randn(8, *case.x.shape[1:], dtype=torch.float64).abs())
    statistics = see_all(case).statistics
    fitted, _, _ = convert(case, statistics)
    plain, plain_settings, _ = convert(case, correlation=0)
    y = case.conv(case.x).detach()
    gaps = [module(case.x).detach() - y for module in (fitted, plain)]
    squares = [float((gap - gap.mean((0, 2, 3), keepdim=True)).square().sum()) for gap in gaps]
    # The ridge may cost on these inputs what it saves on those that it stands for, and no more.
    dropped = case.conv.weight - KIND.fuse(plain, case.site.conv, plain_settings).weight
    dropped_G = dropped.detach().unflatten(0, (case.site.conv.groups, -1)).square().sum((1, 2, 3, 4))
    slack = statistics.patches * float((statistics.ridge()[:, 0] * dropped_G).sum())
    assert squares[0] <= squares[1] + slack + 1e-9
    assert torch.allclose(gaps[0].mean((0, 2, 3)), torch.zeros(()).double(), atol=1e-9)


def test_statistics_of_smooth_inputs_takes_over_the_corners() -> None:
    """What copying drops can be foretold of the neighbours, on images that the fit has not seen."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 5, padding=2, groups=6, dtype=torch.float64)
    nn.init.uniform_(conv.weight)
    fitted, _, option = convert(Case(conv, smooth(0, 6)), see_all(Case(conv, smooth(0, 6))).statistics)
    assumed, _, _ = convert(Case(conv, smooth(0, 6)))
    copied, _, without = convert(Case(conv, smooth(0, 6)), correlation=0.0)
    x = smooth(1, 6)
    y = conv(x).detach()
    energy = (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
    error = [float((module(x) - y).detach().square().sum() / energy) for module in (fitted, assumed, copied)]
    assert error[0] < 0.5 * error[1] < 0.1 * error[2]
    assert error[0] == pytest.approx(option.error, rel=0.15)
    assert without.error == pytest.approx(1 - 9 / 25, abs=0.1)


def test_loss_is_that_of_the_error_or_also_of_the_divergence() -> None:
    torch.manual_seed(0)
    case = Case(nn.Conv2d(3, 4, 3, dtype=torch.float64), smooth(0, 3))
    _, _, plain = convert(case)
    assert plain.loss == pytest.approx(-math.log(1 - plain.error))
    seen = see_all(case, weighted=True).statistics
    _, _, unweighted = convert(case, replace(seen, weight_GOO=None))
    assert unweighted.loss == pytest.approx(-math.log(1 - unweighted.error))
    module, settled, weighted = convert(case, seen)
    found = KIND.fuse(module, case.site.conv, settled).weight.detach().flatten(1)[None]
    divergence = mathematics.divergence(seen, found)
    assert divergence is not None
    assert weighted.error == unweighted.error
    assert weighted.loss == pytest.approx(math.sqrt(unweighted.loss * divergence))


def test_the_target_of_the_statistics_goes_before_the_kernel() -> None:
    """As in sequential calibration, where other outputs are wanted than those of the conv."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False, dtype=torch.float64)
    other = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    x = smooth(0, 3)
    statistics = see_all(Case(other, x)).statistics
    module, _, _ = convert(Case(conv, x), statistics)
    expected, _, _ = convert(Case(other, x), statistics)
    assert torch.allclose(module(x), expected(x))


def test_statistics_gives_a_bias_and_weights_alone_do_not() -> None:
    case = Case(nn.Conv2d(3, 4, 3, bias=False, dtype=torch.float64), smooth(0, 3))
    module, _, option = convert(case, see_all(case).statistics)
    assert option.settings == {"bias": True}
    assert module.vertical.bias is not None
    module, _, option = convert(case)
    assert option.settings == {"correlation": 0.5}
    assert module.vertical.bias is None
    wanted = parse_settings("cross", {"bias": True})
    assert KIND.resolve(case.site, Original(case.conv), wanted).settings == {"bias": True, "correlation": 0.5}
    module = KIND.build(case.site.conv, wanted)
    KIND.init_(module, Original(case.conv), wanted)
    assert module.vertical.bias.tolist() == [0.0] * 4


def test_both_convs_hold_half_of_the_centre_tap() -> None:
    conv = nn.Conv2d(1, 1, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(9.0).reshape(1, 1, 3, 3))
    module, _, _ = convert(Case(conv, torch.randn(1, 1, 5, 5)), correlation=0)
    assert module.vertical.weight.flatten().tolist() == [1.0, 2.0, 7.0]
    assert module.horizontal.weight.flatten().tolist() == [3.0, 2.0, 5.0]


@given(case=cases(sides=ODD))
def test_offered_cost_is_the_cost_counted_by_torch(case: Case) -> None:
    for statistics in (None, see_all(case).statistics):
        module, settled, option = convert(case, statistics)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(case.x[:1])
        assert counter.get_total_flops() == option.cost.flops
        assert sum(p.numel() for p in module.parameters()) == option.cost.params
        assert KIND.cost(case.site, settled) == option.cost
        assert KIND.options(case.site, Original(case.conv, statistics), parse_settings("cross", {})) == [option]


def test_never_promises_the_function_and_never_grows() -> None:
    wish = parse_settings("cross", {})
    assert not KIND.preserves(ConvSpec(4, 4, (3, 3)), wish)
    assert not wish.allow_growth


def test_nothing_to_learn_from_stays_finite() -> None:
    conv = nn.Conv2d(3, 3, 3, dtype=torch.float64)
    case = Case(conv, torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    module, _, option = convert(case, see_all(case).statistics)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    assert math.isfinite(option.loss)
    nn.init.zeros_(conv.weight)
    module, _, option = convert(case)
    assert (option.error, option.loss) == (0.0, 0.0)


@pytest.mark.parametrize("padding", [0, 1])
def test_copies_pickles_loads_compiles_exports_and_traces(padding: int) -> None:
    case = Case(nn.Conv2d(4, 4, 5, padding=padding, groups=4), torch.randn(2, 4, 9, 9))
    module, settled, _ = convert(case)
    x = case.x
    loaded = KIND.build(case.site.conv, settled)
    loaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x), module(x))
    assert torch.allclose(torch.compile(module, backend="eager", fullgraph=True)(x), module(x), atol=1e-6)
    assert torch.allclose(torch.export.export(module, (x,)).module()(x), module(x), atol=1e-6)
    assert trace(nn.Sequential(module), (x,)).by == "torch.fx"
    assert torch.allclose(module(x[0]), module(x)[0], atol=1e-6)
    last = torch.channels_last
    assert module.to(memory_format=last)(x.contiguous(memory_format=last)).is_contiguous(memory_format=last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_keep_their_dtype(dtype: torch.dtype) -> None:
    case = Case(nn.Conv2d(4, 4, 3, dtype=dtype), torch.ones(1, 4, 8, 8, dtype=dtype))
    module, _, _ = convert(case)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module(case.x).dtype == dtype
    single, _, _ = convert(Case(nn.Conv2d(4, 4, 3), torch.ones(1, 4, 8, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        assert single(torch.ones(1, 4, 8, 8)).dtype == torch.bfloat16
    assert {p.dtype for p in single.parameters()} == {torch.float32}


def test_building_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    KIND.build(ConvSpec(4, 4, (3, 3)), parse_settings("cross", {}))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("kernel", "reason"), [((7, 4), "no centre"), ((1, 3), "asymmetric already"), ((7, 7), None)])
def test_refuses_what_has_no_centre(kernel: tuple[int, int], reason: str | None) -> None:
    told = KIND.unsupported(ConvSpec(4, 4, kernel))
    assert told is None if reason is None else reason in str(told)


@pytest.mark.parametrize(
    ("wish", "text"),
    [({"rank": 4}, "unknown key 'rank'"), ({"correlation": 1.0}, "correlation: Input should be less than 1")],
)
def test_settings_out_of_range(wish: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_settings("cross", wish)
