from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asymswap.errors import AsymswapError
from asymswap.measure.fidelity import Sums, compare_outputs, measure_fidelity
from asymswap.planning.apply import apply_plan
from asymswap.types import Plan, Preprocessing, Swap
from asymswap.utils.inputs import probe


def swap_of(name: str, rank: int) -> Swap:
    return Swap(name, "separable", {"rank": rank, "order": "vertical-first"})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu_(self.one(x))  # in place: what a hook saw must not be what the next layer made of it
        return {"y": y, "z": self.two(y)}


@pytest.mark.parametrize("portion", [1, 2, 5])
def test_errors_are_those_computed_by_hand(portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asymswap.utils.inputs.PORTION", portion * 3 * 8 * 8)
    model = Net().train()
    plan = Plan((swap_of("one", 4), swap_of("two", 5)))
    converted = apply_plan(model, plan)
    inputs = (torch.randn(5, 3, 8, 8),)
    batches: list[int] = []
    with model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0]))):
        fidelity = measure_fidelity(model, converted, plan, inputs)
    assert batches == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[portion]
    with torch.no_grad():
        a = model.one(inputs[0])
        expected = float((converted.one(inputs[0]) - a).norm() / a.norm())
        y = torch.relu(a)
        local = float((converted.two(y) - model.two(y)).norm() / model.two(y).norm())
        before, after = model(inputs[0]), converted(inputs[0])
    gap = math.sqrt(sum(float((after[k] - before[k]).square().sum()) for k in before))
    whole = gap / math.sqrt(sum(float(before[k].square().sum()) for k in before))
    assert fidelity.site_outputs["one"].relative == pytest.approx(expected, rel=1e-4)
    assert fidelity.site_outputs["two"].relative == pytest.approx(local, rel=1e-4)
    assert fidelity.output.relative == pytest.approx(whole, rel=1e-4)
    assert fidelity.output.largest == pytest.approx(max(float((after[k] - before[k]).abs().max()) for k in before))
    assert model.training
    assert converted.training


def test_full_rank_moves_nothing() -> None:
    model = Net()
    plan = Plan((swap_of("one", 9), swap_of("two", 18)))
    fidelity = measure_fidelity(model, apply_plan(model, plan), plan, (torch.randn(1, 3, 8, 8),))
    assert fidelity.output.relative < 1e-5
    assert all(error < 1e-5 for error in fidelity.kernels.values())


@dataclass(frozen=True)
class Scores:
    logits: Tensor
    name: str = "scores"
    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "doubled", 2 * self.logits)


class Hidden:
    """Not one of the containers that are looked into."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any], scale: float = 1.0) -> None:
        super().__init__()
        self.wrap, self.scale = wrap, scale

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x * self.scale)


X = torch.linspace(-1, 2, 12).reshape(4, 3)


def test_tensors_within_dataclasses_are_compared() -> None:
    found = compare_outputs(Wrapped(Scores), Wrapped(Scores, 1.5), (X,))
    assert found.relative == pytest.approx(0.5)
    assert found.largest == pytest.approx(2.0)


def test_complex_outputs_are_compared_in_both_parts() -> None:
    def spectrum(x: Tensor) -> Tensor:
        return torch.fft.fft(x).conj()

    found = compare_outputs(Wrapped(spectrum), Wrapped(spectrum, 1.5), (X,))
    assert found.relative == pytest.approx(0.5)
    before, after = np.fft.fft(X.numpy()), np.fft.fft(1.5 * X.numpy())
    parts = [np.abs((after - before).real).max(), np.abs((after - before).imag).max()]
    assert found.largest == pytest.approx(max(parts), rel=1e-5)


def test_outputs_of_other_shapes_are_not_called_equal() -> None:
    column = Wrapped(lambda x: torch.ones_like(x[:, :1]))
    with pytest.raises(AsymswapError, match=r"^outputs of 4x3 cannot be compared with those of 4x1$"):
        compare_outputs(column, Wrapped(torch.ones_like), (X,))


def test_outputs_without_a_tensor_are_an_error() -> None:
    with pytest.raises(AsymswapError, match=r"^the model gives no tensor that could be compared; let its forward"):
        compare_outputs(Wrapped(Hidden), Wrapped(Hidden, 1.5), (X,))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_is_seen_wherever_it_comes(place: int) -> None:
    sums = Sums()
    for number in range(3):
        sums.add(torch.ones(2), torch.tensor([1.0, math.nan if number == place else 2.0]))
    assert math.isnan(sums.relative)
    assert math.isnan(sums.largest)


def test_the_probe_is_the_same_for_a_seed() -> None:
    pre = Preprocessing(3, (5, 7), (0.0,) * 3, (1.0,) * 3)
    state = torch.get_rng_state()
    (one,), (same,), (other,) = (probe(pre, torch.float32, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (2, 3, 5, 7)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
