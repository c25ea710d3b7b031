"""The graph around the candidates as a picture, laid out by graphviz."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from asymswap.errors import OutputError
from asymswap.graph.nodes import Node, NodeGraph
from asymswap.reporting import words
from asymswap.reporting.drawing import COLOURS, clean
from asymswap.spec import Candidate, Cost

SUFFIXES = (".svg", ".dot")
_STEPS = 2
_LINES = 6
_SECONDS = 120.0


def check_graph_file(path: Path) -> None:
    """Raise OutputError for another ending, or where graphviz is needed and not there."""
    if path.suffix not in SUFFIXES:
        raise OutputError(f"--graph {path}: the file must end in {' or '.join(SUFFIXES)}")
    if path.suffix == ".svg" and shutil.which("dot") is None:
        raise OutputError(
            f"--graph {path} needs graphviz, whose command dot is not installed (apt install graphviz, brew install "
            f"graphviz); or write {path.with_suffix('.dot')} and draw it elsewhere"
        )


def graph_text(path: Path, graph: NodeGraph, rows: Sequence[Candidate], total: Cost) -> str:
    """What the file is to hold: graphviz's language, or the picture made of it."""
    dot = to_dot(graph, rows, total)
    return dot if path.suffix == ".dot" else _drawn(dot)


def to_dot(graph: NodeGraph, rows: Sequence[Candidate], total: Cost) -> str:
    """The graph in graphviz's language: the candidates and what stands within a few steps of one.

    Operations that follow each other without a fork are one box, and so count as one step.
    """
    by_name = {row.site.name: row for row in rows}
    chosen = {node.key for node in graph.nodes if (row := by_name.get(node.conv or "")) and row.reason is None}
    boxes = _boxes(graph, chosen)
    box_of = {node.key: box[0].key for box in boxes for node in box}
    ends = ((box_of[one], box_of[other]) for one, other in graph.edges)
    arrows = [(one, other) for one, other in dict.fromkeys(ends) if one != other]
    near = _near(arrows, chosen)
    lines = [_box(box, by_name, total, box[0].key in chosen) for box in boxes if box[0].key in near]
    lines += dict.fromkeys(line for arrow in arrows for line in _arrow(*arrow, near))
    font = 'fontname="Helvetica,Arial,sans-serif", fontsize=11'
    head = [
        "digraph model {",
        f'bgcolor="{COLOURS["paper"][0]}"; ranksep=0.3; nodesep=0.25;',
        f'node [shape=box, style="rounded,filled", {font}, margin="0.12,0.05", height=0.3, '
        f'color="{COLOURS["edge"][0]}", fillcolor="{COLOURS["paper"][0]}", fontcolor="{COLOURS["ink"][0]}"];',
        f'edge [color="{COLOURS["edge"][0]}", arrowsize=0.6];',
    ]
    return "\n".join([*head, *lines, "}", ""])


def _boxes(graph: NodeGraph, chosen: Collection[str]) -> list[list[Node]]:
    """The nodes in their order; one joins the box of the node before it where neither forks, nor is chosen."""
    feeds: dict[str, list[str]] = defaultdict(list)
    follows: dict[str, list[str]] = defaultdict(list)
    for one, other in graph.edges:
        feeds[other].append(one)
        follows[one].append(other)
    boxes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        before = feeds[node.key]
        joins = len(before) == 1 and len(follows[before[0]]) == 1 and not {node.key, before[0]} & set(chosen)
        box = boxes[before[0]] if joins else []
        box.append(node)
        boxes[node.key] = box
    return [box for key, box in boxes.items() if box[0].key == key]


def _near(arrows: Iterable[tuple[str, str]], chosen: Collection[str]) -> set[str]:
    """The chosen boxes and all within a few steps of one."""
    beside: dict[str, set[str]] = defaultdict(set)
    for one, other in arrows:
        beside[one].add(other)
        beside[other].add(one)
    near = set(chosen)
    for _ in range(_STEPS):
        near |= {other for key in near for other in beside[key]}
    return near


def _arrow(one: str, other: str, near: Collection[str]) -> list[str]:
    """What is drawn of an arrow: where it leaves what is shown it comes from, or goes to, three dots."""
    if one not in near and other not in near:
        return []
    if one in near and other in near:
        return [f"{_quoted(one)} -> {_quoted(other)};"]
    dots = f"{other} before" if other in near else f"{one} after"
    ends = (dots, other) if other in near else (one, dots)
    return [f'{_quoted(dots)} [label="…", shape=plaintext, style=""];', " -> ".join(map(_quoted, ends)) + ";"]


def _box(box: Sequence[Node], by_name: Mapping[str, Candidate], total: Cost, chosen: bool) -> str:
    said = [_said(node, by_name) for node in box]
    if len(said) > _LINES:
        half = _LINES // 2
        said = [*said[:half], f"… {len(said) - 2 * half} more", *said[-half:]]
    if not chosen:
        return f"{_quoted(box[0].key)} [label={_lines(said)}];"
    row = by_name[box[0].conv or ""]
    said += [
        f"{words.share(row.site.cost.macs, total.macs)} of the MACs",
        "candidate" if row.kind == "separable" else f"candidate: {row.kind}",
    ]
    blue = COLOURS["kind0"][0]
    return f'{_quoted(box[0].key)} [label={_lines(said)}, fillcolor="#dce8f8", color="{blue}", penwidth=2];'


def _said(node: Node, by_name: Mapping[str, Candidate]) -> str:
    row = by_name.get(node.conv or "")
    if row is not None:
        return f"{node.name}  {row.site.conv.describe()}"
    return node.operation if node.name == node.operation else f"{node.operation}  {node.name}"


def _lines(lines: Iterable[str]) -> str:
    return _quoted("\n".join(lines))


def _quoted(text: str) -> str:
    escaped = clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _drawn(dot: str) -> str:
    try:
        done = subprocess.run(["dot", "-Tsvg"], input=dot, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise OutputError(f"graphviz has not laid the graph out in {_SECONDS:.0f} s; write a .dot file") from None
    except OSError as error:
        raise OutputError(f"graphviz cannot be run: {error.strerror}; write a .dot file") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[:200]
        raise OutputError(f"graphviz has failed ({said}); write a .dot file")
    return done.stdout
