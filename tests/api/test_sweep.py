"""Sweeps: the same figures as single conversions, one look at the images, and going on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import asymswap
from asymswap.api import session as session_module
from asymswap.api.sweep import BUDGETS
from asymswap.cli.commands import command
from asymswap.cli.sweep import parse_fractions
from asymswap.errors import AsymswapError
from asymswap.results.records import to_json
from asymswap.results.sweep import Tradeoff, from_json

CALIBRATION = asymswap.Calibration("digits", images=64)


def run(budgets: list[float], model: Any = "digits-resnet", **options: Any) -> Tradeoff:
    return asymswap.sweep(model, ["half-macs"], "digits", budgets=budgets, **options)


def test_each_point_is_what_a_conversion_of_its_own_gives() -> None:
    found = run([0.5, 0.3], calibration=CALIBRATION)
    assert [point.budget for point in found.points] == [0.5, 0.3]
    # The second would show what the first has left behind.
    for point in found.points[1:]:
        overrides = {"budget.macs": point.budget}
        alone = asymswap.convert(
            "digits-resnet", "half-macs", overrides=overrides, calibration=CALIBRATION, evaluate="digits"
        ).report
        assert alone.accuracy is not None
        assert (point.cost, point.scores) == (alone.after, {one.name: one.after for one in alone.accuracy.scores})
        assert point.swapped == len(alone.swapped)
        assert found.before == alone.before
        assert [one.value for one in found.scores] == [one.before for one in alone.accuracy.scores]


def test_the_images_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    real = session_module.gather_statistics
    monkeypatch.setattr(session_module, "gather_statistics", lambda *args: looks.append(1) or real(*args))
    found = asymswap.sweep("digits-resnet", ["half-macs", "3x3-only"], "digits", budgets=[0.5], calibration=CALIBRATION)
    assert len(found.points) == 2
    assert len(looks) == 1


def test_a_sweep_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run([0.6, 0.4])
    seen: list[Tradeoff] = []

    class StopError(Exception):
        pass

    def stop(so_far: Tradeoff) -> None:
        seen.append(so_far)
        raise StopError

    with pytest.raises(StopError):
        run([0.6, 0.4], on_point=stop)
    converted = []
    real = session_module.apply_plan
    monkeypatch.setattr(session_module, "apply_plan", lambda *args, **how: converted.append(1) or real(*args, **how))
    resumed = run([0.6, 0.4], known=seen[0])
    assert len(converted) == 1

    def figures(sweep: Tradeoff) -> list[Any]:
        return [(point.budget, point.cost, point.scores) for point in sweep.points]

    assert figures(resumed) == figures(whole)


def test_a_sweep_of_another_setting_is_not_gone_on_with() -> None:
    found = run([0.6])
    with pytest.raises(asymswap.AsymswapError, match=r"has other settings \(calibration\); `force=True`"):
        run([0.5], known=found, calibration=CALIBRATION)
    with pytest.raises(asymswap.AsymswapError, match=r"other settings \(measure\)"):
        run([0.5], known=found, measure="params")
    with pytest.raises(asymswap.AsymswapError, match=r"other settings \(input\)"):
        run([0.5], asymswap.open_model("digits-resnet", input_size=(1, 16, 16)), known=found)


def test_images_that_have_changed_are_another_setting(tmp_path: Path) -> None:
    for name in ("0/a", "0/b", "1/c", "2/d", "3/e", "4/f", "5/g", "6/h", "7/i", "8/j", "9/k"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    found = asymswap.sweep("digits-resnet", ["half-macs"], str(tmp_path), budgets=[0.6])
    again = json.loads(json.dumps(to_json(found)))
    assert from_json(again).setting == found.setting
    (tmp_path / "0/b.png").unlink()
    with pytest.raises(asymswap.AsymswapError, match=r"other settings \(images\)"):
        asymswap.sweep("digits-resnet", ["half-macs"], str(tmp_path), budgets=[0.5], known=found)


def test_recipes_and_budgets_may_be_added(tmp_path: Path) -> None:
    found = run([0.6])
    more = asymswap.sweep("digits-resnet", ["half-macs", "3x3-only"], "digits", budgets=[0.6, 0.5], known=found)
    assert [(point.recipe, point.budget) for point in more.points] == [
        ("half-macs", 0.6),
        ("half-macs", 0.5),
        ("3x3-only", 0.6),
        ("3x3-only", 0.5),
    ]


def test_a_budget_out_of_reach_is_told_and_the_others_are_measured() -> None:
    found = run([0.5, 0.01])
    reached, missed = found.points
    assert reached.failed is None
    assert missed.failed is not None
    assert missed.failed.startswith("the budget of 0.01 of the model's MACs cannot be reached")
    assert missed.scores == {}


def test_parameters_can_be_the_measure() -> None:
    (point,) = run([0.5], measure="params").points
    assert point.cost is not None
    assert point.cost.params <= 0.5 * 94_600


@pytest.mark.parametrize("budgets", [[], [0.5, 1.0], [0.0], [1.5], [0.5, float("nan")]])
def test_budgets_are_fractions(budgets: list[float]) -> None:
    with pytest.raises(asymswap.AsymswapError, match="budgets are fractions between 0 and 1, not"):
        run(budgets)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.9:0.3:0.1", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ("0.3:0.9:0.3", [0.9, 0.6, 0.3]),
        ("0.6,0.5", [0.6, 0.5]),
        ("0.25", [0.25]),
    ],
)
def test_budgets_are_read(text: str, expected: list[float]) -> None:
    assert parse_fractions("--macs", text) == expected


def test_the_budgets_that_help_names_are_those_taken_without_any() -> None:
    (shown,) = (parameter.show_default for parameter in command("sweep").params if parameter.name == "macs")
    assert parse_fractions("--macs", shown) == list(BUDGETS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "neither from:to:step"),
        ("0.9:0.3", "neither from:to:step"),
        ("0.9:0.3:0", "the step must be above zero"),
        ("0.9:0.3:1e-9", "at most 100 budgets"),
    ],
)
def test_wrong_budgets_are_told(text: str, message: str) -> None:
    with pytest.raises(asymswap.AsymswapError, match=message):
        parse_fractions("--macs", text)


def test_a_sweep_of_an_earlier_version_has_the_same_timing(tmp_path: Path) -> None:
    timing = asymswap.Timing(rounds=1, threads=1, cache=tmp_path)
    calibration = asymswap.Calibration("digits", images=32)
    options: dict[str, Any] = {"budgets": [0.99], "measure": "latency", "calibration": calibration}
    found = asymswap.sweep("digits-resnet", ["3x3-only"], timing=timing, **options)
    known = {"runtime", "memory_format", "batch", "rounds", "threads"}  # neither a device nor a precision
    assert found.setting["timing"].keys() == known
    half = asymswap.Timing(rounds=1, threads=1, cache=tmp_path, precision="bf16")
    with pytest.raises(AsymswapError, match="other settings"):
        asymswap.sweep("digits-resnet", ["3x3-only"], timing=half, known=found, **options)
