"""The candidates as a picture."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from asymswap.errors import OutputError
from asymswap.reporting.candidates import check_plot_file, to_picture
from asymswap.types import Call, Candidate, ConvSpec, Cost, Site

SVG = "{http://www.w3.org/2000/svg}"


def candidate(name: str, width: int, reason: str | None = None, kind: str = "separable") -> Candidate:
    conv = ConvSpec(width, width, (3, 3), padding=(1, 1), bias=False)
    return Candidate(Site(name, conv, (Call((8, 8), (8, 8)),)), reason, kind=kind)


ROWS = [candidate("stem", 4, "even rank 1 saves nothing"), candidate("layer1.conv1", 16), candidate("layer1.conv2", 32)]
TOTAL = sum((row.site.cost for row in ROWS), start=Cost(10_000, 5_000))


class TestPlot:
    def test_bars_are_as_high_as_the_shares(self) -> None:
        root = ElementTree.fromstring(to_picture("net", ROWS, TOTAL))
        columns = [group for group in root.iter(f"{SVG}g") if group.get("class") == "column"]
        for panel, costs, whole in (
            (1, [row.site.cost.macs for row in ROWS], TOTAL.macs),
            (2, [row.site.cost.params for row in ROWS], TOTAL.params),
        ):
            heights = [float(column.findall(f"{SVG}rect")[panel].get("height", "")) for column in columns]
            assert heights == pytest.approx([heights[2] * cost / costs[2] for cost in costs], abs=0.01)
            axis = [group for group in root.iter(f"{SVG}g") if group.get("class") == "axis"][panel - 1]
            labels = [text.text or "" for text in axis.findall(f"{SVG}text")]
            top = float(labels[-1].removesuffix(" %")) / 100
            assert heights[2] == pytest.approx(112 * costs[2] / whole / top, abs=0.01)

    def test_candidates_are_marked_by_shape_and_text(self) -> None:
        root = ElementTree.fromstring(to_picture("net", ROWS, TOTAL))
        columns = [group for group in root.iter(f"{SVG}g") if group.get("class") == "column"]
        assert [column.find(f"{SVG}circle") is not None for column in columns] == [False, True, True]
        titles = [column.findtext(f"{SVG}title") or "" for column in columns]
        assert titles[0].endswith("no candidate: even rank 1 saves nothing")
        assert titles[2].split("\n")[:2] == ["layer1.conv2", "32->32 3x3 at 8x8"]
        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert "net: 2 of 3 convs are candidates" in texts
        assert {"candidate", "no candidate", "stem", "conv1", "conv2", "layer1"} <= set(texts)

    def test_kinds_of_a_recipe_are_told_apart(self) -> None:
        rows = [candidate("a", 4, kind="acb"), candidate("b", 4), candidate("c", 4, kind="acb")]
        root = ElementTree.fromstring(to_picture("net", rows, TOTAL))
        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert {"candidate: acb", "candidate", "no candidate"} <= set(texts)
        columns = [group for group in root.iter(f"{SVG}g") if group.get("class") == "column"]
        assert [column.find(f"{SVG}circle") is not None for column in columns] == [True, False, True]

    def test_names_of_others_stay_text(self) -> None:
        wild = "</title><script>alert(1)</script>\x00&"
        text = to_picture(wild, [candidate(wild, 4)], TOTAL)
        root = ElementTree.fromstring(text)
        assert root.find(f".//{SVG}script") is None
        assert "script>alert" not in text

    def test_another_ending_is_refused(self) -> None:
        with pytest.raises(OutputError, match=r"--plot x\.png: the file must end in \.svg"):
            check_plot_file(Path("x.png"))
