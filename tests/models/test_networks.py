"""The small networks against published numbers, hand computations and real checkpoints."""

from __future__ import annotations

import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from asymswap.data.datasets import open_data
from asymswap.data.metrics import predict
from asymswap.models.networks import (
    BUILDERS,
    CIFAR_PREPROCESSING,
    DIGITS_PREPROCESSING,
    DIGITS_WEIGHTS,
    DenseNet,
    PadShortcut,
    SqueezeExcite,
    digits_resnet,
)
from asymswap.types import Preprocessing

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the development data ../shared/data is not here")

# He et al. 2015, table 6, gives 0.27 M, 0.46 M, 0.66 M, 0.85 M and 1.7 M; the exact numbers of the others are those of
# the public implementations for 32x32 images; squeeze-and-excitation adds 2/16 C^2 a block (Hu et al. 2018, section 4).
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet18": 11_173_962,
    "densenet121": 6_956_298,
    "se-resnet20": 269_722 + 3 * (16**2 + 32**2 + 64**2) // 8,
    "se-resnet18": 11_173_962 + 2 * (64**2 + 128**2 + 256**2 + 512**2) // 8,
}

each_builder = pytest.mark.parametrize("name", sorted(BUILDERS))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, channels: int, side: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(1, channels, side, side, device="meta"))
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameters_are_as_published(name: str, parameters: int) -> None:
    assert count(BUILDERS[name]()) == parameters


def test_densenet_of_twelve_layers_a_block_has_the_published_million_parameters() -> None:
    assert count(DenseNet((12, 12, 12), 12, stem=16, compression=1.0)) == 1_019_722


def test_densenet_parameters_add_up() -> None:
    parameters, channels = 16 * 3 * 9, 16
    for block in range(3):
        if block:
            parameters += 2 * channels + channels**2
        for _ in range(8):
            parameters += 2 * channels + 9 * 12 * channels
            channels += 12
    assert count(BUILDERS["densenet"]()) == parameters + 2 * channels + 10 * channels + 10


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 40.6), ("resnet56", 125.5), ("resnet18", 555.4)])
def test_macs_are_as_published(name: str, millions: float) -> None:
    assert macs(BUILDERS[name](), 3, 32) / 1e6 == pytest.approx(millions, abs=0.06)


@each_builder
def test_takes_other_channels_classes_and_sizes_on_the_meta_device_too(name: str) -> None:
    with torch.device("meta"):
        model = BUILDERS[name](num_classes=7, in_channels=1)
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 7)
        assert model(torch.empty(1, 1, 40, 48)).shape == (1, 7)


@each_builder
def test_traces_as_a_whole_and_leaves_its_input_alone(name: str) -> None:
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    images = torch.randn(2, 3, 32, 32)
    before = images.clone()
    with torch.no_grad():
        torch.testing.assert_close(fx.symbolic_trace(model)(images), model(images), rtol=0, atol=0)
    assert torch.equal(images, before)


@each_builder
def test_gradient_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = BUILDERS[name]()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []


def test_pad_shortcut_by_hand() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[0, 1] = torch.tensor([[0.0, 2.0], [8.0, 10.0]])
    expected[0, 2] = torch.tensor([[16.0, 18.0], [24.0, 26.0]])
    assert torch.equal(PadShortcut(2, 4, 2)(x), expected)


def test_pad_shortcut_adds_a_quarter_of_the_new_width_on_each_side() -> None:
    out = PadShortcut(16, 32, 2)(torch.ones(1, 16, 2, 2))
    assert out.flatten().tolist() == [0.0] * 8 + [1.0] * 16 + [0.0] * 8


def test_squeeze_excite_by_hand() -> None:
    layer = SqueezeExcite(2, reduction=2)
    with torch.no_grad():
        layer.fc1.weight.copy_(torch.tensor([[1.0, 0.5]]))
        layer.fc2.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.tensor([[1.0, 3.0], [-4.0, 8.0]]).view(1, 2, 1, 2)
    # Means 2 and 2 give the hidden value 3, and the weights sigmoid(3) and sigmoid(-3).
    weights = torch.tensor([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(3))]).view(1, 2, 1, 1)
    torch.testing.assert_close(layer(x), x * weights)


def test_squeeze_excite_stands_between_the_second_batch_norm_and_the_addition() -> None:
    block: Any = BUILDERS["se-resnet20"]().eval().get_submodule("layer1.0")
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        # Without weights, what the layer multiplies with is sigmoid(0) = 1/2.
        block.se.fc2.weight.zero_()
        branch = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)(x)
        torch.testing.assert_close(block(x), (x + branch / 2).relu())


@pytest.fixture(scope="module")
def cifar_test_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(SHARED / "cifar10-jpg.tar") as archive:
        members = [member for member in archive if member.name.startswith("cifar10-jpg/test/")]
        archive.extractall(folder, members, filter="data")
    return folder / "cifar10-jpg"


@needs_shared
@pytest.mark.parametrize(("file", "correct"), [("resnet20-cifar10.th", 1627), ("resnet20-cifar10-jpg.pt", 1756)])
def test_real_checkpoints_load_and_give_their_accuracy(file: str, correct: int, cifar_test_folder: Path) -> None:
    state: dict[str, Tensor] = torch.load(SHARED / file, map_location="cpu", weights_only=True)["state_dict"]
    model = BUILDERS["resnet20"]()
    model.load_state_dict({key.removeprefix("module."): tensor for key, tensor in state.items()})
    accuracy = predict(model, open_data(str(cifar_test_folder), CIFAR_PREPROCESSING, "test"))
    assert len(accuracy) == 2000
    # One image may lie on the edge between two classes on another machine.
    assert accuracy.correct == pytest.approx(correct, abs=1)


def test_digits_weights_are_small_and_good_enough_for_the_demo() -> None:
    assert DIGITS_WEIGHTS.stat().st_size < 400_000
    model = digits_resnet()
    model.load_state_dict(load_file(DIGITS_WEIGHTS))
    accuracy = predict(model, open_data("digits", DIGITS_PREPROCESSING, "test"))
    assert len(accuracy) == 360
    assert accuracy.top1 >= 0.985


def test_digits_preprocessing_is_that_of_the_training_part() -> None:
    data = open_data("digits", Preprocessing(1, (8, 8), (0.0,), (1.0,)), "train")
    pixels = torch.stack([data[index][0] for index in range(len(data))])
    assert DIGITS_PREPROCESSING.mean == (round(pixels.mean().item(), 4),)
    assert DIGITS_PREPROCESSING.std == (round(pixels.std().item(), 4),)


def test_digits_macs_are_nearly_all_in_convs_worth_converting() -> None:
    # Two stages at 8x8 and 4x4; only the stem and the classifier have nothing to separate.
    worthwhile = 64 * 4 * 24 * 24 * 9 + 16 * (24 * 48 + 3 * 48 * 48) * 9
    assert worthwhile / macs(digits_resnet(), 1, 8) > 0.99
