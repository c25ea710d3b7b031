"""The whole graph of a model as data, for pictures."""

from __future__ import annotations

from torch import nn

from asymswap.errors import TraceError
from asymswap.graph.nodes import Node, NodeGraph
from asymswap.graph.sites import find_convs
from asymswap.graph.trace import Trace, node_operation


def read_flow(model: nn.Module, traced: Trace) -> NodeGraph:
    """Every operation of one forward pass in eval mode, or of the largest parts that torch.fx can trace.

    Raises TraceError where it can trace no part that holds a Conv2d.
    """
    firsts = {id(conv): name for name, (conv, _) in find_convs(model).items()}
    nodes: list[Node] = []
    edges: list[tuple[str, str]] = []
    for prefix, graph in traced.graphs.items():
        # Names of the model are asked for in the model, since a copy's convs are others.
        part, root = model.get_submodule(prefix), traced.ghost.get_submodule(prefix)
        for node in graph.nodes:
            if node.op == "get_attr":
                continue
            name = str(node.target) if node.op == "call_module" else node.name
            found = part.get_submodule(name) if node.op == "call_module" else None
            key = f"{prefix}/{node.name}"
            full = f"{prefix}.{name}" if prefix else name
            nodes.append(Node(key, node_operation(root, node), full, firsts.get(id(found))))
            inputs = (source for source in node.all_input_nodes if source.op != "get_attr")
            edges += [(f"{prefix}/{source.name}", key) for source in inputs]
    if not nodes:
        raise TraceError("torch.fx cannot trace any part of the model that holds a Conv2d, so there is no graph of it")
    return NodeGraph(tuple(nodes), tuple(edges))
