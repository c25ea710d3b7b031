"""Merge replacements back into ordinary convs that compute the same, and put batch norms back where they were.

Conversions are undone from the last to the first: what a later one has changed inside of an earlier one's replacement
comes first.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from asymswap import replacements
from asymswap.graph.surgery import swap
from asymswap.graph.trace import conv_input, read_conv, read_structure
from asymswap.planning.apply import apply_plan
from asymswap.results.convert import FusionRow
from asymswap.types import ConvSpec, Plan, Progress, Swap, silent
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import additions, eval_mode, hooked, is_channels_last, meta_copy

_WEAKEST = 1e-2  # share of the average scale: a batch norm's channel that scales by no more is not divided by


class _LeftError(Exception):
    """Why a replacement is left as it is."""


def fuse_model(
    model: nn.Module,
    original: nn.Module,
    plans: Sequence[Plan],
    progress: Progress = silent,
    *,
    separable: bool = False,
    max_offset: float | None = None,
    inputs: Inputs | None = None,
) -> tuple[nn.Module, tuple[Plan, ...], tuple[FusionRow, ...]]:
    """Return a copy of `model` with all fused that can be, in eval mode, the plans of what is left, and what was done.

    Without plans it has the structure of the `original` again, of which nothing else counts. Fused is what fuses
    exactly and costs no more then; with `separable` also pairs and crosses, whose one conv costs more. Predicted
    offsets that stay below `max_offset` pixels on `inputs` are left out.
    """
    structures = [meta_copy(original)]
    for plan in plans:
        structures.append(apply_plan(structures[-1], plan, weights="unset"))
    offsets: dict[str, float] = {}

    def see(entry: Swap, _: nn.Module, found_ST2: Tensor) -> None:
        offsets[entry.site] = max(offsets.get(entry.site, 0.0), float(found_ST2.abs().max()))

    if max_offset is not None and inputs is not None:
        read_taps(model, plans, inputs, see)
    rows: list[FusionRow] = []
    left: list[Plan] = []
    total = sum(len(plan.swaps) for plan in plans)
    for plan, before in reversed(list(zip(plans, structures, strict=False))):
        norms = {site.name: site.norm_behind for site in read_structure(before)}
        later = [entry.site for other in left for entry in other.swaps]
        results: list[FusionRow] = []
        stays: list[Swap] = []
        modules: dict[str, nn.Module] = {}
        for entry in plan.swaps:
            try:
                if any(name.startswith(f"{entry.site}.") for name in later):
                    raise _LeftError("a later conversion has changed its insides")
                kind = replacements.load(entry.kind)
                if isinstance(model.get_submodule(entry.site), nn.Conv2d):
                    raise _LeftError("it is one conv already")
                if not kind.settings.model_fields["allow_growth"].default and not separable:
                    raise _LeftError("one conv would cost more; `separable=True` fuses it nevertheless")
                found = offsets.get(entry.site)
                row, stay, new = _fuse_site(entry, model, before, norms[entry.site], found, max_offset)
            except _LeftError as reason:
                row, stay, new = FusionRow(entry.site, entry.kind, "left", str(reason)), entry, {}
            results.append(row)
            stays += [] if stay is None else [stay]
            modules |= new
            progress("fusing", len(rows) + len(results), total)
        model = swap(model, modules)
        rows = results + rows
        left.insert(0, replace(plan, swaps=tuple(stays)))
    return model.eval(), tuple(plan for plan in left if plan.swaps), tuple(rows)


def _fuse_site(
    entry: Swap, model: nn.Module, before: nn.Module, norm: str | None, offset: float | None, max_offset: float | None
) -> tuple[FusionRow, Swap | None, dict[str, nn.Module]]:
    """Return the row of a replacement, the swap that stays in the plan, and the modules to put in; or _LeftError.

    `before` is the structure before the swap, `norm` the batch norm that alone reads the conv, `offset` the largest.
    """
    kind, settings = replacements.load_swap(entry)
    module = model.get_submodule(entry.site)
    conv = read_conv(cast(nn.Conv2d, before.get_submodule(entry.site)))
    _check_unchanged(module, kind.build(conv, settings))
    fused, reason = kind.fuse(module, conv, settings), ""
    if fused is None:
        fused = kind.without_offsets(module, conv)
        if fused is None or offset is None or max_offset is None:
            more = "" if fused is None else "; `max_offset=…` leaves small offsets out"
            raise _LeftError(f"no ordinary conv computes the same{more}")
        if offset > max_offset:
            raise _LeftError(f"it predicts offsets of up to {offset:.3g} pixels")
        reason = f"offsets of at most {offset:.3g} pixels were left out"
    fused.requires_grad_(any(parameter.requires_grad for parameter in module.parameters()))
    if any(map(is_channels_last, module.parameters())):
        fused.to(memory_format=torch.channels_last)
    modules: dict[str, nn.Module] = {entry.site: fused}
    if entry.absorbs is not None:
        _check_unchanged(model.get_submodule(entry.absorbs), nn.Identity(), "the batch norm's place has changed: ")
        absorbed = cast(nn.BatchNorm2d, before.get_submodule(entry.absorbs))
        modules[entry.absorbs] = _put_back(fused, conv, absorbed, module)
    elif fused.bias is not None and not conv.bias and norm is not None:
        behind = model.get_submodule(norm)
        if type(behind) is nn.BatchNorm2d and behind.running_mean is not None:
            # A copy of the batch norm takes the conv's bias into its mean.
            own = cast(nn.BatchNorm2d, swap(behind, {}))
            with torch.no_grad():
                cast(Tensor, own.running_mean).sub_(fused.bias)
            fused.register_parameter("bias", None)
            modules[norm] = own
    now = read_conv(fused)
    # The rebuilt network has weights of the usual dtype, whatever the checkpoint has.
    if replace(now, dtype=conv.dtype) == conv:
        return FusionRow(entry.site, entry.kind, "fused", reason), None, modules
    # One conv of another form stays as a swap of its own.
    padding = now.padding if isinstance(now.padding, str) else list(now.padding)
    fields: dict[str, Any] = {"kernel": list(now.kernel), "dilation": list(now.dilation), "padding": padding}
    what = f"one {now.describe()}"
    if now.bias and not conv.bias:
        fields, what = {**fields, "bias": True}, f"{what} with a bias"
    stays = Swap(entry.site, "resized", fields, f"fused from {entry.kind}")
    return FusionRow(entry.site, entry.kind, "resized", what), stays, modules


def _check_unchanged(module: nn.Module, fresh: nn.Module, prefix: str = "") -> None:
    """Raise _LeftError where something was added to a replacement or a part of it, which one conv would drop."""
    untouched = dict(fresh.named_modules())
    for name, part in module.named_modules():
        own = untouched.get(name)
        if own is None or type(part) is not type(own):
            raise _LeftError(f"{prefix}its {name or 'class'} was replaced by a {type(part).__name__}")
        added = additions(part, own)
        if added is not None:
            raise _LeftError(f"{prefix}its {name} {added}" if name else f"{prefix}it {added}")


def read_taps(
    model: nn.Module, plans: Sequence[Plan], inputs: Inputs, see: Callable[[Swap, nn.Module, Tensor], None]
) -> None:
    """Run the model in eval mode; call `see` with every replacement whose taps move, and their offsets (S, T, 2)."""
    modules = dict(model.named_modules())
    entries = {entry.site: entry for plan in plans for entry in plan.swaps if entry.site in modules}

    def hook(name: str, args: Any, kwargs: Any) -> None:
        offsets = replacements.load(entries[name].kind).tap_offsets(modules[name], conv_input(args, kwargs))
        if offsets is not None:
            see(entries[name], modules[name], offsets)

    with hooked(model, entries, before=hook), eval_mode(model), torch.no_grad():
        model(*inputs)


def _put_back(fused: nn.Conv2d, conv: ConvSpec, like: nn.BatchNorm2d, block: nn.Module) -> nn.BatchNorm2d:
    """Return the batch norm behind a fused conv, in place of the bias that it has folded in; scale the conv in place.

    It keeps weight and variance of the block's square branch, from whose scale further training starts; channels of
    next to no weight get one that does nothing.
    """
    own = next(part for part in block.modules() if isinstance(part, nn.BatchNorm2d))
    norm = nn.BatchNorm2d(
        like.num_features, own.eps, own.momentum, like.affine, device=fused.weight.device, dtype=own.weight.dtype
    )
    norm.load_state_dict({key: value for key, value in own.state_dict().items() if key in norm.state_dict()})
    with torch.no_grad():
        deviation_O = (cast(Tensor, own.running_var).double() + own.eps).sqrt()
        scale_O, bias_O = 1 / deviation_O, torch.zeros_like(deviation_O)
        if like.affine:
            weight_O, bias_O = own.weight.double(), own.bias.double()
            own_O = (weight_O / deviation_O).abs()
            # At most, not below: where all are zero, none is below their average.
            weight_O = torch.where(own_O <= _WEAKEST * own_O.mean(), deviation_O, weight_O)
            norm.weight.copy_(weight_O)
            scale_O = weight_O / deviation_O
        target_O = cast(Tensor, fused.bias).double()
        cast(Tensor, norm.running_mean).copy_((bias_O - target_O) / scale_O)
        fused.weight.copy_(fused.weight.double() / scale_O[:, None, None, None])
        if conv.bias:
            cast(Tensor, fused.bias).zero_()
        else:
            fused.register_parameter("bias", None)
    norm.requires_grad_(any(parameter.requires_grad for parameter in own.parameters()))
    return norm.train(own.training)
