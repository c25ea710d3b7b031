"""Both networks side by side through the graph of the model, which must be what runs.

We keep only the activations that later nodes still need. Where those of all images fit into the memory limit, they are
kept at every site, and one pass over the images is enough for all layers. Where they do not, as in the first layers of
large networks, the images walk again from the last site at which they fitted, or from the start.

The last conv of a residual branch also corrects the error accumulated on the shortcut: its output is to make the *sum*
right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from asymswap.calibration.gather import Images, PatchSums, choose_positions, outputs_at, patches_of, positions_for
from asymswap.graph.graphs import bind, placeholder_value, whole_graph
from asymswap.graph.trace import node_operation
from asymswap.types import Site
from asymswap.utils.inputs import Inputs, copied
from asymswap.utils.tensors import generator_for, list_tensors, to_meta

Env = dict[fx.Node, Any]

_DAMPING = 0.05  # batch norm scales below this fraction of the channels' average are not undone in full
_SAME = 1e-3  # relative difference of outputs up to which a graph computes what the model does


def walk_graph(
    model: nn.Module, converted: nn.Module, sites: Sequence[Site], images: Images, example: Inputs
) -> Iterator[tuple[str, PatchSums]] | None:
    """Yield each site that the graph calls, in order, with the sums of its patches and target outputs.

    The replacement must be solved before the next site is asked for. None where the model has no graph that computes,
    on the first batch, what the model computes.
    """
    try:
        # The model's own code runs here, with stand-ins, on meta tensors and node by node: it may raise anything.
        walk = _Walk(*whole_graph(model, example), model)
        held = _bytes_held(model, example)
        wrong = not _computes_the_same(walk, model, next(iter(images.batches()), None))
    except Exception:
        wrong = True
    if images.team.sum(torch.tensor(int(wrong))):
        return None
    return _steps(walk, model, converted, sites, images, held)


def _steps(
    walk: _Walk, model: nn.Module, converted: nn.Module, sites: Sequence[Site], images: Images, held: Sequence[int]
) -> Iterator[tuple[str, PatchSums]]:
    by_name = {site.name: site for site in sites}
    limit = images.memory_gib * 2**30 * images.team.size
    kept: list[_Pair] | None = None  # the pairs of all batches at the last site where they fitted

    def pairs(last: bool) -> Iterator[_Pair]:
        """Yield the pairs of all batches where they were kept, or at the start; copies unless it is the last time."""
        if kept is None:
            yield from (_Pair(number, batch) for number, batch in images.batches())
        elif last:
            while kept:
                yield kept.pop(0)
        else:
            # What walks on may change its values in place.
            for pair in kept:
                nodes = {id(node): node for node in (*pair.original, *pair.converted)}
                yield copy.deepcopy(pair, nodes)

    for stop, node in enumerate(walk.order):
        name = str(node.target)
        if node.op != "call_module" or name not in by_name:
            continue
        keep = images.count * held[stop] <= limit
        sums = PatchSums(cast(nn.Conv2d, walk.module(node)), targets=True)
        most = positions_for(by_name[name], images.count)
        here: list[_Pair] = []
        for pair in pairs(last=keep):
            walk.advance(pair, stop, model, converted)
            _add(walk, node, sums, pair, most, generator_for(images.seed, name, pair.number))
            here += [pair] * keep
        kept = here if keep else kept
        yield name, sums


def _add(walk: _Walk, node: fx.Node, sums: PatchSums, pair: _Pair, most: int, generator: torch.Generator) -> None:
    """Add one batch: the patches of the converted network and the target outputs."""
    conv = cast(nn.Conv2d, walk.module(node))
    source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
    target = pair.original[node]
    if node in walk.residuals:
        other, inverse_scale = walk.residuals[node]
        right, wrong = pair.original[other], pair.converted[other]
        if all(isinstance(one, Tensor) and one.shape == target.shape for one in (right, wrong)):
            target = target + (right - wrong) * inverse_scale[None, :, None, None].to(target)
    at = choose_positions(target.shape[-2:], most, generator)
    sums.add(patches_of(conv, pair.converted[source], at), outputs_at(target, conv.groups, at))


def _computes_the_same(walk: _Walk, model: nn.Module, first: tuple[int, Inputs] | None) -> bool:
    """Compare the graph's output with the model's own on the first batch, if this process has one."""
    if first is None:
        return True
    env: Env = {}
    for position, node in enumerate(walk.order):
        last = env[node] = walk.run(node, model, env, first[1])
        walk.forget(env, position)
    ours, theirs = list_tensors(last), list_tensors(model(*copied(first[1])))
    if [one.shape for one in ours] != [other.shape for other in theirs]:
        return False
    for one, other in zip(ours, theirs, strict=True):
        gap, size = (one.double() - other.double()).norm(), other.double().norm()
        if not gap <= _SAME * size and bool(other.isfinite().all()):
            return False
    return True


def _bytes_held(model: nn.Module, example: Inputs) -> list[int]:
    """Return for each node the bytes that a pair of one sample holds there, including the sample itself."""
    ghost = to_meta(example)
    graph, root = whole_graph(model, ghost, on_meta=True)
    walk = _Walk(graph, root, root)
    env: Env = {}
    held = []
    with torch.no_grad(), torch.device("meta"):
        for position, node in enumerate(walk.order):
            before = list_tensors(list(env.values()))
            env[node] = walk.run(node, root, env, ghost)
            held.append(sum(tensor.nbytes for tensor in [*before, *list_tensors((list(env.values()), ghost))]))
            walk.forget(env, position)
    return held


@dataclass
class _Pair:
    """Both networks' values for one batch at one point of the walk.

    The original has run up to and including the node at `position`; the converted one up to the node before, since the
    one at `position` may be a replacement that is still to be solved.
    """

    number: int
    inputs: Inputs
    position: int = -1
    original: Env = field(default_factory=dict)
    converted: Env = field(default_factory=dict)


class _Walk:
    """The nodes of a graph in an order in which each sum's shortcut is known before its branch ends.

    `residuals` are, for the last conv of a branch, the sum's other operand and the inverse scale of the batch norms.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, model: nn.Module) -> None:
        self._root, self._model = root, model
        found = ((node, self._find_residual(node)) for node in graph.nodes)
        self.residuals = {node: residual for node, residual in found if residual is not None}
        self.order = self._schedule(list(graph.nodes))
        place = {node: number for number, node in enumerate(self.order)}
        self._last_read: list[list[fx.Node]] = [[] for _ in self.order]
        for node in self.order:
            readers = [*node.users, *(conv for conv, (other, _) in self.residuals.items() if other is node)]
            self._last_read[max((place[reader] for reader in readers), default=place[node])].append(node)

    def advance(self, pair: _Pair, stop: int, model: nn.Module, converted: nn.Module) -> None:
        """Walk on to the node at position `stop`."""
        for position in range(pair.position, stop):
            # The original's value at the current node is read there: it is forgotten on leaving.
            if position >= 0:
                node = self.order[position]
                pair.converted[node] = self.run(node, converted, pair.converted, pair.inputs)
                self.forget(pair.original, position)
                self.forget(pair.converted, position)
            node = self.order[position + 1]
            pair.original[node] = self.run(node, model, pair.original, pair.inputs)
        pair.position = stop

    def forget(self, env: Env, position: int) -> None:
        """Drop the values that no node after that position reads."""
        for gone in self._last_read[position]:
            env.pop(gone, None)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls."""
        return self._model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def run(self, node: fx.Node, model: nn.Module, env: Env, inputs: Inputs) -> Any:
        """Return the value of one node, with the modules of `model`; the inputs are the model's arguments."""
        args: Any = fx.node.map_arg(node.args, env.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, env.__getitem__)
        if node.op == "placeholder":
            # A copy, since a model may change its input in place.
            return placeholder_value(node, bind(self._model, copied(inputs), {}))
        if node.op == "get_attr":
            # A parameter or buffer of the model, or a constant that tracing has put on the root.
            try:
                return attrgetter(str(node.target))(model)
            except AttributeError:
                return attrgetter(str(node.target))(self._root)
        if node.op == "call_module":
            return model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args[0] if node.op == "output" else cast(Callable[..., Any], node.target)(*args, **kwargs)

    def _find_residual(self, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
        """Follow conv [-> batch norm] -> sum, where nothing else reads a value in between."""
        conv = self.module(node)
        if not isinstance(conv, nn.Conv2d):
            return None
        inverse = torch.ones(conv.out_channels, device=conv.weight.device)
        last = node
        while len(last.users) == 1:
            user = next(iter(last.users))
            op = node_operation(self._model, user)
            if op == "add":
                others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not last]
                # With alpha, or with an operand by name, it is no plain sum of the two.
                return (others[0], inverse) if len(others) == 1 and not user.kwargs else None
            module = self.module(user)
            if op == "batch_norm" and isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                scale = torch.rsqrt(module.running_var + module.eps)
                if module.weight is not None:
                    scale = scale * module.weight.detach()
                inverse = inverse * (scale / (scale.square() + _DAMPING**2 * scale.square().mean()))
            elif op not in ("identity", "dropout"):
                return None
            last = user
        return None

    def _schedule(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Move what a sum's other operand needs in front of the conv that ends the branch, where that is safe."""
        order: list[fx.Node] = []
        placed: set[fx.Node] = set()
        for position, node in enumerate(nodes):
            if node in placed:
                continue
            other = self.residuals[node][0] if node in self.residuals else None
            if other is not None and other not in placed:
                early, waiting = {other}, [other]
                while waiting:
                    new = set(waiting.pop().all_input_nodes) - early - placed
                    early |= new
                    waiting += new
                jumped = nodes[position : max(nodes.index(n) for n in early) + 1]
                # What works in place would be read too early or too late.
                if node in early or any(self._in_place(n) for n in jumped):
                    del self.residuals[node]
                else:
                    moved = [n for n in jumped if n in early]
                    order += moved
                    placed.update(moved)
            order.append(node)
            placed.add(node)
        return order

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return bool(node.kwargs.get("inplace")) or name.endswith("_") or name in ("iadd", "imul", "isub", "setitem")
