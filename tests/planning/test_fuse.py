"""Fused models compute what they computed, and fit the architecture that they came from."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap.errors import AsymswapError
from asymswap.measure.fidelity import compare_outputs
from asymswap.models.networks import digits_resnet

EXACT = ("acb", "acb with norms", "offset", "weighted-offset", "separable", "cross")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """With batch norms that have seen something, and are not all positive."""
    torch.manual_seed(0)
    model = digits_resnet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(-0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def train_a_little_(model: nn.Module) -> None:
    """Weights, offsets and statistics somewhere else, as training leaves them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                scale = 0.1 * float(tensor.abs().mean()) + 0.02
                noise = scale * torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)


def recipe_text(swap: str) -> str:
    settings = {
        "acb": "kind = 'acb'",
        "acb with norms": "kind = 'acb', bn = 'branch'",
        "offset": "kind = 'offset', limit = 1.5",
        "weighted-offset": "kind = 'weighted-offset'",
        "separable": "kind = 'separable', rank = 9, bias = true",
        "cross": "kind = 'cross', bias = true",
        "predicted-offset": "kind = 'predicted-offset', mask = true",
    }
    return f"[[rules]]\nmatch = {{ kernel = '3x3', in_channels = {{ min = 8 }} }}\nswap = {{ {settings[swap]} }}\n"


@pytest.fixture
def converted(request: pytest.FixtureRequest, network: nn.Module, tmp_path: Path) -> asymswap.Conversion:
    (tmp_path / "recipe.toml").write_text(recipe_text(request.param))
    return asymswap.convert(
        asymswap.open_model(network, input_size=(1, 8, 8)), tmp_path / "recipe.toml", allow_drift=True
    )


@pytest.mark.parametrize("converted", EXACT, indirect=True)
def test_a_trained_model_computes_the_same_when_it_is_fused(
    converted: asymswap.Conversion, network: nn.Module, images: Tensor
) -> None:
    train_a_little_(converted.model)
    fusion = asymswap.fuse(asymswap.open_model(converted, arch=network), separable=True)
    assert {row.outcome for row in fusion.report.sites} <= {"fused", "resized"}
    assert compare_outputs(converted.model, fusion.model, (images,)).relative < 1e-5
    assert not any("Offset" in type(module).__name__ for module in fusion.model.modules())
    moved = "offset" in converted.plan.swaps[0].kind
    assert fusion.report.as_original is not moved
    if not moved:
        plain = digits_resnet()
        plain.load_state_dict(fusion.model.state_dict())
        assert compare_outputs(converted.model, plain, (images,)).relative < 1e-5


@pytest.mark.parametrize("converted", ["acb with norms"], indirect=True)
def test_batch_norms_come_back_with_the_scale_that_they_had(converted: asymswap.Conversion, network: nn.Module) -> None:
    assert converted.plan.swaps[0].absorbs is not None
    fusion = asymswap.fuse(asymswap.open_model(converted, arch=network))
    for swap in converted.plan.swaps:
        assert swap.absorbs is not None
        old, new = network.get_submodule(swap.absorbs), fusion.model.get_submodule(swap.absorbs)
        assert isinstance(old, nn.BatchNorm2d)
        assert isinstance(new, nn.BatchNorm2d)
        usual = old.weight.abs() > 0.1
        assert torch.allclose(new.weight[usual], old.weight[usual])
        assert torch.allclose(new.running_mean[usual], old.running_mean[usual], atol=1e-4)
        conv = fusion.model.get_submodule(swap.site)
        assert torch.allclose(conv.weight[usual], network.get_submodule(swap.site).weight[usual], atol=1e-5)


def test_batch_norms_of_weight_zero_come_back(network: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """As `zero_init_residual` leaves them: the last one of every block."""
    zeroed = copy.deepcopy(network)
    for name, module in zeroed.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.weight)
    (tmp_path / "recipe.toml").write_text(recipe_text("acb with norms"))
    conversion = asymswap.convert(asymswap.open_model(zeroed, input_size=(1, 8, 8)), tmp_path / "recipe.toml")
    assert "layer1.0.bn2" in {swap.absorbs for swap in conversion.plan.swaps}
    fusion = asymswap.fuse(asymswap.open_model(conversion, arch=zeroed))
    with torch.no_grad():
        assert torch.allclose(fusion.model(images), zeroed(images), atol=1e-4)


@pytest.mark.parametrize("converted", ["acb", "acb with norms", "offset"], indirect=True)
def test_trainability_and_memory_format_are_carried_over(converted: asymswap.Conversion, network: nn.Module) -> None:
    trainable = asymswap.fuse(asymswap.open_model(converted, arch=network)).model
    assert all(parameter.requires_grad for parameter in trainable.parameters())
    assert trainable.layer1[0].conv1.weight.is_contiguous()
    converted.model.requires_grad_(False).to(memory_format=torch.channels_last)
    frozen = asymswap.fuse(asymswap.open_model(converted, arch=network)).model
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert frozen.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not frozen.layer1[0].conv1.weight.is_contiguous()


@pytest.mark.parametrize("converted", ["separable"], indirect=True)
def test_what_would_cost_more_is_left_unless_it_is_asked_for(
    converted: asymswap.Conversion, network: nn.Module
) -> None:
    with pytest.raises(AsymswapError, match=r"nothing to fuse \(separable: one conv would cost more; `separable=True`"):
        asymswap.fuse(asymswap.open_model(converted, arch=network))


@pytest.mark.parametrize("converted", ["predicted-offset"], indirect=True)
def test_offsets_are_left_out_below_a_threshold_only(
    converted: asymswap.Conversion, network: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    exact = asymswap.fuse(asymswap.open_model(converted, arch=network))
    assert exact.report.as_original
    with torch.no_grad():
        for name, parameter in converted.model.named_parameters():
            if name.endswith("predictor.bias"):
                parameter.fill_(0.01)
    with pytest.raises(
        AsymswapError, match="no ordinary conv computes the same; `max_offset=…` leaves small offsets out"
    ):
        asymswap.fuse(asymswap.open_model(converted, arch=network))
    with pytest.raises(AsymswapError, match=r"it predicts offsets of up to 0\.01 pixels"):
        asymswap.fuse(asymswap.open_model(converted, arch=network), max_offset=0.005)
    loose = asymswap.fuse(asymswap.open_model(converted, arch=network), max_offset=0.02)
    assert loose.report.as_original
    assert "offsets of at most 0.01 pixels were left out" in loose.report.sites[0].reason
    assert 0 < loose.report.relative < 0.2
    told = compare_outputs(converted.model, loose.model, (images,)).relative
    assert told == pytest.approx(loose.report.relative, rel=1)


def test_a_conversion_inside_of_another_comes_first(network: nn.Module, tmp_path: Path, images: Tensor) -> None:
    (tmp_path / "1.toml").write_text(recipe_text("acb"))
    (tmp_path / "2.toml").write_text(
        "[[rules]]\nmatch = { names = '*.square.*', kernel = '3x3' }\nswap = { kind = 'separable', ratio = 0.5 }\n"
    )
    torch.save(network.state_dict(), tmp_path / "net.pt")
    one = asymswap.convert(asymswap.open_model(tmp_path / "net.pt", arch="digits-resnet"), tmp_path / "1.toml")
    asymswap.save(one, tmp_path / "one.pt")
    two = asymswap.convert(tmp_path / "one.pt", tmp_path / "2.toml")
    asymswap.save(two, tmp_path / "two.pt")
    with pytest.raises(AsymswapError, match="acb: a later conversion has changed its insides"):
        asymswap.fuse(tmp_path / "two.pt")
    fusion = asymswap.fuse(tmp_path / "two.pt", separable=True)
    assert fusion.report.as_original
    assert [row.kind for row in fusion.report.sites[:8]] == ["acb"] * 8
    plain = digits_resnet()
    plain.load_state_dict(fusion.model.state_dict())
    assert compare_outputs(two.model, plain, (images,)).relative < 1e-5


@pytest.mark.parametrize("converted", ["acb"], indirect=True)
def test_train_mode_is_refused(converted: asymswap.Conversion, network: nn.Module) -> None:
    converted.model.train()
    with pytest.raises(AsymswapError, match=r"needs the statistics of eval mode: call model\.eval\(\)"):
        asymswap.fuse(asymswap.open_model(converted, arch=network))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_of_the_weights_does_not_matter(dtype: torch.dtype, tmp_path: Path) -> None:
    """The network that is rebuilt from the header has weights of float32, whatever those of the checkpoint are."""
    conversion = asymswap.convert("digits-resnet", "acnet")
    before = asymswap.fuse(conversion).model.state_dict()
    torch.save(
        {key: value.to(dtype) if value.is_floating_point() else value for key, value in before.items()},
        tmp_path / "s.pt",
    )
    other = asymswap.convert(asymswap.open_model(tmp_path / "s.pt", arch="digits-resnet"), "acnet")
    asymswap.save(other, tmp_path / "x.pt")
    fusion = asymswap.fuse(tmp_path / "x.pt")
    assert fusion.report.as_original
    assert {row.outcome for row in fusion.report.sites} == {"fused"}
    state = torch.load(tmp_path / "s.pt", weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in fusion.model.state_dict().items())
