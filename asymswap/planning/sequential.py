"""Layer after layer: each replacement is solved for the input that it will really get.

The original and the converted network walk through the traced graph side by side, all images at once, so that one
pass is enough for all layers. At each swapped site the patches come from the converted network as it is so far, and
the wanted output from the original one (Zhang, Zou, He and Sun, 2015, section 3.3, in closed form; see
factorize.evidence). Where a conv ends the branch of a residual sum, the output is wanted such that the *sum* comes
out right: what the shortcut has gone wrong so far is wanted of the branch on top.

Only what later nodes still need is kept of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from asymswap import kinds
from asymswap.factorize.evidence import Evidence
from asymswap.graph.trace import meta_graph, node_operation, shared_graph
from asymswap.planning.calibration import PatchSums, choose_positions, outputs_at, patches_of, positions_for
from asymswap.spec import Plan, Progress, Site, silent
from asymswap.tensors import eval_mode, list_tensors

Env = dict[fx.Node, Any]


def images_that_fit(model: nn.Module, example: Tensor, memory_gib: float) -> int:
    """How many images can walk through both networks at once within the memory; `example` is one of them, 1xCxHxW."""
    graph, root = meta_graph(model)
    largest = held = 0
    env: Env = {}
    walk = _Walk(graph, root, root)
    with torch.no_grad():
        for node in walk.order:
            env[node] = walk.run(node, root, env, example.to("meta"))
            for gone in walk.last_used.get(node, ()):
                env.pop(gone, None)
            held = sum(
                tensor.numel() * tensor.element_size() for value in env.values() for tensor in list_tensors(value)
            )
            largest = max(largest, held)
    return max(1, int(memory_gib * 2**30 / (2 * max(largest, 1))))


def refine_(
    model: nn.Module,
    converted: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    evidence: Mapping[str, Evidence],
    batches: Iterable[Tensor],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Evidence]:
    """Solve every replacement in `converted` anew, in place, in the order in which the sites run.

    The model must trace whole. A conv that runs more than once in a forward pass keeps its one-pass solution, since its
    later inputs are not known yet when it is needed first. Returns the evidence that each was solved with.
    """
    graph, root = shared_graph(model)
    walk = _Walk(graph, root, model)
    by_name = {site.name: site for site in sites}
    swaps = {swap.site: swap for swap in plan.swaps if len(by_name[swap.site].calls) == 1}
    inputs = list(batches)
    originals: list[Env] = [{} for _ in inputs]
    changed: list[Env] = [{} for _ in inputs]
    used: dict[str, Evidence] = {}
    generator = torch.Generator().manual_seed(seed)
    images = sum(len(batch) for batch in inputs)
    with eval_mode(model, converted), torch.inference_mode():
        for node in walk.order:
            for env, batch in zip(originals, inputs, strict=True):
                env[node] = walk.run(node, model, env, batch)
            name = walk.site_of(node, swaps)
            if name is not None:
                site = by_name[name]
                at_most = positions_for(site, images)
                sums = PatchSums()
                for original, env in zip(originals, changed, strict=True):
                    _add(walk, node, sums, original, env, at_most, generator)
                used[name] = _sequential_evidence(evidence[name], sums)
                swap = swaps[name]
                settings = kinds.parse_settings(swap.kind, swap.settings)
                conv = cast(nn.Conv2d, model.get_submodule(name))
                kinds.load(swap.kind).init_(converted.get_submodule(name), conv, settings, used[name])
                progress("solving layer by layer", len(used), len(swaps))
            for env, batch in zip(changed, inputs, strict=True):
                env[node] = walk.run(node, converted, env, batch)
            for env in (*originals, *changed):
                for gone in walk.last_used.get(node, ()):
                    env.pop(gone, None)
    return used


def _add(
    walk: _Walk, node: fx.Node, sums: PatchSums, original: Env, env: Env, at_most: int, generator: torch.Generator
) -> None:
    """Add one batch: the patches of the converted network and the wanted outputs."""
    conv = cast(nn.Conv2d, walk.module(node))
    source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
    wanted = original[node]
    residual = walk.residuals.get(node)
    if residual is not None:
        gap = original[residual.other] - env[residual.other]
        if gap.shape == wanted.shape:
            wanted = wanted + gap * residual.inverse_scale[None, :, None, None].to(gap)
    at = choose_positions(wanted.shape[-2:], at_most, generator)
    sums.add(patches_of(conv, env[source], at), outputs_at(wanted, conv.groups, at))


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
        self.last_used: dict[fx.Node, list[fx.Node]] = {}
        for node in self.order:
            readers = [*node.users, *(conv for conv, residual in self.residuals.items() if residual.other is node)]
            last = max(readers, key=place.__getitem__, default=node)
            self.last_used.setdefault(last, []).append(node)

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
                return _Residual(others[0], inverse) if len(others) == 1 else None
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
    return scale / (scale.square() + (0.05**2) * scale.square().mean())


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
