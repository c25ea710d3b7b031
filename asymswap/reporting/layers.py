"""The picture of a network's layers in order: panels one above the other, each layer a column through all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asymswap.reporting.drawing import (
    Element,
    element,
    in_groups,
    kind_class,
    mark,
    shortened,
    ticks,
)

_LEFT, _RIGHT, _TOP = 58.0, 14.0, 8.0
_TITLE, _PANEL, _GAP = 22.0, 112.0, 12.0
_NARROWEST, _WIDEST, _FULL = 13.0, 96.0, 1040.0
_LONGEST_LABEL, _CHARACTER = 24, 5.6


@dataclass(frozen=True)
class Column:
    """One layer: its name, what is said of it, line by line, and the number of the kind that marks it, if any does."""

    name: str
    lines: tuple[str, ...]
    kind: int | None


@dataclass(frozen=True)
class Bar:
    """What a panel shows of one layer: a pale bar behind, a coloured one before it, a line across; None is nothing."""

    back: float | None = None
    front: float | None = None
    line: float | None = None

    @property
    def top(self) -> float:
        """The largest finite value."""
        values = (value for value in (self.back, self.front, self.line) if value is not None and math.isfinite(value))
        return max(values, default=0.0)


@dataclass(frozen=True)
class Panel:
    """One quantity of all layers; `said` makes a value of its axis into text."""

    title: str
    said: Callable[[float], str]
    bars: tuple[Bar, ...]


def draw_layers(
    columns: Sequence[Column],
    panels: Sequence[Panel],
    label: str,
    heading: Sequence[str] = (),
    legend: Sequence[str] = (),
) -> Element:
    """The picture; `label` is read out in its place.

    Where it stands alone it has a `heading`, line by line, and a `legend`, which names the kinds in their order, and
    then what is marked by none of them.
    """
    pitch = min(_WIDEST, max(_NARROWEST, (_FULL - _LEFT - _RIGHT) / max(1, len(columns))))
    width = _LEFT + _RIGHT + pitch * len(columns)
    width = max([width, *(_LEFT + 7.2 * len(line) for line in heading)])
    top = _TOP + _TITLE * (len(heading) + bool(legend))
    bottoms = [top + (number + 1) * (_TITLE + _PANEL) + number * _GAP for number in range(len(panels))]
    foot = bottoms[-1] if bottoms else top
    # What all share stands below, so that the columns can be drawn one by one with everything of theirs.
    names, below = _names([column.name for column in columns], pitch, foot + 22)
    picture = element(
        "svg",
        element("title", text=label),
        viewBox=f"0 0 {width:.0f} {below:.0f}",
        width=round(width),
        height=round(below),
        role="img",
        class_="layers",
    )
    picture.extend(_heading(heading))
    if legend:
        picture.append(_legend(legend, _TOP + 10 + _TITLE * len(heading)))
    scales = [_Scale(panel, bottom) for panel, bottom in zip(panels, bottoms, strict=True)]
    picture.extend(scale.axis(width) for scale in scales)
    picture.extend(names)
    for number, column in enumerate(columns):
        x = _LEFT + pitch * number
        group = element("g", element("title", text="\n".join(column.lines)), class_="column")
        group.append(element("rect", x=x, y=top, width=pitch, height=foot - top + 20, fill="transparent", class_="hit"))
        for scale in scales:
            group.extend(scale.bar(number, x, pitch, column.kind))
        group.append(mark(column.kind, x + pitch / 2, foot + 10, min(4.0, pitch / 3)))
        picture.append(group)
    return picture


class _Scale:
    """One panel's place on the picture."""

    def __init__(self, panel: Panel, bottom: float) -> None:
        self._panel, self._bottom = panel, bottom
        self._ticks = ticks(max((bar.top for bar in panel.bars), default=0.0))

    def axis(self, width: float) -> Element:
        """Title, lines across, and what they stand for."""
        group = element("g", class_="axis")
        group.append(_text(self._panel.title, 4, self._bottom - _PANEL - 10, 12, "f-ink", font_weight=600))
        for tick in self._ticks:
            y = self._y(tick)
            group.append(element("line", x1=_LEFT, x2=width - _RIGHT, y1=y, y2=y, class_="s-line", stroke_width=1))
            said = "0" if tick == 0 else self._panel.said(tick)
            group.append(_text(said, _LEFT - 6, y + 3.5, 10, "f-soft", text_anchor="end"))
        return group

    def bar(self, number: int, x: float, pitch: float, kind: int | None) -> list[Element]:
        """What the panel shows of one layer."""
        bar, wide = self._panel.bars[number], 0.8 * pitch
        made = []
        if bar.back is not None:
            css = "f-before s-edge" if bar.front is not None else "f-before"
            made.append(self._rect(x + (pitch - wide) / 2, wide, bar.back, css))
        if bar.front is not None:
            narrow = 0.5 * pitch if bar.back is not None else wide
            made.append(self._rect(x + (pitch - narrow) / 2, narrow, bar.front, f"f-{kind_class(kind)}"))
        if bar.line is not None:
            y = self._y(bar.line)
            left, right = x + 0.06 * pitch, x + 0.94 * pitch
            made.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="s-ink", stroke_width=2))
        return made

    def _rect(self, x: float, width: float, value: float, css: str) -> Element:
        y = self._y(value)
        edge = 0.75 if "s-" in css else None
        return element("rect", x=x, y=y, width=width, height=self._bottom - y, class_=css, stroke_width=edge)

    def _y(self, value: float) -> float:
        # A value without end reaches the top.
        share = min(1.0, value / self._ticks[-1]) if value == value else 0.0
        return self._bottom - _PANEL * share


def _names(names: Sequence[str], pitch: float, top: float) -> tuple[list[Element], float]:
    """The layers' names upright below their columns, the groups below those, and how far down all that reaches."""
    groups = in_groups(names)
    labels = [shortened(rest or group, _LONGEST_LABEL) for group, rest in groups]
    made = []
    for number, label in enumerate(labels):
        x = _LEFT + pitch * (number + 0.5) + 3
        turned = f"rotate(-90 {x:.2f} {top:.2f})"
        made.append(_text(label, x, top, 10, "f-soft", text_anchor="end", transform=turned))
    below = top + _CHARACTER * max(map(len, labels), default=0) + 8
    first = 0
    for group, members in itertools.groupby(groups, key=lambda pair: pair[0]):
        count = sum(1 for _ in members)
        left, right = _LEFT + pitch * first + 2, _LEFT + pitch * (first + count) - 2
        if count > 1:
            made.append(element("line", x1=left, x2=right, y1=below, y2=below, class_="s-edge", stroke_width=1))
            told = shortened(group, max(1, int((right - left) / 6.2)))
            made.append(_text(told, (left + right) / 2, below + 13, 11, "f-ink", text_anchor="middle"))
        first += count
    return made, below + 22


def _heading(lines: Sequence[str]) -> list[Element]:
    made = []
    for number, line in enumerate(lines):
        weight, css = (600, "f-ink") if number == 0 else (None, "f-soft")
        made.append(_text(line, 4, _TOP + 10 + _TITLE * number, 13, css, font_weight=weight))
    return made


def _legend(names: Sequence[str], y: float) -> Element:
    group, x = element("g", class_="legend"), 4.0
    for number, name in enumerate(names):
        kind = number if number < len(names) - 1 else None
        group.append(mark(kind, x + 5, y - 4, 4.5))
        group.append(_text(name, x + 15, y, 12, "f-ink"))
        x += 30 + 6.4 * len(name)
    return group


def _text(text: str, x: float, y: float, size: int, css: str, **attributes: object) -> Element:
    return element("text", text=text, x=x, y=y, font_size=size, class_=css, **attributes)
