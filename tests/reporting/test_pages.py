"""Colours of pages, lengths of bars, and text of others that stands in pages and plots."""

from __future__ import annotations

import math
import re
from importlib import resources
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asymswap.reporting.convert import MARKS
from asymswap.reporting.format import clean
from asymswap.reporting.pages import add_legend, new_figure, percent_of, picture_of

STYLE = resources.files("asymswap.reporting").joinpath("templates", "report.css").read_text(encoding="utf-8")
LIGHT, DARK = (
    dict(re.findall(r"--(\w+):(#\w{6});", block)) for block in re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)[:2]
)
KINDS = [f"kind{number}" for number in range(len(MARKS))]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
class TestColours:
    @pytest.mark.parametrize("ground", ["paper", "panel", "mark"])
    @pytest.mark.parametrize("name", ["ink", "soft"])
    def test_text_can_be_read(self, name: str, ground: str, theme: dict[str, str]) -> None:
        assert contrast(theme[name], theme[ground]) >= 4.5

    @pytest.mark.parametrize("name", ["edge", "kept", "accent", *KINDS])
    def test_what_is_drawn_can_be_seen(self, name: str, theme: dict[str, str]) -> None:
        assert contrast(theme[name], theme["paper"]) >= 3
        assert contrast(theme[name], theme["panel"]) >= 3

    @pytest.mark.parametrize("name", KINDS)
    def test_the_bar_in_front_stands_out_from_the_pale_one(self, name: str, theme: dict[str, str]) -> None:
        assert contrast(theme[name], theme["before"]) >= 2

    def test_every_colour_of_the_style_is_defined(self, theme: dict[str, str]) -> None:
        assert set(re.findall(r"var\(--(\w+)\)", STYLE)) == theme.keys()


def test_every_kind_has_a_shape_of_its_own() -> None:
    assert len(set(MARKS)) == len(MARKS)


@given(st.floats(0, allow_nan=False), st.floats(0, 1e300))
@settings(deadline=None, derandomize=True)
def test_bars_are_as_long_as_their_values(value: float, most: float) -> None:
    percent = percent_of(value, most)
    assert 0 <= percent <= 100
    assert (percent == 0) == (value == 0)
    if 0 < value <= most:
        assert percent == pytest.approx(100 * (value / most), abs=1)


def test_what_has_no_length_is_drawn_too() -> None:
    assert [percent_of(value, 2.0) for value in (math.nan, -1.0, 0.0, math.inf)] == [0, 0, 0, 100]
    assert percent_of(math.inf, 0.0) == 100


@pytest.mark.parametrize("text", ["<&>", "\ud800\udfff", "\ufffe\uffff\x00\x85", "\t漢字 🙂", "$_$ \\alpha", "_hidden"])
def test_any_text_makes_a_valid_plot(text: str) -> None:
    pytest.importorskip("matplotlib")
    figure = new_figure(4, 3)
    axes = figure.add_subplot()
    add_legend(axes, [(axes.plot([0, 1], [0, 1])[0], text)])
    shown = "".join(ElementTree.fromstring(picture_of(figure, "svg")).itertext())
    for word in clean(text).split():
        assert word in shown


def test_characters_that_deceive_are_replaced() -> None:
    # XML 1.0, production 2, leaves out these two beside the surrogates.
    assert clean("a\ufffeb\uffffc") == "a\ufffdb\ufffdc"
    assert clean("a\u202eb\x1bc\ud800d\te\n") == "a\ufffdb\ufffdc\ufffdd\te\n"
    assert clean("naïve 漢字 🙂") == "naïve 漢字 🙂"
