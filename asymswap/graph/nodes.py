"""A model's operations and what flows between them, as data: knows no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One operation of a forward pass: a key of its own, its canonical name, and the module's or the node's name.

    `conv` is the first name of the Conv2d that runs there, None where it is another operation.
    """

    key: str
    operation: str
    name: str
    conv: str | None = None


@dataclass(frozen=True)
class NodeGraph:
    """Operations in the order in which they run, and pairs of keys: the output of one is an input of the other."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]
