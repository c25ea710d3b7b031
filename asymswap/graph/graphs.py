"""Graphs by torch.fx, believed only where they are what runs.

torch.fx follows one way through a forward with stand-ins for tensors, and may take another branch than a real run does:
`isinstance(x, Tensor)` is false for a stand-in, `x is None` is false for an argument that nobody gives. So arguments
that are no tensors keep the values that they have in a recorded run, and a graph counts only if its operations, walked
on the arguments of each recorded call, are the operations of that call.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import copy_with, list_tensors, map_tensors, meta_copy

Operation = tuple[str, tuple[tuple[int, ...], ...], tuple[str, ...]]
"""The name of a function of torch, the shapes of the tensors that it returned, and which of the model's own it read."""

_MARK = "_asymswap_depends_on_input"


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: its arguments on the meta device, and which operations of the recording it did."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operations: slice


@dataclass
class Recording:
    """The operations of a run that depend on its input, in order, and the calls of each module, by the module's id."""

    operations: list[Operation] = field(default_factory=list)
    calls: dict[int, list[ModuleCall]] = field(default_factory=lambda: defaultdict(list))


@contextmanager
def recording(model: nn.Module, inputs: Inputs) -> Iterator[tuple[Recording, Inputs]]:
    """Record what the model does with the inputs that are given back, a copy of `inputs`, while this is open."""
    found = Recording()
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | torch.jit.ScriptModule) or not _holds_conv(module):
            continue
        begun: list[tuple[tuple[Any, ...], Any, int]] = []

        def enter(_: nn.Module, args: Any, kwargs: Any, begun: list[Any] = begun) -> None:
            begun.append((map_tensors(args, _ghost), map_tensors(kwargs, _ghost), len(found.operations)))

        def leave(module: nn.Module, *_: Any, begun: list[Any] = begun) -> None:
            args, kwargs, start = begun.pop()
            found.calls[id(module)].append(ModuleCall(args, kwargs, slice(start, len(found.operations))))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with _Recorder(found.operations, _names(model)):
            yield found, tuple(map_tensors(argument, _marked_copy) for argument in inputs)
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchFunctionMode):
    """Notes every function of torch that is given a tensor which depends on the marked ones."""

    def __init__(self, operations: list[Operation], names: Mapping[int, str]) -> None:
        super().__init__()
        self._operations, self._names = operations, names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list_tensors((args, kwargs))
        depends = any(hasattr(tensor, _MARK) for tensor in given)
        result = func(*args, **kwargs)
        if depends:
            made = list_tensors(result)
            name = getattr(func, "__name__", str(func))
            if made:
                read = tuple(self._names[id(tensor)] for tensor in given if id(tensor) in self._names)
                self._operations.append((_plain(name), tuple(tuple(tensor.shape) for tensor in made), read))
            # What is written to depends on the input from then on.
            written = list_tensors(args[0]) if _works_in_place(name) else []
            for tensor in (*made, *written):
                if not isinstance(tensor, nn.Parameter):
                    setattr(tensor, _MARK, True)
        return result


def _names(model: nn.Module) -> dict[int, str]:
    """The names of a model's parameters and buffers by their ids."""
    return {id(tensor): name for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())}


def _plain(name: str) -> str:
    """The name without the marks of working in place: a stand-in makes `x = x + y` of `x += y`."""
    bare = name.strip("_")
    return bare[1:] if name.startswith("__i") and _works_in_place(name) else bare


def _works_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__invert__"))
    return name.endswith("_")


def _ghost(tensor: Tensor) -> Tensor:
    """The tensor on the meta device, with its mark."""
    with torch._C.DisableTorchFunction():
        ghost = torch.empty_like(tensor, device="meta")
    if hasattr(tensor, _MARK):
        setattr(ghost, _MARK, True)
    return ghost


def _marked_copy(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        marked = tensor.detach().clone()
    setattr(marked, _MARK, True)
    return marked


def _holds_conv(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


class _Tracer(fx.Tracer):
    """Leaves are torch.nn layers, anything that is a Conv2d or a batch norm, and torchvision's operators."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d | nn.modules.batchnorm._NormBase):
            return True
        if type(m).__module__.startswith("torchvision.ops"):
            # Some of "torchvision.ops" are containers (SqueezeExcitation): those are walked through to their convs.
            return not any(isinstance(child, nn.Conv2d) for child in m.modules())
        return super().is_leaf_module(m, module_qualified_name)


def bind(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the module's forward by name, defaults included."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def trace_graph(module: nn.Module, arguments: Mapping[str, Any]) -> fx.Graph:
    """The module's graph; numbers, text, truth values and None among its forward's arguments are taken as constants.

    Raises whatever torch.fx, which runs the module's own code, raises.
    """
    constants = {
        name: value for name, value in arguments.items() if value is None or type(value) in (bool, int, float, str)
    }
    return _Tracer().trace(module, constants or None)


def placeholder_value(node: fx.Node, arguments: Mapping[str, Any]) -> Any:
    """The value of a graph's placeholder, from the arguments of `bind`."""
    name = str(node.target).lstrip("*")
    return arguments[name] if name in arguments else arguments[re.sub(r"_\d+$", "", name)]


class _Walk(fx.Interpreter):
    """Runs a graph with the modules of `root`."""

    def __init__(self, root: nn.Module, graph: fx.Graph, arguments: Mapping[str, Any]) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self._arguments = arguments

    def run_node(self, n: fx.Node) -> Any:
        return placeholder_value(n, self._arguments) if n.op == "placeholder" else super().run_node(n)


def believed_parts(model: nn.Module, recorded: Recording, ghost: nn.Module) -> dict[str, fx.Graph]:
    """The graph of the whole model by the name "", or those of its largest parts that hold a conv and are what runs.

    `model` is what was recorded; `ghost` is a copy of it on the meta device that may be changed, in eval mode: tracing
    leaves constants in some.
    """

    def graph_of(part: nn.Module, prefix: str) -> fx.Graph | None:
        calls = recorded.calls.get(id(model.get_submodule(prefix)), [])
        return _graph_that_runs(part, calls, recorded, names) if calls else None

    names = _names(ghost)
    return dict(_graphs(ghost, "", graph_of))


def traceable_parts(model: nn.Module) -> dict[str, fx.Graph]:
    """The same of a model that is not run: whether its graphs are what runs is not known. It may be changed."""

    def graph_of(part: nn.Module, _: str) -> fx.Graph | None:
        try:
            return trace_graph(part, _defaults(part))
        except Exception:  # the part's own code runs with stand-ins: anything may be raised
            return None

    return dict(_graphs(model, "", graph_of))


def _graphs(
    module: nn.Module, prefix: str, graph_of: Callable[[nn.Module, str], fx.Graph | None]
) -> Iterator[tuple[str, fx.Graph]]:
    if not _holds_conv(module) or isinstance(module, nn.Conv2d):
        return
    graph = graph_of(module, prefix)
    if graph is not None:
        yield prefix, graph
        return
    for name, child in module.named_children():
        yield from _graphs(child, f"{prefix}.{name}" if prefix else name, graph_of)


def _graph_that_runs(
    module: nn.Module, calls: Sequence[ModuleCall], recorded: Recording, names: Mapping[int, str]
) -> fx.Graph | None:
    """The module's graph, None where torch.fx cannot trace it or where it is not what runs in all of the calls."""
    try:
        # The module's own code runs here, with stand-ins and again on meta tensors: anything at all may be raised.
        graph = trace_graph(module, bind(module, calls[0].args, calls[0].kwargs))
        to_meta_(module)
        for call in calls:
            found: list[Operation] = []
            # Copies, since what works in place changes the marks.
            arguments = bind(module, map_tensors(call.args, _ghost), map_tensors(call.kwargs, _ghost))
            with torch.no_grad(), torch.device("meta"), _Recorder(found, names):
                _Walk(module, graph, arguments).run()
            if found != recorded.operations[call.operations]:
                return None
    except Exception:
        return None
    return graph


def _defaults(module: nn.Module) -> dict[str, Any]:
    """The defaults of the forward's arguments, but for the first."""
    _, *others = inspect.signature(module.forward).parameters.values()
    return {one.name: one.default for one in others if one.default is not inspect.Parameter.empty}


def to_meta_(root: nn.Module) -> None:
    """Move the constants that tracing has put on a module of meta tensors to the meta device too."""
    for module in root.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_meta:
                setattr(module, name, value.to("meta"))


def shared_graph(model: nn.Module, inputs: Inputs) -> tuple[fx.Graph, nn.Module]:
    """The graph of the whole model, and the copy that was traced: its modules are its own, its tensors the model's.

    Raises whatever torch.fx raises where the model does not trace whole.
    """
    every = itertools.chain(model.parameters(), model.buffers())
    root = copy_with(model, every, lambda tensor: tensor).eval()
    return trace_graph(root, bind(root, inputs, {})), root


def meta_graph(model: nn.Module, inputs: Inputs) -> tuple[fx.Graph, nn.Module]:
    """The same with all tensors on the meta device."""
    root = meta_copy(model).eval()
    graph = trace_graph(root, bind(root, inputs, {}))
    to_meta_(root)
    return graph, root
