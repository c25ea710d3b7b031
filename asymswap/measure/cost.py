"""MACs and parameters of a whole model, counted on meta tensors.

The convention is that of `asymswap.spec`: convolutions (transposed and deformable ones too), linear layers and matrix
products, attention included, counted by formula from shapes while the model runs on meta tensors, one input, eval mode.
Nothing is computed, and functional calls are seen as well as modules. Not counted: additions of biases, normalisation,
activations, pooling, interpolation of feature maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.ops  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from asymswap.errors import TraceError
from asymswap.inputs import Inputs, describe, with_values
from asymswap.opening import Opened
from asymswap.spec import Cost, Site
from asymswap.tensors import deep_copy, meta_copy, to_meta

aten = torch.ops.aten


@dataclass(frozen=True)
class Costs:
    """The cost of a model, and that of the modules in it that were asked for."""

    total: Cost
    by_name: Mapping[str, Cost]


def count_costs(model: nn.Module, inputs: Inputs, names: Iterable[str] = ()) -> Costs:
    """MACs of one forward pass in eval mode and parameters, each counted once; the model itself is not run.

    `names` are modules of the model whose share is counted too; of one that runs several times, all runs are summed.
    """
    wanted = list(names)
    try:
        return _count(meta_copy(model).eval(), to_meta(inputs), wanted)
    except Exception:
        # What looks at values, as detection does, needs some; what fails for another reason fails again.
        return _count(deep_copy(model).eval(), with_values(inputs), wanted)


def cost_of(opened: Opened) -> Cost:
    """The whole cost of an opened model; raises TraceError where it does not run on an input of its size."""
    try:
        return count_costs(opened.model, opened.example()).total
    except Exception as error:
        # What a network says about an input that it does not take is its own.
        about, reason = describe(opened.example()), " ".join(str(error).split())[:200]
        raise TraceError(
            f"{opened.reference} does not run on {about}: {reason or type(error).__name__}; give another --input"
        ) from error


def count_swapped(before: Costs, converted: nn.Module, sites: Iterable[Site]) -> Costs:
    """The cost after a conversion, each site's at the sizes that its calls had before.

    For models in which it depends on values what runs, so that two runs cannot be compared. `before` is the cost of
    all sites before.
    """
    after = {site.name: _count_calls(converted.get_submodule(site.name), site) for site in sites}
    saved = sum(before.by_name[name].macs - cost.macs for name, cost in after.items())
    return Costs(Cost(before.total.macs - saved, _params(converted)), after)


def _count_calls(module: nn.Module, site: Site) -> Cost:
    skeleton, dtype = meta_copy(module).eval(), getattr(torch, site.conv.dtype)
    sizes = [(call.batch, site.conv.in_channels, *call.input) for call in site.calls]
    runs = [_count(skeleton, (torch.empty(size, dtype=dtype, device="meta"),), []) for size in sizes]
    return Cost(sum(run.total.macs for run in runs), _params(skeleton))


def _count(skeleton: nn.Module, inputs: Inputs, names: Sequence[str]) -> Costs:
    """The cost of a model that may be run and given hooks."""
    macs = dict.fromkeys(names, 0)
    counter = _Counter()
    for name in macs:
        _watch(skeleton.get_submodule(name), name, macs, counter)
    with torch.no_grad(), counter:
        skeleton(*inputs)
    by_name = {name: Cost(macs[name], _params(skeleton.get_submodule(name))) for name in macs}
    return Costs(Cost(counter.macs, _params(skeleton)), by_name)


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _watch(module: nn.Module, name: str, macs: dict[str, int], counter: _Counter) -> None:
    """Add what the counter counts while the module runs to `macs[name]`."""

    def enter(*_: Any) -> None:
        macs[name] -= counter.macs

    def leave(*_: Any) -> None:
        macs[name] += counter.macs

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _matmul(a: Tensor, b: Tensor, *_: Any) -> int:
    return math.prod(a.shape) * b.shape[-1]


def _added_matmul(_: Tensor, a: Tensor, b: Tensor, *__: Any) -> int:
    return _matmul(a, b)


def _convolution(x: Tensor, weight: Tensor, transposed: bool, out: Tensor) -> int:
    # Every pixel of the output gathers group_in * taps products; of a transposed conv, every pixel of the input spreads
    # group_out * taps.
    walked = x if transposed else out
    return walked.shape[0] * math.prod(walked.shape[2:]) * math.prod(weight.shape)


def _deform_conv(x: Tensor, weight: Tensor, offset: Tensor, *others: Any) -> int:
    # Each sample is a weighted sum of four pixels of the input, and with a mask it is scaled once more.
    use_mask = bool(others[-1])
    samples = x.shape[1] * math.prod(weight.shape[2:])
    return offset.shape[0] * math.prod(offset.shape[2:]) * (math.prod(weight.shape) + samples * (4 + use_mask))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    *batch, rows, depth = query.shape
    return math.prod(batch) * rows * key.shape[-2] * (depth + value.shape[-1])


_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.addmm: _added_matmul,
    aten.baddbmm: _added_matmul,
    torch.ops.torchvision.deform_conv2d: _deform_conv,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
}


class _Counter(TorchDispatchMode):
    """Adds up the MACs of every operator that has a formula, as it passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is aten.convolution:
            self.macs += _convolution(args[0], args[1], args[6], out)
        elif packet in _FORMULAS:
            self.macs += _FORMULAS[packet](*args)
        return out
