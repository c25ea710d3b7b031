"""Every `nn.Conv2d` of a module tree as a `Site`, with the reason where no kind may touch it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set

from torch import nn

from asymswap.errors import listed
from asymswap.types import Call, ConvSpec, Neighbour, Site
from asymswap.utils.tensors import additions

Neighbours = tuple[tuple[Neighbour, ...], tuple[Neighbour, ...]]

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


def read_conv(conv: nn.Conv2d) -> ConvSpec:
    """Return all fields of a conv, as its forward reads them: channels and kernel are those of its weight."""
    outputs, inputs, *kernel = (conv.out_channels, conv.in_channels // conv.groups, *_pair(conv.kernel_size))
    if not isinstance(conv.weight, nn.parameter.UninitializedParameter):
        outputs, inputs, *kernel = conv.weight.shape
    return ConvSpec(
        in_channels=inputs * conv.groups,
        out_channels=outputs,
        kernel=(kernel[0], kernel[1]),
        stride=_pair(conv.stride),
        padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
        dilation=_pair(conv.dilation),
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        dtype=str(conv.weight.dtype).removeprefix("torch."),
    )


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
    refused = [(site.name, site.refusal) for site in sites if site.refusal and site.refusal.startswith(_SHARES)]
    tied = [f"{name} with {refusal.removeprefix(_SHARES)}" for name, refusal in refused]
    if not tied:
        return ()
    what = "1 conv shares its weights" if len(tied) == 1 else f"{len(tied)} convs share their weights"
    return (f"{what} with another layer, and nothing is swapped there: {listed(tied, 4)}",)


def _memory(parameter: nn.Parameter) -> int:
    """Return where a parameter's numbers lie; where it has none yet, the id of the parameter itself."""
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.data_ptr()


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
