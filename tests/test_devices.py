"""Devices: what is computed elsewhere is what the processor computes, and nothing of the two meets by mistake."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap import replacements
from asymswap.api.session import Session
from asymswap.errors import AsymswapError, RecipeError
from asymswap.measure.timing import Timing
from asymswap.utils.tensors import device_of, find_device
from tests.helpers.other_device import PretendedCuda, pretended_cuda


@pytest.fixture
def cuda() -> Iterator[PretendedCuda]:
    with pretended_cuda() as device:
        yield device


class Denoiser(nn.Module):
    """Images to images, and by a branch on its input's values no graph of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.mix = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu()).relu()
        return x - self.last(self.mix(y)) if x.mean() > -100 else x


def seeded(build: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


SETTINGS = dict.fromkeys(("separable", "low-rank"), ", ratio = 0.5") | {"cross": ", allow_growth = true"}
CLASSIFIED = asymswap.Calibration("digits", images=64, polish_steps=3)


def test_convert_on_a_device_is_convert_on_the_processor():
    expected = asymswap.convert(
        asymswap.open_model("digits-resnet", device="cpu"), "half-macs", calibration=CLASSIFIED, evaluate="digits"
    )
    with pretended_cuda() as cuda:
        opened = asymswap.open_model("digits-resnet", device="cuda")
        found = asymswap.convert(opened, "half-macs", calibration=CLASSIFIED, evaluate="digits")
        assert cuda.calls > 1000
        assert device_of(opened.model).type == device_of(found.model).type == "cpu"
    assert found.plan == expected.plan
    assert_same(found.model, expected.model)
    assert found.report.accuracy == expected.report.accuracy
    assert found.report.agreement == expected.report.agreement
    assert any("computed on cuda:0" in note for note in found.report.calibration.notes)


def test_a_network_without_a_graph_is_solved_there_too(cuda):
    calibration = asymswap.Calibration(torch.randn(96, 1, 12, 12), polish_steps=2)
    found = asymswap.convert(seeded(Denoiser), "half-macs", macs=0.6, calibration=calibration, input_size=(1, 12, 12))
    calls, cuda.calls = cuda.calls, 0
    opened = asymswap.open_model(seeded(Denoiser), device="cpu")
    expected = asymswap.convert(opened, "half-macs", macs=0.6, calibration=calibration, input_size=(1, 12, 12))
    assert calls > 1000
    assert cuda.calls == 0
    assert_same(found.model, expected.model)


def test_a_module_on_the_device_stays_there(cuda):
    model = seeded(Denoiser).to("cuda")
    found = asymswap.convert(model, "3x3-only", input_size=(1, 12, 12), overrides={"ratio": 0.5})
    assert device_of(found.model) == device_of(model) == torch.device("cuda", 0)
    assert found.model(torch.randn(1, 1, 12, 12, device="cuda")).shape == (1, 1, 12, 12)


@pytest.mark.parametrize("kind", replacements.names())
def test_every_kind_is_made_there(cuda, kind, tmp_path):
    rule = f'kind = "{kind}"{SETTINGS.get(kind, "")}'
    recipe = tmp_path / "recipe.toml"
    names = '["mix"]' if kind == "low-rank" else '["second"]'
    recipe.write_text(f"[[rules]]\nmatch = {{ names = {names} }}\nswap = {{ {rule} }}\n")
    expected = asymswap.convert(asymswap.open_model(seeded(Denoiser), device="cpu"), recipe, input_size=(1, 12, 12))
    cuda.calls = 0
    found = asymswap.convert(seeded(Denoiser).to("cuda"), recipe, input_size=(1, 12, 12))
    assert found.report.swapped
    assert cuda.calls > 10
    assert_same(found.model, expected.model)


def test_sweep_by_a_drop_and_evaluate(cuda):
    calibration = asymswap.Calibration("digits", images=64)
    swept = asymswap.sweep("digits-resnet", ["half-macs"], "digits", budgets=[0.5], calibration=calibration)
    kept = asymswap.convert("digits-resnet", "half-macs", max_drop=20, calibration=calibration)
    found = asymswap.evaluate(["digits-resnet", kept], "digits")
    compared = asymswap.compare(["digits-resnet", kept], data=calibration, against_original=True)
    assert swept.points[0].failed is None
    assert found.device == "cuda:0"
    assert cuda.calls > 1000
    assert compared.models[1].scores


def test_a_metric_of_the_users_gets_the_model_where_it_was(cuda):
    def metric(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(torch.zeros(1, 1, 8, 8)).sum())  # on the processor

    calibration = asymswap.Calibration("digits", images=32)
    converted = asymswap.convert("digits-resnet", "half-macs", calibration=calibration, evaluate=metric)
    assert converted.report.accuracy.scores
    assert asymswap.evaluate(["digits-resnet", converted], metric).models[1].scores
    asked = asymswap.open_model("digits-resnet", device="cuda")
    with pytest.raises(AsymswapError, match="same device"):
        asymswap.evaluate([asked], metric)


def test_time_on_a_device(cuda):
    opened = asymswap.open_model("digits-resnet", device="cuda")
    found = asymswap.benchmark([opened], memory_formats=["contiguous"], rounds=5, precision="bf16")
    assert found.settings[0].device == "cuda:0"
    assert found.dtype == "bfloat16"
    assert found.results[0].seconds is not None, found.results[0].failure
    converted = asymswap.convert(opened, "3x3-only", time=True, timing=Timing(rounds=5))
    assert converted.report.latency.device == "cuda:0"
    by_runtime = {row.runtime: row for row in converted.report.latency.times}
    assert by_runtime["torch"].after is not None


def test_ranks_suit_tensor_cores():
    assert Timing(device="cuda:0", precision="fp16").multiple == 8
    assert Timing(device="cuda:0").multiple is None
    assert Timing(precision="bf16").multiple is None


def test_a_sweep_rounds_ranks_as_a_conversion_does(monkeypatch):
    asked = []

    def refused(_, requested, *args, **kwargs):
        asked.append([way.settings.multiple for rule in requested.rules for way in rule.ways])
        raise RecipeError("seen")

    monkeypatch.setattr(Timing, "multiple", 4)
    monkeypatch.setattr(Session, "plan", refused)
    with pytest.raises(RecipeError, match="seen"):
        asymswap.convert("digits-resnet", "half-macs", latency=0.9)
    swept = asymswap.sweep("digits-resnet", ["half-macs"], data="digits", budgets=[0.9], measure="latency")
    assert swept.points[0].failed == "seen"
    assert asked[0]
    assert set(asked[0]) == {4}
    assert asked == [asked[0]] * 2


@pytest.mark.parametrize("name", ["cuda:3", "gpu", "meta", "cpu:1x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(AsymswapError, match=rf"`device={name}` is not there; this machine has cpu"):
        asymswap.open_model("digits-resnet", device=name)


def test_devices_that_are_there(cuda):
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(AsymswapError, match="this machine has cpu, cuda"):
        find_device("cuda:1")
