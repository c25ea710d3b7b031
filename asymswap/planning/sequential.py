"""Layer after layer: each replacement is solved for the input that it will really get.

The original and the converted network walk through the traced graph side by side. At each swapped site the patches come
from the converted network as it is so far, and the wanted output from the original one (Zhang, Zou, He and Sun, 2015,
section 3.3, in closed form; see factorize.evidence). Where a conv ends the branch of a residual sum, the output is
wanted such that the *sum* comes out right: what the shortcut has gone wrong so far is wanted of the branch on top.

Of the activations only what later nodes still need is kept. Where those of all images fit into the memory limit, they
are kept at every site, and one pass over the images does for all layers. Where they do not, as in the first layers of
large networks, the images walk again from the last site at which they fitted, or from the start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from asymswap import kinds
from asymswap.distributed import ALONE, Team
from asymswap.factorize.evidence import Evidence
from asymswap.graph.trace import meta_graph, node_operation, shared_graph
from asymswap.planning.calibration import Batches, PatchSums, choose_positions, outputs_at, patches_of, positions_for
from asymswap.spec import Plan, Progress, Site, Swap, silent
from asymswap.tensors import eval_mode, generator_for, list_tensors

Env = dict[fx.Node, Any]

_DAMPING = 0.05
"""The scale of a batch norm, relative to the average of its channels, below which undoing it stops to grow."""


def refine_(
    model: nn.Module,
    converted: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    evidence: Mapping[str, Evidence],
    batches: Batches,
    images: int,
    example: Tensor,
    *,
    memory_gib: float = 4.0,
    seed: int = 0,
    team: Team = ALONE,
    progress: Progress = silent,
) -> dict[str, Evidence]:
    """Solve every replacement in `converted` anew, in place, in the order in which the sites run.

    The model must trace whole; `images` is how many the batches of all processes hold, and `example` one of them
    (1xCxHxW), of which only the size and the dtype count: a process may have no batch at all.
    A conv that runs more than once in a forward pass keeps its one-pass solution, since its later inputs are not known
    yet when it is needed first; what is promised to preserve the conv's function is left alone.
    Returns the evidence that each was solved with.
    """
    by_name = {site.name: site for site in sites}
    wanted = refinable(sites, plan)
    swaps = {swap.site: swap for swap in plan.swaps if swap.site in wanted}
    used: dict[str, Evidence] = {}
    walk = _walk_of(model)
    bytes_of_image = _held(model, example)
    limit = memory_gib * 2**30 * team.size
    kept: _Start | _Kept = _Start(batches)
    with eval_mode(model, converted), torch.inference_mode():
        for stop, node in enumerate(walk.order):
            name = walk.site_of(node, swaps)
            if name is None:
                continue
            keep = images * bytes_of_image[stop] <= limit
            sums = PatchSums(cast(nn.Conv2d, walk.module(node)), wanted=True)
            most = positions_for(by_name[name], images)
            here: list[_Pair] = []
            for pair in kept.take() if keep else kept.copies():
                walk.advance(pair, stop, model, converted)
                _add(walk, node, sums, pair, most, generator_for(seed, name, pair.number))
                here += [pair] * keep
            kept = _Kept(here) if keep else kept
            sums.meet(team)
            used[name] = _sequential_evidence(evidence[name], sums)
            _solve_(converted.get_submodule(name), cast(nn.Conv2d, walk.module(node)), swaps[name], used[name], team)
            progress("solving layer by layer", len(used), len(swaps))
    return used


def refinable(sites: Sequence[Site], plan: Plan) -> set[str]:
    """The swapped sites that `refine_` solves: whose input is known in time, and whose function is not promised."""
    by_name = {site.name: site for site in sites}
    found = set()
    for swap in plan.swaps:
        site, settings = by_name[swap.site], kinds.parse_settings(swap.kind, swap.settings)
        if len(site.calls) == 1 and not kinds.load(swap.kind).preserves(site.conv, settings):
            found.add(swap.site)
    return found


def _solve_(module: nn.Module, conv: nn.Conv2d, swap: Swap, evidence: Evidence, team: Team) -> None:
    settings = kinds.parse_settings(swap.kind, swap.settings)
    kinds.load(swap.kind).init_(module, conv, settings, evidence)
    team.follow_(module)


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
    graph, root = meta_graph(model)
    walk = _Walk(graph, root, root)
    env: Env = {}
    held = []
    with torch.no_grad():
        for position, node in enumerate(walk.order):
            before = _bytes(env)
            env[node] = walk.run(node, root, env, example.to("meta"))
            held.append(before + _bytes(env) + _bytes({node: example}))
            walk.forget(env, position)
    return held


def _bytes(env: Env) -> int:
    return sum(tensor.numel() * tensor.element_size() for value in env.values() for tensor in list_tensors(value))


def _walk_of(model: nn.Module) -> _Walk:
    graph, root = shared_graph(model)
    return _Walk(graph, root, model)


def _add(walk: _Walk, node: fx.Node, sums: PatchSums, pair: _Pair, at_most: int, generator: torch.Generator) -> None:
    """Add one batch: the patches of the converted network and the wanted outputs."""
    conv = cast(nn.Conv2d, walk.module(node))
    source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
    wanted = pair.original[node]
    residual = walk.residuals.get(node)
    if residual is not None:
        gap = pair.original[residual.other] - pair.converted[residual.other]
        if gap.shape == wanted.shape:
            wanted = wanted + gap * residual.inverse_scale[None, :, None, None].to(gap)
    at = choose_positions(wanted.shape[-2:], at_most, generator)
    sums.add(patches_of(conv, pair.converted[source], at), outputs_at(wanted, conv.groups, at))


def _sequential_evidence(one_pass: Evidence, sums: PatchSums) -> Evidence:
    """Evidence of the converted network's patches; the ridge pulls the wanted kernel towards the conv's own."""
    mean_GD, cov_GDD = sums.moments()
    mean_GO: Tensor = sums.sum_GO / sums.patches
    cross_GOD = sums.cross_GOD / sums.patches - mean_GO[:, :, None] * mean_GD[:, None, :]
    bare = replace(one_pass, mean_GD=mean_GD, cov_GDD=cov_GDD, target_mean_GO=mean_GO, patches=sums.patches)
    pulled_GOD = cross_GOD + bare.ridge()[:, :, None] * one_pass.target_GOD
    target_GOD: Tensor = torch.linalg.solve(bare.ridged(), pulled_GOD.mT).mT
    return replace(bare, target_GOD=target_GOD)


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
            return images.clone() if not env else (node.args[0] if node.args else None)
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
