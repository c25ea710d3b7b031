"""What `offset` and `weighted-offset` share, for both; what only the latter has is in `test_weighted_offset.py`."""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conv_cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st
from patch_statistics import see_all
from torch import fx, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from asymswap import replacements
from asymswap.errors import RecipeError
from asymswap.graph.trace import read_conv
from asymswap.measure.macs import count_costs
from asymswap.replacements.offset import OffsetConv2d, Settings
from asymswap.types import Call, ConvSpec, Site

BOTH = ("offset", "weighted-offset")
LIMITS = st.sampled_from([0.3, 1.0, 1.7, 3.0])


def zero_padded(case: Case) -> Case:
    case.conv.padding_mode = "zeros"
    return case


def zero_cases(dtype: torch.dtype = torch.float32) -> st.SearchStrategy[Case]:
    return cases(dtype).map(zero_padded)


def convert(case: Case, kind_name: str, **wish: object) -> tuple[OffsetConv2d, Settings]:
    kind = replacements.load(kind_name)
    option = kind.resolve(case.site, replacements.Original(case.conv), replacements.parse_settings(kind_name, wish))
    settled = cast(Settings, replacements.parse_settings(kind_name, option.settings))
    assert settled.limit == wish.get("limit", 1.0)
    module = kind.build(case.site.conv, settled)
    kind.init_(module, replacements.Original(case.conv), settled)
    assert isinstance(module, OffsetConv2d)
    return module, settled


def moved(case: Case, kind_name: str, seed: int, **wish: object) -> tuple[OffsetConv2d, Settings]:
    """Converted, then with random offsets all over what the limit allows, and random factors."""
    module, settled = convert(case, kind_name, **wish)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.rand(module.raw_offsets.shape, generator=generator, dtype=torch.float64)
        module.raw_offsets.copy_(settled.limit * torch.atanh(1.98 * drawn - 0.99))
        if module.tap_weights is not None:
            module.tap_weights.copy_(torch.rand(module.tap_weights.shape, generator=generator) + 0.5)
    return module, settled


def deformed(case: Case, offset_T2: torch.Tensor, factor_T: torch.Tensor | None = None) -> torch.Tensor:
    """torchvision's deformable convolution, with the same offsets at every pixel."""
    conv, x = case.conv, case.x
    kernel, dilation = cast(Any, conv.kernel_size), cast(Any, conv.dilation)
    if isinstance(conv.padding, str):
        totals = [d * (k - 1) if conv.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        top, left = (total // 2 for total in totals)
        x = F.pad(x, (left, totals[1] - left, top, totals[0] - top))
        padding = (0, 0)
    else:
        padding = cast(Any, conv.padding)
    with torch.no_grad():
        size = conv(case.x).shape[-2:]
    expanded = offset_T2.to(x.dtype).reshape(1, -1, 1, 1).expand(len(x), -1, *size)
    mask = None if factor_T is None else factor_T.to(x.dtype).reshape(1, -1, 1, 1).expand(len(x), -1, *size)
    return torchvision.ops.deform_conv2d(
        x, expanded, conv.weight, conv.bias, cast(Any, conv.stride), padding, dilation, mask
    )


def simple_case(**fields: Any) -> Case:
    torch.manual_seed(1)
    return Case(nn.Conv2d(4, 6, 3, **{"padding": 1, **fields}), torch.randn(2, 4, 9, 8))


@given(case=zero_cases(), kind_name=st.sampled_from(BOTH), limit=LIMITS)
def test_conversion_changes_nothing_for_every_form_of_conv(case: Case, kind_name: str, limit: float) -> None:
    module, settled = convert(case, kind_name, limit=limit)
    with torch.no_grad():
        expected, got = case.conv(case.x), module(case.x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert cast(Any, replacements.load(kind_name)).preserves(case.site.conv, settled)
    assert not module.offsets().any()


@given(case=zero_cases(torch.float64), kind_name=st.sampled_from(BOTH), limit=LIMITS, seed=st.integers(0, 2**16))
def test_offsets_act_as_in_deform_conv2d_borders_included(case: Case, kind_name: str, limit: float, seed: int) -> None:
    module, _ = moved(case, kind_name, seed, limit=limit)
    with torch.no_grad():
        got = module(case.x)
        expected = deformed(case, module.offsets(), module.tap_weights)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@given(
    case=zero_cases(),
    kind_name=st.sampled_from(BOTH),
    limit=LIMITS,
    seed=st.integers(0, 2**16),
    axes=st.sampled_from([(1, 1), (0, 1), (1, 0), (0, 0)]),
)
def test_fuse_is_exact_and_no_larger_than_it_must_be(
    case: Case, kind_name: str, limit: float, seed: int, axes: tuple[int, int]
) -> None:
    module, settled = moved(case, kind_name, seed, limit=limit)
    with torch.no_grad():
        module.raw_offsets *= torch.tensor(axes)
    fused = replacements.load(kind_name).fuse(module, case.site.conv, settled)
    assert type(fused) is nn.Conv2d
    with torch.no_grad():
        torch.testing.assert_close(fused(case.x), module(case.x), rtol=1e-5, atol=1e-5)
    for axis, moves in enumerate(axes):
        kernel, dilation = case.site.conv.kernel[axis], case.site.conv.dilation[axis]
        if moves:
            assert cast(Any, fused.kernel_size)[axis] <= dilation * (kernel - 1) + 1 + 2 * math.ceil(limit)
        else:
            assert (cast(Any, fused.kernel_size)[axis], cast(Any, fused.dilation)[axis]) == (kernel, dilation)
    pixels = [math.prod(c) for c in (cast(Any, fused.kernel_size), module.kernel().shape[2:])]
    assert pixels[0] <= pixels[1]


@given(case=zero_cases(), kind_name=st.sampled_from(BOTH), limit=LIMITS)
def test_fuse_gives_the_original_back_where_nothing_has_moved(case: Case, kind_name: str, limit: float) -> None:
    module, settled = convert(case, kind_name, limit=limit)
    fused = replacements.load(kind_name).fuse(module, case.site.conv, settled)
    assert fused is not None
    assert read_conv(fused) == case.site.conv
    state = case.conv.state_dict()
    assert fused.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in fused.state_dict().items())


@pytest.mark.parametrize("kind_name", BOTH)
def test_fuse_keeps_a_dilation_that_whole_offsets_keep(kind_name: str) -> None:
    """Saturated, every tap has moved by exactly two pixels, one step of the dilation: apart, 5 x 5 of dilation 2."""
    case = simple_case(padding=2, dilation=2, stride=2)
    module, settled = convert(case, kind_name, limit=2)
    rows, columns = (torch.arange(9).div(3, rounding_mode="floor") - 1, torch.arange(9) % 3 - 1)
    with torch.no_grad():
        module.raw_offsets.copy_(1000.0 * torch.stack([rows, columns], 1))
    fused = replacements.load(kind_name).fuse(module, case.site.conv, settled)
    assert fused is not None
    assert (fused.kernel_size, fused.dilation, fused.padding) == ((5, 5), (2, 2), (4, 4))
    with torch.no_grad():
        torch.testing.assert_close(fused(case.x), module(case.x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("padding", "wanted"), [(1, ((1, 1), (0, 0))), (0, ((3, 3), (0, 0))), ("same", ((1, 1), "same"))]
)
def test_fuse_takes_back_no_more_padding_than_there_is(padding: int | str, wanted: tuple[Any, Any]) -> None:
    """All taps on the middle one: 1 x 1, where the padding allows it."""
    case = simple_case(padding=padding, stride=1 if padding == "same" else 2)
    module, settled = convert(case, "offset")
    with torch.no_grad():
        module.raw_offsets[:, 0] = 1000.0 * (1 - torch.arange(9).div(3, rounding_mode="floor"))
        module.raw_offsets[:, 1] = 1000.0 * (1 - torch.arange(9) % 3)
    fused = replacements.load("offset").fuse(module, case.site.conv, settled)
    assert fused is not None
    assert (fused.kernel_size, fused.padding) == wanted
    with torch.no_grad():
        torch.testing.assert_close(fused(case.x), module(case.x), rtol=1e-5, atol=1e-5)


@given(case=zero_cases(), kind_name=st.sampled_from(BOTH), limit=LIMITS, calls=st.integers(1, 3))
def test_the_cost_is_the_cost_counted_by_torch(case: Case, kind_name: str, limit: float, calls: int) -> None:
    module, settled = convert(case, kind_name, limit=limit)
    site = Site("conv", case.site.conv, (Call(case.site.calls[0].input, case.site.calls[0].output, batch=2),) * calls)
    cost = cast(Any, replacements.load(kind_name)).cost(site, settled)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for _ in range(calls):
            module(case.x)
    assert counter.get_total_flops() == cost.flops
    assert sum(p.numel() for p in module.parameters()) == cost.params
    counted = count_costs(module, (case.x,)).total
    assert (counted.macs * calls, counted.params) == (cost.macs, cost.params)
    (option,) = replacements.load(kind_name).options(site, replacements.Original(case.conv), settled)
    assert (option.cost, option.error, option.loss) == (cost, 0.0, 0.0)


@given(case=zero_cases(torch.float64), kind_name=st.sampled_from(BOTH), seed=st.integers(0, 2**16))
def test_gradients_where_no_offset_is_whole(case: Case, kind_name: str, seed: int) -> None:
    module, settled = moved(case, kind_name, seed, limit=1.7)
    with torch.no_grad():
        # Away from the kinks at -1, 0 and 1, which finite differences would step over.
        offset = module.offsets()
        offset = offset.floor() + (offset - offset.floor()).clamp(0.05, 0.65)
        module.raw_offsets.copy_(settled.limit * torch.atanh(offset / settled.limit))
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, functional_call(module, dict(zip(names, values, strict=True)), (x,)))

    inputs = (case.x[:1].clone().requires_grad_(), *(value.detach().requires_grad_() for value in values))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("kind_name", BOTH)
@pytest.mark.parametrize("fields", [{}, {"stride": 2, "dilation": 2}, {"padding": "same"}], ids=str)
def test_the_gradient_at_zero_is_the_mean_of_both_sides_and_not_zero(kind_name: str, fields: dict[str, Any]) -> None:
    """On either side the loss is linear in each offset: the oracle's difference over both is the mean exactly."""
    case = simple_case(**fields)
    case = Case(case.conv.double(), case.x.double())
    module, _ = convert(case, kind_name)
    y = module(case.x)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (y * pull).sum().backward()
    expected = torch.zeros(9, 2, dtype=torch.float64)
    for tap, axis in itertools.product(range(9), range(2)):
        step = torch.zeros(9, 2, dtype=torch.float64)
        step[tap, axis] = 1e-3
        with torch.no_grad():
            expected[tap, axis] = ((deformed(case, step) - deformed(case, -step)) * pull).sum() / 2e-3
    assert module.raw_offsets.grad is not None
    torch.testing.assert_close(module.raw_offsets.grad, expected)
    assert float(expected.abs().min()) > 1e-2


def test_training_finds_where_the_taps_should_look() -> None:
    """A smooth image, and the outputs of known offsets: from zero, the offsets alone get there."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(8, 4, 6, 6, generator=generator), (24, 24), mode="bicubic")
    case = Case(nn.Conv2d(4, 8, 3, padding=1), x)
    wanted = 1.4 * torch.rand(9, 2, generator=generator) - 0.7
    module, _ = convert(case, "offset")
    with torch.no_grad():
        target = deformed(case, wanted)
    optimiser = torch.optim.Adam([module.raw_offsets], lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        loss = F.mse_loss(module(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    torch.testing.assert_close(module.offsets().detach(), wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize("limit", [0.3, 1.0, 2.5])
def test_no_offset_passes_the_limit_and_one_at_it_can_return(limit: float) -> None:
    case = simple_case()
    module, _ = convert(case, "offset", limit=limit)
    with torch.no_grad():
        module.raw_offsets.copy_(torch.linspace(-50, 50, 18).reshape(9, 2))
    assert float(module.offsets().detach().abs().max()) == pytest.approx(limit)
    assert module.offsets().detach().abs().max() <= limit
    torch.testing.assert_close(
        module(case.x).detach(), deformed(case, module.offsets().detach()).detach(), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        module.raw_offsets.fill_(4 * limit)
    module(case.x).square().sum().backward()
    assert module.raw_offsets.grad is not None
    assert bool((module.raw_offsets.grad != 0).all())


@pytest.mark.parametrize("kind_name", BOTH)
@pytest.mark.parametrize("kernel", [(1, 3), (5, 1), (2, 4)])
def test_kernels_that_are_not_square(kernel: tuple[int, int], kind_name: str) -> None:
    torch.manual_seed(2)
    case = Case(nn.Conv2d(3, 3, kernel, padding=(0, 1), groups=3).double(), torch.randn(1, 3, 8, 7).double())
    module, settled = moved(case, kind_name, 5)
    fused = replacements.load(kind_name).fuse(module, case.site.conv, settled)
    assert fused is not None
    with torch.no_grad():
        expected = deformed(case, module.offsets(), module.tap_weights)
        torch.testing.assert_close(module(case.x), expected)
        torch.testing.assert_close(fused(case.x), expected)


@pytest.mark.parametrize("kind_name", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_rounds_once(kind_name: str, dtype: torch.dtype) -> None:
    case = simple_case(dtype=torch.float32)
    case = Case(case.conv.to(dtype), case.x.to(dtype))
    module, settled = moved(case, kind_name, 7, limit=2.5)
    assert {p.dtype for p in module.parameters()} == {dtype}
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(module.kernel().double(), exact.kernel(), rtol=eps, atol=1e-6)
        assert module(case.x).dtype == dtype
        fused = replacements.load(kind_name).fuse(module, case.site.conv, settled)
        assert fused is not None
        assert fused.weight.dtype == dtype
        torch.testing.assert_close(fused(case.x), module(case.x))
    assert module.offsets().dtype == torch.float32


@pytest.mark.parametrize("kind_name", BOTH)
def test_autocast_rounds_the_built_kernel_and_not_the_positions(kind_name: str) -> None:
    case = simple_case()
    module, _ = moved(case, kind_name, 7, limit=2.5)
    with torch.no_grad():
        plain = module.kernel()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module.kernel(), plain)
            got = module(case.x)
        expected = F.conv2d(
            case.x.bfloat16(), plain.bfloat16(), cast(torch.Tensor, module.bias).bfloat16(), padding=(4, 4)
        )
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind_name", BOTH)
def test_it_copies_pickles_compiles_exports_and_traces(kind_name: str) -> None:
    case = simple_case()
    module, _ = moved(case, kind_name, 11)
    with torch.no_grad():
        expected = module(case.x)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        others: dict[str, Any] = {
            "copied": copy.deepcopy(module),
            "pickled": torch.load(buffer, weights_only=False),
            "traced": fx.symbolic_trace(module),
            "exported": torch.export.export(module, (case.x,)).module(),
            "compiled": torch.compile(module, backend="aot_eager", fullgraph=True),
        }
        for name, other in others.items():
            torch.testing.assert_close(other(case.x), expected, msg=lambda text, name=name: f"{name}: {text}")
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(others["compiled"](case.x), module(case.x))
        x = case.x.to(memory_format=torch.channels_last)
        last = module.to(memory_format=torch.channels_last)(x)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(module(case.x[0]).detach(), expected[0])


@pytest.mark.parametrize("kind_name", BOTH)
def test_compiled_gradients_at_zero_are_the_eager_ones(kind_name: str) -> None:
    case = simple_case()
    module, _ = convert(case, kind_name)
    other = copy.deepcopy(module)
    for run in (module, torch.compile(other, backend="aot_eager", fullgraph=True)):
        run(case.x).square().sum().backward()
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind_name", BOTH)
def test_building_draws_no_random_numbers_and_names_its_state(kind_name: str) -> None:
    before = torch.get_rng_state()
    module = replacements.load(kind_name).build(
        ConvSpec(4, 4, (3, 2), bias=False), replacements.parse_settings(kind_name, {})
    )
    assert torch.equal(torch.get_rng_state(), before)
    factors = ["tap_weights"] if kind_name == "weighted-offset" else []
    assert list(module.state_dict()) == ["weight", "raw_offsets", *factors]
    assert "4->4 3x2, limit=1" in repr(module)


@pytest.mark.parametrize("kind_name", BOTH)
def test_statistics_changes_nothing(kind_name: str) -> None:
    case = simple_case(groups=2)
    module, settled = moved(case, kind_name, 1)
    replacements.load(kind_name).init_(module, replacements.Original(case.conv, see_all(case).statistics), settled)
    assert not module.offsets().any()
    assert torch.equal(module.weight, case.conv.weight)
    assert torch.equal(module.bias, case.conv.bias)


@pytest.mark.parametrize("kind_name", BOTH)
@pytest.mark.parametrize(
    ("conv", "text"),
    [
        (ConvSpec(4, 4, (1, 1)), "a 1x1 kernel has a single tap"),
        (ConvSpec(4, 4, (3, 3), padding=(1, 1), padding_mode="reflect"), "beyond the reflect padding"),
        (ConvSpec(4, 4, (3, 3), dtype="complex64"), "complex64 weights are not real floating-point numbers"),
    ],
)
def test_refuses_what_it_cannot_do(kind_name: str, conv: ConvSpec, text: str) -> None:
    assert text in str(replacements.load(kind_name).unsupported(conv))


@pytest.mark.parametrize("kind_name", BOTH)
def test_accepts_every_other_kernel(kind_name: str) -> None:
    for kernel in [(1, 2), (3, 1), (3, 3), (4, 7)]:
        assert replacements.load(kind_name).unsupported(ConvSpec(4, 4, kernel, groups=4, padding="same")) is None


@pytest.mark.parametrize("kind_name", BOTH)
@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ({"limit": 0.0}, r"limit: Input should be greater than or equal to 0.01 \(got 0.0\)"),
        ({"limit": -1}, r"limit: Input should be greater than or equal to 0.01 \(got -1\)"),
        ({"limit": 17}, r"limit: Input should be less than or equal to 16 \(got 17\)"),
        ({"limit": math.nan}, "limit: Input should be a finite number"),
        ({"limit": math.inf}, "limit: Input should be a finite number"),
        ({"limit": "1"}, "limit: Input should be a valid number"),
        ({"limits": 2.0}, "unknown key 'limits'; did you mean limit"),
    ],
)
def test_settings_out_of_range(kind_name: str, wish: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text) as raised:
        replacements.parse_settings(kind_name, wish)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind_name", BOTH)
def test_a_limit_may_be_a_whole_number_and_growth_is_allowed(kind_name: str) -> None:
    settled = cast(Settings, replacements.parse_settings(kind_name, {"limit": 2}))
    assert (settled.limit, settled.allow_growth) == (2.0, True)


def test_a_conv_with_wide_holes_is_refused() -> None:
    """Built without its holes, the 3x3 conv of DeepLab's dilation 36 would have 75x75 taps."""
    spec = read_conv(nn.Conv2d(4, 4, 3, dilation=36, padding=36))
    assert replacements.load("offset").unsupported(spec) == (
        "its taps span 73 pixels, and one ordinary kernel would have to hold all that is between them"
    )
    assert replacements.load("offset").unsupported(read_conv(nn.Conv2d(4, 4, 3, dilation=12))) is None
