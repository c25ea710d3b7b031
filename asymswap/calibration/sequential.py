"""Layer after layer: each replacement is solved for the input that it will really get.

At each swapped site the patches come from the network as converted so far, and the target output from the original one
(Zhang, Zou, He and Sun, 2015, section 3.3, in closed form; see factorize.statistics).

Where the graph of the whole model is what runs, both networks walk through it side by side, with the activations that
later nodes still need. A layer is solved on as many images as have theirs within the memory limit, so that each walks
once; fewer give more positions each. Only where these are very few do others walk again from the start. The last conv
of a residual branch also corrects the error accumulated on the shortcut: its output is to make the *sum* right.

Elsewhere real forward passes are stopped at the current layer: the original runs once for many sites, keeping the
sampled positions of each output alone; the converted network runs for every site, up to it.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from asymswap import replacements
from asymswap.calibration.gather import Images, PatchSums, outputs_at, patches_of, within
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.graphs import bind, placeholder_value, whole_graph
from asymswap.graph.trace import conv_hooks, conv_input, node_operation
from asymswap.types import Plan, Progress, Site, silent
from asymswap.utils.distributed import Team
from asymswap.utils.inputs import Inputs, copied, samples_in
from asymswap.utils.tensors import StopForward, eval_mode, list_tensors

Env = dict[fx.Node, Any]

_DAMPING = 0.05  # batch norm scales below this fraction of the channels' average are not undone in full
_SAME = 1e-3  # relative difference of outputs up to which a graph computes what the model does
_NOT_FINITE = "its input in the converted network is not finite"
_LEAST = 128  # samples for each layer, though their activations do not fit into memory
# Above this fraction of a target output's energy that no kernel explains, patches and targets do not belong together:
# a detector's second stage looks at other boxes in the converted network than in the original.
_UNEXPLAINED = 0.8


@dataclass
class Refined:
    """The sites that were solved, and why some were in one pass."""

    solved: set[str] = field(default_factory=set)
    one_pass: dict[str, str] = field(default_factory=dict)
    by_graph: bool = True


def refine_(
    model: nn.Module,
    converted: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    statistics: Mapping[str, SiteStatistics],
    images: Images,
    example: Inputs,
    progress: Progress = silent,
) -> Refined:
    """Solve every refinable replacement in `converted`, in place, in the order in which the sites run.

    `example` holds arguments of one sample; only sizes and dtypes count, for a process may have no batch. A conv that
    runs more than once in a forward pass keeps its one-pass solution, since its later inputs are not known when it is
    needed first; a replacement that preserves the conv's function is left alone.
    """
    names = refinable(sites, plan)
    swaps = {swap.site: swap for swap in plan.swaps if swap.site in names}
    chosen = {site.name: site for site in sites if site.name in swaps}
    found = Refined()

    def solve_(name: str, sums: PatchSums | str) -> None:
        used = sums if isinstance(sums, str) else _sequential_statistics(statistics[name], sums, images.team)
        if isinstance(used, str):
            found.one_pass[name], used = used, statistics[name]
        found.solved.add(name)
        module, conv = converted.get_submodule(name), cast(nn.Conv2d, model.get_submodule(name))
        kind, settings = replacements.load_swap(swaps[name])
        kind.init_(module, replacements.Original(conv, used), settings)
        images.team.follow_(module)

    with eval_mode(model, converted), torch.inference_mode():
        walk = _walk_graph(model, converted, chosen, images, example)
        found.by_graph = walk is not None
        missed = ((name, "it did not run") for name in swaps if name not in found.solved)
        for name, sums in itertools.chain(walk or _stop_at_sites(model, converted, chosen, images), missed):
            assert name not in found.solved, "every replacement is solved by exactly one way"
            solve_(name, sums)  # on covariances of its own, which end with it: they may take gigabytes
            progress("solving layer by layer", len(found.solved), len(swaps))
    return found


def refinable(sites: Sequence[Site], plan: Plan) -> set[str]:
    """Return the swapped sites that `refine_` solves: those that run once and whose function is not preserved."""
    once = {site.name: site.conv for site in sites if len(site.calls) == 1}
    kinds = {swap.site: replacements.load_swap(swap) for swap in plan.swaps if swap.site in once}
    return {name for name, (kind, settings) in kinds.items() if not kind.preserves(once[name], settings)}


def _sequential_statistics(one_pass: SiteStatistics, sums: PatchSums, team: Team) -> SiteStatistics | str:
    """Return statistics of the converted network's patches from all processes, or why they are of no use."""
    sums.meet(team)
    if not sums.patches:
        return "it did not run"
    mean_GD, cov_GDD = sums.moments()
    mean_GO, cross_GOD = sums.targets()
    bare = replace(one_pass, mean_GD=mean_GD, cov_GDD=cov_GDD, target_mean_GO=mean_GO, patches=sums.patches)
    # The ridge pulls the target kernel towards the conv's own.
    pulled_GOD = cross_GOD + bare.ridge()[:, :, None] * one_pass.target_GOD
    target_GOD: Tensor = torch.linalg.solve(bare.ridged(), pulled_GOD.mT).mT
    if sums.unexplained(target_GOD, cov_GDD) > _UNEXPLAINED:
        return "its inputs in the two networks do not belong together"
    return replace(bare, target_GOD=target_GOD)


_Target = tuple[torch.Size, tuple[Tensor, Tensor], Tensor]
"""The original network at one site for one batch: the size of the input, some positions, and the outputs there."""


def _stop_at_sites(
    model: nn.Module, converted: nn.Module, sites: Mapping[str, Site], images: Images
) -> Iterator[tuple[str, PatchSums | str]]:
    """Yield each site in call order, to be solved before the next one, with its sums or why there are none."""

    def call_order() -> list[str]:
        """Return the convs in the order in which they run on the first batch."""
        seen: list[str] = []
        with conv_hooks(model, lambda name, _, __: seen.append(name)):
            for _, batch in itertools.islice(images.batches(), 1):
                model(*copied(batch))
        return [name for name in dict.fromkeys(seen) if name in sites]

    def targets_of(group: Sequence[Site]) -> dict[str, dict[int, _Target | None]]:
        """Return the targets for each site and batch; None where it runs several times in a forward pass."""
        found: dict[str, dict[int, _Target | None]] = {site.name: {} for site in group}
        number = 0

        def see(name: str, seen: Tensor, output: Tensor) -> None:
            if name in found:
                at = images.positions(sites[name], output, number)
                target = seen.shape, at, outputs_at(output, sites[name].conv.groups, at)
                found[name][number] = None if number in found[name] else target

        with conv_hooks(model, see):
            for number, batch in images.batches():  # noqa: B007  # `see` reads it
                model(*copied(batch))
        return found

    def add_runs(name: str, sums: PatchSums, targets: Mapping[int, _Target | None]) -> str | None:
        """Add the site's patches in the converted network; return why they do not fit the targets, if so."""
        if None in targets.values():
            return "it runs several times in a forward pass"
        inputs: list[Tensor] = []

        def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs.append(conv_input(args, kwargs))
            raise StopForward

        with converted.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True):
            for number, batch in images.batches():
                inputs.clear()
                with suppress(StopForward):
                    converted(*copied(batch))
                target = targets.get(number)
                if [one.shape for one in inputs] != ([] if target is None else [target[0]]):
                    return "it runs on inputs of another size, or another number of times, in the converted network"
                try:
                    if target is not None:
                        _, at, outputs_GON = target
                        sums.add(patches_of(sums.conv, inputs[0], at), outputs_GON)
                except ValueError:
                    return _NOT_FINITE
        return None

    order = [sites[name] for name in images.team.first(call_order)]
    output_bytes = lambda site: 4.0 * images.count * images.each(site) * site.conv.out_channels  # noqa: E731
    for group in within(images.memory_gib * 2**30, order, output_bytes):
        targets = targets_of(group)
        for site in group:
            sums = PatchSums(cast(nn.Conv2d, model.get_submodule(site.name)), targets=True)
            reason = add_runs(site.name, sums, targets.pop(site.name))
            reasons = [one for one in images.team.gather(reason) if one is not None]
            yield site.name, reasons[0] if reasons else sums


def _walk_graph(
    model: nn.Module, converted: nn.Module, sites: Mapping[str, Site], images: Images, example: Inputs
) -> Iterator[tuple[str, PatchSums | str]] | None:
    """Yield each site that the graph calls, to be solved before the next one, with its sums.

    None where the model has no graph that computes, on the first batch, what the model computes.
    """
    held = None
    # The model's own code runs here, with stand-ins and node by node: it may raise anything.
    with suppress(Exception):
        walk = _Walk(*whole_graph(model, example), model)
        held = [walk.bytes_held(batch) for _, batch in itertools.islice(images.batches(), 1)]
    checked = [one for one in images.team.gather(held) if one is not None]
    # The first process has a batch; others may have none.
    return walk.sums(converted, sites, images, checked[0][0]) if len(checked) == images.team.size else None


@dataclass
class _Pair:
    """Both networks' values for one batch."""

    number: int
    inputs: Inputs
    position: int = -1  # of a node
    original: Env = field(default_factory=dict)  # up to that node
    converted: Env = field(default_factory=dict)  # up to the node before: that one may be still to be solved


class _Walk:
    """The nodes of a graph in an order in which each sum's shortcut is known before its branch ends."""

    def __init__(self, graph: fx.Graph, root: nn.Module, model: nn.Module) -> None:
        self._interpreter, self._model = fx.Interpreter(root, garbage_collect_values=False, graph=graph), model
        # For the last conv of a branch, the sum's other operand and the inverse scale of the batch norms.
        found = ((node, self._find_residual(node)) for node in graph.nodes)
        self.residuals = {node: residual for node, residual in found if residual is not None}
        self.order = self._schedule(list(graph.nodes))
        place = {node: number for number, node in enumerate(self.order)}
        # Of two convs that a sum joins only the later one knows the other's output.
        self.residuals = {conv: one for conv, one in self.residuals.items() if place[one[0]] < place[conv]}
        self._last_read: list[list[fx.Node]] = [[] for _ in self.order]
        for node in self.order:
            readers = [*node.users, *(conv for conv, (other, _) in self.residuals.items() if other is node)]
            self._last_read[max((place[reader] for reader in readers), default=place[node])].append(node)

    def bytes_held(self, inputs: Inputs) -> list[float]:
        """Return the bytes that one sample's pair holds at each node; ValueError where the model computes others."""
        env, held = Env(), list[float]()
        for position, node in enumerate(self.order):
            last = env[node] = self._run(node, self._model, env, inputs)
            # Both networks' values, of the converted one not yet this node's.
            values = [*env.values(), *(value for key, value in env.items() if key is not node), inputs]
            held.append(sum(tensor.nbytes for tensor in list_tensors(values)) / samples_in(inputs))
            self._forget(env, position)
        ours, theirs = ([one.double() for one in list_tensors(out)] for out in (last, self._model(*copied(inputs))))
        for one, other in zip(ours, theirs, strict=True):
            close = (one - other).norm() <= _SAME * other.norm() or not other.isfinite().all()
            if one.shape != other.shape or not close:
                raise ValueError("the graph computes something else")
        return held

    def sums(
        self, converted: nn.Module, sites: Mapping[str, Site], images: Images, held: Sequence[float]
    ) -> Iterator[tuple[str, PatchSums | str]]:
        """Yield the sites and their sums, or why there are none; `held` are a pair's bytes of a sample at each node."""
        limit, live = images.memory_gib * 2**30 * images.team.size, list[_Pair]()

        def pairs() -> Iterator[_Pair]:
            """Yield the pairs of all batches, where they were kept or at the start."""
            known = {pair.number for pair in live}
            while live:
                yield live.pop(0)
            yield from (_Pair(number, batch) for number, batch in images.batches() if number not in known)

        for stop, node in enumerate(self.order):
            name, conv = str(node.target), self._module(node)
            if name not in sites or not isinstance(conv, nn.Conv2d):
                continue
            source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
            fitting = limit / max(held[stop], 1.0)
            used = replace(images, count=min(images.count, max(math.ceil(fitting), _LEAST)))
            sums, kept, samples, reason = PatchSums(conv, targets=True), list[_Pair](), 0, ""
            for pair in pairs():
                self._advance(pair, stop, converted)
                target = pair.original[node]
                if node in self.residuals:
                    other, inverse_scale = self.residuals[node]
                    right, wrong = pair.original[other], pair.converted[other]
                    if all(isinstance(one, Tensor) and one.shape == target.shape for one in (right, wrong)):
                        target = target + (right - wrong) * inverse_scale[None, :, None, None].to(target)
                at = used.positions(sites[name], target, pair.number)
                try:
                    sums.add(patches_of(conv, pair.converted[source], at), outputs_at(target, conv.groups, at))
                except ValueError:
                    reason = _NOT_FINITE
                samples += samples_in(pair.inputs) * images.team.size
                kept += [pair] * (samples <= fitting)
                if samples >= used.count:
                    break
            live = kept
            yield name, max(images.team.gather(reason)) or sums

    def _advance(self, pair: _Pair, stop: int, converted: nn.Module) -> None:
        """Walk on to the node at position `stop`."""
        for position in range(pair.position, stop):
            # The original's value at the current node is read there: it is forgotten on leaving.
            if position >= 0:
                node = self.order[position]
                pair.converted[node] = self._run(node, converted, pair.converted, pair.inputs)
                self._forget(pair.original, position)
                self._forget(pair.converted, position)
            node = self.order[position + 1]
            pair.original[node] = self._run(node, self._model, pair.original, pair.inputs)
        pair.position = stop

    def _forget(self, env: Env, position: int) -> None:
        """Drop the values that no node after that position reads."""
        for gone in self._last_read[position]:
            env.pop(gone, None)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _run(self, node: fx.Node, model: nn.Module, env: Env, inputs: Inputs) -> Any:
        """Return the value of one node, with the modules of `model`; the inputs are the model's arguments."""
        if node.op == "placeholder":
            # A copy, since a model may change its input in place.
            return placeholder_value(node, bind(self._model, copied(inputs), {}))
        args: Any = fx.node.map_arg(node.args, env.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, env.__getitem__)
        if node.op == "call_module":
            return model.get_submodule(str(node.target))(*args, **kwargs)
        # What `get_attr` reads is in the root, which has the model's own tensors, and constants of tracing.
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)

    def _find_residual(self, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
        """Follow conv [-> batch norm] -> sum, where nothing else reads a value in between."""
        conv = self._module(node)
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
            module = self._module(user)
            if op == "batch_norm" and isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                scale = torch.rsqrt(module.running_var + module.eps)
                if module.weight is not None:
                    scale = scale * module.weight.detach()
                damped = scale.square() + _DAMPING**2 * scale.square().mean()
                # Branches start at zero in many networks: through them nothing can be corrected.
                inverse = inverse * (scale / damped.clamp(min=torch.finfo(scale.dtype).tiny))
            elif op not in ("identity", "dropout"):
                return None
            last = user
        return None

    def _schedule(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Move what a sum's other operand needs in front of the conv that ends the branch, where that is safe."""
        order: dict[fx.Node, None] = {}
        for position, node in enumerate(nodes):
            other = self.residuals[node][0] if node in self.residuals and node not in order else None
            if other is not None and other not in order:
                early, waiting = {other}, [other]
                while waiting:
                    new = set(waiting.pop().all_input_nodes) - early - order.keys()
                    early |= new
                    waiting += new
                jumped = nodes[position : max(nodes.index(n) for n in early) + 1]
                # What works in place would be read too early or too late.
                if node not in early and not any(self._in_place(n) for n in jumped):
                    order |= dict.fromkeys(n for n in jumped if n in early)
            order[node] = None  # nothing new where it was moved
        return list(order)

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self._module(node), "inplace", False))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return bool(node.kwargs.get("inplace")) or name.endswith("_") or name in ("iadd", "imul", "isub", "setitem")
