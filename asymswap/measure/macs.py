"""MACs and parameters of a whole model, counted in eval mode while it runs on one input of meta tensors.

`asymswap.types.MACS` states the convention. torch's FlopCounterMode counts modules and functional calls by formulas
over shapes; the formulas that it lacks are here. `Costs.uncounted` names operators that read weights and have none.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision.ops  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from asymswap.measure.latency import metered
from asymswap.types import Call, Cost, Site
from asymswap.utils.inputs import Inputs, with_values
from asymswap.utils.tensors import deep_copy, device_of, hooked, meta_copy, to_meta

aten = torch.ops.aten
Shape = Sequence[int]


@dataclass(frozen=True)
class Costs:
    """The cost of a model, and of some modules in it by name, with their calls."""

    total: Cost
    by_name: Mapping[str, Cost]
    calls: Mapping[str, Sequence[Call]] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    def notes(self) -> tuple[str, ...]:
        """Name the operators that the number of MACs leaves out, if any."""
        note = f"MACs leave out operators that read weights and have no formula: {', '.join(self.uncounted)}"
        return (note,) if self.uncounted else ()


def count_costs(model: nn.Module, inputs: Inputs, names: Iterable[str] = ()) -> Costs:
    """Count the MACs of a forward pass in eval mode, and parameters, of a model and of all runs of named modules."""
    names = list(dict.fromkeys(names))
    try:
        return _count(meta_copy(model).eval(), to_meta(inputs), names)
    except Exception:
        # A model that looks at values, such as a detector, needs some; other failures happen again.
        return _count(deep_copy(model).eval(), with_values(inputs, device_of(model)), names)


def count_swapped(before: Costs, converted: nn.Module, sites: Iterable[Site]) -> Costs:
    """Return the cost after a conversion, of each site at its input sizes before, where values decide what runs."""
    after = {}
    for site in sites:
        structure = meta_copy(converted.get_submodule(site.name)).eval()
        dtype = getattr(torch, site.conv.dtype)
        sizes = [(call.batch, site.conv.in_channels, *call.input) for call in site.calls]
        runs = [_count(structure, (torch.empty(size, dtype=dtype, device="meta"),), []) for size in sizes]
        after[site.name] = Cost(sum(run.total.macs for run in runs), _params(structure))
    saved = sum(before.by_name[name].macs - cost.macs for name, cost in after.items())
    return Costs(Cost(before.total.macs - saved, _params(converted)), after)


def _count(structure: nn.Module, inputs: Inputs, names: Sequence[str]) -> Costs:
    """Count a copy of a model, which may be run and given hooks."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    uncounted = _Uncounted(structure, counter.flop_registry)

    def see(name: str, args: Any, kwargs: Any, output: Any) -> None:
        seen = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(seen) == 1 and isinstance(output, Tensor) and min(seen[0].dim(), output.dim()) >= 3:
            calls[name].append(Call.of(seen[0].shape, output.shape))

    meter, hooks = metered(structure, names, counter.get_total_flops), hooked(structure, names, after=see)
    # The counter comes last: it decomposes operators, and passes on what it cannot decompose.
    with ExitStack() as ending, torch.no_grad(), meter as flops, hooks, uncounted, counter:
        # Attention and encoder layers must not run as one operator each, which no formula knows.
        ending.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        structure(*inputs)
    by_name = {name: Cost(flops[name] // 2, _params(structure.get_submodule(name))) for name in names}
    total = Cost(counter.get_total_flops() // 2, _params(structure))
    return Costs(total, by_name, calls, tuple(sorted(uncounted.found)))


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    *batch, rows, depth = query
    return 2 * math.prod(batch) * rows * key[-2] * (depth + value[-1])


def _deform_conv(x: Shape, weight: Shape, offset: Shape, *others: Any, **_: Any) -> int:
    # Each sample is a weighted sum of four pixels of the input, scaled once more with a mask.
    samples, use_mask = x[1] * math.prod(weight[2:]), bool(others[-1])
    return 2 * offset[0] * math.prod(offset[2:]) * (math.prod(weight) + samples * (4 + use_mask))


# What torch's counter lacks: FLOPs by the shapes of the arguments. Numbers of a matrix meet one of a vector each.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((aten.mv, aten.dot, aten.vdot), lambda one, *_, **__: 2 * math.prod(one)),
    aten.addmv: lambda _, one, *__, **___: 2 * math.prod(one),
    aten.addbmm: lambda _, one, other, *__, **___: 2 * math.prod(one) * other[-1],
    # nn.Bilinear: each weight is used once for each row of the inputs, (N, 1, I, 1) and (N, 1, 1, J).
    aten._trilinear: lambda one, weight, *_, **__: 2 * one[0] * math.prod(weight),
    aten.conv_tbc: lambda _, weight, *__, out_shape, **___: 2 * out_shape[0] * out_shape[1] * math.prod(weight),
    # Each row of the input, (steps, images, features) or packed, meets the matrices of a layer once.
    aten.mkldnn_rnn_layer: lambda x, to_gates, between_steps, *_, **__: (
        2 * math.prod(x[:-1]) * (math.prod(to_gates) + math.prod(between_steps))
    ),
    aten._cudnn_rnn: lambda x, weights, *_, **__: (
        2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    torch.ops.torchvision.deform_conv2d: _deform_conv,
}

# Operators that read weights and are left out by the convention: normalisation, look-ups, moves and sums.
_FREE = re.compile(
    r"batch_norm|layer_norm|group_norm|rms_norm|weight_norm|embedding|index|gather|scatter|cat$|stack|copy|clone|fill"
    r"|repeat|select|roll|flip|tril|triu|pad|im2col|sum|mean|var|std|norm|max|min|sort|topk|softmax|pool|upsample|grid_sampl"
    r"|bernoulli|dropout|equal|scalar|nonzero|where|diagonal|resize|set_|new_|_like"
)
_TAGS = [getattr(torch.Tag, name) for name in ("pointwise", "reduction") if hasattr(torch.Tag, name)]


class _Uncounted(TorchDispatchMode):
    """Collects the names of operators that read weights of a model and have no formula."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, known: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()
        self._known = known
        # Views of a weight share its storage; kept here, so that no other gets its id.
        self._storages = [tensor.untyped_storage() for tensor in model.parameters() if tensor.layout is torch.strided]
        self._weights = {id(storage) for storage in self._storages}

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        packet, free = getattr(func, "_overloadpacket", func), False
        if getattr(func, "namespace", "") in ("aten", "prim", "prims"):
            # It multiplies no weights, or only as the convention leaves out.
            free = func.is_view or bool(_FREE.search(packet.__name__)) or any(tag in func.tags for tag in _TAGS)
        if packet not in self._known and not free:
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            storages = {id(one.untyped_storage()) for one in tensors if one.layout is torch.strided}
            if storages & self._weights:
                self.found.add(str(packet))
        return func(*args, **(kwargs or {}))
