from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conv_cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st
from patch_statistics import see_all
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from asymswap.errors import RecipeError
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.trace import read_conv, trace
from asymswap.replacements import Original, load, parse_settings
from asymswap.replacements.branches import BranchSum, NormSettings
from asymswap.types import ConvSpec, Neighbour, Site

KIND = load("acb")
ODD = (3, 5)
MODES = st.sampled_from(["shared", "branch"])


def convert(
    conv: nn.Conv2d, bn: str, norm: nn.BatchNorm2d | None = None, statistics: SiteStatistics | None = None
) -> tuple[BranchSum, NormSettings]:
    wanted = parse_settings("acb", {"bn": bn})
    if norm is not None:
        wanted = KIND.fold_norm(wanted, norm)
    site = Site("conv", read_conv(conv), ())
    settled = parse_settings("acb", KIND.resolve(site, Original(conv, statistics), wanted).settings)
    block = KIND.build(site.conv, settled)
    KIND.init_(block, Original(conv, statistics, norm), settled)
    return block.train(conv.training), settled


def new_norm(channels: int, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.BatchNorm2d:
    """A batch norm with random weights and statistics."""
    norm = nn.BatchNorm2d(channels, dtype=dtype, **fields)
    scramble_(norm)
    return norm


def scramble_(module: nn.Module) -> None:
    """Random numbers for all parameters and statistics."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.2, 3.0)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.7)
        else:
            tensor.fill_(7)


def smooth(case: Case, seed: int = 0) -> Case:
    """The case with many images whose pixels are alike their neighbours, with a mean: as feature maps are."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(16, *case.x.shape[1:], generator=g, dtype=case.x.dtype)
    return Case(case.conv, F.avg_pool2d(x, 3, 1, 1) * 2 + 0.3)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool(((got - expected).norm() <= tolerance * expected.norm().clamp_min(1e-3)).item())


@given(case=cases(sides=ODD), bn=MODES, calibrated=st.booleans())
def test_the_function_of_every_form_of_conv_is_preserved(case: Case, bn: str, calibrated: bool) -> None:
    block, _ = convert(case.conv.eval(), bn, statistics=see_all(case).statistics if calibrated else None)
    with torch.no_grad():
        got, expected = block(case.x), case.conv(case.x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert close(got, expected)


@given(
    case=cases(sides=ODD),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3]),
    momentum=st.sampled_from([0.1, 0.01, None]),
    calibrated=st.booleans(),
)
def test_a_batch_norm_is_taken_over_in_eval_and_in_train_mode(
    case: Case, affine: bool, eps: float, momentum: float | None, calibrated: bool
) -> None:
    norm = new_norm(case.conv.out_channels, affine=affine, eps=eps, momentum=momentum)
    block, _ = convert(case.conv, "branch", norm, see_all(case).statistics if calibrated else None)
    with torch.no_grad():
        assert close(block.eval()(case.x), norm.eval()(case.conv(case.x)))
        assert close(block.train()(case.x), norm.train()(case.conv(case.x)), 1e-4)
        own = block.square.norm
        for name, tensor in norm.state_dict().items():
            assert torch.allclose(own.state_dict()[name], tensor, atol=1e-5), name


@given(case=cases(sides=ODD))
def test_other_constants_than_the_norms_still_preserve_the_function(case: Case) -> None:
    norm = new_norm(case.conv.out_channels, eps=0.1)
    settled = parse_settings("acb", {"bn": "branch"})
    block = KIND.build(case.site.conv, settled).eval()
    KIND.init_(block, Original(case.conv, norm=norm), settled)
    with torch.no_grad():
        assert close(block(case.x), norm.eval()(case.conv(case.x)))


@given(case=cases(dtype=torch.float64, sides=ODD), bn=MODES)
def test_the_block_is_the_sum_of_three_convs_on_the_padded_input(case: Case, bn: str) -> None:
    conv = case.conv
    block, _ = convert(conv.eval(), bn)
    scramble_(block)
    if conv.padding == "same":
        border = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    else:
        border = (0, 0) if conv.padding == "valid" else conv.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(case.x, (border[1], border[1], border[0], border[0]), mode=mode)
    up, left = (d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    height, width = padded.shape[2:]
    parts = {
        "square": padded,
        "vertical": padded[..., left : width - left],
        "horizontal": padded[..., up : height - up, :],
    }
    expected = torch.zeros(())
    for name, inputs in parts.items():
        branch = block.get_submodule(name)
        y = F.conv2d(inputs, branch.conv.weight, branch.conv.bias, conv.stride, 0, conv.dilation, conv.groups)
        if bn == "branch":
            n = branch.norm
            y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-5)
        expected = expected + y
    assert close(block(case.x), expected, 1e-10)


@given(case=cases(sides=ODD), bn=MODES, with_norm=st.booleans())
def test_fuses_to_one_conv_after_any_training(case: Case, bn: str, with_norm: bool) -> None:
    norm = new_norm(case.conv.out_channels, eps=1e-3) if with_norm and bn == "branch" else None
    block, settled = convert(case.conv, bn, norm)
    scramble_(block)
    optimiser = torch.optim.SGD(block.parameters(), 0.01)
    for _ in range(2):
        optimiser.zero_grad()
        block.train()(case.x).square().mean().backward()
        optimiser.step()
    fused = KIND.fuse(block.eval(), case.site.conv, settled)
    with torch.no_grad():
        assert close(fused(case.x), block(case.x))
    spec = read_conv(fused)
    assert {**vars(spec), "bias": None} == {**vars(case.site.conv), "bias": None}
    assert spec.bias == (case.site.conv.bias or bn == "branch")


def test_fusing_what_is_untouched_gives_the_conv_back() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    block, settled = convert(conv, "shared")
    fused = KIND.fuse(block, read_conv(conv), settled)
    assert torch.equal(fused.weight, conv.weight)
    assert fused.bias is None


def step(block: BranchSum, x: Tensor, target: Tensor, rate: float = 0.1) -> dict[str, float]:
    """How far one step of SGD in train mode moves each branch."""
    before = copy.deepcopy(block)
    block.train().zero_grad()
    (block(x) - target).square().mean().backward()
    torch.optim.SGD(block.parameters(), rate).step()
    moved = {}
    for name, branch in block.named_children():
        old = before.get_submodule(name)
        pairs = zip(branch.parameters(), old.parameters(), strict=True)
        moved[name] = float(torch.stack([(new - was).detach().norm() for new, was in pairs]).norm())
    return moved


@pytest.mark.parametrize("bn", ["shared", "branch"])
@pytest.mark.parametrize("groups", [1, 8])
def test_the_first_steps_move_the_strips_as_far_as_the_square(bn: str, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
    case = smooth(Case(conv, torch.randn(2, 8, 12, 12)))
    norm = new_norm(8) if bn == "branch" else None
    block, _ = convert(conv, bn, norm, see_all(case).statistics)
    target = torch.randn(16, 8, 12, 12)
    for number in range(3):
        moved = step(block, case.x, target)
        for strip in ("vertical", "horizontal"):
            assert 0.05 < moved[strip] / moved["square"] < 3, (number, moved)
    for strip in (block.vertical, block.horizontal):
        # The strips have an effect by now, and their kernels have had a gradient.
        assert float(strip[-1].weight.detach().abs().max()) > 0
        assert float(strip.conv.weight.grad.abs().max()) > 0


def test_strips_of_zeros_behind_batch_norms_would_leap() -> None:
    """Why they are copied instead: the same first step from strips of zeros behind norms of weight one."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    case = smooth(Case(conv, torch.randn(2, 8, 12, 12)))
    block, _ = convert(conv, "branch", new_norm(8), see_all(case).statistics)
    for strip in (block.vertical, block.horizontal):
        nn.init.zeros_(strip.conv.weight)
        nn.init.ones_(strip.norm.weight)
    moved = step(block, case.x, torch.randn(16, 8, 12, 12))
    assert moved["vertical"] > 50 * moved["square"]


@given(case=cases(dtype=torch.float64, sides=ODD), with_norm=st.booleans())
def test_statistics_gives_the_strips_the_statistics_that_they_see(case: Case, with_norm: bool) -> None:
    norm = new_norm(case.conv.out_channels, torch.float64) if with_norm else None
    block, _ = convert(case.conv.eval(), "branch", norm, see_all(case).statistics)
    seen: dict[str, Tensor] = {}
    for name, branch in block.named_children():
        branch.conv.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.detach()}))
    block(case.x)
    for name in ("vertical", "horizontal") if with_norm else ("square", "vertical", "horizontal"):
        running = block.get_submodule(name).norm
        assert torch.allclose(running.running_mean, seen[name].mean((0, 2, 3)), atol=1e-8)
        assert torch.allclose(running.running_var, seen[name].var((0, 2, 3), correction=0), atol=1e-8)


@given(case=cases(sides=ODD))
def test_without_a_norm_statistics_keeps_the_train_mode_too(case: Case) -> None:
    """On the images that the statistics is of: another batch has other statistics."""
    block, _ = convert(case.conv, "branch", None, see_all(case).statistics)
    with torch.no_grad():
        assert close(block.train()(case.x), case.conv(case.x), 1e-3)


def test_without_statistics_the_norm_tells_the_scale_of_the_strips() -> None:
    """White inputs, for which the guess is right: measured on the inputs themselves."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 5, padding="valid")
    nn.init.uniform_(conv.bias, 2, 5)
    x = 1.7 * torch.randn(64, 16, 24, 24)
    norm = nn.BatchNorm2d(32, momentum=None)
    with torch.no_grad():
        norm.train()(conv(x))
        block, _ = convert(conv.eval(), "branch", norm)
        for strip, inputs in ((block.vertical, x[..., 2:-2]), (block.horizontal, x[..., 2:-2, :])):
            y = strip.conv(inputs)
            assert torch.allclose(strip.norm.running_var, y.var((0, 2, 3)), rtol=0.1)
            assert torch.allclose(strip.norm.running_mean, y.mean((0, 2, 3)), atol=0.05)


def test_a_kernel_without_a_centre_lends_its_strongest_column() -> None:
    conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    edge = torch.tensor([[-1.0, 0.0, 2.0]]).expand(3, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.stack([edge, edge.T])[:, None])
    block, _ = convert(conv, "branch", new_norm(2))
    assert block.vertical.conv.weight[:, 0, :, 0].tolist() == [[2.0, 2.0, 2.0], [-1.0, 0.0, 2.0]]
    assert block.horizontal.conv.weight[:, 0, 0].tolist() == [[-1.0, 0.0, 2.0], [2.0, 2.0, 2.0]]


def test_a_pruned_filter_stays_finite_and_pruned() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        conv.weight[1] = 0.0
    block, _ = convert(conv, "branch", new_norm(4))
    assert all(bool(torch.isfinite(t).all()) for t in block.state_dict().values())
    step(block, torch.randn(4, 3, 8, 8), torch.randn(4, 4, 8, 8))
    assert all(bool(torch.isfinite(t).all()) for t in block.state_dict().values())
    assert float(block.vertical.conv.weight[1].detach().abs().max()) == 0.0


@given(case=cases(sides=ODD), bn=MODES)
def test_offered_cost_is_the_cost_counted_by_torch(case: Case, bn: str) -> None:
    block, settled = convert(case.conv.eval(), bn)
    cost = KIND.cost(case.site, settled)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(case.x[:1])
    assert counter.get_total_flops() == cost.flops
    assert sum(p.numel() for p in block.parameters()) == cost.params
    assert [option.cost for option in KIND.options(case.site, Original(case.conv), settled)] == [cost]


@pytest.mark.parametrize("bn", ["shared", "branch"])
@pytest.mark.parametrize("padding", [0, 1])
def test_copies_pickles_and_loads(bn: str, padding: int) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=padding).eval()
    block, settled = convert(conv, bn)
    scramble_(block)
    x = torch.randn(2, 4, 8, 8)
    loaded = KIND.build(read_conv(conv), settled).eval()
    loaded.load_state_dict(block.state_dict())
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert torch.equal(other(x), block(x))


@pytest.mark.parametrize("bn", ["shared", "branch"])
@pytest.mark.parametrize("padding", [0, 1])
def test_compiles_exports_and_traces_whole(bn: str, padding: int) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=padding, dilation=2).eval()
    block, _ = convert(conv, bn)
    scramble_(block)
    x = torch.randn(2, 4, 9, 9)
    assert torch.allclose(torch.compile(block, backend="eager", fullgraph=True)(x), block(x), atol=1e-6)
    assert torch.allclose(torch.export.export(block, (x,)).module()(x), block(x), atol=1e-6)
    assert trace(nn.Sequential(block), (x,)).by == "torch.fx"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bn", ["shared", "branch"])
def test_half_precision_and_autocast_keep_their_dtype(dtype: torch.dtype, bn: str) -> None:
    conv = nn.Conv2d(4, 4, 3, dtype=dtype).eval()
    block, settled = convert(conv, bn)
    assert {t.dtype for t in block.state_dict().values() if t.is_floating_point()} == {dtype}
    with torch.no_grad():
        got = block(torch.ones(1, 4, 8, 8, dtype=dtype))
    assert got.dtype == dtype
    assert KIND.preserves(read_conv(conv), settled) == (bn == "shared")
    single, _ = convert(nn.Conv2d(4, 4, 3).eval(), bn)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert single(torch.ones(1, 4, 8, 8)).dtype == torch.bfloat16
    assert {t.dtype for t in single.parameters()} == {torch.float32}


def test_channels_last_stays() -> None:
    block, _ = convert(nn.Conv2d(4, 4, 3), "shared")
    y = block.to(memory_format=torch.channels_last)(
        torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    )
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_an_image_without_a_batch() -> None:
    conv = nn.Conv2d(4, 4, 3)
    block, _ = convert(conv, "shared")
    x = torch.randn(4, 8, 8)
    assert torch.allclose(block(x), conv(x), atol=1e-6)


@pytest.mark.parametrize("wish", [{"bn": "shared"}, {"bn": "branch"}])
def test_building_draws_no_random_numbers(wish: Mapping[str, object]) -> None:
    before = torch.get_rng_state()
    KIND.build(ConvSpec(4, 4, (3, 3)), parse_settings("acb", wish))
    assert torch.equal(torch.get_rng_state(), before)


class Readers(nn.Module):
    """Convs that a batch norm reads alone, not alone, and not at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.both, self.late, self.bare = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.n1, self.n2, self.n3 = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(self.alone(x))
        y = self.both(x)
        x = self.n2(y) + y
        x = self.n3(self.late(x).relu())
        return self.bare(x)


def test_takes_over_a_batch_norm_that_alone_reads_the_conv() -> None:
    sites = {site.name: site for site in trace(Readers(), (torch.randn(1, 3, 8, 8),)).sites}
    assert {name: site.norm_behind for name, site in sites.items()} == {
        "alone": "n1",
        "both": None,
        "late": None,
        "bare": None,
    }
    branch, shared = parse_settings("acb", {"bn": "branch"}), parse_settings("acb", {})
    assert KIND.fold_norm(branch, nn.BatchNorm2d(3)) is not None
    assert KIND.fold_norm(shared, nn.BatchNorm2d(3)) is None
    assert Site("conv", ConvSpec(3, 3, (3, 3)), ()).norm_behind is None
    behind = (Neighbour("identity", "i"), Neighbour("batch_norm", "n", direct=False))
    assert Site("conv", ConvSpec(3, 3, (3, 3)), (), after=behind).norm_behind is None


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4, track_running_stats=False), nn.SyncBatchNorm(4)]
)
def test_takes_over_batch_norms_with_statistics_only(norm: nn.Module) -> None:
    assert KIND.fold_norm(parse_settings("acb", {"bn": "branch"}), norm) is None


def test_variances_beyond_the_range_of_float16_are_undone() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 4, 3, padding=1), 600 * torch.randn(4, 4, 9, 9)
    statistics = see_all(Case(conv, x)).statistics
    half = copy.deepcopy(conv).half().eval()
    block, _ = convert(half, "branch", statistics=statistics)
    with torch.no_grad():
        assert float(conv(x).var()) > 65504  # the largest number in float16
        assert close(block(x.half()).float(), conv(x), tolerance=5e-3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in block.state_dict().values())


def test_takes_over_no_hooks() -> None:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda *_: None)
    assert KIND.fold_norm(parse_settings("acb", {"bn": "branch"}), norm) is None


def test_constants_taken_over_are_settled_and_survive() -> None:
    folded = KIND.fold_norm(parse_settings("acb", {"bn": "branch"}), nn.BatchNorm2d(4, eps=1e-3, momentum=None))
    conv = nn.Conv2d(4, 4, 3)
    settled = KIND.resolve(Site("conv", read_conv(conv), ()), Original(conv), folded).settings
    assert settled == {"bn": "branch", "eps": 1e-3, "momentum": "cumulative"}
    norm = KIND.build(read_conv(conv), parse_settings("acb", settled)).vertical.norm
    assert (norm.eps, norm.momentum) == (1e-3, None)


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ({"bn": "both"}, "bn: Input should be 'shared' or 'branch' .got 'both'."),
        ({"eps": 1e-3}, 'only bn = "branch" has batch norms to give eps to'),
        ({"bn": "branch", "momentum": 2.0}, "less than or equal to 1"),
        ({"rank": 2}, "unknown key 'rank'"),
    ],
)
def test_settings_out_of_range(wish: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_settings("acb", wish)


@pytest.mark.parametrize(("kernel", "reason"), [((4, 4), "no centre"), ((1, 3), "asymmetric already"), ((3, 3), None)])
def test_refuses_what_has_no_centre(kernel: tuple[int, int], reason: str | None) -> None:
    told = KIND.unsupported(ConvSpec(4, 4, kernel))
    assert told is None if reason is None else reason in str(told)
