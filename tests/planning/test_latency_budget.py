"""Budgets of latency, on a machine whose speed is a formula."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asymswap
from asymswap.errors import RecipeError
from asymswap.measure.latency import Timed
from asymswap.measure.macs import count_costs
from asymswap.planning import latency_budget

REST = 1e-3


class Machine:
    """Takes a nanosecond for each MAC, and a little for each conv; convs in `slow` are slow once they are pairs."""

    def __init__(self, slow: Mapping[str, float] | None = None, optimism: float = 1.0) -> None:
        self.slow = slow or {}
        self.optimism = optimism
        """How much faster single convs look in the table than they are beside the original."""
        self.runs: list[int] = []

    def __call__(
        self, models: Mapping[str, nn.Module], inputs: Any, names: Sequence[str] = (), **_: Any
    ) -> dict[str, Timed]:
        self.runs.append(len(models))
        return {key: self._time(model, inputs, names, len(models) > 2) for key, model in models.items()}

    def _time(self, model: nn.Module, inputs: Any, names: Sequence[str], table: bool) -> Timed:
        costs = count_costs(model, inputs, names)
        seconds = {}
        for name in names:
            pair = not isinstance(model.get_submodule(name), nn.Conv2d)
            seconds[name] = 1e-9 * costs.by_name[name].macs
            if pair:
                seconds[name] *= self.optimism if table else self.slow.get(name, 1.0)
        others = 1e-9 * (costs.total.macs - sum(costs.by_name[name].macs for name in names))
        return Timed(REST + others + sum(seconds.values()), seconds, REST + others)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def use(**options: Any) -> Machine:
        made = Machine(**options)
        monkeypatch.setattr(latency_budget, "time_models", made)
        return made

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return use


def convert(fraction: float, **options: Any) -> asymswap.Conversion:
    return asymswap.convert("digits-resnet", "half-macs", overrides={"budget.latency": fraction}, **options)


def test_the_latency_that_is_measured_keeps_the_budget(machine: Any) -> None:
    machine()
    conversion = convert(0.8)
    row = conversion.report.latency
    assert row is not None
    assert (row.wanted, row.undone) == (0.8, ())
    assert 0.7 < row.after / row.before <= 0.8
    # By the machine's formula.
    assert row.before == pytest.approx(REST + 1e-9 * conversion.report.before.macs)
    assert row.after == pytest.approx(REST + 1e-9 * conversion.report.after.macs)
    assert str(conversion.report.budget) == "0.8 of the model's latency"


def test_less_is_planned_where_the_table_was_too_hopeful(machine: Any) -> None:
    machine(optimism=0.8)
    row = convert(0.75).report.latency
    assert row is not None
    assert row.after / row.before <= 0.75


def test_more_is_planned_where_the_table_was_too_gloomy(machine: Any) -> None:
    machine(optimism=1.3)
    row = convert(0.75).report.latency
    assert row is not None
    assert 0.72 < row.after / row.before <= 0.75


def test_swaps_that_are_slower_when_measured_are_taken_back_and_told(machine: Any) -> None:
    machine(slow={"layer2.1.conv1": 30.0})
    conversion = convert(0.85)
    row = conversion.report.latency
    assert row is not None
    assert row.undone == ("layer2.1.conv1",)
    assert row.after / row.before <= 0.85
    (keep,) = [keep for keep in conversion.plan.keeps if keep.site == "layer2.1.conv1"]
    assert "ms where the conv takes" in keep.reason
    assert isinstance(conversion.model.get_submodule("layer2.1.conv1"), nn.Conv2d)


def test_what_a_rule_has_asked_for_is_not_taken_back(machine: Any, tmp_path: Path) -> None:
    machine()
    (tmp_path / "r.toml").write_text(
        '[[rules]]\nmatch = { names = "layer1.0.conv1" }\nswap = { kind = "acb" }\n'
        '[[rules]]\nmatch = { kernel = "3x3", in_channels = { min = 8 } }\nswap = { kind = "separable" }\n'
        "[budget]\nlatency = 0.9\n"
    )
    conversion = asymswap.convert("digits-resnet", tmp_path / "r.toml")
    row = conversion.report.latency
    assert row is not None
    assert row.undone == ()
    assert row.after / row.before <= 0.9
    assert conversion.plan.swaps[0].kind == "acb"


def test_the_table_is_kept_and_used_again(machine: Any, tmp_path: Path) -> None:
    first = machine()
    plan = convert(0.8).plan
    (path,) = (tmp_path / "cache" / "asymswap").glob("latency-*.json")
    table = json.loads(path.read_text())
    assert table["machine"]["threads"] == torch.get_num_threads()
    assert table["machine"]["memory_format"] == "channels-last"
    again = machine()
    assert convert(0.8).plan == plan
    assert max(first.runs) > 2 >= max(again.runs)
    # Another memory format has a table of its own, a damaged one is made anew, and one that cannot be written is not.
    convert(0.8, timing=asymswap.Timing(memory_format="contiguous"))
    assert len(list(path.parent.glob("*.json"))) == 2
    path.write_text("{")
    assert convert(0.8).plan == plan
    (tmp_path / "file").write_text("")
    assert convert(0.8, timing=asymswap.Timing(cache=tmp_path / "file" / "under")).plan == plan


def test_a_latency_out_of_reach_tells_the_lowest(machine: Any) -> None:
    machine()
    with pytest.raises(
        RecipeError, match=r"0\.1 of the model's latency cannot be reached: .* ask for at least (0\.\d+)"
    ):
        convert(0.1)


def test_the_best_so_far_is_kept_where_a_tighter_attempt_is_out_of_reach(machine: Any) -> None:
    machine(optimism=0.8)
    with pytest.raises(RecipeError, match=r"ask for at least 0\.\d+") as caught:
        convert(0.1)
    least = float(str(caught.value).split("at least ")[1][:5])
    row = convert(least).report.latency
    assert row is not None
    assert row.wanted == least < row.after / row.before


def test_a_real_machine_is_measured_too(tmp_path: Path) -> None:
    """A pair of the lowest ranks does a twentieth of the work: six tenths are in reach, and not without a swap."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)))
    conversion = asymswap.convert(
        asymswap.open_model(model, input_size=(64, 48, 48)),
        "half-macs",
        overrides={"budget.latency": 0.6},
        timing=asymswap.Timing(rounds=5, cache=tmp_path),
    )
    row = conversion.report.latency
    assert row is not None
    assert row.before > 0
    assert row.after > 0
    assert conversion.plan.swaps
    assert len(list(tmp_path.glob("latency-*.json"))) == 1


def test_of_several_kinds_each_is_timed(machine: Any, tmp_path: Path) -> None:
    machine()
    (tmp_path / "r.toml").write_text(
        '[[rules]]\nmatch = { in_channels = { min = 8 } }\nswap = [{ kind = "separable" }, { kind = "cross" }]\n'
        "[budget]\nlatency = 0.7\n"
    )
    conversion = asymswap.convert("digits-resnet", tmp_path / "r.toml")
    row = conversion.report.latency
    assert row is not None
    assert 0.6 < row.after / row.before <= 0.7
    (path,) = (tmp_path / "cache" / "asymswap").glob("latency-*.json")
    for seconds in json.loads(path.read_text())["seconds"].values():
        assert {key.partition(" ")[0] for key in seconds if key} == {"separable", "cross"}
