"""Measuring by a clock that moves when the work says so: nothing here depends on the machine's speed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from asymswap.measure import latency
from asymswap.measure.latency import in_format, inputs_like, time_models


class Clock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Work(nn.Module):
    """Takes the given seconds, run by run, over and over."""

    def __init__(self, clock: Clock, *seconds: float) -> None:
        super().__init__()
        self.clock = clock
        self.seconds = itertools.cycle(seconds)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += next(self.seconds)
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", clock)
    return clock


X = (torch.zeros(1, 3, 4, 4),)


def test_modules_and_the_rest_have_minima_of_their_own(clock: Clock) -> None:
    """Slow spells fall upon different parts: no pass is quiet as a whole, but each part once is."""
    model = nn.Sequential(Work(clock, 2, 9), Work(clock, 7, 3), Work(clock, 1))
    found = time_models({"m": model}, X, ["0", "1"], rounds=4)["m"]
    assert found.modules == {"0": 2, "1": 3}
    assert found.rest == 1
    assert found.whole == 10
    assert found.sum_of_parts == 6


def test_the_median_is_that_of_the_whole_pass_without_the_warm_ups(clock: Clock) -> None:
    model = nn.Sequential(Work(clock, 90, 90, 90, 4, 8, 5))
    found = time_models({"m": model}, X, ["0"], rounds=3)["m"]
    assert (found.whole, found.median) == (4, 5)


def test_a_module_that_runs_twice_counts_twice(clock: Clock) -> None:
    work = Work(clock, 2)
    model = nn.Sequential(work, nn.Identity(), work)
    assert time_models({"m": model}, X, ["0"], rounds=2)["m"].modules == {"0": 4}


def test_models_take_turns(clock: Clock) -> None:
    order: list[str] = []

    def noted(name: str) -> nn.Module:
        module = Work(clock, 1)
        module.register_forward_hook(lambda *_: order.append(name))
        return module

    time_models({"a": noted("a"), "b": noted("b")}, X, rounds=3)
    rounds = ["".join(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert len(rounds) == 3 + latency._WARM_UPS
    # Neither always comes behind the other.
    assert set(rounds) == {"ab", "ba"}


def test_long_runs_are_cut_short(clock: Clock) -> None:
    work = Work(clock, 20)
    time_models({"m": work}, X, rounds=1000)
    assert clock.now < 100 + 20 * 20


def test_nothing_of_the_stopwatches_is_left_and_modes_come_back(clock: Clock) -> None:
    model = nn.Sequential(Work(clock, 1)).train()
    time_models({"m": model}, X, ["0"], rounds=1)
    assert model.training
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("memory_format", ["channels-last", "contiguous"])
def test_formats_and_batches(memory_format: latency.MemoryFormat) -> None:
    conv = nn.Conv2d(3, 4, 3)
    made = in_format(conv, memory_format)
    assert torch.equal(made.weight, conv.weight)
    (x,) = inputs_like((torch.empty(1, 3, 8, 6, device="meta"),), memory_format, batch=5)
    assert x.shape == (5, 3, 8, 6)
    for tensor in (made.weight, x):
        assert tensor.is_contiguous(memory_format=latency._FORMATS[memory_format])
    assert conv.weight.is_contiguous()
