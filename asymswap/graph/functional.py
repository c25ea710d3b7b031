"""Convolutions that a model computes without an `nn.Conv2d`: they can't be swapped, and are named instead.

They are seen while the model runs, and so in every model that runs, be it traceable or not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class FunctionCalls:
    """Calls of `torch.nn.functional.conv2d` by other code than a Conv2d's own.

    `callers` counts them by the name and the class of the module whose forward made them; `weights` holds the names of
    the model's own parameters that they used.
    """

    callers: Counter[tuple[str, str]] = field(default_factory=Counter)
    weights: set[str] = field(default_factory=set)

    def note(self) -> tuple[str, ...]:
        """What is to be told of them: nothing where there are none."""
        if not self.callers:
            return ()
        by_class: dict[str, list[str]] = defaultdict(list)
        for (name, kind), calls in self.callers.items():
            by_class[kind].append((name or "the model itself") + (f" ({calls} times)" if calls > 1 else ""))
        told = "; ".join(f"{kind} {_shortened(names)}" for kind, names in by_class.items())
        number = sum(self.callers.values())
        what = "1 convolution is a function call" if number == 1 else f"{number} convolutions are function calls"
        return (f"{what} (conv2d without an nn.Conv2d), which nothing can be swapped for: {told}",)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@contextmanager
def watch_functions(model: nn.Module) -> Iterator[FunctionCalls]:
    """While open, collect the calls of functional convolutions that the model makes when it is run."""
    found = FunctionCalls()
    running: list[tuple[str, nn.Module]] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue

        def enter(module: nn.Module, _: Any, name: str = name) -> None:
            running.append((name, module))

        def leave(*_: Any) -> None:
            running.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        with _Watch(found, running, names):
            yield found
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    def __init__(self, found: FunctionCalls, running: list[tuple[str, nn.Module]], names: dict[int, str]) -> None:
        super().__init__()
        self._found, self._running, self._names = found, running, names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and self._running and not isinstance(self._running[-1][1], nn.Conv2d):
            name, module = self._running[-1]
            self._found.callers[name, type(module).__name__] += 1
            weight: Tensor | None = args[1] if len(args) > 1 else kwargs.get("weight")
            if id(weight) in self._names:
                self._found.weights.add(self._names[id(weight)])
        return func(*args, **kwargs)
