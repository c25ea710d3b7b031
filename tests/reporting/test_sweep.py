"""Trade-off curves: the front and the advice against their definitions, and the forms that they are shown in."""

from __future__ import annotations

import html
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asymswap.reporting.sweep import draw, sweep_view, to_html
from asymswap.results.evaluate import Score
from asymswap.results.records import to_json
from asymswap.results.sweep import Point, Tradeoff, from_json
from asymswap.types import Cost

BEFORE = Cost(1000, 500)


def top1(value: float) -> dict[str, float]:
    return {"top-1": value}


def make(points: list[Point], tolerance: float = 0.01, accuracy: float = 0.9) -> Tradeoff:
    scores = (Score("top-1", accuracy, "%"),)
    return Tradeoff("net", "macs", BEFORE, scores, 100, "some images", tolerance, tuple(points), {"data": "x"})


points = st.builds(
    Point,
    recipe=st.sampled_from(["a", "b"]),
    budget=st.sampled_from([0.9, 0.5, 0.3]),
    cost=st.builds(Cost, st.integers(1, 1000), st.integers(1, 500)),
    scores=st.integers(0, 100).map(lambda number: top1(number / 100)),
)
failures = st.builds(Point, recipe=st.just("a"), budget=st.just(0.1), failed=st.just("it cannot be reached"))


@given(found=st.lists(points | failures, max_size=8))
def test_nothing_beats_the_front_and_all_else_is_beaten(found: list[Point]) -> None:
    sweep = make(found)
    front = sweep.front

    def beats(one: Point, other: Point) -> bool:
        assert one.cost is not None
        assert other.cost is not None
        no_worse = one.cost.macs <= other.cost.macs and one.scores["top-1"] >= other.scores["top-1"]
        return no_worse and (one.cost.macs, one.scores) != (other.cost.macs, other.scores)

    for point in sweep.measured:
        beaten = any(beats(other, point) for other in sweep.measured)
        assert point.cost is not None
        equal = any((p.cost.macs, p.scores) == (point.cost.macs, point.scores) for p in front if p.cost)
        assert beaten or equal
    assert not any(beats(other, point) for other in sweep.measured for point in front)


@given(found=st.lists(points, max_size=8), tolerance=st.integers(0, 30))
def test_what_is_advised_is_the_cheapest_that_loses_little(found: list[Point], tolerance: int) -> None:
    sweep = make(found, tolerance / 100)
    allowed = [p.cost.macs for p in found if p.cost and round(100 * p.scores["top-1"]) >= 90 - tolerance]
    if not allowed:
        assert sweep.advised is None
        assert sweep.advice().startswith("Every budget loses more than")
    else:
        assert sweep.advised is not None
        assert sweep.advised.cost is not None
        assert sweep.advised.cost.macs == min(allowed)


def test_the_advice_in_words() -> None:
    found = [Point("a", 0.5, Cost(500, 300), top1(0.895)), Point("a", 0.4, Cost(400, 200), top1(0.86))]
    assert make(found).advice() == (
        "Advised: 0.5, the last before top-1 falls by more than 1 point (90.0 % -> 89.5 %)."
    )
    two = make([*found, Point("b", 0.4, Cost(390, 200), top1(0.89))])
    assert two.advice().startswith("Advised: 0.4 by b, the last before top-1 falls by more than 1 point")


@settings(deadline=None)  # the first example loads pydantic
@given(found=st.lists(points | failures, max_size=5))
def test_json_brings_it_back(found: list[Point]) -> None:
    sweep = make(found)
    written = json.loads(json.dumps(to_json(sweep)))
    assert from_json(written) == sweep
    assert written["advice"] == sweep.advice()
    assert [point["on_front"] for point in written["points"]] == [point in sweep.front for point in sweep.points]


def test_a_damaged_sweep_is_told_before_anything_is_made_of_it() -> None:
    """Values of other types used to go through, and to end in an AttributeError where they were shown."""
    sound = json.loads(json.dumps(to_json(make([Point("a", 0.5, Cost(500, 300), top1(0.89))]))))
    assert from_json(sound).points[0].budget == 0.5
    changes = [
        {"model": ["net"]},
        {"measure": "upper"},
        {"scores": "much"},
        {"scores": []},
        {"scores": [{"name": "top-1"}]},
        {"images": -1},
        {"data": {}},
    ]
    changes += [{"notes": "none"}, {"setting": []}, {"setting": {"recipes": [1]}}, {"tolerance": math.nan}]
    changes += [{"before": None}, {"before": {"macs": 10**400, "params": 1}}, {"before": {"macs": [], "params": 1}}]
    points = [
        {"recipe": ["a"]},
        {"budget": "half"},
        {"cost": None},
        {"failed": "no"},
        {"scores": {"top-1": math.inf}},
        {"scores": {"other": 1.0}},
    ]
    changes += [{"points": [{**sound["points"][0], **change}]} for change in points]
    for change in changes:
        with pytest.raises((KeyError, TypeError, ValueError)):
            from_json({**sound, **change})


def test_new_points_stand_where_they_belong() -> None:
    sweep = make([])
    for recipe, budget in [("a", 0.3), ("b", 0.5), ("a", 0.5), ("b", 0.4)]:
        sweep = sweep.with_point(Point(recipe, budget, Cost(1, 1), top1(0.5)))
    assert [(p.recipe, p.budget) for p in sweep.points] == [("a", 0.5), ("a", 0.3), ("b", 0.5), ("b", 0.4)]


def test_tables_hold_every_point_and_say_what_was_not_met() -> None:
    points = [Point("a", 0.5, Cost(500, 300), top1(0.895)), Point("a", 0.1, failed="it is out of reach")]
    text = sweep_view(make(points)).markdown()
    assert "| a | 0.5 | 500 (50.0 %) | 300 (60.0 %) | 89.5 % | -0.50 | advised |" in text
    assert "| a | 0.1 | - | - | - | - | not met |" in text
    assert "- a at 0.1: it is out of reach." in text


def test_names_are_no_markdown() -> None:
    sweep = make([Point("a|<b>*c*\n# d", 0.5, Cost(500, 300), top1(0.895))])
    lines = sweep_view(sweep).markdown().splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# net: advised: 0.5, the last before top-1 falls by more than 1 point (90.0 % -> 89.5 %)."
    ]
    assert r"| a\|\<b>\*c\* # d | 0.5 | 500 (50.0 %) |" in "\n".join(lines)


def test_the_page_holds_the_advice_and_every_point() -> None:
    pytest.importorskip("matplotlib")
    sweep = make([Point("<b>a</b>", 0.5, Cost(500, 300), top1(0.895)), Point("a", 0.1, failed="it is out of reach")])
    page = to_html(sweep)
    assert html.escape(sweep.advice()) in page
    assert "&lt;b&gt;a&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "it is out of reach" in page
    assert page.count("<tr>") == 4
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("form", ["svg", "png"])
def test_pictures_are_made_and_equal_sweeps_make_equal_ones(form: str) -> None:
    pytest.importorskip("matplotlib")
    sweep = make([Point("a", 0.5, Cost(500, 300), top1(0.895)), Point("b", 0.4, Cost(400, 300), top1(0.8))])
    picture = draw(sweep, form)
    assert picture == draw(sweep, form)
    if form == "svg":
        text = "".join(ET.fromstring(picture).itertext())
        assert all(word in text for word in ("a", "b", "Pareto front", "advised: 0.5", "unchanged", "1 less"))
    else:
        assert picture.startswith(b"\x89PNG")
    draw(make([]), form)


def test_names_are_no_formulas_and_none_is_hidden() -> None:
    pytest.importorskip("matplotlib")
    points = [Point("_mine.toml", 0.5, Cost(500, 300), top1(0.895)), Point("b$_$.toml", 0.4, Cost(400, 300), top1(0.8))]
    sweep = replace(make(points), model="net$_$\x1b.pt")
    texts = "".join(ET.fromstring(draw(sweep, "svg")).itertext())
    assert all(name in texts for name in ("net$_$\ufffd.pt", "_mine.toml", "b$_$.toml", "Pareto front"))
    draw(sweep, "png")


@pytest.mark.parametrize("advised", [0.3, 0.5, 0.9])
def test_the_advice_stands_inside_of_the_frame(advised: float) -> None:
    pytest.importorskip("matplotlib")
    budgets = (0.9, 0.5, 0.3)
    points = [
        Point("a", cost, Cost(int(1000 * cost), 300), top1(0.895 if cost >= advised else 0.5)) for cost in budgets
    ]
    picture = ET.fromstring(draw(make(points), "svg"))
    (words,) = [found for found in picture.iter() if found.text == f"advised: {advised}"]
    start = float(words.get("x", "0"))
    frame = next(group for group in picture.iter() if group.get("id") == "patch_2")
    edge = max(float(x) for x in re.findall(r"[ML] ([\d.]+) ", next(iter(frame)).get("d", "")))
    assert start + 70 < edge  # points; the words take some 65 of them


def test_budgets_that_fail_for_one_reason_share_a_line() -> None:
    failures = [Point("a", budget, failed=f"the budget of {budget:g} is out of reach") for budget in (0.4, 0.2, 0.1)]
    further = [Point("b", 0.4, failed="the budget of 0.4 is out of reach"), Point("b", 0.9, Cost(900, 450), top1(0.9))]
    lines = sweep_view(make([*failures, *further])).fine_print
    assert [line for line in lines if "reach" in line] == [
        "a at 0.4, 0.2 and 0.1: the budget of 0.4 is out of reach.",
        "b at 0.4: the budget of 0.4 is out of reach.",
    ]
    other = sweep_view(make([failures[0], Point("a", 0.2, failed="it is something else")])).fine_print
    assert [line for line in other if line.startswith("a at")] == [
        "a at 0.4: the budget of 0.4 is out of reach.",
        "a at 0.2: it is something else.",
    ]
