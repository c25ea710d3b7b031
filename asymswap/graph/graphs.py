"""Graphs by torch.fx, believed only where they are what runs.

torch.fx follows one way through a forward with stand-ins for tensors, and may take another branch than a real run does:
`isinstance(x, Tensor)` is false for a stand-in, `x is None` is false for an argument that nobody gives. So arguments
that are no tensors keep the values that they have in a recorded run, and a graph counts only if its operations, walked
on the arguments of each recorded call, are the operations of that call.
"""

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from asymswap.errors import listed
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import copy_with, device_of, list_tensors, map_tensors

Operation = tuple[str, tuple[tuple[int, ...], ...], tuple[str, ...]]
"""The name of a function of torch, the shapes of the tensors that it returned, and which of the model's own it read."""

_MARK = "_asymswap_depends_on_input"


class Recording(TorchFunctionMode):
    """What a run did: while it lasts, every function of torch that gets a tensor which depends on the marked ones.

    `operations` are those that depend on its input, in order; `calls` the calls of each module that holds a conv, by
    the module's id: its arguments on the meta device, and which operations it did. `functional_convs` are the calls of
    `F.conv2d` that no Conv2d made: name and class of the module that did, and the weight's name in the model. `running`
    are the modules that have begun and not ended: name, module, arguments of one that holds a conv, first operation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.calls: dict[int, list[tuple[Any, slice]]] = defaultdict(list)
        self.functional_convs: list[tuple[str, str, str | None]] = []
        self.running: list[tuple[str, nn.Module, Any, int]] = []
        self._names = {id(own): name for name, own in (*model.named_parameters(), *model.named_buffers())}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and self.running and not isinstance(self.running[-1][1], nn.Conv2d):
            module_name, module, *_ = self.running[-1]
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            self.functional_convs.append((module_name, type(module).__name__, self._names.get(id(weight))))
        given = list_tensors((args, kwargs))
        depends = any(hasattr(tensor, _MARK) for tensor in given)
        result = func(*args, **kwargs)
        if depends:
            made = list_tensors(result)
            name, in_place = _plain(getattr(func, "__name__", str(func)))
            if made:
                read = tuple(self._names[id(tensor)] for tensor in given if id(tensor) in self._names)
                self.operations.append((name, tuple(tuple(tensor.shape) for tensor in made), read))
            # What is written to depends on the input from then on.
            for tensor in (*made, *(list_tensors(args[0]) if in_place else ())):
                if not isinstance(tensor, nn.Parameter):
                    setattr(tensor, _MARK, True)
        return result

    def notes(self) -> tuple[str, ...]:
        """Name the functional convolutions, for which nothing can be swapped; nothing where there are none."""
        if not self.functional_convs:
            return ()
        by_class: dict[str, list[str]] = defaultdict(list)
        for (name, kind), calls in Counter(call[:2] for call in self.functional_convs).items():
            by_class[kind].append((name or "the model itself") + (f" ({calls} times)" if calls > 1 else ""))
        where = "; ".join(f"{kind} {listed(names, 4)}" for kind, names in by_class.items())
        number = len(self.functional_convs)
        what = "1 convolution is a function call" if number == 1 else f"{number} convolutions are function calls"
        return (f"{what} (conv2d without an nn.Conv2d), which nothing can be swapped for: {where}",)


@contextmanager
def recording(model: nn.Module, inputs: Inputs) -> Iterator[tuple[Recording, Inputs]]:
    """While open, record what the model does with the inputs that are yielded, a copy of `inputs`."""
    found = Recording(model)

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = map_tensors((args, kwargs), _ghost) if _holds_conv(module) else None
        found.running.append((name, module, given, len(found.operations)))

    def leave(module: nn.Module, *_: Any) -> None:
        given, start = found.running.pop()[2:]
        if given is not None:
            found.calls[id(module)].append((given, slice(start, len(found.operations))))

    copies = map_tensors(inputs, lambda tensor: tensor.detach().clone().as_subclass(Tensor))
    for tensor in list_tensors(copies):
        setattr(tensor, _MARK, True)
    with ExitStack() as hooks, found:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.enter_context(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        yield found, copies


def _plain(name: str) -> tuple[str, bool]:
    """Return a function's name without the marks of working in place, and True if it works so."""
    bare = name.strip("_")
    if not name.startswith("__"):
        return bare, name.endswith("_")
    if name.startswith("__i") and name not in ("__index__", "__invert__"):
        return bare[1:], True
    return bare, name == "__setitem__"


def _ghost(tensor: Tensor) -> Tensor:
    """Return the tensor on the meta device, with its mark."""
    with torch._C.DisableTorchFunction():
        ghost = torch.empty_like(tensor, device="meta")
    if hasattr(tensor, _MARK):
        setattr(ghost, _MARK, True)
    return ghost


def _holds_conv(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv2d) and any(isinstance(part, nn.Conv2d) for part in module.modules())


class _Tracer(fx.Tracer):
    """Leaves are torch.nn layers, anything that is a Conv2d or a batch norm, and torchvision's operators."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d | nn.modules.batchnorm._NormBase):
            return True
        if type(m).__module__.startswith("torchvision.ops"):
            # Some of them are containers (SqueezeExcitation): those are walked through to their convs.
            return not _holds_conv(m)
        return super().is_leaf_module(m, module_qualified_name)


def bind(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the module's forward by name, defaults included."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def trace_graph(module: nn.Module, arguments: Mapping[str, Any]) -> fx.Graph:
    """Return the module's graph, with arguments that are no tensors as constants; raises whatever torch.fx raises.

    Constants that tracing puts on a module of meta tensors go to the meta device too.
    """
    constants = {name: value for name, value in arguments.items() if type(value) in (NoneType, bool, int, float, str)}
    graph = _Tracer().trace(module, constants or None)
    for part in module.modules() if device_of(module).type == "meta" else ():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                setattr(part, name, value.to("meta"))
    return graph


def placeholder_value(node: fx.Node, arguments: Mapping[str, Any]) -> Any:
    """Return the value of a graph's placeholder, from the arguments of `bind`."""
    name = str(node.target).lstrip("*")
    return arguments[name] if name in arguments else arguments[re.sub(r"_\d+$", "", name)]


def believed_parts(model: nn.Module, recorded: Recording, ghost: nn.Module) -> dict[str, fx.Graph]:
    """Return the graph of the whole model by the name "", or those of its largest parts with a conv that are what runs.

    `model` is what was recorded; `ghost` a copy on the meta device, in eval mode, in which tracing may leave constants.
    """

    def graph_of(part: nn.Module, prefix: str) -> fx.Graph | None:
        graph = None
        for given, operations in recorded.calls.get(id(model.get_submodule(prefix)), []):
            # Copies, since what works in place changes the marks.
            arguments = bind(part, *map_tensors(given, _ghost))
            graph = graph or trace_graph(part, arguments)
            found = Recording(ghost)
            values = {node: placeholder_value(node, arguments) for node in graph.nodes if node.op == "placeholder"}
            with torch.no_grad(), torch.device("meta"), found:
                fx.Interpreter(part, garbage_collect_values=False, graph=graph).run(initial_env=values)
            if found.operations != recorded.operations[operations]:
                return None
        return graph

    return _graphs(ghost, graph_of)


def traceable_parts(model: nn.Module) -> dict[str, fx.Graph]:
    """Return the same for a model that is not run, and may be changed: its graphs may not be what runs."""

    def graph_of(part: nn.Module, _: str) -> fx.Graph | None:
        _first, *others = inspect.signature(part.forward).parameters.values()
        return trace_graph(part, {one.name: one.default for one in others if one.default is not one.empty})

    return _graphs(model, graph_of)


def _graphs(model: nn.Module, graph_of: Callable[[nn.Module, str], fx.Graph | None]) -> dict[str, fx.Graph]:
    found: dict[str, fx.Graph] = {}
    for name, part in [*model.named_modules(remove_duplicate=False)]:
        if "" in found or any(name.startswith(f"{whole}.") for whole in found) or not _holds_conv(part):
            continue
        with suppress(Exception):  # the part's own code runs with stand-ins and on meta tensors: anything may be raised
            graph = graph_of(part, name)
            if graph is not None:
                found[name] = graph
    return found


def whole_graph(model: nn.Module, inputs: Inputs) -> tuple[fx.Graph, nn.Module]:
    """Return the graph of the whole model and the copy, with its own tensors, that was traced; raises as torch.fx."""
    every = (*model.parameters(), *model.buffers())
    root = copy_with(model, every, lambda tensor: tensor).eval()
    return trace_graph(root, bind(root, inputs, {})), root
