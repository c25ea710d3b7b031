"""The whole graph of a model as data, for pictures."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from asymswap.errors import TraceError
from asymswap.graph.nodes import Node, NodeGraph
from asymswap.graph.sites import find_convs
from asymswap.graph.trace import meta_graph, node_operation


def read_flow(model: nn.Module) -> NodeGraph:
    """Every operation of one forward pass in eval mode, or of the largest parts that torch.fx can trace.

    Raises TraceError where it can trace no part that holds a Conv2d.
    """
    firsts = {id(conv): name for name, (conv, _) in find_convs(model).items()}
    nodes: list[Node] = []
    edges: list[tuple[str, str]] = []
    for prefix, part in _parts(model, ""):
        graph, root = meta_graph(part)
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


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The module, or its largest traceable parts that hold a conv, by name."""
    if isinstance(module, nn.Conv2d) or not any(isinstance(child, nn.Conv2d) for child in module.modules()):
        return
    try:
        # torch.fx runs the user's forward with proxies: anything at all may be raised there.
        meta_graph(module)
    except Exception:
        for name, child in module.named_children():
            yield from _parts(child, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, module
