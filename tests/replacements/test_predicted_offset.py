from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from asymswap.errors import RecipeError
from asymswap.graph.surgery import swap, take_over_
from asymswap.graph.trace import read_conv, trace
from asymswap.measure.macs import count_costs
from asymswap.replacements import Original, load, parse_settings, predicted_offset
from asymswap.replacements.predicted_offset import PredictedOffsetConv2d
from asymswap.types import Call, ConvSpec, Site

KIND = load("predicted-offset")


def convert(conv: nn.Conv2d, **wish: object) -> tuple[PredictedOffsetConv2d, predicted_offset.Settings]:
    settled = parse_settings("predicted-offset", wish)
    assert isinstance(settled, predicted_offset.Settings)
    module = KIND.build(read_conv(conv), settled)
    KIND.init_(module, Original(conv), settled)
    return module, settled


def train_(module: PredictedOffsetConv2d, pixels: float = 1.0, seed: int = 0) -> PredictedOffsetConv2d:
    """Give the predictor weights that move the taps by about so many pixels, and by other ones at every pixel."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight, bias = module.predictor.weight, module.predictor.bias
        assert bias is not None
        scale = pixels / math.sqrt(weight[0].numel())
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * scale)
        bias.copy_(torch.randn(bias.shape, generator=generator, dtype=torch.float64) * pixels)
    return module


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def wishes(draw: st.DrawFn, case: Case) -> dict[str, object]:
    groups = draw(st.sampled_from(divisors(case.conv.in_channels)))
    return {"mask": draw(st.booleans()), "offset_groups": groups}


def by_grid_sample(module: PredictedOffsetConv2d, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The definition of Dai et al., equation 2, tap by tap, with torch's own sampler: (N, C, T, H, W) samples first.

    Like deform_conv2d, `grid_sample` reads zeros beyond the input, and fades into them over the last pixel.
    """
    kernel, taps, groups = conv.kernel_size, math.prod(conv.kernel_size), module.offset_groups
    predicted = module.predictor(x)
    offset = predicted[:, : 2 * groups * taps].unflatten(1, (groups, taps, 2))
    mask = 2 * predicted[:, 2 * groups * taps :].sigmoid().unflatten(1, (groups, taps)) if module.mask else None
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    rows, columns = padded.shape[2:]
    height, width = predicted.shape[2:]
    down = torch.arange(height, dtype=x.dtype)[:, None] * conv.stride[0]
    right = torch.arange(width, dtype=x.dtype)[None, :] * conv.stride[1]
    samples = []
    for group, channels in enumerate(padded.chunk(groups, 1)):
        for tap in range(taps):
            y = down + tap // kernel[1] * conv.dilation[0] + offset[:, group, tap, 0]
            z = right + tap % kernel[1] * conv.dilation[1] + offset[:, group, tap, 1]
            grid = torch.stack([2 * z / (columns - 1) - 1, 2 * y / (rows - 1) - 1], -1)
            sample = F.grid_sample(channels, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
            samples.append(sample if mask is None else sample * mask[:, group, tap, None])
    by_group = [torch.stack(samples[group * taps : (group + 1) * taps], 2) for group in range(groups)]
    patches = torch.cat(by_group, 1).unflatten(1, (conv.groups, -1))
    weight = conv.weight.flatten(2).unflatten(0, (conv.groups, -1))
    out = torch.einsum("ngcthw,goct->ngohw", patches, weight).flatten(1, 2)
    return out if conv.bias is None else out + conv.bias[:, None, None]


@given(case=cases(), data=st.data())
def test_the_function_of_every_form_of_conv_is_preserved(case: Case, data: st.DataObject) -> None:
    module, settled = convert(case.conv, **data.draw(wishes(case)))
    assert KIND.unsupported(case.site.conv) is None
    assert KIND.preserves(case.site.conv, settled)
    channels = (3 if module.mask else 2) * module.offset_groups * math.prod(case.conv.kernel_size)
    alike = replace(case.site.conv, out_channels=channels, groups=1, bias=True)
    assert read_conv(module.predictor) == alike
    with torch.no_grad():
        expected, got = case.conv(case.x), module(case.x)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert relative(got, expected) < 1e-5


@given(case=cases(dtype=torch.float64), data=st.data(), pixels=st.sampled_from([0.3, 2.0, 20.0]))
def test_moved_taps_read_what_grid_sample_reads(case: Case, data: st.DataObject, pixels: float) -> None:
    """20 pixels are more than the images have: most samples are zero then, and those at the rim count."""
    module, _ = convert(case.conv, **data.draw(wishes(case)))
    train_(module, pixels, seed=data.draw(st.integers(0, 2**16)))
    with torch.no_grad():
        expected, got = by_grid_sample(module, case.conv, case.x), module(case.x)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < 1e-9 * (1 + float(expected.abs().max()))


def test_offsets_are_pixels_down_then_right() -> None:
    """The same offset at every tap moves the whole image, by whole pixels without any interpolation."""
    conv = nn.Conv2d(2, 3, 3, padding=1)
    module, _ = convert(conv)
    with torch.no_grad():
        module.predictor.bias.copy_(torch.tensor([2.0, -1.0]).repeat(9))
        x = torch.randn(1, 2, 8, 9, generator=torch.Generator().manual_seed(0))
        assert torch.equal(module.predict_offsets(x)[0, :, 3, 4], torch.tensor([2.0, -1.0]).repeat(9))
        assert torch.allclose(module(x)[..., 1:5, 2:8], conv(x)[..., 3:7, 1:7], atol=1e-6)


@pytest.mark.parametrize("mask", [False, True])
def test_predicted_offsets_leave_the_masks_out(mask: bool) -> None:
    module, _ = convert(nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), mask=mask, offset_groups=2)
    train_(module)
    x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        offsets = module.predict_offsets(x)
        assert torch.equal(offsets, module.predictor(x)[:, : 2 * 2 * 6])
        assert offsets.shape[2:] == module(x).shape[2:]


FORMS: Sequence[dict[str, Any]] = (
    {"padding": 1},
    {"padding": "same", "dilation": 2, "groups": 2, "padding_mode": "reflect"},
    {"stride": 2, "padding": 1, "bias": False},
)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_of_input_weights_and_predictor(form: dict[str, Any], mask: bool) -> None:
    torch.manual_seed(0)
    module, _ = convert(nn.Conv2d(2, 4, (2, 3), dtype=torch.float64, **form), mask=mask, offset_groups=2)
    train_(module)
    names, values = zip(*module.named_parameters(), strict=True)
    assert {"weight", "predictor.weight", "predictor.bias"} <= set(names)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return result

    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=False)


@pytest.mark.parametrize("mask", [False, True])
def test_the_predictor_learns_from_the_first_step(mask: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1)
    module, settled = convert(conv, mask=mask)
    x = torch.randn(2, 3, 8, 8)
    module(x).square().sum().backward()
    gradient = module.predictor.weight.grad
    assert gradient is not None
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    conv(x).square().sum().backward()
    assert relative(module.weight.grad, conv.weight.grad) < 1e-5
    torch.optim.SGD(module.parameters(), 1e-3).step()
    assert float(module.predict_offsets(x).detach().abs().max()) > 0
    assert KIND.fuse(module, read_conv(conv), settled) is None


@given(case=cases(), data=st.data())
def test_an_untrained_replacement_fuses_into_the_conv_it_came_from(case: Case, data: st.DataObject) -> None:
    module, settled = convert(case.conv, **data.draw(wishes(case)))
    fused = KIND.fuse(module, case.site.conv, settled)
    assert fused is not None
    assert type(fused) is nn.Conv2d
    assert read_conv(fused) == case.site.conv
    assert all(torch.equal(one, other) for one, other in zip(fused.parameters(), case.conv.parameters(), strict=True))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_predictor_with_one_number_in_it_does_not_fuse(name: str) -> None:
    conv = nn.Conv2d(2, 2, 3)
    module, settled = convert(conv, mask=True)
    with torch.no_grad():
        getattr(module.predictor, name).view(-1)[-1] = 1e-30
    assert KIND.fuse(module, read_conv(conv), settled) is None


def only_products(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """What `FlopCounterMode` says of an ordinary conv with these shapes."""
    return int(2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight))


@given(case=cases(), data=st.data())
def test_offered_cost_is_the_cost_counted_by_us_and_by_torch(case: Case, data: st.DataObject) -> None:
    module, settled = convert(case.conv, **data.draw(wishes(case)))
    option = KIND.resolve(case.site, Original(case.conv), settled)
    assert [option] == KIND.options(case.site, Original(case.conv), settled)
    assert option.cost == KIND.cost(case.site, settled) == count_costs(module, (case.x[:1],)).total
    assert option.cost.params == sum(parameter.numel() for parameter in module.parameters())
    formulas = {torch.ops.torchvision.deform_conv2d: only_products}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        y = module(case.x[:1])
    samples = case.conv.in_channels * math.prod(case.conv.kernel_size) * math.prod(y.shape[2:])
    sampling = samples * (5 if settled.mask else 4)
    assert counter.get_total_flops() == 2 * (option.cost.macs - sampling)


def test_cost_is_that_of_all_calls() -> None:
    spec = ConvSpec(4, 8, (3, 3), padding=(1, 1))
    wish = predicted_offset.Settings(mask=True)
    one, other = Call((8, 8), (8, 8)), Call((4, 6), (4, 6), batch=5)
    costs = [KIND.cost(Site("c", spec, calls), wish) for calls in ((one,), (other,), (one, other))]
    assert costs[2].macs == costs[0].macs + costs[1].macs
    # 27 predicted channels and 8 of the output, each of 4 * 9 products, and 4 * 9 samples of 4 + 1.
    assert costs[0].macs == 64 * (27 * 36 + 8 * 36 + 36 * 5)
    assert {cost.params for cost in costs} == {27 * 36 + 27 + 8 * 36 + 8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [False, True])
def test_half_precision_weights(dtype: torch.dtype, mask: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, dtype=dtype)
    module, _ = convert(conv, mask=mask)
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert module(x).dtype == dtype
    assert relative(module(x).double(), conv.double()(x.double())) < 2 * torch.finfo(dtype).eps
    module(x).sum().backward()
    assert module.predictor.weight.grad is not None
    assert bool(module.predictor.weight.grad.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [False, True])
def test_autocast_gives_what_it_gives_of_a_conv(dtype: torch.dtype, mask: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    module, _ = convert(conv, mask=mask)
    x = torch.randn(2, 4, 8, 8)
    moved = copy.deepcopy(module)
    train_(moved)
    with torch.autocast("cpu", dtype):
        for given_x in (x, x.to(dtype)):
            assert module(given_x).dtype == conv(given_x).dtype == dtype
        assert relative(module(x).float(), conv(x).float()) < 4 * torch.finfo(dtype).eps
        # The offsets are of the low precision too: they move by at most an eps of a few pixels.
        assert relative(moved(x).float(), moved.double()(x.double()).float()) < 8 * torch.finfo(dtype).eps
        moved.float()(x).float().sum().backward()
    assert moved.predictor.weight.grad is not None


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_offset_that_is_no_number_gives_none_at_its_own_pixel_alone(value: float, mask: bool) -> None:
    """torchvision's operator alone would end the process here; infinitely far away there are zeros."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1)
    module, _ = convert(conv, mask=mask)

    def spoil(_: nn.Module, __: Any, predicted: Tensor) -> Tensor:
        predicted = predicted.clone()
        predicted[1, 5, 2, 3] = value
        return predicted

    module.predictor.register_forward_hook(spoil)
    x = torch.randn(2, 2, 7, 7)
    with torch.no_grad():
        got, expected = module(x), conv(x)
    if math.isnan(value):
        expected[1, :, 2, 3] = math.nan
    else:
        # Channel 5 is the horizontal offset of the tap (0, 2).
        expected[1, :, 2, 3] -= conv.weight.detach()[:, :, 0, 2] @ x[1, :, 1, 4]
    assert torch.allclose(got, expected, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_compiles_as_one_graph(form: dict[str, Any], backend: str) -> None:
    torch.manual_seed(0)
    module, _ = convert(nn.Conv2d(4, 6, 3, **form), mask=True)
    train_(module)
    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    x = torch.randn(2, 4, 8, 8)
    assert torch.allclose(compiled(x), module(x), atol=1e-5)
    gradients = [torch.autograd.grad(run(x).square().sum(), list(module.parameters())) for run in (compiled, module)]
    for one, other in zip(*gradients, strict=True):
        assert relative(one, other) < 1e-5


def test_memory_format_is_the_convs() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    module, _ = convert(conv)
    x = torch.randn(2, 4, 8, 8)
    last = x.to(memory_format=torch.channels_last)
    assert module(x).stride() == conv(x).stride()
    assert module(last).stride() == conv(last).stride() != conv(x).stride()
    assert torch.allclose(module(last), module(x), atol=1e-5)
    conv.to(memory_format=torch.channels_last)
    assert take_over_(module, conv)(x).stride() == conv(x).stride()


def test_one_image_without_a_batch_and_a_batch_without_images() -> None:
    torch.manual_seed(0)
    for padding_mode in ("zeros", "reflect"):
        conv = nn.Conv2d(4, 6, 3, padding="same", padding_mode=padding_mode)
        module, _ = convert(conv, mask=True, offset_groups=2)
        train_(module)
        x = torch.randn(3, 4, 8, 8)
        assert torch.allclose(module(x[1]), module(x)[1], atol=1e-5)
        assert module.predict_offsets(x[1]).shape == (36, 8, 8)
        assert module(x[:0]).shape == conv(x[:0]).shape
        module(x[:0]).sum().backward()


def test_copies_pickles_and_state_dicts_compute_the_same() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    module, settled = convert(conv, mask=True)
    train_(module)
    loaded = KIND.build(read_conv(conv), settled)
    loaded.load_state_dict(module.state_dict())
    assert sorted(module.state_dict()) == ["bias", "predictor.bias", "predictor.weight", "weight"]
    x = torch.randn(2, 4, 8, 8)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x), module(x))


def test_building_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    KIND.build(ConvSpec(4, 4, (3, 3)), predicted_offset.Settings(mask=True))
    assert torch.equal(torch.get_rng_state(), before)


class Residual(nn.Module):
    """Two convs of which one is swapped, a batch norm, and a sum around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return y + self.norm(self.second(y))


def test_a_converted_model_is_traced_and_counted_like_any_other() -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(1, 3, 8, 8)
    module, settled = convert(model.second, mask=True)
    converted = swap(model, {"second": module})
    again = trace(converted, (x,))
    assert again.by == "torch.fx"
    sites = {site.name: site for site in again.sites}
    assert sites.keys() == {"first", "second.predictor"}
    assert sites["first"].refusal is None
    assert "is a PredictorConv2d, a subclass of Conv2d" in str(sites["second.predictor"].refusal)
    after = sites["first"].after
    assert after is not None
    assert [neighbour.op for neighbour in after] == ["relu"]
    (site,) = (site for site in trace(model, (x,)).sites if site.name == "second")
    assert count_costs(converted, (x,), ["second"]).by_name["second"] == KIND.cost(site, settled)
    train_(module)
    graph = fx.symbolic_trace(converted)
    assert torch.equal(graph(x), converted(x))
    assert torch.equal(fx.symbolic_trace(graph)(x), converted(x))


@pytest.mark.parametrize("dtype", ["complex64", "int8"])
def test_refuses_weights_that_are_not_real(dtype: str) -> None:
    assert KIND.unsupported(ConvSpec(4, 4, (3, 3), dtype=dtype)) == (
        f"{dtype} weights are not real floating-point numbers"
    )


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ({"offset_groups": 0}, "offset_groups: Input should be greater than or equal to 1 .got 0."),
        ({"mask": 1}, "mask: Input should be a valid boolean"),
        ({"masks": True}, "unknown key 'masks'; did you mean mask"),
    ],
)
def test_settings_out_of_range(wish: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_settings("predicted-offset", wish)


def test_offset_groups_must_divide_the_channels() -> None:
    conv = nn.Conv2d(6, 4, 3)
    site = Site("c", read_conv(conv), (Call((8, 8), (6, 6)),))
    wish = predicted_offset.Settings(offset_groups=4)
    text = "offset_groups = 4 does not divide the 6 input channels"
    asks = (lambda: KIND.resolve(site, conv, wish), lambda: KIND.options(site, conv, wish))
    for ask in (*asks, lambda: KIND.build(site.conv, wish)):
        with pytest.raises(RecipeError, match=f"^{text}"):
            ask()


def test_settled_settings_settle_to_themselves() -> None:
    conv = nn.Conv2d(6, 4, 3)
    site = Site("c", read_conv(conv), (Call((8, 8), (6, 6)),))
    wish = parse_settings("predicted-offset", {"mask": True, "offset_groups": 3})
    option = KIND.resolve(site, Original(conv), wish)
    assert (option.settings, option.error, option.loss) == ({"mask": True, "offset_groups": 3}, 0.0, 0.0)
    assert parse_settings("predicted-offset", option.settings) == wish
    assert wish.allow_growth
