"""Every family of kinds on networks of every build: they convert, keep what they promise, and train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap.measure.fidelity import compare_outputs
from asymswap.models.opening import open_model
from asymswap.utils.tensors import list_tensors

NETWORKS = {
    "cifar:resnet20": 32,
    "resnet18": 64,
    "resnet50": 64,
    "vgg16_bn": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 299,
    "convnext_tiny": 64,
    "efficientnet_v2_s": 64,
    "deeplabv3_resnet50": 64,
    "cifar:resnet18": 32,
    "cifar:densenet121": 32,
    "cifar:se-resnet18": 32,
}
KINDS = {
    "acb": 'kind = "acb", bn = "branch"',
    "low-rank": 'kind = "low-rank", ratio = 0.5',
    "cross": 'kind = "cross", allow_growth = true',
    "offset": 'kind = "weighted-offset", limit = 1.0',
    "predicted-offset": 'kind = "predicted-offset", mask = true',
    "separable": 'kind = "separable", ratio = 0.5',
}
THOROUGH = "cifar:resnet20"
"""The network that `make test` tries every kind on; the others are tried with the kind that most users want."""
QUICK = [(THOROUGH, kind) for kind in KINDS] + [("cifar:se-resnet18", "low-rank")]
LIKE_OTHERS = {
    *("resnet18", "resnet50", "vgg16_bn", "cifar:resnet18", "cifar:densenet121"),  # plain, residual or dense
    *(
        "inception_v3",
        "efficientnet_v2_s",
    ),  # branches as in GoogLeNet; depthwise convs as in ConvNeXt, SE as in CIFAR's
}
"""Built as others here are, and larger: nightly."""
PAIRS = [
    pytest.param(network, kind, marks=pytest.mark.slow if quick else pytest.mark.nightly)
    for network in NETWORKS
    for kind in KINDS
    if kind != "low-rank" or network not in (THOROUGH, "vgg16_bn", "convnext_tiny")  # they have no 1x1 conv
    for quick in [(network, kind) in QUICK or (kind == "separable" and network not in LIKE_OTHERS)]
]
RULE = "[[rules]]\nmatch = {{ kernel = {{ min = '3x3', max = '7x7' }} }}\nswap = {{ {} }}\n"


def rule_of(kind: str) -> str:
    rule = RULE.format(KINDS[kind])
    return rule.replace("{ min = '3x3', max = '7x7' }", "'1x1'") if kind == "low-rank" else rule


@pytest.mark.parametrize(("network", "kind"), PAIRS)
def test_it_converts_keeps_its_promise_and_trains(network: str, kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    size = NETWORKS[network]
    original = open_model(network, weights="none", input_size=(3, size, size)).model
    rule = rule_of(kind)
    if kind == "separable":
        # A depthwise 3x3 conv is of rank 3: half of its cost is out of reach. Wide kernels take long to factorise.
        rule = rule.replace("match = {", "match = { groups = 'dense', in_channels = { max = 128 },")
    (tmp_path / "r.toml").write_text(rule)
    # A promise that is not kept would be an error here.
    conversion = asymswap.convert(asymswap.open_model(original, input_size=(3, size, size)), tmp_path / "r.toml")
    model, report = conversion.model, conversion.report
    assert report.swapped
    assert report.after == sum((row.after for row in report.sites), start=report.rest)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    if all(row.exact for row in report.swapped):
        assert compare_outputs(original, model, (x,)).relative < 1e-4
    touched = {name for swap in conversion.plan.swaps for name in (swap.site, swap.absorbs) if name is not None}
    kept = {key for key in original.state_dict() if not any(key.startswith(f"{name}.") for name in touched)}
    assert kept <= model.state_dict().keys()
    check_training(original, model, x, [swap.site for swap in conversion.plan.swaps])


def check_training(original: nn.Module, model: nn.Module, x: Tensor, sites: list[str]) -> None:
    """Outputs of the same type as before, and a gradient for every parameter that was put in."""
    one, other = original.train()(x.clone()), model.train()(x.clone())
    assert type(one) is type(other)
    assert [tuple(a.shape) for a in list_tensors(one)] == [tuple(b.shape) for b in list_tensors(other)]
    torch.stack([out.float().square().mean() for out in list_tensors(other)]).sum().backward()
    for site in sites:
        for name, parameter in model.get_submodule(site).named_parameters():
            assert parameter.grad is not None, f"{site}.{name}"
            assert bool(torch.isfinite(parameter.grad).all()), f"{site}.{name}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype(kind: str, dtype: torch.dtype, tmp_path: Any) -> None:
    (tmp_path / "r.toml").write_text(rule_of(kind))
    original = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
    )
    original = original.to(dtype).eval()
    model = asymswap.convert(asymswap.open_model(original, input_size=(4, 12, 12)), tmp_path / "r.toml").model
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {dtype}
    with torch.no_grad():
        assert model(torch.randn(2, 4, 12, 12, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_they_compile_and_run_in_channels_last(kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    (tmp_path / "r.toml").write_text(rule_of(kind))
    original = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
    ).eval()
    model = asymswap.convert(asymswap.open_model(original, input_size=(4, 12, 12)), tmp_path / "r.toml").model
    x = torch.randn(2, 4, 12, 12)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager")(x)
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(compiled, expected, atol=1e-5)
    assert torch.allclose(last, expected, atol=1e-5)
