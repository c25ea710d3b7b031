"""Check, before any conv is replaced, that a model runs as before with other modules in their places.

Some networks look at what their layers are: they pad only before an nn.Conv2d, or collect the outputs of these alone.
Each conv in question is hidden in a module that computes exactly the same, and both models are run on one input: where
the calls or the outputs differ, the model's code treats the two differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asymswap.errors import AsymswapError
from asymswap.graph.sites import find_convs
from asymswap.graph.surgery import swap
from asymswap.measure.fidelity import Sums
from asymswap.types import Call
from asymswap.utils.inputs import Inputs, with_values
from asymswap.utils.tensors import eval_mode, list_tensors

_SAME = 1e-4
"""Largest relative difference of equal outputs: threads may add numbers in another order."""


class _StandIn(nn.Module):
    """Computes what the module does that it holds, hidden from the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = (module,)

    def forward(self, input: Tensor) -> Any:
        return self.held[0](input)


@dataclass(frozen=True)
class _Run:
    """The outputs of one run, and the sizes of the calls of some modules in it."""

    outputs: Sequence[Tensor]
    calls: Mapping[str, Sequence[Call]]


def check_stand_ins(model: nn.Module, names: Sequence[str], inputs: Inputs) -> None:
    """Raise AsymswapError, with the name, where the model's code would not run a replacement as it runs the module.

    `inputs` are those of one forward pass, with or without numbers. The model is not changed.
    """
    filled = with_values(inputs)
    try:
        # Copies run: a forward may build or fuse things in its own model.
        before = _run(swap(model, {}, share=True), names, filled)
    except Exception:
        # What does not run on made-up numbers cannot be asked so; the converted model is run later.
        return
    reason = _difference(model, names, filled, before)
    if reason is None:
        return
    single = ((name, _difference(model, [name], filled, before)) for name in names)
    name, why = next(((name, why) for name, why in single if why is not None), (", ".join(names[:4]), reason))
    holders = [key for key, part in model.named_children() if find_convs(part)]
    inside = f", or give the network itself if it is the attribute {holders[0]!r}" if len(holders) == 1 else ""
    raise AsymswapError(
        f"{name} cannot be swapped: the model's code treats it unlike a module of another class ({why}); keep it by a "
        f"rule with keep = true{inside}"
    )


def describe_calls(name: str, calls: Sequence[Call], expected: Sequence[Call]) -> str | None:
    """Say how the calls of a module differ from the expected ones; None where they are the same."""
    if len(calls) != len(expected):
        return f"{name} is called {len(calls)} times instead of {len(expected)}"
    for call, other in zip(calls, expected, strict=True):
        if call != other:
            old, new = (f"{c.batch} of {c.input[0]}x{c.input[1]} to {c.output[0]}x{c.output[1]}" for c in (other, call))
            return f"{name} is called on {new} pixels instead of {old}"
    return None


def _run(model: nn.Module, names: Sequence[str], inputs: Inputs) -> _Run:
    calls: dict[str, list[Call]] = {name: [] for name in names}
    with ExitStack() as hooks, eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name in names:

            def see(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                seen = args[0] if args else next(iter(kwargs.values()))
                calls[name].append(Call.of(seen.shape, output.shape))

            hooks.enter_context(model.get_submodule(name).register_forward_hook(see, with_kwargs=True))
        torch.manual_seed(0)
        return _Run([tensor.clone() for tensor in list_tensors(model(*inputs))], calls)


def _difference(model: nn.Module, names: Sequence[str], inputs: Inputs, before: _Run) -> str | None:
    """Say what changes where stand-ins do the work of the named modules, if anything."""
    stand_ins = {name: _StandIn(model.get_submodule(name)) for name in names}
    try:
        after = _run(swap(model, stand_ins, share=True), names, inputs)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    for name in names:
        change = describe_calls(name, after.calls[name], before.calls[name])
        if change is not None:
            return change
    gap = _gap(before.outputs, after.outputs)
    if gap is None or gap <= _SAME:
        return None if gap is not None else "the model's outputs are others in number or size"
    # A model that draws random numbers, or remembers, is not the same twice either.
    again = _gap(before.outputs, _run(swap(model, {}, share=True), names, inputs).outputs)
    if again is None or again > _SAME:
        return None
    return f"the model's output changes by {gap:.1e} although the layer computes the same"


def _gap(one: Sequence[Tensor], other: Sequence[Tensor]) -> float | None:
    """Return the relative difference of two runs' outputs; None where their number or sizes differ."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return None
    sums = Sums()
    for mine, its in zip(one, other, strict=True):
        if not torch.equal(mine.nan_to_num(), its.nan_to_num()):
            sums.add(mine, its)
    return sums.difference().relative if sums.tensors else 0.0
