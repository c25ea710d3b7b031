"""Budgets of latency, on a machine whose speed is a formula."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asymswap
from asymswap.errors import AsymswapError, RecipeError
from asymswap.measure.latency import Parts, parts_of
from asymswap.measure.macs import count_costs
from asymswap.measure.runtimes import RUNTIMES, installed
from asymswap.planning import latency_budget
from asymswap.planning.latency_budget import Bench
from asymswap.results.convert import LatencyRow
from asymswap.results.records import to_json
from asymswap.results.sweep import Tradeoff, from_json

REST = 1e-3


class Machine:
    """Takes a nanosecond for each MAC, and a little for each conv; convs in `slow` are slow once they are pairs."""

    def __init__(
        self, slow: Mapping[str, float] | None = None, optimism: float = 1.0, drag: float = 1.0, noise: float = 0.0
    ) -> None:
        self.slow = slow or {}
        self.optimism = optimism
        """How much faster single convs look in the table than they are beside the original."""
        self.drag, self.noise = drag, noise
        """How much slower the whole is with swaps than its layers tell, and by how much rounds differ."""
        self.runs: list[int] = []

    def __call__(self, model: nn.Module, example: Any, timing: asymswap.Timing, progress: Any) -> Bench:
        bench = Bench(model, example, timing, progress)
        bench.measure = lambda *args, **options: self._measure(example, *args, **options)  # type: ignore[method-assign]
        return bench

    def _measure(
        self, example: Any, models: Mapping[str, nn.Module], names: Sequence[str], whole: bool = True
    ) -> tuple[dict[str, Any], dict[str, Parts]]:
        self.runs.append(len(models))
        found = {key: self._time(model, example, names, not whole) for key, model in models.items()}
        passes = {}
        for key, timed in found.items():
            drag = self.drag if key else 1.0
            passes[key] = [
                [sum(timed.values()) * drag * (1 + self.noise * (len(key) > 0) * (n % 3 - 1))] for n in range(9)
            ]
        return passes, found

    def _time(self, model: nn.Module, inputs: Any, names: Sequence[str], table: bool) -> Parts:
        costs = count_costs(model, inputs, names)
        seconds = {}
        for name in names:
            pair = not isinstance(model.get_submodule(name), nn.Conv2d)
            seconds[name] = 1e-9 * costs.by_name[name].macs
            if pair:
                seconds[name] *= self.optimism if table else self.slow.get(name, 1.0)
        others = 1e-9 * (costs.total.macs - sum(costs.by_name[name].macs for name in names))
        return parts_of(REST + others + sum(seconds.values()), seconds)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def use(**options: Any) -> Machine:
        made = Machine(**options)
        monkeypatch.setattr(latency_budget, "Bench", made)
        return made

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return use


def convert(asked: float | str, **options: Any) -> asymswap.Conversion:
    return asymswap.convert("digits-resnet", "half-macs", latency=asked, **{"time": False, **options})


def times(row: LatencyRow) -> tuple[float, float]:
    """Seconds before and after in the budget's runtime."""
    (first, *_) = row.times
    assert first.before is not None
    assert first.after is not None
    return first.before.minimum, first.after.minimum


def share(row: LatencyRow) -> float:
    before, after = times(row)
    return after / before


def test_the_latency_that_is_measured_keeps_the_budget(machine: Any) -> None:
    machine()
    conversion = convert(0.8)
    row = conversion.report.latency
    assert row is not None
    assert (row.wanted, row.undone) == (0.8, ())
    assert 0.7 < share(row) <= 0.8
    # By the machine's formula.
    assert times(row)[0] == pytest.approx(REST + 1e-9 * conversion.report.before.macs)
    assert times(row)[1] == pytest.approx(REST + 1e-9 * conversion.report.after.macs)
    assert str(conversion.report.budget) == "0.8 of the model's latency"


def test_less_is_planned_where_the_table_was_too_hopeful(machine: Any) -> None:
    machine(optimism=0.8)
    row = convert(0.75).report.latency
    assert row is not None
    assert share(row) <= 0.75


def test_more_is_planned_where_the_table_was_too_gloomy(machine: Any) -> None:
    machine(optimism=1.3)
    row = convert(0.75).report.latency
    assert row is not None
    assert 0.72 < share(row) <= 0.75


def test_swaps_that_are_slower_when_measured_are_taken_back_and_told(machine: Any) -> None:
    machine(slow={"layer2.1.conv1": 30.0})
    conversion = convert(0.85)
    row = conversion.report.latency
    assert row is not None
    assert row.undone == ("layer2.1.conv1",)
    assert share(row) <= 0.85
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
    conversion = asymswap.convert("digits-resnet", tmp_path / "r.toml", time=False)
    row = conversion.report.latency
    assert row is not None
    assert row.undone == ()
    assert share(row) <= 0.9
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
    assert row.wanted == least < share(row)


@pytest.mark.parametrize(
    "runtime",
    ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnxruntime", "openvino"))],
)
def test_a_real_machine_is_measured_too(runtime: str, tmp_path: Path, one_thread: None) -> None:
    """A pair of the lowest ranks does a twentieth of the work: eight tenths are in reach, and not without a swap."""
    if runtime not in installed([runtime]):
        pytest.skip(f"{runtime} is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)))
    try:
        conversion = asymswap.convert(
            asymswap.open_model(model, input_size=(64, 48, 48)),
            "half-macs",
            latency=0.8,
            runtime=runtime,
            timing=asymswap.Timing(rounds=5, cache=tmp_path),
        )
    except RecipeError as error:
        # Other programs may take so much of the machine that nothing can be told.
        if not re.search("cannot be reached|too noisy", str(error)):
            raise
        pytest.skip(f"the machine is too busy: {error}")
    row = conversion.report.latency
    assert row is not None
    assert min(times(row)) > 0
    assert conversion.plan.swaps
    # The budget's runtime first, the others that are installed behind it.
    others = [name for name in ("torch", "onnxruntime", "openvino") if name != runtime]
    assert [one.runtime for one in row.times] == [runtime, *installed(others)]
    assert all(one.ratio is not None for one in row.times)
    (path,) = tmp_path.glob("latency-*.json")
    about = json.loads(path.read_text())["machine"]
    assert (about["runtime"], about["version"]) == (runtime, RUNTIMES[runtime].version())


@pytest.mark.parametrize("asked", ["2ms", "0.002s", " 2.0 ms"])
def test_a_time_can_be_asked_for(machine: Any, asked: str) -> None:
    machine()
    row = convert(asked).report.latency
    assert row is not None
    assert (row.wanted, row.in_seconds) == (0.002, True)
    assert 0.0018 < times(row)[1] <= 0.002 < times(row)[0]


def test_a_time_out_of_reach_tells_the_lowest_in_ms(machine: Any) -> None:
    machine()
    said = r"the budget of 0.5 ms cannot be reached: .* everywhere (\d\.\d+) ms is left; ask for at least (.*)ms"
    with pytest.raises(RecipeError, match=said) as caught:
        convert("0.5ms")
    least = str(caught.value).split("at least ")[1].partition("ms")[0]
    row = convert(f"{least}ms").report.latency
    assert row is not None
    assert times(row)[1] <= 1e-3 * float(least) + 1e-9


def test_a_time_that_is_met_already_swaps_nothing(machine: Any) -> None:
    machine()
    with pytest.raises(RecipeError, match="the budget of 50 ms is met without a single swap"):
        convert("50ms")


@pytest.mark.parametrize("asked", ["5 minutes", "-3ms", "0ms", 0, 1.5, True, "fast"])
def test_what_is_no_latency_is_told(asked: Any) -> None:
    with pytest.raises(RecipeError, match=r"budget\.latency: give a fraction above 0 and at most 1, or a time such as"):
        convert(asked)


def test_where_no_swap_is_faster_it_is_said(machine: Any) -> None:
    """As of convs that take a tenth of a millisecond each, where two of them only take longer."""
    machine(optimism=1e3)
    said = "with the smallest swap everywhere 1.000 is left, since none is faster than its conv"
    with pytest.raises(RecipeError, match=said):
        convert(0.9)


def test_nothing_slower_is_made_where_the_whole_is_slower_than_its_layers_tell(machine: Any) -> None:
    machine(drag=4.0)
    with pytest.raises(
        RecipeError, match=r"no swap pays in PyTorch at batch 1: the network with swaps takes 3\.\d\d of"
    ):
        convert(0.8)


def test_a_machine_that_is_too_noisy_says_how_noisy(machine: Any) -> None:
    machine(drag=2.2, noise=0.5)
    with pytest.raises(RecipeError, match=r"too noisy to tell if a swap pays in Py.* \(0\.\d\d to 1\.\d\d with 9\d"):
        convert(0.36)


def test_a_runtime_that_is_not_there_or_tells_no_layers_is_one_line(
    machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(AsymswapError, match=r"^torch\.compile does not tell the time of single layers"):
        convert(0.8, runtime="compile", timing=asymswap.Timing(rounds=1, cache=tmp_path))
    monkeypatch.setattr(type(RUNTIMES["openvino"]), "needs", {"no_such_module": (1,)})
    with pytest.raises(AsymswapError, match=r"^OpenVINO needs no_such_module; pip install 'asymswap\[openvino\]'$"):
        convert(0.8, runtime="openvino")
    with pytest.raises(AsymswapError, match="the runtime 'openvin' is unknown; did you mean openvino"):
        convert(0.8, runtime="openvin")


def test_of_several_kinds_each_is_timed(machine: Any, tmp_path: Path) -> None:
    machine()
    (tmp_path / "r.toml").write_text(
        '[[rules]]\nmatch = { in_channels = { min = 8 } }\nswap = [{ kind = "separable" }, { kind = "cross" }]\n'
        "[budget]\nlatency = 0.7\n"
    )
    conversion = asymswap.convert("digits-resnet", tmp_path / "r.toml", time=False)
    row = conversion.report.latency
    assert row is not None
    assert 0.6 < share(row) <= 0.7
    (path,) = (tmp_path / "cache" / "asymswap").glob("latency-*.json")
    for seconds in json.loads(path.read_text())["seconds"].values():
        assert {key.partition(" ")[0] for key in seconds if key} == {"separable", "cross"}


def test_a_sweep_takes_budgets_of_latency(machine: Any) -> None:
    machine()

    def sweep(**options: Any) -> Tradeoff:
        return asymswap.sweep(
            "digits-resnet", ["half-macs"], "digits", budgets=[0.8, 0.1], measure="latency", **options
        )

    found = sweep()
    met, missed = found.points
    assert met.time is not None
    assert 0.7 < met.time <= 0.8
    assert (found.front, found.share(met)) == ((met,), met.time)
    assert "0.1 of the model's latency cannot be reached" in (missed.failed or "")
    assert f"{100 * met.time:.1f} %" in str(found)
    assert from_json(to_json(found)).points == found.points
    # What is known is not measured again, but only for the same setting.
    assert sweep(known=found).points == found.points
    with pytest.raises(AsymswapError, match=r"has other settings \(timing\)"):
        sweep(known=found, timing=asymswap.Timing(batch=2))
    with pytest.raises(AsymswapError, match='goes with `measure="latency"`; leave it out'):
        asymswap.sweep("digits-resnet", ["half-macs"], "digits", timing=asymswap.Timing())
