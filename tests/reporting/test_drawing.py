"""Scales, names and colours of pictures."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asymswap.reporting.drawing import (
    COLOURS,
    KIND_COLOURS,
    clean,
    element,
    in_groups,
    mark,
    markup,
    shortened,
    svg_file,
    ticks,
)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
class TestColours:
    @pytest.mark.parametrize("ground", ["paper", "panel", "mark"])
    @pytest.mark.parametrize("name", ["ink", "soft"])
    def test_text_can_be_read(self, name: str, ground: str, theme: int) -> None:
        assert contrast(COLOURS[name][theme], COLOURS[ground][theme]) >= 4.5

    @pytest.mark.parametrize("name", ["edge", "kept", "accent", *(f"kind{n}" for n in range(KIND_COLOURS))])
    def test_what_is_drawn_can_be_seen(self, name: str, theme: int) -> None:
        assert contrast(COLOURS[name][theme], COLOURS["paper"][theme]) >= 3
        assert contrast(COLOURS[name][theme], COLOURS["panel"][theme]) >= 3

    @pytest.mark.parametrize("number", range(KIND_COLOURS))
    def test_the_bar_in_front_stands_out_from_the_pale_one(self, number: int, theme: int) -> None:
        assert contrast(COLOURS[f"kind{number}"][theme], COLOURS["before"][theme]) >= 2


def test_every_kind_has_a_shape_of_its_own() -> None:
    shapes = {markup(mark(number, 0, 0, 5)).split(" class")[0] for number in (None, *range(KIND_COLOURS))}
    assert len(shapes) == KIND_COLOURS + 1


@given(st.floats(1e-9, 1e15))
@settings(deadline=None, derandomize=True)
def test_ticks_reach_just_over_the_top(top: float) -> None:
    found = ticks(top)
    assert found[0] == 0
    assert 2 <= len(found) <= 5
    assert found[-2] < top <= found[-1] * (1 + 1e-6)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.parametrize("top", [0, -1, float("nan"), float("inf")])
def test_ticks_of_nothing(top: float) -> None:
    assert ticks(top) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["conv1", "layer1.0.conv1", "layer1.0.conv2"], [("conv1", ""), ("layer1", "0.conv1"), ("layer1", "0.conv2")]),
        (["features.0", "features.3"], [("0", ""), ("3", "")]),
        (["features.b1.c1", "features.b1.c2", "features.t"], [("b1", "c1"), ("b1", "c2"), ("t", "")]),
        (["only"], [("only", "")]),
        (["a.b.c"], [("c", "")]),
        ([], []),
    ],
)
def test_groups(names: list[str], groups: list[tuple[str, str]]) -> None:
    assert in_groups(names) == groups


@given(st.text(max_size=40), st.integers(1, 30))
@settings(deadline=None, derandomize=True)
def test_shortened_text_keeps_both_ends(text: str, most: int) -> None:
    short = shortened(text, most)
    assert len(short) == min(len(text), most)
    if len(text) > most:
        head, tail = short.split("…") if "…" not in text else (short[: (most - 1) // 2], short[(most - 1) // 2 + 1 :])
        assert text.startswith(head)
        assert text.endswith(tail)


@given(st.text(st.characters() | st.sampled_from("\ud800\udfff\ufffe\uffff\x00\x85"), max_size=20))
@settings(deadline=None, derandomize=True)
def test_any_text_makes_a_valid_file(text: str) -> None:
    picture = element("svg", element("text", text=text), element("g", data_name=text), width=10)
    read = ElementTree.fromstring(svg_file(picture))
    shown = read.find("{http://www.w3.org/2000/svg}text")
    assert shown is not None
    assert (shown.text or "").replace("\r", "\n") == clean(text)


def test_characters_that_deceive_are_replaced() -> None:
    # XML 1.0, production 2, leaves out these two beside the surrogates.
    assert clean("a\ufffeb\uffffc") == "a\ufffdb\ufffdc"
    assert clean("a\u202eb\x1bc\ud800d\te\n") == "a\ufffdb\ufffdc\ufffdd\te\n"
    assert clean("naïve 漢字 🙂") == "naïve 漢字 🙂"
