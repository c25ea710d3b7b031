"""Branches: without effect or with their share they compute what the conv did, learn, and fuse back to one conv."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_cases import Case, cases
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from patch_statistics import see_all
from pydantic import ValidationError
from torch import nn

import asymswap
from asymswap.errors import RecipeError
from asymswap.graph.trace import read_conv
from asymswap.measure.macs import count_costs
from asymswap.replacements import Original
from asymswap.replacements.branches import Branches, Settings

KIND = Branches()
EACH = ("vertical", "horizontal", "1x1", "5x5", "1x7", "7x1", "dilated", "identity", "1x1-kxk", "avg", "edge", "pair")
quick = settings(
    max_examples=settings.default.max_examples,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
SETTINGS = st.builds(
    lambda names, start, bn: Settings(branches=tuple(f"{name}?" for name in names), start=start, bn=bn, rank=2),
    st.lists(st.sampled_from(EACH), min_size=1, max_size=4, unique=True),
    st.sampled_from(["nothing", "share"]),
    st.sampled_from(["shared", "branch"]),
)
CASES = cases(dtype=torch.float64, sides=(1, 3, 5))


def large(case: Case) -> None:
    """Reflected and circular padding cannot be wider than the input."""
    assume(case.conv.padding_mode == "zeros" or min(case.x.shape[2:]) > 2 * 2 * 3 * 5)


def made(case: Case, wish: Settings, calibrated: bool = False, norm: nn.BatchNorm2d | None = None) -> tuple[Any, Any]:
    statistics = see_all(case).statistics if calibrated else None
    original = Original(case.conv, statistics, norm)
    try:
        option = KIND.resolve(case.site, original, wish)
    except RecipeError:
        assume(False)
    settled = Settings.model_validate(dict(option.settings))
    if norm is not None:
        settled = KIND.fold_norm(settled, norm)
    module = KIND.build(case.site.conv, settled)
    KIND.init_(module, original, settled)
    return module.eval(), settled


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm().clamp_min(1e-9)).detach())


@quick
@given(case=CASES, wish=SETTINGS, calibrated=st.booleans())
def test_it_computes_what_the_conv_did(case: Case, wish: Settings, calibrated: bool) -> None:
    large(case)
    module, _ = made(case, wish, calibrated)
    with torch.no_grad():
        assert gap(module(case.x), case.conv(case.x)) < 1e-8


@quick
@given(case=CASES, wish=SETTINGS, seed=st.integers(0, 99))
def test_with_a_batch_norm_taken_over(case: Case, wish: Settings, seed: int) -> None:
    large(case)
    assume(wish.bn == "branch")
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(case.conv.out_channels, dtype=torch.float64).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn_like(tensor))
        norm.running_var.copy_(torch.rand_like(norm.running_var) + 0.1)
    module, _ = made(case, wish, norm=norm)
    with torch.no_grad():
        assert gap(module(case.x), norm(case.conv(case.x))) < 1e-8


@quick
@given(case=CASES, wish=SETTINGS)
def test_trained_it_fuses_to_one_conv(case: Case, wish: Settings) -> None:
    large(case)
    module, settled = made(case, wish)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
        for name, tensor in module.named_buffers():
            if "running" in name:
                tensor.copy_(torch.rand_like(tensor) + 0.2)
        fused = KIND.fuse(module, case.site.conv, settled)
        assert type(fused) is nn.Conv2d
        assert gap(fused(case.x), module(case.x)) < 1e-8


@quick
@given(case=cases(sides=(1, 3, 5)), wish=SETTINGS)
def test_costs_by_formula_are_those_counted(case: Case, wish: Settings) -> None:
    large(case)
    module, settled = made(case, wish)
    assert KIND.cost(case.site, settled) == count_costs(module, (case.x[:1],)).total


@pytest.mark.parametrize("bn", ["shared", "branch"])
@pytest.mark.parametrize("name", EACH)
def test_it_starts_without_effect_but_learns(name: str, bn: str) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64), torch.randn(4, 8, 9, 9, dtype=torch.float64)
    case = Case(conv, x)
    module, _ = made(case, Settings(branches=(name,), bn=bn), calibrated=True)
    module(x).square().mean().backward()
    sizes = {}
    for child, branch in module.named_children():
        first = [p for p in branch.parameters() if p.grad is not None and float(p.grad.norm()) > 0]
        assert first, f"{child} has no gradient"
        sizes[child] = max(float(p.grad.norm()) / max(1.0, float(p.detach().norm())) for p in first)
    square = sizes.pop("square")
    # A first step in proportion: no branch outruns the conv beside it.
    assert all(0.001 * square < size < 30 * square for size in sizes.values()), (square, sizes)


def test_a_share_is_taken_from_the_conv() -> None:
    torch.manual_seed(0)
    case = Case(nn.Conv2d(6, 6, 3, padding=1), torch.randn(2, 6, 8, 8))
    module, _ = made(case, Settings(branches=("1x1", "identity", "1x1-kxk"), start="share"))
    weight = case.conv.weight.detach()
    # A quarter of the middle tap each, and of the whole kernel for the last.
    torch.testing.assert_close(getattr(module, "1x1").conv.weight[:, :, 0, 0], weight[:, :, 1, 1] / 4)
    torch.testing.assert_close(module.identity.conv.weight.flatten(), weight[:, :, 1, 1].diagonal() / 4)
    torch.testing.assert_close(getattr(module, "1x1-kxk").conv.weight, weight / 4)
    assert gap(module.square.conv.weight, weight) > 0.2


@pytest.mark.parametrize(
    ("conv", "name", "reason"),
    [
        (nn.Conv2d(4, 8, 3), "identity", "4 channels do not become 8 by an identity"),
        (nn.Conv2d(4, 4, 3), "3x3", "it is the conv itself"),
        (nn.Conv2d(4, 4, 3), "4x4", "a kernel of 4x4 has no middle"),
        (nn.Conv2d(4, 4, (1, 3)), "laplacian", "a filter of 3x3 is larger than a kernel of 1x3"),
        (nn.Conv2d(4, 4, 1), "avg", "a 1x1 kernel has no taps apart"),
    ],
)
def test_what_a_conv_cannot_have(conv: nn.Conv2d, name: str, reason: str) -> None:
    case = Case(conv, torch.randn(1, 4, 9, 9))
    with pytest.raises(RecipeError, match=reason):
        KIND.resolve(case.site, Original(conv), Settings(branches=(name,)))
    kept = KIND.resolve(case.site, Original(conv), Settings(branches=(f"{name}?", "5x5")))
    assert kept.settings["branches"] == ["5x5"]


@pytest.mark.parametrize(
    ("branches", "reason"),
    [
        (("identiy",), "did you mean identity"),
        (("1x1", "1x1"), "'1x1' is there twice"),
        (("edge", "sobel-x"), "'sobel-x' is there twice"),
        (("1x99",), "larger than 63"),
        ((), "at least 1"),
    ],
)
def test_wrong_names(branches: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Settings(branches=branches)


def test_edge_is_three_filters_also_where_it_may_be_left_out() -> None:
    case = Case(nn.Conv2d(4, 4, 3), torch.randn(1, 4, 9, 9))
    for name in ("edge", "edge?"):
        kept = KIND.resolve(case.site, Original(case.conv), Settings(branches=(name,))).settings["branches"]
        assert kept == ["sobel-x", "sobel-y", "laplacian"]


def test_an_even_kernel_has_no_middle() -> None:
    assert "no middle" in str(KIND.unsupported(read_conv(nn.Conv2d(4, 4, 2))))


def test_a_pair_beside_a_frozen_conv_is_all_that_is_trained(tmp_path: Path) -> None:
    recipe = tmp_path / "lora.toml"
    recipe.write_text(
        '[[rules]]\nmatch = { kernel = "3x3" }\nswap = { kind = "branches", branches = ["pair"], rank = 2 }\n'
    )
    conversion = asymswap.convert("digits-resnet", recipe)
    training = asymswap.Training(steps=3, train="new", workers=0)
    tuned = asymswap.finetune(conversion, "digits", training, progress=False)
    before, after = conversion.model.state_dict(), tuned.model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name]) and "running" not in name}
    changed = {name for name in changed if "num_batches" not in name}
    assert changed
    assert all(".pair." in name for name in changed)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        fused = asymswap.fuse(tuned).model.eval()
        torch.testing.assert_close(fused(x), tuned.model.eval()(x), rtol=1e-4, atol=1e-4)
    assert not any("pair" in name for name in fused.state_dict())


@pytest.mark.parametrize("recipe", ["repvgg", "dbb", "ecb", "strip"])
def test_a_network_is_converted_written_read_and_fused(
    recipe: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    original = asymswap.open_model("digits-resnet").model
    conversion = asymswap.convert("digits-resnet", recipe)
    asymswap.save(conversion, "model.pt")
    loaded = asymswap.load("model.pt").eval()
    with torch.no_grad():
        torch.testing.assert_close(conversion.model.eval()(x), original(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(loaded(x), conversion.model(x))
        done = run("fuse", "model.pt", "-o", "fused.pt", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["sites"]
        torch.testing.assert_close(asymswap.load("fused.pt").eval()(x), original(x), rtol=1e-4, atol=1e-4)
