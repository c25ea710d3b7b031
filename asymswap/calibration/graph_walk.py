"""Both networks side by side through the graph of the model, which must be what runs.

Of the activations only what later nodes still need is kept. Where those of all images fit into the memory limit, they
are kept at every site, and one pass over the images does for all layers. Where they do not, as in the first layers of
large networks, the images walk again from the last site at which they fitted, or from the start.

Where a conv ends the branch of a residual sum, its output is asked to make the *sum* right: the error accumulated on
the shortcut is corrected by the branch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from asymswap.calibration.gather import Batches, PatchSums, choose_positions, outputs_at, patches_of, positions_for
from asymswap.graph.graphs import bind, meta_graph, placeholder_value, shared_graph
from asymswap.graph.trace import node_operation
from asymswap.types import Site
from asymswap.utils.distributed import Team
from asymswap.utils.tensors import generator_for, list_tensors

Env = dict[fx.Node, Any]

_DAMPING = 0.05
"""The scale of a batch norm, relative to the average of its channels, below which undoing it stops to grow."""

_SAME = 1e-3
"""Relative difference of outputs up to which a graph computes what the model does."""


def walk_graph(
    model: nn.Module,
    converted: nn.Module,
    sites: Sequence[Site],
    batches: Batches,
    images: int,
    example: Tensor,
    memory_gib: float,
    seed: int,
    team: Team,
) -> Iterator[tuple[str, PatchSums]] | None:
    """Yield each site that the graph calls, in order, with the sums of its patches and target outputs.

    The replacement must be solved before the next site is asked for. None where the model has no graph that computes,
    on the first batch, what the model computes.
    """
    try:
        # The model's own code runs here, with stand-ins, on meta tensors and node by node: it may raise anything.
        walk = _walk_of(model, example)
        held = _held(model, example)
        wrong = not _computes_the_same(walk, model, next(iter(batches()), None))
    except Exception:
        wrong = True
    if team.sum(torch.tensor(int(wrong))):
        return None
    limit = memory_gib * 2**30 * team.size
    return _steps(walk, model, converted, {site.name: site for site in sites}, batches, images, held, limit, seed)


def _steps(
    walk: _Walk,
    model: nn.Module,
    converted: nn.Module,
    sites: Mapping[str, Site],
    batches: Batches,
    images: int,
    held: Sequence[int],
    limit: float,
    seed: int,
) -> Iterator[tuple[str, PatchSums]]:
    kept: _Start | _Kept = _Start(batches)
    for stop, node in enumerate(walk.order):
        name = walk.site_of(node, sites)
        if name is None:
            continue
        keep = images * held[stop] <= limit
        sums = PatchSums(cast(nn.Conv2d, walk.module(node)), targets=True)
        most = positions_for(sites[name], images)
        here: list[_Pair] = []
        for pair in kept.take() if keep else kept.copies():
            walk.advance(pair, stop, model, converted)
            _add(walk, node, sums, pair, most, generator_for(seed, name, pair.number))
            here += [pair] * keep
        kept = _Kept(here) if keep else kept
        yield name, sums


def _computes_the_same(walk: _Walk, model: nn.Module, first: tuple[int, Tensor] | None) -> bool:
    """Walk the graph on the first batch, if this process has one, and compare with the model's own output."""
    if first is None:
        return True
    env: Env = {}
    for position, node in enumerate(walk.order):
        env[node] = walk.run(node, model, env, first[1])
        last = env[node]
        walk.forget(env, position)
    ours, theirs = list_tensors(last), list_tensors(model(first[1].clone()))
    if [one.shape for one in ours] != [other.shape for other in theirs]:
        return False
    gaps = [(one.double() - other.double()).norm() for one, other in zip(ours, theirs, strict=True)]
    return all(
        bool(gap <= _SAME * other.double().norm()) or not bool(other.isfinite().all())
        for gap, other in zip(gaps, theirs, strict=True)
    )


@dataclass
class _Pair:
    """Both networks' values for one batch, somewhere on their way.

    The original has run up to the node at `position`, that one included; the converted one up to the node before it,
    since that at `position` may be a replacement that is still to be solved.
    """

    number: int
    images: Tensor
    position: int = -1
    original: Env = field(default_factory=dict)
    converted: Env = field(default_factory=dict)


class _Start:
    """The pairs of all batches before the first node."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def copies(self) -> Iterator[_Pair]:
        """A pair for each batch."""
        return (_Pair(number, images) for number, images in self._batches())

    take = copies


class _Kept:
    """The pairs of all batches at one site."""

    def __init__(self, pairs: list[_Pair]) -> None:
        self._pairs = pairs

    def take(self) -> Iterator[_Pair]:
        """The pairs themselves, one after the other; none is left."""
        while self._pairs:
            yield self._pairs.pop(0)

    def copies(self) -> Iterator[_Pair]:
        """Copies of the pairs: what walks on may change its values in place."""
        return (copy.deepcopy(pair, {id(node): node for node in _nodes(pair)}) for pair in self._pairs)


def _nodes(pair: _Pair) -> list[fx.Node]:
    return [*pair.original, *pair.converted]


def _held(model: nn.Module, example: Tensor) -> list[int]:
    """For each node, the bytes that a pair of one image holds there, the image itself (1xCxHxW) included."""
    ghost = example.to("meta")
    graph, root = meta_graph(model, (ghost,))
    walk = _Walk(graph, root, root)
    env: Env = {}
    held = []
    with torch.no_grad(), torch.device("meta"):
        for position, node in enumerate(walk.order):
            before = _bytes(env)
            env[node] = walk.run(node, root, env, ghost)
            held.append(before + _bytes(env) + _bytes({node: ghost}))
            walk.forget(env, position)
    return held


def _bytes(env: Env) -> int:
    return sum(tensor.numel() * tensor.element_size() for value in env.values() for tensor in list_tensors(value))


def _walk_of(model: nn.Module, example: Tensor) -> _Walk:
    graph, root = shared_graph(model, (example,))
    return _Walk(graph, root, model)


def _add(walk: _Walk, node: fx.Node, sums: PatchSums, pair: _Pair, at_most: int, generator: torch.Generator) -> None:
    """Add one batch: the patches of the converted network and the target outputs."""
    conv = cast(nn.Conv2d, walk.module(node))
    source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
    target = pair.original[node]
    residual = walk.residuals.get(node)
    if residual is not None:
        right, wrong = pair.original[residual.other], pair.converted[residual.other]
        if all(isinstance(one, Tensor) and one.shape == target.shape for one in (right, wrong)):
            target = target + (right - wrong) * residual.inverse_scale[None, :, None, None].to(target)
    at = choose_positions(target.shape[-2:], at_most, generator)
    sums.add(patches_of(conv, pair.converted[source], at), outputs_at(target, conv.groups, at))


@dataclass(frozen=True)
class _Residual:
    """The other operand of the sum that a conv's branch ends in, and what undoes the batch norm before it."""

    other: fx.Node
    inverse_scale: Tensor


class _Walk:
    """The nodes of a graph in an order in which each sum's shortcut is known before its branch ends."""

    def __init__(self, graph: fx.Graph, root: nn.Module, model: nn.Module) -> None:
        self._root = root
        self._model = model
        found = {node: self._find_residual(node) for node in graph.nodes}
        self.residuals: dict[fx.Node, _Residual] = {node: value for node, value in found.items() if value is not None}
        self.order = self._schedule(list(graph.nodes))
        place = {node: number for number, node in enumerate(self.order)}
        self._last_read: list[list[fx.Node]] = [[] for _ in self.order]
        for node in self.order:
            readers = [*node.users, *(conv for conv, residual in self.residuals.items() if residual.other is node)]
            self._last_read[max((place[reader] for reader in readers), default=place[node])].append(node)

    def advance(self, pair: _Pair, stop: int, model: nn.Module, converted: nn.Module) -> None:
        """Walk on to the node at position `stop`."""
        for position in range(pair.position, stop):
            # What the original has of the node where it stands is still read there: it is forgotten on leaving.
            if position >= 0:
                self._step(pair.converted, position, converted, pair.images)
                self.forget(pair.original, position)
                self.forget(pair.converted, position)
            self._step(pair.original, position + 1, model, pair.images)
        pair.position = stop

    def _step(self, env: Env, position: int, model: nn.Module, images: Tensor) -> None:
        node = self.order[position]
        env[node] = self.run(node, model, env, images)

    def forget(self, env: Env, position: int) -> None:
        """Drop the values that no node after that position reads."""
        for gone in self._last_read[position]:
            env.pop(gone, None)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self._model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def site_of(self, node: fx.Node, names: Mapping[str, Any]) -> str | None:
        """The name of the swapped site that a node calls."""
        return str(node.target) if node.op == "call_module" and str(node.target) in names else None

    def run(self, node: fx.Node, model: nn.Module, env: Env, images: Tensor) -> Any:
        """The value of one node, with the modules of `model`; the images are the model's first argument."""
        args: Any = fx.node.map_arg(node.args, env.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, env.__getitem__)
        if node.op == "placeholder":
            # A copy, since a model may change its input in place.
            return placeholder_value(node, bind(self._model, (images.clone(),), {}))
        if node.op == "get_attr":
            return _attribute(model, self._root, str(node.target))
        if node.op == "call_module":
            return model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args[0] if node.op == "output" else cast(Callable[..., Any], node.target)(*args, **kwargs)

    def _find_residual(self, node: fx.Node) -> _Residual | None:
        """Follow conv [-> batch norm] -> sum, where nobody else reads what is in between."""
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
                return _Residual(others[0], inverse) if len(others) == 1 and not user.kwargs else None
            module = self.module(user)
            if op == "batch_norm" and isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                inverse = inverse * _undo(module)
            elif op not in ("identity", "dropout"):
                return None
            last = user
        return None

    def _schedule(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Bring what a sum's other operand needs before the conv that ends the branch, where that is safe."""
        order: list[fx.Node] = []
        placed: set[fx.Node] = set()
        for position, node in enumerate(nodes):
            if node in placed:
                continue
            residual = self.residuals.get(node)
            if residual is not None and residual.other not in placed:
                early = _needed(residual.other, placed)
                jumped = nodes[position : max(nodes.index(n) for n in early) + 1]
                # Something that works in place would be read before it has happened, or after.
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


def _needed(node: fx.Node, placed: set[fx.Node]) -> set[fx.Node]:
    """A node and all that it depends on, but what is there already."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in found and one not in placed:
            found.add(one)
            waiting += one.all_input_nodes
    return found


def _undo(norm: nn.BatchNorm2d) -> Tensor:
    """The inverse of a batch norm's scale in eval mode, damped where the scale is next to nothing."""
    scale = torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    return scale / (scale.square() + _DAMPING**2 * scale.square().mean())


def _attribute(model: nn.Module, root: nn.Module, target: str) -> Any:
    """A parameter or buffer of the model, or a constant that tracing has put on its root."""
    for owner in (model, root):
        value: Any = owner
        try:
            for part in target.split("."):
                value = getattr(value, part)
            return value
        except AttributeError:
            continue
    raise AssertionError(f"the traced graph reads {target}, which is nowhere")
