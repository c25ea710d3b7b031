from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conv_cases import Case, cases
from hypothesis import given
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models, ops

import asymswap
from asymswap.graph.trace import trace
from asymswap.measure.macs import _count, count_costs, count_swapped
from asymswap.models import networks


@given(case=cases())
def test_three_ways_to_the_cost_of_a_conv(case: Case) -> None:
    """The site's formula, our counter and torch's, for every form of conv."""
    x = case.x[:1]
    ours = count_costs(case.conv, (x,)).total
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.conv(x)
    assert ours == case.site.cost
    assert counter.get_total_flops() == ours.flops


class Everything(nn.Module):
    """Transposed and functional convs, matrix products, attention, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
        self.kernel = nn.Parameter(torch.randn(6, 6, 3, 3))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.line = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.conv2d(self.up(x), self.kernel)
        tokens = y.flatten(2).mT
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.line(mixed) + self.line(tokens) @ torch.ones(5, 5, device=x.device)


def test_all_operators_are_counted_as_torch_counts_them() -> None:
    model, x = Everything().eval(), torch.randn(2, 4, 5, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta")(x.to("meta"))
    costs = count_costs(model, (x,), ["line", "up", "attention"])
    assert counter.get_total_flops() == costs.total.flops
    pixels = 9 * 9  # (5 - 1) * 2 + 3 = 11, less 2 by the functional conv
    assert costs.by_name["line"].macs == 2 * (2 * pixels * 6 * 5)
    assert costs.by_name["up"].macs == 2 * 25 * 4 * 3 * 9
    assert costs.by_name["line"].params == 35


class Deformable(nn.Module):
    """A grouped deformable conv with two groups of offsets and masks or none, between convs that torch counts."""

    def __init__(self, with_mask: bool) -> None:
        super().__init__()
        self.with_mask = with_mask
        self.predictor = nn.Conv2d(4, 2 * 3 * 6, (2, 3), stride=2)
        self.moved = ops.DeformConv2d(4, 8, (2, 3), stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.predictor(x).split([24, 12], 1)
        y: Tensor = self.moved(x, offset, mask if self.with_mask else None)
        return y


@pytest.mark.parametrize(("with_mask", "macs_per_sample"), [(False, 4), (True, 5)])
def test_deformable_convs_are_counted_with_their_samples(with_mask: bool, macs_per_sample: int) -> None:
    """Products as torch's counter counts them, once it is told that they are those of a conv; samples by hand."""

    def products(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return int(2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight))

    model, x = Deformable(with_mask).eval(), torch.randn(3, 4, 9, 8)
    formulas = {torch.ops.torchvision.deform_conv2d: products}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        y = model(x)
    assert y.shape == (3, 8, 4, 3)
    costs = count_costs(model, (x,), ["predictor", "moved"])
    samples = 3 * 4 * 3 * 4 * 6  # images, output pixels, channels, taps
    assert costs.total.flops == counter.get_total_flops() + 2 * macs_per_sample * samples
    assert costs.by_name["moved"].macs == 3 * 12 * 8 * 2 * 6 + macs_per_sample * samples
    assert costs.by_name["moved"] + costs.by_name["predictor"] == costs.total


@pytest.mark.parametrize(
    ("name", "macs"), [("resnet20", 40.6e6), ("resnet56", 125.5e6), ("resnet18", 555e6)], ids=lambda v: str(v)
)
def test_totals_of_cifar_networks_are_the_published_ones(name: str, macs: float) -> None:
    total = count_costs(networks.BUILDERS[name](), (torch.empty(1, 3, 32, 32),)).total
    assert total.macs == pytest.approx(macs, rel=2e-3)


def test_the_cost_after_a_swap_is_that_of_a_whole_run() -> None:
    """Site by site at the sizes of before, and counted on the converted network: two ways to one number."""
    model = networks.digits_resnet()
    conversion = asymswap.convert(asymswap.open_model(model, input_size=(1, 8, 8)), "3x3-only")
    image = (torch.empty(1, 1, 8, 8, device="meta"),)
    sites = trace(model, image).sites
    names = [site.name for site in sites]
    before, after = count_costs(model, image, names), count_costs(conversion.model, image, names)
    by_calls = count_swapped(before, conversion.model, sites)
    assert by_calls.total == after.total != before.total
    assert by_calls.by_name == after.by_name


class Looks(nn.Module):
    """What it does depends on the values that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)[:, :3]) if float(x.max()) > 0 else x


def test_a_model_that_looks_at_values_is_counted_with_some() -> None:
    model = Looks()
    counted = count_costs(model, (torch.empty(1, 3, 8, 8, device="meta"),), ["conv"])
    assert counted.total.macs == counted.by_name["conv"].macs == 2 * 8 * 8 * 4 * 3 * 9


# Layers, the sizes of their inputs, and the MACs by hand.
BY_HAND: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...], int]] = {
    "bilinear": (nn.Bilinear(5, 7, 3), ((4, 5), (4, 7)), 4 * 3 * 5 * 7),
    "LSTM": (nn.LSTM(6, 8, 2, bidirectional=True), ((5, 2, 6),), 4 * 2 * 10 * (8 * 6 + 8 * 8 + 8 * 16 + 8 * 8)),
    "GRU": (nn.GRU(6, 8, batch_first=True), ((2, 5, 6),), 3 * 10 * (8 * 6 + 8 * 8)),
    "RNN": (nn.RNN(6, 8), ((5, 2, 6),), 10 * (8 * 6 + 8 * 8)),
    "LSTM cell": (nn.LSTMCell(6, 8), ((2, 6),), 4 * 2 * 8 * (6 + 8)),
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True), ((2, 5, 8),) * 3, 2 * (5 * 8 * 8 * 4 + 2 * 5 * 5 * 8)),
    "encoder": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        ((2, 5, 8),),
        2 * 2 * (5 * 8 * 8 * 4 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16),
    ),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), ((1, 4, 5, 5),), 25 * 4 * 3 * 9),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), ((2, 4, 5),), 2 * 5 * 4 * 6 * 3),
    "3d": (nn.Conv3d(4, 6, 3), ((1, 4, 5, 5, 5),), 27 * 4 * 6 * 27),
}


class Inferring(nn.Module):
    """Runs a module under inference mode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *x: Tensor) -> Any:
        with torch.inference_mode():
            return self.module(*x)


@pytest.mark.parametrize("name", BY_HAND)
def test_every_layer_is_counted_by_its_formula_however_it_runs(name: str) -> None:
    """On meta tensors and with numbers, where torch has kernels for whole layers; under inference mode and not."""
    layer, sizes, macs = BY_HAND[name]
    fast = torch.backends.mha.get_fastpath_enabled()
    inputs = tuple(torch.rand(size) for size in sizes)
    for module in (layer.eval(), Inferring(layer).eval()):
        for costs in (count_costs(module, inputs), _count(module, inputs, [])):
            assert (costs.total.macs, costs.uncounted) == (macs, ())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_network_under_inference_mode_costs_what_it_costs_without() -> None:
    x = (torch.empty(1, 3, 32, 32),)
    net = models.resnet18(num_classes=10)
    costs = count_costs(Inferring(net), x, ["module.layer1.0.conv1"])
    assert costs.total.macs == count_costs(net, x).total.macs == 37_016_576
    assert costs.by_name["module.layer1.0.conv1"].macs == 8 * 8 * 64 * 64 * 9


class Unusual(nn.Module):
    """Products of vectors, weights in operators without a formula, weights that are only moved, scaled or summed."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.eye(8)), nn.Parameter(torch.ones(8))
        self.token, self.norm, self.table = nn.Parameter(torch.ones(1, 8)), nn.LayerNorm(8), nn.Embedding(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.norm(x) * self.vector.abs().softmax(0), self.token.expand(1, 8)])
        y = y + self.table(torch.zeros(1, dtype=torch.long, device=x.device)) + self.matrix.sum()
        y = torch.fft.irfft(torch.fft.rfft(y) * torch.fft.rfft(self.vector), n=8)
        return (
            torch.mv(y, self.vector) @ torch.ones(len(y), device=x.device) + torch.linalg.solve(self.matrix, y.mT).sum()
        )


def test_operators_that_read_weights_and_have_no_formula_are_named() -> None:
    costs = count_costs(Unusual(), (torch.ones(3, 8),))
    assert costs.total.macs == 4 * 8 + 4
    assert costs.uncounted == ("aten._fft_r2c", "aten._linalg_solve_ex")
    (note,) = costs.notes()
    assert note.endswith("have no formula: aten._fft_r2c, aten._linalg_solve_ex")
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), Unusual())
    listed = asymswap.candidates(asymswap.open_model(net, input_size=(3, 1, 1)))
    assert note in listed.notes
