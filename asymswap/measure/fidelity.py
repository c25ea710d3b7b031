"""How far a converted model's outputs and kernels are from the original's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asymswap import replacements
from asymswap.errors import AsymswapError
from asymswap.graph.sites import find_convs, read_conv
from asymswap.graph.trace import Trace, conv_hooks
from asymswap.types import Plan
from asymswap.utils.inputs import Inputs, portions, sizes
from asymswap.utils.tensors import eval_mode, list_tensors, map_tensors


@dataclass(frozen=True)
class Difference:
    """Two results compared: the norm of the difference relative to the first's, and the largest absolute difference."""

    relative: float
    largest: float


@dataclass(frozen=True)
class Fidelity:
    """Differences of the whole model's output, of each swapped site's output on the original's input, and its kernel.

    A kernel's is missing where the replacement amounts to no kernel of the original size.
    """

    output: Difference
    site_outputs: Mapping[str, Difference]
    kernels: Mapping[str, float]


WHOLE = ("",)
"""The model itself, by the name that torch has for it, as the one part whose outputs are compared."""


def compared_parts(traced: Trace) -> tuple[str, ...]:
    """Return the parts whose outputs tell whether two versions of a model compute the same.

    Outputs that depend on values (which boxes a detector keeps) jump where scores are close, even of equal networks:
    there, the parts that torch.fx could read are compared, and the convs outside of them.
    """
    if traced.on_meta:
        return WHOLE
    inside = tuple(f"{part}." if part else "" for part in traced.parts)
    outside = [site.name for site in traced.sites if not f"{site.name}.".startswith(inside)]
    return (*traced.parts, *outside)


def measure_fidelity(
    original: nn.Module, converted: nn.Module, plan: Plan, inputs: Inputs, parts: Sequence[str] = WHOLE
) -> Fidelity:
    """Run both models on the same inputs in eval mode and compare; both are unchanged afterwards.

    Each replacement, and each of the `parts`, gets the very input that the original one gets, so that a site's error is
    its own. Where it has taken over a batch norm, the output is that of conv and batch norm.
    """
    sums = {swap.site: Sums() for swap in plan.swaps}
    norms = {swap.site: original.get_submodule(swap.absorbs) for swap in plan.swaps if swap.absorbs is not None}

    def see(name: str, seen: Tensor, output: Tensor) -> None:
        if name in sums:
            expected = norms[name](output) if name in norms else output
            sums[name].add(expected, converted.get_submodule(name)(seen))

    with conv_hooks(original, see):
        output = compare_outputs(original, converted, inputs, parts)
    return Fidelity(
        output=output,
        site_outputs={name: total.difference() for name, total in sums.items()},
        kernels=dict(_kernel_errors(original, converted, plan)),
    )


def compare_outputs(one: nn.Module, other: nn.Module, inputs: Inputs, parts: Sequence[str] = WHOLE) -> Difference:
    """Compare the outputs of both models, or of their parts, on the same inputs in eval mode.

    Each part of `other` gets the very input that the part of `one` gets. Both are unchanged afterwards. Raises
    AsymswapError where they give no tensor, or tensors of other sizes.
    """
    whole = Sums()
    with eval_mode(one, other), torch.no_grad(), _compared(one, other, parts, whole):
        for portion in portions(inputs):
            one(*portion)
    if parts and not whole.tensors:
        raise AsymswapError(
            "the model gives no tensor that could be compared; let its forward return tensors, or lists, tuples, "
            "dicts or dataclasses of them"
        )
    return whole.difference()


@contextmanager
def _compared(one: nn.Module, other: nn.Module, parts: Sequence[str], sums: Sums) -> Iterator[None]:
    """While open, compare what each part of `one` computes with what that of `other` makes of the same input."""
    with ExitStack() as hooks:
        for name in parts:
            counterpart = other.get_submodule(name)
            results: list[Any] = []

            def run(
                _: nn.Module, args: Any, kwargs: Any, part: nn.Module = counterpart, made: list[Any] = results
            ) -> None:
                # On copies: a part may write into what it is given.
                made.append(part(*map_tensors(args, Tensor.clone), **map_tensors(kwargs, Tensor.clone)))

            def compare(_: nn.Module, __: Any, output: Any, made: list[Any] = results) -> None:
                ones, others = list_tensors(output), list_tensors(made.pop())
                if [tensor.shape for tensor in ones] != [tensor.shape for tensor in others]:
                    shapes = (sizes(tuple(tensors)) or "no tensor" for tensors in (others, ones))
                    raise AsymswapError("outputs of {} cannot be compared with those of {}".format(*shapes))
                for mine, its in zip(ones, others, strict=True):
                    sums.add(mine, its)

            module = one.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(run, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(compare))
        yield


class Sums:
    """Squared differences and squared values summed in float64, over any number of `tensors`."""

    def __init__(self) -> None:
        self.tensors = 0
        self.squares = self.energy = self.largest = 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        """Compare two tensors of one shape, the second with the first; of complex numbers both parts."""
        self.tensors += 1
        one, other = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (one, other))
        # Subtracting close numbers loses nothing, so the tensors' own precision will do; only the sums need more.
        dtype = torch.promote_types(one.dtype, torch.float32)
        gap = other.to(dtype) - one.to(dtype)
        self.squares += float(torch.linalg.vector_norm(gap, dtype=torch.float64)) ** 2
        self.energy += float(torch.linalg.vector_norm(one.to(dtype), dtype=torch.float64)) ** 2
        largest = float(gap.abs().max()) if gap.numel() else 0.0
        # Nothing is greater than a NaN: max keeps one that comes first, and passes over one that comes second.
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)

    def difference(self) -> Difference:
        """Return the difference over all of them."""
        relative = math.sqrt(self.squares / self.energy) if self.energy else (0.0 if not self.squares else math.inf)
        return Difference(relative, self.largest)


def _kernel_errors(original: nn.Module, converted: nn.Module, plan: Plan) -> Iterator[tuple[str, float]]:
    convs: dict[str, nn.Conv2d] = {name: conv for name, (conv, _) in find_convs(original).items()}
    for swap in plan.swaps:
        if swap.absorbs is not None:
            # Its kernel holds the batch norm's scale, and cannot be compared with the conv's.
            continue
        (kind, settings), conv = replacements.load_swap(swap), convs[swap.site]
        fused = kind.fuse(converted.get_submodule(swap.site), read_conv(conv), settings)
        if fused is not None and fused.weight.shape == conv.weight.shape:
            sums = Sums()
            sums.add(conv.weight.detach(), fused.weight.detach())
            yield swap.site, sums.difference().relative


def difference(teacher: object, student: object) -> Tensor:
    """Return the squared difference of all outputs relative to the teacher's own squares."""
    gaps, wholes = [], []
    for one, other in zip(list_tensors(teacher), list_tensors(student), strict=True):
        if one.is_floating_point():
            gaps.append((other.float() - one.float()).square().sum())
            wholes.append(one.float().square().sum())
    return torch.stack(gaps).sum() / torch.stack(wholes).sum().clamp_min(1e-12)
