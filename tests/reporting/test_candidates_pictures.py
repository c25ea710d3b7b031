"""The candidates as a picture, and the graph around them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from asymswap.errors import OutputError
from asymswap.graph.nodes import Node, NodeGraph
from asymswap.reporting.candidates import check_plot_file, to_picture
from asymswap.reporting.graph import check_graph_file, graph_text, to_dot
from asymswap.spec import Call, Candidate, ConvSpec, Cost, Site

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


def chain(*operations: str) -> NodeGraph:
    """Nodes one after the other; those called conv:NAME are convs."""
    nodes = []
    for number, operation in enumerate(operations):
        kind, _, name = operation.partition(":")
        nodes.append(Node(str(number), kind, name or kind, name or None))
    return NodeGraph(tuple(nodes), tuple((str(n), str(n + 1)) for n in range(len(operations) - 1)))


LONG = chain("input", "pool", "conv:layer1.conv1", "batch_norm", "relu", "linear", "output")


def edges(dot: str) -> set[tuple[str, str]]:
    return set(re.findall(r'"([^"]*)" -> "([^"]*)"', dot))


def labels(dot: str) -> dict[str, str]:
    return dict(re.findall(r'^"([^"]*)" \[label="([^"]*)"', dot, re.MULTILINE))


class TestGraph:
    def test_operations_in_a_row_are_one_box_and_candidates_stand_alone(self) -> None:
        dot = to_dot(LONG, ROWS, TOTAL)
        assert edges(dot) == {("0", "2"), ("2", "3")}
        assert labels(dot) == {
            "0": r"input\npool",
            "2": r"layer1.conv1  16->16 3x3\n19.5 % of the MACs\ncandidate",
            "3": r"batch_norm\nrelu\nlinear\noutput",
        }

    def test_a_long_row_is_shortened(self) -> None:
        dot = to_dot(chain("conv:layer1.conv1", *(f"op{number}" for number in range(9))), ROWS, TOTAL)
        assert labels(dot)["1"] == r"op0\nop1\nop2\n… 3 more\nop6\nop7\nop8"

    def test_forks_stay_and_what_is_far_is_three_dots(self) -> None:
        """Four blocks with a shortcut each, the candidate in the first."""
        nodes, arrows = [Node("in", "input", "input")], []
        last = "in"
        for number in range(4):
            conv = "layer1.conv1" if number == 0 else f"other{number}"
            nodes += [Node(f"c{number}", "conv", conv, conv), Node(f"a{number}", "add", f"add{number}")]
            arrows += [(last, f"c{number}"), (f"c{number}", f"a{number}"), (last, f"a{number}")]
            last = f"a{number}"
        dot = to_dot(NodeGraph(tuple(nodes), tuple(arrows)), ROWS, TOTAL)
        assert edges(dot) == {
            ("in", "c0"), ("in", "a0"), ("c0", "a0"), ("a0", "c1"), ("a0", "a1"), ("c1", "a1"), ("a1", "a1 after"),
        }  # fmt: skip
        assert labels(dot)["a1 after"] == "…"

    def test_no_arrow_goes_back(self) -> None:
        """Boxes are made so that the order of the network is that of the picture."""
        order = {node.key: number for number, node in enumerate(LONG.nodes)}
        for one, other in edges(to_dot(LONG, ROWS, TOTAL)):
            assert order[one] < order[other]

    def test_names_of_others_stay_text(self) -> None:
        wild = 'a"];\nb [label="\\'
        graph = NodeGraph((Node("0", "conv", wild, wild),), ())
        dot = to_dot(graph, [candidate(wild, 4)], TOTAL)
        assert '"a\\"];\\nb [label=\\"\\\\  4->4 3x3' in dot

    @pytest.mark.programs
    @pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed (apt install graphviz)")
    def test_graphviz_draws_it(self, tmp_path: Path) -> None:
        wild = 'a"];<b>&\\N'
        rows = [*ROWS, candidate(wild, 4)]
        graph = NodeGraph((*LONG.nodes, Node("w", "conv", wild, wild)), (*LONG.edges, ("5", "w")))
        root = ElementTree.fromstring(graph_text(tmp_path / "g.svg", graph, rows, TOTAL))
        texts = [text.text for text in root.iter(f"{SVG}text")]
        # graphviz draws two spaces as one that is wide and one that is not.
        plain = [" ".join((text or "").split()) for text in texts]
        assert "layer1.conv1 16->16 3x3" in plain
        assert f"{wild} 4->4 3x3" in plain
        assert texts.count("candidate") == 2

    def test_without_graphviz_it_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.which", lambda name: None)
        check_graph_file(Path("g.dot"))
        with pytest.raises(OutputError, match=r"--graph g\.svg needs graphviz.*apt install graphviz.*write g\.dot"):
            check_graph_file(Path("g.svg"))
        with pytest.raises(OutputError, match=r"--graph g\.png: the file must end in \.svg or \.dot"):
            check_graph_file(Path("g.png"))

    @pytest.mark.parametrize(
        ("script", "said"),
        [
            ("echo no good >&2; exit 3", r"graphviz has failed \(no good\); write a \.dot file"),
            (None, r"cannot be run"),
        ],
    )
    def test_a_graphviz_that_fails_is_told(
        self, script: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dot = tmp_path / "dot"
        dot.write_text(f"#!/bin/sh\n{script}\n" if script else "")
        dot.chmod(0o755 if script else 0o644)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if script else str(tmp_path))
        with pytest.raises(OutputError, match=said):
            graph_text(tmp_path / "g.svg", LONG, ROWS, TOTAL)
