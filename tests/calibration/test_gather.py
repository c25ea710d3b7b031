from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from conv_cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st
from planned import in_batches, make_plan
from safetensors.torch import save_file
from torch import Tensor, nn

from asymswap.calibration import gather as gathering
from asymswap.calibration.gather import (
    Images,
    PatchSums,
    StatisticsSummary,
    gather,
    load_statistics,
    outputs_at,
    patches_of,
    save_statistics,
)
from asymswap.calibration.sequential import refine_
from asymswap.errors import SourceError
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.trace import trace
from asymswap.measure.macs import count_costs
from asymswap.planning.apply import apply_plan
from asymswap.planning.recipe import parse_recipe
from asymswap.types import Plan, Site, Swap

RECIPE = '[[rules]]\nmatch = {}\nswap = { kind = "separable" }\n[budget]\nmacs = 0.5\nover = "matched"\n'


@given(case=cases(dtype=torch.float64), data=st.data())
def test_kernel_times_patches_is_the_output_of_every_form_of_conv(case: Case, data: st.DataObject) -> None:
    conv = case.conv
    with torch.no_grad():
        y = conv(case.x)
        flat = torch.randperm(y.shape[-2:].numel(), generator=torch.Generator().manual_seed(0))
        flat = flat[: data.draw(st.integers(1, 40))]
        at = flat // y.shape[-1], flat % y.shape[-1]
        patches = patches_of(conv, case.x, at)
        kernel = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
        got = kernel @ patches
        if conv.bias is not None:
            got = got + conv.bias.unflatten(0, (conv.groups, -1, 1))
        assert torch.allclose(got, outputs_at(y, conv.groups, at), atol=1e-10)


class Net(nn.Module):
    """Two residual blocks, one with a projected shortcut that is computed after its branch, and a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a1, self.a2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.b1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.b2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.project = nn.Conv2d(width, 2 * width, 1, stride=2)
        self.n1, self.n2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.m1, self.m2 = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.n2(self.a2(self.relu(self.n1(self.a1(x))))) + x)
        y = self.m2(self.b2(self.relu(self.m1(self.b1(x)))))
        y += self.project(x)
        return self.head(self.relu(y).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
    for _ in range(20):
        model(torch.randn(32, 3, 12, 12))
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def spatial(model: nn.Module, images: Tensor) -> list[Site]:
    return [site for site in trace(model, (images[:1],)).sites if site.conv.kernel == (3, 3)]


def test_statistics_is_the_moments_of_all_patches(
    net: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "_POSITIONS", 144)
    found = gather(net, spatial(net, images), Images(in_batches(images, 40), len(images)))["stem"]
    patches = nn.functional.unfold(images, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    assert found.patches == len(patches)
    assert torch.allclose(found.mean_GD[0], patches.mean(0), atol=1e-6)
    assert torch.allclose(found.cov_GDD[0], torch.cov(patches.T, correction=0), atol=1e-5)
    expected = (net.stem.weight.detach().double().flatten(1) @ found.mean_GD[0]) + net.stem.bias.detach()
    assert torch.allclose(found.target_mean_GO[0], expected)


def test_output_weights_are_second_moments_of_gradients(net: nn.Module, images: Tensor) -> None:
    """The expectation over the noise, class by class by autograd; a number added to all scores changes nothing."""
    few = images[:16]
    draws = [
        gather(net, spatial(net, few), Images(in_batches(few, 16), 16, seed=seed))["b2"].weight_GOO
        for seed in range(60)
    ]
    exact = torch.zeros(16, 16, dtype=torch.float64)
    kept: dict[str, Tensor] = {}
    handle = net.b2.register_forward_hook(lambda _, __, out: kept.update(y=out))
    scores = net(few.clone().requires_grad_(True))
    handle.remove()
    centred = (scores - scores.mean(1, keepdim=True)) / scores.detach().std(correction=0)
    for label in range(5):
        (g,) = torch.autograd.grad(centred[:, label].sum(), kept["y"], retain_graph=True)
        rows = g.permute(0, 2, 3, 1)
        exact += torch.einsum("nhwo,nhwp->op", rows, rows).double() / 16
    mean = torch.stack([weight[0] for weight in draws if weight is not None]).mean(0)
    assert float((mean - exact).norm() / exact.norm()) < 0.15


def test_probabilities_weigh_as_the_scores_they_are_made_from(net: nn.Module, images: Tensor) -> None:
    """They differ by the logarithm and a number added to all scores."""
    few = images[:16]

    def weight(model: nn.Module, name: str) -> Tensor:
        found = gather(model, spatial(model, few), Images(in_batches(few, 16), 16), "scores")[name].weight_GOO
        assert found is not None
        return found / found.norm()

    assert torch.allclose(weight(nn.Sequential(net, nn.Softmax(1)), "0.b2"), weight(net, "b2"), rtol=1e-4, atol=1e-7)


def test_gathering_leaves_the_model_alone(net: nn.Module, images: Tensor) -> None:
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    gather(net, spatial(net, images), Images(in_batches(images, 32), len(images)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    net.eval()


@pytest.mark.parametrize("full", [False, True])
def test_several_passes_find_what_one_finds(
    net: nn.Module, images: Tensor, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = spatial(net, images)
    one = gather(net, sites, Images(in_batches(images, 32), len(images)))
    files = []

    def no_space(*_: Any, **__: Any) -> Any:
        files.append(1)
        raise OSError(28, "No space left on device")

    if full:
        monkeypatch.setattr("tempfile.TemporaryFile", no_space)
    many = gather(net, sites, Images(in_batches(images, 32), len(images), memory_gib=1e-6))
    assert one.keys() == many.keys()
    assert len(files) == (len(one) if full else 0)
    for name in one:
        assert torch.equal(one[name].cov_GDD, many[name].cov_GDD)
        assert torch.equal(one[name].ridged(), many[name].ridged())
        assert torch.allclose(one[name].weight_GOO, many[name].weight_GOO)


def test_the_same_seed_finds_the_same_bits(net: nn.Module, images: Tensor) -> None:
    runs = [gather(net, spatial(net, images), Images(in_batches(images, 32), len(images), seed=5)) for _ in range(2)]
    for name, statistics in runs[0].items():
        assert torch.equal(statistics.cov_GDD, runs[1][name].cov_GDD)
        assert torch.equal(statistics.weight_GOO, runs[1][name].weight_GOO)


def test_activations_that_are_not_finite_name_the_first_layer(net: nn.Module, images: Tensor) -> None:
    spoilt = images.clone()
    spoilt[3, 0, 0, 0] = float("nan")
    with pytest.raises(SourceError, match="the input of stem is not finite on the calibration images"):
        gather(net, spatial(net, images), Images(in_batches(spoilt, 32), len(images)))


def plan_of(net: nn.Module, images: Tensor, statistics: object) -> tuple[Plan, list[Site]]:
    sites = spatial(net, images)
    total = count_costs(net, (images[:1],)).total
    return make_plan(net, sites, parse_recipe(RECIPE, "r"), total, statistics=statistics), sites  # type: ignore[arg-type]


def output_error(net: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((net(x) - other(x)).norm() / net(x).norm())


def test_calibration_beats_the_weights_and_layer_by_layer_beats_one_pass(net: nn.Module, images: Tensor) -> None:
    fresh = torch.randn(256, 3, 12, 12, generator=torch.Generator().manual_seed(9))
    statistics = gather(net, spatial(net, images), Images(in_batches(images, 32), len(images)))
    plan, sites = plan_of(net, images, statistics)
    blind = apply_plan(net, plan_of(net, images, None)[0])
    one_pass = apply_plan(net, plan, statistics=statistics)
    refined = apply_plan(net, plan, statistics=statistics)
    used = refine_(net, refined, sites, plan, statistics, Images(in_batches(images, 32), len(images)), (images[:1],))
    assert used.solved == {swap.site for swap in plan.swaps}
    assert used.by_graph
    errors = [output_error(net, model, fresh) for model in (refined, one_pass, blind)]
    assert errors == sorted(errors)


def test_refining_at_full_rank_changes_nothing_that_matters(net: nn.Module, images: Tensor) -> None:
    sites = spatial(net, images)
    statistics = gather(net, sites, Images(in_batches(images, 32), len(images)))
    settings = {"order": "vertical-first", "bias": True}
    full = Plan(
        tuple(
            Swap(s.name, "separable", {**settings, "rank": 3 * min(s.conv.in_channels, s.conv.out_channels)})
            for s in sites
        )
    )
    converted = apply_plan(net, full, statistics=statistics)
    refine_(net, converted, sites, full, statistics, Images(in_batches(images, 32), len(images)), (images[:1],))
    assert output_error(net, converted, images) < 1e-3


def test_refining_keeps_the_kernel_where_the_images_never_vary(images: Tensor) -> None:
    """The patches of a channel that is always zero say nothing about its weights: they stay as they are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)).eval()
    first, last = net[0], net[2]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        assert first.bias is not None
        first.bias[0] = -100.0
        # A kernel of rank two: the pair can be exact.
        last.weight.copy_(torch.einsum("orj,rci->ocij", torch.randn(6, 2, 3), torch.randn(2, 4, 3)))
    sites = spatial(net, images)
    statistics = gather(net, sites, Images(in_batches(images, 32), len(images)))
    plan = Plan((Swap("2", "separable", {"order": "vertical-first", "rank": 2, "bias": True}),))
    converted = apply_plan(net, plan, statistics=statistics)
    refine_(net, converted, sites, plan, statistics, Images(in_batches(images, 32), len(images)), (images[:1],))
    pair = [half.weight for half in converted.get_submodule("2").children() if isinstance(half, nn.Conv2d)]
    kernel = torch.einsum("orj,rci->ocij", pair[1][:, :, 0], pair[0][..., 0])
    assert torch.allclose(kernel, last.weight, rtol=1e-2, atol=1e-2)


def test_a_branch_is_wanted_to_make_up_for_its_shortcut(net: nn.Module, images: Tensor) -> None:
    """Spoil the stem only: the last conv of the first block must then make the sum better than it would by itself."""
    sites = spatial(net, images)
    statistics = gather(net, sites, Images(in_batches(images, 32), len(images)))
    pair = {"order": "vertical-first", "bias": True}
    plan = Plan((Swap("stem", "separable", {**pair, "rank": 2}), Swap("a2", "separable", {**pair, "rank": 20})))
    aware, unaware = (apply_plan(net, plan, statistics=statistics) for _ in range(2))
    refine_(net, aware, sites, plan, statistics, Images(in_batches(images, 32), len(images)), (images[:1],))
    alone = replace(plan, swaps=plan.swaps[:1])
    refine_(net, unaware, sites, alone, statistics, Images(in_batches(images, 32), len(images)), (images[:1],))

    def block_error(model: nn.Module) -> float:
        with torch.no_grad():
            sums = []
            for one in (net, model):
                x = torch.relu(one.stem(images))
                sums.append(one.n2(one.a2(torch.relu(one.n1(one.a1(x))))) + x)
        return float((sums[0] - sums[1]).norm() / sums[0].norm())

    assert block_error(aware) < 0.95 * block_error(unaware)


class Halved(nn.Module):
    """A shortcut beside half of a branch, which can be written in two ways."""

    def __init__(self, alpha: bool) -> None:
        super().__init__()
        self.alpha = alpha
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.add(x, self.branch(x), alpha=0.5) if self.alpha else x + 0.5 * self.branch(x)


def test_a_sum_with_a_factor_is_no_plain_sum(images: Tensor) -> None:
    found = []
    pair = {"order": "vertical-first", "bias": True}
    plan = Plan((Swap("stem", "separable", {**pair, "rank": 2}), Swap("branch", "separable", {**pair, "rank": 4})))
    for alpha in (True, False):
        torch.manual_seed(0)
        model = Halved(alpha).eval()
        sites = spatial(model, images)
        statistics = gather(model, sites, Images(in_batches(images, 32), len(images)))
        converted = apply_plan(model, plan, statistics=statistics)
        refine_(
            model,
            converted,
            sites,
            plan,
            statistics,
            Images(in_batches(images, 32), len(images)),
            (images[:1],),
        )
        found.append(converted.state_dict())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("memory", [0.0, 1.3e-3, 2e-3])
def test_walking_again_where_memory_is_short_finds_the_same(net: nn.Module, images: Tensor, memory: float) -> None:
    """In none, some and most of the layers the activations of all images fit; the model works in place, too."""
    batches = in_batches(images, 32)
    statistics = gather(net, spatial(net, images), Images(batches, len(images)))
    plan, sites = plan_of(net, images, statistics)
    found = []
    for limit in (memory, 4.0):
        converted = apply_plan(net, plan, statistics=statistics)
        refine_(net, converted, sites, plan, statistics, Images(batches, len(images), memory_gib=limit), (images[:1],))
        found.append(converted.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])


def test_activations_are_kept_where_they_fit(net: nn.Module, images: Tensor) -> None:
    passes: list[int] = []

    def batches() -> Iterator[tuple[int, tuple[Tensor]]]:
        passes.append(1)
        return in_batches(images, 32)()

    statistics = gather(net, spatial(net, images), Images(batches, len(images)))
    plan, sites = plan_of(net, images, statistics)
    needed = {}
    for limit in (4.0, 1.5e-3, 0.0):
        passes.clear()
        converted = apply_plan(net, plan, statistics=statistics)
        refine_(net, converted, sites, plan, statistics, Images(batches, len(images), memory_gib=limit), (images[:1],))
        needed[limit] = len(passes) - 1  # one is the look at the first batch
    assert needed[4.0] == 1
    assert 1 < needed[1.5e-3] < needed[0.0] == len(plan.swaps)


def test_layers_whose_activations_do_not_fit_take_fewer_images(net: nn.Module, images: Tensor) -> None:
    many = torch.cat([images, images.flip(3), images.flip(2)])
    many = many[: len(many) // 32 * 32]
    assert len(many) > 160
    loaded = 0

    def batches() -> Iterator[tuple[int, tuple[Tensor]]]:
        nonlocal loaded
        for one in in_batches(many, 32)():
            loaded += 1
            yield one

    statistics = gather(net, spatial(net, images), Images(batches, len(many)))
    plan, sites = plan_of(net, images, statistics)
    outputs, needed = [], []
    for limit in (4.0, 0.0):
        loaded, converted = 0, apply_plan(net, plan, statistics=statistics)
        refine_(net, converted, sites, plan, statistics, Images(batches, len(many), memory_gib=limit), (images[:1],))
        needed.append(loaded - 1)  # one is the look at the first batch
        with torch.no_grad():
            outputs.append(converted(images))
    assert needed == [len(many) // 32, 4 * len(plan.swaps)]
    with torch.no_grad():
        original = net.eval()(images)
    errors = [float((one - original).norm() / original.norm()) for one in outputs]
    assert errors[1] < 1.1 * errors[0]


def test_statistics_survives_a_file(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    statistics = gather(net, spatial(net, images), Images(in_batches(images, 32), len(images)))
    summary = StatisticsSummary("images", len(images), "0" * 64, 3, "1" * 64)
    save_statistics(tmp_path / "e.safetensors", statistics, summary)
    again, read = load_statistics(tmp_path / "e.safetensors")
    assert read == summary
    assert again.keys() == statistics.keys()
    for name, one in statistics.items():
        for part in ("mean_GD", "cov_GDD", "target_GOD", "target_mean_GO", "weight_GOO"):
            assert torch.equal(getattr(one, part), getattr(again[name], part))
        assert one.patches == again[name].patches


def test_a_file_that_is_no_statistics(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="cannot read the calibration cache"):
        load_statistics(tmp_path / "x")


EVIDENCE = SiteStatistics(
    mean_GD=torch.zeros(1, 3, dtype=torch.float64),
    cov_GDD=torch.eye(3, dtype=torch.float64)[None],
    target_GOD=torch.ones(1, 2, 3, dtype=torch.float64),
    target_mean_GO=torch.zeros(1, 2, dtype=torch.float64),
    weight_GOO=torch.eye(2, dtype=torch.float64)[None],
    patches=5,
)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"patches": 5 + 0j}, "conv/patches is no number of patches"),
        ({"patches": True}, "conv/patches is no number of patches"),
        ({"cov_GDD": -EVIDENCE.cov_GDD}, "conv/cov_GDD is not symmetric and positive semidefinite"),
        ({"cov_GDD": EVIDENCE.cov_GDD - 0.6}, "conv/cov_GDD is not symmetric and positive semidefinite"),
        ({"cov_GDD": EVIDENCE.cov_GDD + 0.5 * torch.eye(3).roll(1, 1)}, "conv/cov_GDD is not symmetric"),
        ({"weight_GOO": EVIDENCE.weight_GOO - 0.8}, "conv/weight_GOO is not symmetric and positive semidefinite"),
    ],
)
def test_statistics_that_no_images_can_give(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    summary = StatisticsSummary("images", 5, "0" * 64, 3, "1" * 64)
    save_statistics(tmp_path / "good", {"conv": EVIDENCE}, summary)
    assert load_statistics(tmp_path / "good")[0]["conv"].patches == 5
    save_statistics(tmp_path / "bad", {"conv": replace(EVIDENCE, **changed)}, summary)
    with pytest.raises(SourceError, match=told):
        load_statistics(tmp_path / "bad")


@pytest.mark.parametrize(("lacking", "told"), [("tensors", "not those that were written"), ("model", "model")])
def test_statistics_that_does_not_tell_what_it_is_of(tmp_path: Path, lacking: str, told: str) -> None:
    save_statistics(tmp_path / "e", {"conv": EVIDENCE}, StatisticsSummary("images", 5, "0" * 64, 3, "1" * 64))
    with safetensors.safe_open(tmp_path / "e", framework="pt") as file:
        about = json.loads(file.metadata()["asymswap-evidence"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del about[lacking]
    save_file(tensors, tmp_path / "e", metadata={"asymswap-evidence": json.dumps(about)})
    with pytest.raises(SourceError, match=told):
        load_statistics(tmp_path / "e")


@pytest.mark.parametrize("last", [1, 2])
def test_a_single_number_has_a_gradient_too(images: Tensor, last: int) -> None:
    """A network with one output, whose last batch may hold one image."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    batches = in_batches(images[: 8 + last], 8)
    weight = gather(model, spatial(model, images), Images(batches, 8 + last))["0"].weight_GOO
    assert weight is not None
    assert bool(weight.isfinite().all())
    assert bool(weight.any())


def test_half_precision_is_summed_in_more(net: nn.Module, images: Tensor) -> None:
    """Patches whose products would overflow float16 give the moments of the same numbers in float32."""
    conv = nn.Conv2d(3 * 8, 8, 1, groups=8)
    sums = {dtype: PatchSums(conv) for dtype in (torch.float16, torch.float32)}
    patches = (100 * images[:8].flatten(2)).to(torch.float16)
    for dtype, one in sums.items():
        one.add(patches.to(dtype))
    half, single = (one.moments()[1] for one in sums.values())
    assert torch.equal(half, single)
    assert bool(torch.isfinite(half).all())
