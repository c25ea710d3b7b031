"""How far a converted model's outputs and kernels are from the original's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asymswap import kinds
from asymswap.graph.sites import find_convs, read_conv
from asymswap.graph.trace import Inputs, conv_hooks
from asymswap.spec import Plan, Preprocessing
from asymswap.tensors import eval_mode, list_tensors


@dataclass(frozen=True)
class Difference:
    """Two results compared: the norm of the difference relative to the first's, and the largest absolute difference."""

    relative: float
    largest: float


@dataclass(frozen=True)
class Fidelity:
    """The whole model's output difference, and each swapped site's: of its output on the original's input, of its
    kernel.

    A kernel's is missing where the replacement amounts to no kernel of the original size.
    """

    output: Difference
    site_outputs: Mapping[str, Difference]
    kernels: Mapping[str, float]


def probe(preprocessing: Preprocessing, dtype: torch.dtype, images: int = 2, seed: int = 0) -> Inputs:
    """Random inputs, normal with mean 0 and deviation 1 as normalised images nearly are, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(images, preprocessing.channels, *preprocessing.size, generator=generator)
    return (batch.to(dtype),)


def measure_fidelity(original: nn.Module, converted: nn.Module, plan: Plan, inputs: Inputs) -> Fidelity:
    """Run both models on the same inputs in eval mode and compare; both are unchanged afterwards.

    At each swapped site the replacement sees the very input that the original conv sees, so that a site's error is its
    own and not what came before it. Where it has taken over a batch norm, the output is that of conv and batch norm.
    """
    sums = {swap.site: _Sums() for swap in plan.swaps}
    norms = {swap.site: original.get_submodule(swap.absorbs) for swap in plan.swaps if swap.absorbs is not None}

    def see(name: str, seen: Tensor, output: Tensor) -> None:
        if name in sums:
            wanted = norms[name](output) if name in norms else output
            sums[name].add(wanted, converted.get_submodule(name)(seen))

    with eval_mode(original, converted), torch.no_grad():
        with conv_hooks(original, see):
            before = original(*inputs)
        after = converted(*inputs)
    return Fidelity(
        output=_difference(before, after),
        site_outputs={name: total.difference() for name, total in sums.items()},
        kernels=dict(_kernel_errors(original, converted, plan)),
    )


def compare_outputs(one: nn.Module, other: nn.Module, inputs: Inputs) -> Difference:
    """Run both models on the same inputs in eval mode and compare all outputs; both are unchanged afterwards."""
    with eval_mode(one, other), torch.no_grad():
        return _difference(one(*inputs), other(*inputs))


def _difference(before: Any, after: Any) -> Difference:
    whole = _Sums()
    for one, other in zip(list_tensors(before), list_tensors(after), strict=True):
        whole.add(one, other)
    return whole.difference()


class _Sums:
    """Squared differences and squared values summed in float64, over any number of tensors."""

    def __init__(self) -> None:
        self.squares = self.energy = self.largest = 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        # Subtracting close numbers loses nothing, so the tensors' own precision will do; only the sums need more.
        dtype = torch.promote_types(one.dtype, torch.float32)
        gap = other.to(dtype) - one.to(dtype)
        self.squares += _energy(gap)
        self.energy += _energy(one.to(dtype))
        self.largest = max(self.largest, float(gap.abs().max()) if gap.numel() else 0.0)

    def difference(self) -> Difference:
        relative = math.sqrt(self.squares / self.energy) if self.energy else (0.0 if not self.squares else math.inf)
        return Difference(relative, self.largest)


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _kernel_errors(original: nn.Module, converted: nn.Module, plan: Plan) -> Any:
    convs: dict[str, nn.Conv2d] = {name: conv for name, (conv, _) in find_convs(original).items()}
    for swap in plan.swaps:
        if swap.absorbs is not None:
            # Its kernel holds the batch norm's scale, and cannot be compared with the conv's.
            continue
        kind, conv = kinds.load(swap.kind), convs[swap.site]
        settings = kinds.parse_settings(swap.kind, swap.settings)
        fused = kind.fuse(converted.get_submodule(swap.site), read_conv(conv), settings)
        if fused is not None and fused.weight.shape == conv.weight.shape:
            sums = _Sums()
            sums.add(conv.weight.detach(), fused.weight.detach())
            yield swap.site, sums.difference().relative
