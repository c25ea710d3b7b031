"""Measuring by a clock that moves when the work says so: nothing here depends on the machine's speed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asymswap.measure import latency
from asymswap.measure.latency import (
    Timed,
    Turn,
    best_of,
    in_format,
    inputs_like,
    ratio_of,
    seconds_of,
    take_turns,
    time_once,
)
from asymswap.types import Ratio


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


def time_models(models: dict[str, nn.Module], names: Sequence[str], rounds: int) -> dict[str, Timed]:
    turns = {key: Turn(partial(time_once, model, X, names)) for key, model in models.items()}
    return {key: best_of(passes) for key, passes in take_turns(turns, rounds=rounds).items()}


def test_modules_and_the_rest_have_minima_of_their_own(clock: Clock) -> None:
    """Slow spells fall upon different parts: no pass is quiet as a whole, but each part once is."""
    model = nn.Sequential(Work(clock, 2, 9), Work(clock, 7, 3), Work(clock, 1))
    found = time_models({"m": model}, ["0", "1"], rounds=4)["m"]
    assert found.modules == {"0": 2, "1": 3}
    assert found.rest == 1
    assert found.whole == 10
    assert found.rest + sum(found.modules.values()) == 6


def test_the_median_is_that_of_the_whole_pass_without_the_warm_ups(clock: Clock) -> None:
    model = nn.Sequential(Work(clock, 90, 90, 90, 4, 8, 5))
    found = time_models({"m": model}, ["0"], rounds=3)["m"]
    assert (found.whole, found.median) == (4, 5)


def test_a_module_that_runs_twice_counts_twice(clock: Clock) -> None:
    work = Work(clock, 2)
    model = nn.Sequential(work, nn.Identity(), work)
    assert time_models({"m": model}, ["0"], rounds=2)["m"].modules == {"0": 4}


def test_models_take_turns(clock: Clock) -> None:
    order: list[str] = []

    def noted(name: str) -> nn.Module:
        module = Work(clock, 1)
        module.register_forward_hook(lambda *_: order.append(name))
        return module

    time_models({"a": noted("a"), "b": noted("b")}, [], rounds=3)
    rounds = ["".join(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert len(rounds) == 3 + latency._WARM_UPS
    # Neither always comes behind the other.
    assert set(rounds) == {"ab", "ba"}


def test_long_runs_are_cut_short_after_five_rounds(clock: Clock) -> None:
    told: list[tuple[str, int, int]] = []
    turns = {"m": Turn(latency.stopwatch(lambda: Work(clock, 20)(X)))}
    found = take_turns(turns, rounds=1000, seconds=1, progress=lambda *step: told.append(step))
    assert found == {"m": [[20.0]] * 5}
    # And the progress tells how many are to be expected.
    assert told[0] == ("timing", 1, 8)
    assert told[-1] == ("timing", 8, 8)


def test_the_time_left_is_told_by_the_pace(clock: Clock) -> None:
    told: list[int] = []
    take_turns(
        {"m": Turn(latency.stopwatch(lambda: Work(clock, 2)(X)))},
        rounds=1000,
        seconds=40,
        progress=lambda _, __, total: told.append(total),
    )
    # 20 rounds of 2 s are 40 s, and the one after that is the last.
    assert set(told[:-1]) == {20}
    assert told[-1] == 21


class Counted:
    """Measures nothing, counts its calls and notes on how many threads it runs."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __call__(self) -> float:
        self.threads.append(torch.get_num_threads())
        return 1.0


def test_a_turn_of_short_passes_holds_many(clock: Clock) -> None:
    found = take_turns({"m": Turn(latency.stopwatch(lambda: Work(clock, 0.006)(X)))}, rounds=3)
    assert [len(passes) for passes in found["m"]] == [4, 4, 4]
    assert found["m"][0] == pytest.approx([0.006] * 4)


def passing(clock: Clock, counted: Counted) -> Turn:
    def measure() -> float:
        clock.now += 1
        return counted()

    return Turn(measure, threads=None)


@pytest.mark.parametrize(("threads", "pools"), [((1, 2), ("torch", "torch")), ((1, 1), ("torch", "onnx"))])
def test_where_threads_or_libraries_alternate_each_turn_begins_with_a_pass_that_does_not_count(
    clock: Clock, threads: tuple[int, int], pools: tuple[str, str]
) -> None:
    counted = Counted(), Counted()
    turns = {
        number: Turn(passing(clock, one).measure, threads[number], pools[number]) for number, one in enumerate(counted)
    }
    before = torch.get_num_threads()
    found = take_turns(turns, rounds=4)
    assert torch.get_num_threads() == before
    for number, one in enumerate(counted):
        assert found[number] == [[1.0]] * 4
        assert one.threads == [threads[number]] * 2 * (4 + latency._WARM_UPS)


def test_where_nothing_alternates_every_pass_counts(clock: Clock) -> None:
    counted = Counted()
    take_turns({"a": passing(clock, counted), "b": passing(clock, counted)}, rounds=4)
    assert len(counted.threads) == 2 * (4 + latency._WARM_UPS)


def test_threads_are_as_before_after_an_error() -> None:
    def fail() -> float:
        raise ValueError("no")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="no"):
        take_turns({"m": Turn(fail, before + 1)}, rounds=1)
    assert torch.get_num_threads() == before


class TestNumbers:
    ROUNDS = ((3.0, 2.0), (4.0, 9.0), (8.0, 5.0), (1.0, 6.0))

    def test_minimum_and_median_are_those_of_all_passes_the_spread_is_that_of_the_rounds(self) -> None:
        found = seconds_of(self.ROUNDS)
        assert (found.minimum, found.median) == (1, 4.5)
        best = np.array([2, 4, 5, 1])
        low, middle, high = np.percentile(best, (25, 50, 75))
        assert found.spread == pytest.approx((high - low) / middle)

    def test_a_single_round_spreads_over_nothing(self) -> None:
        assert seconds_of([[3.0]]).spread == 0

    def test_a_slow_spell_falls_upon_both_and_leaves_their_ratio(self) -> None:
        slow = [1, 1, 7, 30, 2, 1, 1, 1]
        first, other = [[2.0 * factor] for factor in slow], [[1.5 * factor, 400.0] for factor in slow]
        ratio = ratio_of(other, first)
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.75, 0.75, 0.75))

    @pytest.mark.parametrize(
        ("ratio", "told", "vague"),
        [
            (Ratio(0.7, 0.68, 0.72), True, False),
            (Ratio(1.3, 1.28, 1.32), True, False),
            (Ratio(0.97, 0.94, 1.01), False, False),
            (Ratio(1.01, 1.005, 1.02), False, False),
            (Ratio(0.7, 0.6, 0.8), True, True),
            (Ratio(1.1, 0.8, 1.4), False, True),
        ],
    )
    def test_what_can_be_told(self, ratio: Ratio, told: bool, vague: bool) -> None:
        assert (ratio.is_significant, ratio.is_noisy) == (told, vague)


def test_others_are_what_was_busy_without_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> None:
    stat, own = tmp_path / "stat", [5.0]
    tick = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(latency, "_STAT", stat)
    monkeypatch.setattr(latency.time, "process_time", lambda: own[0])
    stat.write_text(f"cpu  {10 * tick} 0 0 999 999 0 0 0 0 0\ncpu0 1 2\n")
    watched = latency.Bystanders()
    # In ten seconds all cores were busy for 18, six of them with us; idle time and waiting do not count.
    clock.now += 10
    own[0] += 6
    stat.write_text(f"cpu  {20 * tick} {3 * tick} {2 * tick} 7777 8888 {tick} {tick} {tick} 0 0\n")
    assert watched.cores() == pytest.approx(1.2)
    stat.unlink()
    assert latency.Bystanders().cores() is None


def test_nothing_of_the_stopwatches_is_left_and_modes_come_back(clock: Clock) -> None:
    model = nn.Sequential(Work(clock, 1)).train()
    time_models({"m": model}, ["0"], rounds=1)
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
        assert tensor.is_contiguous(memory_format=latency.FORMATS[memory_format])
    assert conv.weight.is_contiguous()


def test_batches_of_lists_and_clips() -> None:
    ((*images,),) = inputs_like(([torch.empty(3, 8, 6, device="meta")],), "channels-last", batch=4)
    assert [image.shape for image in images] == [(3, 8, 6)] * 4
    (clips,) = inputs_like((torch.empty(1, 3, 2, 8, 6, device="meta"),), "channels-last", batch=4)
    assert clips.shape == (4, 3, 2, 8, 6)
