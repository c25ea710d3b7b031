"""Reading a model: every `nn.Conv2d` as a `Site`, with calls from a run on meta tensors and neighbours from torch.fx.

Forward hooks reach every Conv2d of every model that runs on meta tensors; torch.fx adds what is beside each conv. Where
the graph of the whole model cannot be made, or is not what runs, the largest parts are read whose graphs are; where
there is none, the sites have no neighbours, and `Trace.by` says so.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.utils import _pair

from asymswap.errors import TraceError, listed
from asymswap.graph.graphs import Recording, believed_parts, recording, traceable_parts
from asymswap.graph.vocabulary import canonical
from asymswap.types import Call, ConvSpec, Neighbour, Site, norm_behind
from asymswap.utils.inputs import Inputs, sizes, with_values
from asymswap.utils.tensors import additions, deep_copy, device_of, hooked, meta_copy, to_meta

Neighbours = tuple[tuple[Neighbour, ...], tuple[Neighbour, ...]]

NORM_ACT = "batch_norm_act"  # the operation of a node that normalises and then does something else, in one module

# What the subclasses of Conv2d in use compute that a plain one does not, by the names of their classes.
_SUBCLASSES = {
    **dict.fromkeys(("Conv2dSame", "Conv2dSameExport", "Conv2dDynamicSamePadding"), "padding computed at run time"),
    **dict.fromkeys(("StdConv2d", "StdConv2dSame", "ConvWS2d", "ConvAWS2d"), "weights standardised at every run"),
    **dict.fromkeys(("ScaledStdConv2d", "ScaledStdConv2dSame"), "weights standardised and scaled at every run"),
    "Conv2dStaticSamePadding": "uneven padding of its own",
    "ParametrizedConv2d": "weights computed again at every run (weight_norm, spectral_norm or your own)",
    "LazyConv2d": "no weights before the model has run once",
}
_SHARES = "shares its weights with "
_FRESH = nn.Conv2d(1, 1, 1, device="meta")


@dataclass(frozen=True)
class Trace:
    """What was read of a model: its sites, and the modules whose graphs are what runs (`""` is the whole model).

    `on_meta` is False where the sizes came from a run with numbers, since what runs depends on them. `notes` name
    convolutions that can't be swapped for reasons outside of a site.
    """

    sites: tuple[Site, ...]
    parts: tuple[str, ...] = ("",)
    on_meta: bool = True
    notes: tuple[str, ...] = ()

    def refusing(self, names: Collection[str], reason: str) -> Self:
        """Return the same with those sites refused that were not yet."""
        sites = (replace(s, refusal=s.refusal or reason) if s.name in names else s for s in self.sites)
        return replace(self, sites=tuple(sites))

    @property
    def by(self) -> str:
        """How it was read: `torch.fx`, `torch.fx in N parts` or `forward hooks`."""
        if self.parts == ("",):
            return "torch.fx"
        parts = f"torch.fx in {len(self.parts)} part" + "s" * (len(self.parts) != 1)
        return parts if self.parts else "forward hooks"


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Read every Conv2d of a model in eval mode; the model itself is neither run nor changed.

    Of the `inputs` of one forward pass only shapes and dtypes matter; raises TraceError if the model can't take them.
    """
    ran, calls, recorded = _run_somehow(model, inputs)
    ghost = meta_copy(model).eval()
    graphs = believed_parts(ran, recorded, ghost)
    neighbours, read_elsewhere = _read_graphs(ghost, graphs)
    neighbours = _alone_in_training(model, inputs, neighbours)
    read_elsewhere |= {weight.rpartition(".")[0] for _, _, weight in recorded.functional_convs if weight is not None}
    sites = make_sites(model, calls, neighbours, read_elsewhere)
    on_meta = all(parameter.is_meta for parameter in ran.parameters())
    return Trace(sites, tuple(graphs), on_meta, tied_note(sites) + recorded.notes())


def check_runs(traced: Trace, model: nn.Module, inputs: Inputs) -> None:
    """Raise TraceError, with what was seen instead, for a model in which no Conv2d was seen to run."""
    if any(site.calls for site in traced.sites):
        return
    name, number = type(model).__name__, len(traced.sites)
    what = f"none of its {number} Conv2d was seen to run" if number else "the model has no Conv2d to swap"
    others = Counter(type(part).__name__ for part in model.modules() if isinstance(part, nn.Conv1d | nn.Conv3d))
    what += "".join(f"; its {count} {kind} are none" for kind, count in others.items() if not number)
    holders = []  # attributes with a network, also of lists and dicts, which torch does not know
    for key, value in {**vars(model), **dict(model.named_children())}.items():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if key != "_modules" and any(isinstance(item, nn.Module) and find_convs(item) for item in values):
            holders.append(key)
    hint = ""
    if isinstance(model, torch.jit.ScriptModule):
        hint = "; it is a ScriptModule, whose layers are compiled: give the module that it was made from"
    elif len(holders) == 1:
        hint = f"; give the network itself, its attribute {holders[0]!r}"
    seen = "; ".join(traced.notes)
    raise TraceError(f"{name} on an input of {sizes(inputs)}: {what}{f' ({seen})' if seen else ''}{hint}")


def read_structure(model: nn.Module) -> tuple[Site, ...]:
    """Return every Conv2d of a model with its neighbours, without calls: nothing is run, and weights may be unset."""
    ghost = meta_copy(model).eval()
    return make_sites(model, {}, *_read_graphs(ghost, traceable_parts(ghost)))


def conv_input(args: Any, kwargs: Any) -> Tensor:
    """Return the input of a conv, or of its replacement: its one argument, which may go by its name."""
    return cast(Tensor, args[0] if args else kwargs["input"])


def conv_hooks(model: nn.Module, see: Callable[[str, Tensor, Tensor], None]) -> AbstractContextManager[None]:
    """While open, `see(name, input, output)` is called at every run of every Conv2d."""
    return hooked(model, find_convs(model), after=lambda name, args, kwargs, y: see(name, conv_input(args, kwargs), y))


def _run_somehow(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, dict[str, list[Call]], Recording]:
    """Run a copy of the model, on meta tensors if possible; return the copy, the calls of its convs, and the record."""

    def run(copied: nn.Module, given: Inputs) -> tuple[nn.Module, dict[str, list[Call]], Recording]:
        calls: dict[str, list[Call]] = defaultdict(list)
        seen = conv_hooks(copied, lambda name, x, output: calls[name].append(Call.of(x.shape, output.shape)))
        with torch.no_grad(), seen, recording(copied, given) as (recorded, copies):
            copied(*copies)
        return copied, dict(calls), recorded

    for device in (nullcontext(), torch.device("meta")):
        # Some make tensors of their own in their forward: those are made on the meta device at the second try.
        with suppress(Exception), device:  # the model's own code runs here: it may raise anything
            return run(meta_copy(model).eval(), to_meta(inputs))
    try:
        # Some look at values (detection, data-dependent control flow): these are run with numbers.
        return run(deep_copy(model).eval(), with_values(inputs, device_of(model)))
    except Exception as error:
        if not find_convs(model):
            raise TraceError("the model has no Conv2d, so there is nothing to swap") from None
        reason, advice = (str(error).strip() or type(error).__name__).splitlines()[0], "give another `input_size=…`"
        dtypes = {weight.dtype: name for name, weight in model.named_parameters() if weight.is_floating_point()}
        if len(dtypes) > 1:
            named = ", ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in dtypes.items())
            advice = f"its layers have several dtypes, {named}: give them one, as with model.float()"
        raise TraceError(f"the model does not run on an input of {sizes(inputs)}: {reason}; {advice}") from error


def _read_graphs(model: nn.Module, parts: Mapping[str, fx.Graph]) -> tuple[dict[str, Neighbours], set[str]]:
    """Return the neighbours of each conv, by its first name, and the convs whose parameters are read without a call."""
    first_names = {id(conv): name for name, (conv, _) in find_convs(model).items()}
    found: dict[str, Neighbours] = {}
    read_elsewhere: set[str] = set()
    for prefix, graph in parts.items():
        root = model.get_submodule(prefix)
        # The module of every call, and the owner of every parameter that is read without one.
        used: dict[fx.Node, nn.Module] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                owner = str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
                used[node] = root.get_submodule(owner)
        runs = Counter(id(module) for module in used.values())
        for node, module in used.items():
            name = first_names.get(id(module))
            if name is not None and node.op == "get_attr":
                read_elsewhere.add(name)
            elif name is not None:
                sides = []
                for forward, known in zip((False, True), found.get(name, ((), ())), strict=True):
                    neighbours = [*_walk(root, runs, node, forward)]
                    if prefix:
                        # A part's inputs and outputs are seams of ours, and more may run a neighbour than it shows.
                        inside = [n for n in neighbours if n.op not in ("input", "output")]
                        neighbours = [replace(n, name=f"{prefix}.{n.name}", alone=False) for n in inside]
                    sides.append(known + tuple(n for n in neighbours if n not in known))
                found[name] = sides[0], sides[1]
    return found, read_elsewhere


def _alone_in_training(model: nn.Module, inputs: Inputs, neighbours: dict[str, Neighbours]) -> dict[str, Neighbours]:
    """Return the same neighbours, with a batch norm `alone` behind its conv only where it is so in train mode, too.

    It is not where the train-time graph uses it or the conv's output elsewhere (auxiliary branches), where the modes of
    the two differ, as given or after `train()`, and where it shares its weights.
    """
    pairs = {name: norm for name, (_, after) in neighbours.items() if (norm := norm_behind(after)) is not None}
    if not pairs:
        return neighbours
    ghost = meta_copy(model)
    with suppress(Exception):
        ghost.train()
    trained, _ = _read_graphs(ghost, traceable_parts(ghost))
    every = [(*module.parameters(recurse=False), *module.buffers(recurse=False)) for module in model.modules()]
    owners = Counter(id(tensor) for tensors in every for tensor in tensors)
    runs: Counter[str] = Counter()
    counting = hooked(ghost, set(pairs.values()), after=lambda name, *_: runs.update([name]))
    # What cannot run in train mode, as without its targets, is judged by its graph and by what ran of it.
    with suppress(Exception), torch.no_grad(), counting:
        ghost(*to_meta(inputs))
    found = dict(neighbours)
    for name, norm in pairs.items():
        modes = [(whole.get_submodule(norm).training, whole.get_submodule(name).training) for whole in (model, ghost)]
        own = model.get_submodule(norm)
        shares = any(owners[id(tensor)] > 1 for tensor in (*own.parameters(), *own.buffers()))
        runs_once = runs[norm] <= 1 and norm_behind(trained.get(name, ((), ()))[1]) == norm
        if shares or not runs_once or any(one != other for one, other in modes):
            before, after = found[name]
            found[name] = before, tuple(replace(n, alone=False) if n.name == norm else n for n in after)
    return found


def _walk(
    root: nn.Module, runs: Mapping[int, int], node: fx.Node, forward: bool, direct: bool = True
) -> Iterator[Neighbour]:
    """Yield the nodes beside `node`; through a batch norm also those behind it. `runs` counts calls, by module id."""
    for other in node.users if forward else node.all_input_nodes:
        operation = node_operation(root, other)
        if other.op != "call_module":
            yield Neighbour(operation, other.name, direct)
        elif operation == NORM_ACT:
            # Two operations in one module: in their order, and nothing that could be taken over.
            name, parts = str(other.target), ["batch_norm", _activation(root.get_submodule(str(other.target)))]
            for place, part in enumerate(parts if forward else reversed(parts)):
                yield Neighbour(part, name, direct and place == 0)
        else:
            name = str(other.target)
            yield Neighbour(operation, name, direct, alone=runs[id(root.get_submodule(name))] == 1)
        if operation in ("batch_norm", "identity"):
            yield from _walk(root, runs, other, forward, direct=False)


def node_operation(root: nn.Module, node: fx.Node) -> str:
    """Return the canonical name of what a node does, with the modules of `root`."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d):
            return "conv"
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return "batch_norm" if _activation(module) == "identity" else NORM_ACT
        return canonical(type(module).__name__)
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    return canonical(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name))


def _activation(module: nn.Module) -> str:
    """Return what a batch norm's class does beside normalising: `identity` for torch's own.

    timm's BatchNormAct2d applies its `act`, maybe an identity; other classes with a forward go by their own name.
    """
    if type(module).forward in {cls.forward for cls in (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)}:
        return "identity"
    act = getattr(module, "act", None)
    return canonical(type(act if isinstance(act, nn.Module) else module).__name__)


def read_conv(conv: nn.Conv2d) -> ConvSpec:
    """Return all fields of a conv, as its forward reads them: channels and kernel are those of its weight."""
    outputs, inputs, kernel = conv.out_channels, conv.in_channels // conv.groups, _pair(conv.kernel_size)
    if not isinstance(conv.weight, nn.parameter.UninitializedParameter):
        outputs, inputs, *kernel = conv.weight.shape
    padding = conv.padding if isinstance(conv.padding, str) else _pair(conv.padding)
    sizes = (kernel[0], kernel[1]), _pair(conv.stride), padding, _pair(conv.dilation)
    dtype = str(conv.weight.dtype).removeprefix("torch.")
    return ConvSpec(inputs * conv.groups, outputs, *sizes, conv.groups, conv.bias is not None, conv.padding_mode, dtype)


def find_convs(model: nn.Module) -> dict[str, tuple[nn.Conv2d, tuple[str, ...]]]:
    """Return every Conv2d by its first name, with further names (aliases) under which the same module is registered."""
    found: dict[int, tuple[nn.Conv2d, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d):
            found.setdefault(id(module), (module, []))[1].append(name)
    return {names[0]: (conv, tuple(names[1:])) for conv, names in found.values()}


def make_sites(
    model: nn.Module, calls: Mapping[str, list[Call]], neighbours: Mapping[str, Neighbours], read_elsewhere: Set[str]
) -> tuple[Site, ...]:
    """Return one Site for each Conv2d: those that run in the order of their first call, then those that never do.

    `calls` is in call order; `read_elsewhere` names convs whose parameters the model reads without calling the conv.
    """
    convs = find_convs(model)
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[_memory(parameter)].append(name)
    sites = []
    for name in [name for name in dict.fromkeys([*calls, *convs]) if name in convs]:
        conv, aliases = convs[name]
        before, after = neighbours.get(name, (None, None))
        seen = tuple(calls.get(name, ()))
        refusal = _refusal(name, conv, owners, read_elsewhere)
        if refusal is None and not all(call.batched for call in seen):
            # Batch norms and calibration need batches, as some kinds do.
            refusal = "is called on one image without a batch (C x H x W); give it 1 x C x H x W"
        sites.append(Site(name, read_conv(conv), seen, aliases, before, after, refusal))
    return tuple(sites)


def _refusal(name: str, conv: nn.Conv2d, owners: Mapping[int, list[str]], read_elsewhere: Set[str]) -> str | None:
    """Return why no kind may replace this module, or None."""
    if type(conv) is not nn.Conv2d:
        known = [_SUBCLASSES[cls.__name__] for cls in type(conv).__mro__ if cls.__name__ in _SUBCLASSES]
        computes = f": {known[0]}" if known else ", a subclass of Conv2d that may compute something else"
        return f"is a {type(conv).__name__}{computes}"
    if name == "":
        return "is the whole model; put it into an nn.Sequential"
    changed = additions(conv, _FRESH)
    for method in ("forward", "_conv_forward", "__call__"):
        # Where a method of nn.Conv2d itself has been replaced, every conv computes something else.
        owner = getattr(nn.Conv2d, method).__module__
        if changed is None and not owner.startswith("torch."):
            changed = f"is an nn.Conv2d whose {method} {owner} has replaced"
    if changed is not None:
        return f"{changed}, which a swap would drop"
    others = [owner for parameter in conv.parameters() for owner in owners[_memory(parameter)] if owner != name]
    if others:
        return f"{_SHARES}{others[0]}"
    if conv.padding_mode != "zeros" and read_conv(conv).pads != tuple(conv._reversed_padding_repeated_twice):
        return f"had its padding changed after construction, which padding_mode = {conv.padding_mode!r} does not see"
    return "has parameters that the model reads without calling it" if name in read_elsewhere else None


def tied_note(sites: Sequence[Site]) -> tuple[str, ...]:
    """Name the convs that share their weights with another layer; nothing where there are none."""
    refused = [(site.name, site.refusal or "") for site in sites]
    tied = [f"{name} with {why.removeprefix(_SHARES)}" for name, why in refused if why.startswith(_SHARES)]
    if not tied:
        return ()
    what = "1 conv shares its weights" if len(tied) == 1 else f"{len(tied)} convs share their weights"
    return (f"{what} with another layer, and nothing is swapped there: {listed(tied, 4)}",)


def _memory(parameter: nn.Parameter) -> int:
    """Return where a parameter's numbers lie; where it has none yet, the id of the parameter itself."""
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.data_ptr()
