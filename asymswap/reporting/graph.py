"""The graph around the candidates as a picture, laid out by graphviz."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from asymswap.errors import OutputError
from asymswap.graph.nodes import Node, NodeGraph
from asymswap.reporting import words
from asymswap.reporting.drawing import COLOURS, clean
from asymswap.spec import Candidate, Cost

SUFFIXES = (".svg", ".dot")
_STEPS = 2
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
    """The graph in graphviz's language: candidates, what stands next to them, and how much lies between."""
    by_name = {row.site.name: row for row in rows}
    chosen = {node.key for node in graph.nodes if (row := by_name.get(node.conv or "")) and row.reason is None}
    shown = _near(graph, chosen)
    # Every hidden node goes by the name of the heap that it is drawn in.
    heap_of = _heaps(graph, shown)
    lines = [_node(node, by_name, total) for node in graph.nodes if node.key in shown]
    lines += [_heap(name, members) for name, members in _members(graph, heap_of)]
    ends = ((heap_of.get(one, one), heap_of.get(other, other)) for one, other in graph.edges)
    lines += [f"{_quoted(one)} -> {_quoted(other)};" for one, other in dict.fromkeys(ends) if one != other]
    font = 'fontname="Helvetica,Arial,sans-serif", fontsize=11'
    head = [
        "digraph model {",
        f'bgcolor="{COLOURS["paper"][0]}"; ranksep=0.3; nodesep=0.25;',
        f'node [shape=box, style="rounded,filled", {font}, margin="0.12,0.05", height=0.3, '
        f'color="{COLOURS["edge"][0]}", fillcolor="{COLOURS["paper"][0]}", fontcolor="{COLOURS["ink"][0]}"];',
        f'edge [color="{COLOURS["edge"][0]}", arrowsize=0.6];',
    ]
    return "\n".join([*head, *lines, "}", ""])


def _near(graph: NodeGraph, chosen: Collection[str]) -> set[str]:
    """The chosen nodes and all within a few steps of one."""
    beside: dict[str, set[str]] = defaultdict(set)
    for one, other in graph.edges:
        beside[one].add(other)
        beside[other].add(one)
    near = set(chosen)
    for _ in range(_STEPS):
        near |= {other for key in near for other in beside[key]}
    return near


def _heaps(graph: NodeGraph, shown: Collection[str]) -> dict[str, str]:
    """For every node that is not shown, the key of the first of those that it hangs together with."""
    heap_of = {node.key: node.key for node in graph.nodes if node.key not in shown}

    def root(key: str) -> str:
        while heap_of[key] != key:
            key = heap_of[key]
        return key

    order = {node.key: number for number, node in enumerate(graph.nodes)}
    for one, other in graph.edges:
        if one in heap_of and other in heap_of:
            first, second = sorted((root(one), root(other)), key=order.__getitem__)
            heap_of[second] = first
    return {key: root(key) for key in heap_of}


def _members(graph: NodeGraph, heap_of: Mapping[str, str]) -> Iterator[tuple[str, list[Node]]]:
    heaps: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.key in heap_of:
            heaps[heap_of[node.key]].append(node)
    yield from heaps.items()


def _node(node: Node, by_name: Mapping[str, Candidate], total: Cost) -> str:
    row = by_name.get(node.conv or "")
    if row is None:
        label = [node.operation] if node.name == node.operation else [node.operation, node.name]
        return f"{_quoted(node.key)} [label={_lines(label)}];"
    share = words.share(row.site.cost.macs, total.macs)
    label = [node.name, row.site.conv.describe(), f"{share} of the MACs"]
    if row.reason is not None:
        return f"{_quoted(node.key)} [label={_lines(label)}];"
    blue = COLOURS["kind0"][0]
    label.append("candidate" if row.kind == "separable" else f"candidate: {row.kind}")
    return f'{_quoted(node.key)} [label={_lines(label)}, fillcolor="#dce8f8", color="{blue}", penwidth=2];'


def _heap(name: str, members: Sequence[Node]) -> str:
    kinds = ", ".join(f"{count} {operation}" for operation, count in _commonest(members))
    number = len(members)
    label = [members[0].operation, members[0].name] if number == 1 else [f"{number} more operations", kinds]
    return f'{_quoted(name)} [label={_lines(label)}, style="rounded,dashed", fontcolor="{COLOURS["soft"][0]}"];'


def _commonest(members: Iterable[Node]) -> list[tuple[str, int]]:
    return Counter(node.operation for node in members).most_common(3)


def _lines(lines: Iterable[str]) -> str:
    return _quoted("\n".join(dict.fromkeys(lines)))


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
