"""Pairs made ready for int8 compute what they did, and lose less by it; files in int8 answer as their model does."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import asymswap
from asymswap.data.datasets import open_data
from asymswap.errors import AsymswapError
from asymswap.measure.int8 import rotate_

GROUPS = 2


def pair(groups: int) -> nn.Sequential:
    """A model of one pair, whose channels in between have ranges from 1 to 1000."""
    torch.manual_seed(0)
    first = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=groups)
    second = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=groups)
    with torch.no_grad():
        first.weight.mul_(torch.logspace(0, 3, 8)[:, None, None, None])
        first.bias.mul_(torch.logspace(0, 3, 8))
    return nn.Sequential(nn.Sequential(first, second))


def rounded(x: Tensor, steps: int, low: Tensor, high: Tensor) -> Tensor:
    step = (high - low).clamp_min(1e-12) / steps
    return low + step * ((x - low) / step).round()


def in_int8(model: nn.Sequential, x: Tensor) -> Tensor:
    """What int8 makes of it: one step for all of a tensor in between, one for each output channel of weights."""
    first, second = model[0]

    def weights(conv: nn.Conv2d) -> Tensor:
        peak = conv.weight.abs().amax((1, 2, 3), keepdim=True)
        return rounded(conv.weight, 254, -peak, peak)

    y = nn.functional.conv2d(x, weights(first), first.bias, padding=first.padding, groups=first.groups)
    y = rounded(y, 255, y.min().clamp_max(0), y.max().clamp_min(0))
    return nn.functional.conv2d(y, weights(second), second.bias, padding=second.padding, groups=second.groups)


@pytest.mark.parametrize("groups", [1, GROUPS])
def test_a_pair_computes_the_same_and_loses_less_by_int8(groups: int) -> None:
    model, x = pair(groups), torch.randn(4, 8, 12, 12)
    with torch.no_grad():
        wanted, before = model(x), in_int8(model, x)
        assert rotate_(model, ["0"]) == 1
        after = in_int8(model, x)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    # Of 255 steps for a range of 1000 the channels of range 1 had none.
    assert (after - wanted).norm() < 0.5 * (before - wanted).norm()


def test_a_channel_without_values_stays_finite() -> None:
    model = pair(1)
    with torch.no_grad():
        model[0][0].weight[0], model[0][0].bias[0] = 0.0, 0.0
        model[0][1].weight[:, 1] = 0.0
    rotate_(model, ["0"])
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_other_modules_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert rotate_(model, ["0", "1"]) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    calibration = asymswap.Calibration("digits", images=128)
    asymswap.save(asymswap.convert("digits-resnet", "half-macs", calibration=calibration), folder / "model.pt")
    return folder / "model.pt"


def test_a_file_in_int8_answers_as_its_model(converted: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    calibration = asymswap.Calibration("digits", images=128)
    model, folder = asymswap.load(converted), converted.parent
    state = {key: value.clone() for key, value in model.state_dict().items()}
    floats = asymswap.export(converted, folder / "float.onnx")
    report = asymswap.export(converted, folder / "int8.onnx", quantize="int8", calibration=calibration)
    assert report.rotated > 3
    assert report.int8.outputs[0].measure == "top-1"
    assert report.int8.outputs[0].value > 0.97
    assert "In int8. Agreement with the model" in str(report)
    assert report.files[0].bytes < 0.6 * floats.files[0].bytes
    graph = onnx.load(folder / "int8.onnx").graph
    convs = [node for node in graph.node if node.op_type == "Conv"]
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    assert convs
    assert all(made_by[name] == "DequantizeLinear" for node in convs for name in node.input[:2])
    # By another program, on images that it was not calibrated on.
    data = open_data("digits", asymswap.open_model(converted).preprocessing, "test")
    images = torch.stack([data[number][0] for number in range(64)])
    session = onnxruntime.InferenceSession(folder / "int8.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
    with torch.no_grad():
        wanted = model(images)
    assert (found - wanted).norm() < 0.2 * wanted.norm()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fuse", [True, False])
def test_export_of_a_given_module_leaves_it_as_it_is(tmp_path: Path, fuse: bool) -> None:
    pytest.importorskip("onnxruntime")
    conversion = asymswap.convert("digits-resnet", "3x3-only", overrides={"ratio": 0.5})
    before = {key: value.clone() for key, value in conversion.model.state_dict().items()}
    asymswap.export(
        conversion,
        tmp_path / "m.onnx",
        fuse=fuse,
        quantize="int8",
        calibration=asymswap.Calibration("digits", images=32),
    )
    assert all(torch.equal(value, before[key]) for key, value in conversion.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.pt2", {"quantize": "int8", "calibration": asymswap.Calibration("digits")}, "int8 is for ONNX files"),
        ("m.onnx", {"quantize": "int8"}, "goes with `calibration="),
        ("m.onnx", {"calibration": asymswap.Calibration("digits")}, "goes with `calibration="),
        ("m.onnx", {"quantize": "int4", "calibration": asymswap.Calibration("digits")}, "int4"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, options: dict, message: str) -> None:
    with pytest.raises(AsymswapError, match=message):
        asymswap.export("digits-resnet", tmp_path / name, **options)
    assert not (tmp_path / name).exists()
