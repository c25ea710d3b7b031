"""What all pictures share: SVG elements, scales, shapes, and the colours of the HTML report, light and dark.

A picture is a tree of ElementTree, so that no name of a layer can ever become markup. It carries classes instead of
colours: `f-NAME` fills and `s-NAME` strokes with one of `COLOURS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from xml.etree import ElementTree

from asymswap.errors import BIDIRECTIONAL, CONTROLS

Element = ElementTree.Element

COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#14191f"),
    "panel": ("#f5f7f9", "#1c232b"),
    "ink": ("#1a222b", "#e8ecf0"),
    "soft": ("#55606c", "#a9b4bf"),
    "line": ("#d8dee4", "#36414c"),
    "edge": ("#76838f", "#8b98a5"),
    "before": ("#ccd5de", "#4a5764"),
    "kept": ("#6d7985", "#98a4b0"),
    "mark": ("#fff1c2", "#453a12"),
    "accent": ("#1d5fbf", "#79b0ff"),
    "kind0": ("#1d5fbf", "#79b0ff"),
    "kind1": ("#b4500b", "#f2a75c"),
    "kind2": ("#0b7268", "#55d0bf"),
    "kind3": ("#7a35d8", "#bb9dff"),
    "kind4": ("#b5175f", "#ff8fb8"),
    "kind5": ("#566b0d", "#b9d35c"),
    "kind6": ("#8a5a2b", "#d9b38c"),
}
"""Each colour by name, on white paper and on dark: text has a contrast of at least 4.5 to it, what is drawn 3."""

KIND_COLOURS = sum(name.startswith("kind") for name in COLOURS)

DARK = "@media screen and (prefers-color-scheme: dark)"
"""Where the dark colours hold: never in print."""

_UNCLEAN = re.compile(f"[{CONTROLS}\ud800-\udfff\ufffe\uffff{BIDIRECTIONAL}]")


def clean(text: str) -> str:
    """The text without characters that XML forbids or that reorder what is read; names come from anybody's files."""
    return _UNCLEAN.sub("\ufffd", text)


def element(tag: str, *children: Element, text: str = "", **attributes: object) -> Element:
    """An SVG element; in the attributes' names `_` stands for `-`, and a trailing one is dropped (`class_`)."""
    made = Element(tag, {_name(key): _value(value) for key, value in attributes.items() if value is not None})
    made.text = clean(text) or None
    made.extend(children)
    return made


def _name(key: str) -> str:
    return "viewBox" if key == "viewBox" else key.rstrip("_").replace("_", "-")


def _value(value: object) -> str:
    # A quarter of a pixel is as exact as anything on a screen.
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else clean(str(value))


def markup(picture: Element) -> str:
    """A picture as text to stand inside of an HTML page."""
    return ElementTree.tostring(picture, encoding="unicode")


def svg_file(picture: Element) -> str:
    """A picture as a file of its own, with its colours, on its own paper."""
    alone = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **picture.attrib})
    paper = element("rect", width="100%", height="100%", class_="f-paper")
    alone.extend([element("style", text=svg_style()), paper, *picture])
    return markup(alone) + "\n"


def svg_style() -> str:
    """The rules that give the classes of pictures their colours."""
    font = "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}"
    return f"{font}{_rules(0)}{DARK}{{{_rules(1)}}}"


def _rules(theme: int) -> str:
    return "".join(
        f".f-{name}{{fill:{pair[theme]}}}.s-{name}{{stroke:{pair[theme]}}}" for name, pair in COLOURS.items()
    )


def variables() -> str:
    """The colours as custom properties for the rest of an HTML page."""
    light, dark = ("".join(f"--{name}:{pair[theme]};" for name, pair in COLOURS.items()) for theme in (0, 1))
    return f":root{{color-scheme:light;{light}}}{DARK}{{:root{{color-scheme:dark;{dark}}}}}"


def kind_class(index: int | None) -> str:
    """The colour of the kind of that number, or of what is kept."""
    return "kept" if index is None else f"kind{index % KIND_COLOURS}"


def mark(index: int | None, x: float, y: float, radius: float) -> Element:
    """The shape that stands for the kind of that number, so that it need not be told by its colour; kept is a dash."""
    css = f"f-{kind_class(index)}"
    if index is None:
        return element("rect", x=x - 0.7 * radius, y=y - 0.8, width=1.4 * radius, height=1.6, class_=css)
    number = index % KIND_COLOURS
    if number == 0:
        return element("circle", cx=x, cy=y, r=radius, class_=css)
    corners = _CORNERS[number - 1]
    points = " ".join(f"{x + radius * dx:.2f},{y + radius * dy:.2f}" for dx, dy in corners)
    return element("polygon", points=points, class_=css)


_T = 0.35
_CORNERS: tuple[tuple[tuple[float, float], ...], ...] = (
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
    ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    ((-1.1, -0.9), (1.1, -0.9), (0, 1.1)),
    (
        *((-_T, -1.1), (_T, -1.1), (_T, -_T), (1.1, -_T), (1.1, _T), (_T, _T)),
        *((_T, 1.1), (-_T, 1.1), (-_T, _T), (-1.1, _T), (-1.1, -_T), (-_T, -_T)),
    ),
    ((-0.5, -1.2), (0.5, -1.2), (0.5, 1.2), (-0.5, 1.2)),
)
"""Square, triangle, diamond, triangle on its tip, cross, upright bar."""


def ticks(top: float, most: int = 4) -> list[float]:
    """Round numbers from 0 up to the first that is not below `top`."""
    if not (top > 0 and math.isfinite(top)):
        return [0.0, 1.0]
    rough = top / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * number for number in range(math.ceil(top / step - 1e-9) + 1)]


def in_groups(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each dotted name as a group and the rest: what all names begin with belongs to neither.

    `layer1.0.conv1` is (`layer1`, `0.conv1`); where every name begins with `features`, its children are the groups.
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(one) > shared + 1 for one in parts) and len({one[shared] for one in parts}) == 1:
        shared += 1
    return [(one[shared], ".".join(one[shared + 1 :])) for one in parts]


def shortened(text: str, most: int) -> str:
    """The text, its middle left out where it is longer than that."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
