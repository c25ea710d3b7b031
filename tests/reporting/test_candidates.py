"""The candidates as a plot."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from asymswap.reporting import candidates as shown
from asymswap.results.candidates import Candidates
from asymswap.types import Call, Candidate, ConvSpec, Cost, Site

pytest.importorskip("matplotlib")


def candidate(name: str, width: int, reason: str | None = None, kind: str = "separable") -> Candidate:
    conv = ConvSpec(width, width, (3, 3), padding=(1, 1), bias=False)
    return Candidate(Site(name, conv, (Call((8, 8), (8, 8)),)), reason, kind=kind)


ROWS = [candidate("stem", 4, "even rank 1 saves nothing"), candidate("layer1.conv1", 16), candidate("layer1.conv2", 32)]


def found(rows: list[Candidate], reference: str = "net") -> Candidates:
    total = sum((row.site.cost for row in rows), start=Cost(10_000, 5_000))
    return Candidates(reference, "torch.fx", "an input", tuple(rows), total)


def texts(picture: bytes) -> str:
    return "\n".join(ElementTree.fromstring(picture).itertext())


def test_bars_are_as_high_as_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(shown, "picture_of", lambda figure, form: figures.append(figure))
    told = found(ROWS)
    shown.draw(told)
    for axes, name in zip(figures[0].axes, ("macs", "params"), strict=True):
        candidates, others = axes.containers
        whole = getattr(told.total, name)
        expected = [100 * getattr(row.site.cost, name) / whole for row in ROWS]
        assert [bar.get_height() for bar in [*others, *candidates]] == pytest.approx(expected)
        assert [bar.get_x() + bar.get_width() / 2 for bar in candidates] == pytest.approx([1, 2])


def test_it_names_layers_and_says_what_the_candidates_hold() -> None:
    words = texts(shown.draw(found(ROWS)))
    assert "net: 2 of 3 convs are candidates; they hold " in words
    assert "what is no conv holds 1.3 % and 30.0 %" in words
    for word in ("candidate: separable", "no candidate", "stem", "layer1.conv1", "layer1.conv2"):
        assert word in words.splitlines()


def test_kinds_of_a_recipe_are_told_apart() -> None:
    rows = [candidate("a", 4, kind="acb"), candidate("b", 4), candidate("c", 4, kind="acb")]
    assert {"candidate: acb", "candidate: separable", "no candidate"} <= set(
        texts(shown.draw(found(rows))).splitlines()
    )


@pytest.mark.parametrize("rows", [ROWS, []], ids=["some", "none"])
@pytest.mark.parametrize("form", ["svg", "png"])
def test_equal_candidates_make_equal_files(form: str, rows: list[Candidate]) -> None:
    picture = shown.draw(found(rows), form)
    assert picture == shown.draw(found(rows), form)
    assert b"<dc:date>" not in picture


def test_names_of_others_stay_text() -> None:
    wild = "</title><script>alert(1)</script>\x00&$_$"
    picture = shown.draw(found([candidate(wild, 4)], wild))
    root = ElementTree.fromstring(picture)
    assert root.find(".//{http://www.w3.org/2000/svg}script") is None
    assert b"script>alert" not in picture
    assert texts(picture).count("</title><script>alert(1)</script>\ufffd&$_$") == 2
