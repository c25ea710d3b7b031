"""Convs made from their fields, convs and kernels of another size about the same middle, and batch norms as numbers.

A strip meets the centre of a k x k kernel with odd sides: k x 1 taps at the centre column see what that column sees if
the input has d * (k - 1) / 2 pixels less beside it than the kernel pads, d being the dilation. So the padding shrinks
by that much, and where the kernel pads less, the rest is cut from the input. Every padding mode fills a pixel by its
distance from the border alone, so that less of it is a part of more of it.
"""

import operator
from collections.abc import Mapping
from dataclasses import astuple, replace
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from asymswap.types import ConvSpec, Size
from asymswap.utils.tensors import store_


def new_conv(conv: ConvSpec, cls: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    """Return a conv of these fields with unset weights."""
    *fields, dtype = astuple(conv)  # in the order in which nn.Conv2d takes them
    module: nn.Conv2d = nn.utils.skip_init(cls, *fields, dtype=getattr(torch, dtype))
    return module


def conv_of(conv: ConvSpec, weight_OIHW: Tensor, bias_O: Tensor | None, like: Tensor) -> nn.Conv2d:
    """Return a conv of these fields but for kernel size and bias, with these numbers; dtype and device are `like`'s."""
    kernel, dtype = (weight_OIHW.shape[2], weight_OIHW.shape[3]), str(like.dtype).removeprefix("torch.")
    made = new_conv(replace(conv, kernel=kernel, bias=bias_O is not None, dtype=dtype)).to(like.device)
    copy_(made, weight_OIHW, bias_O)
    return made


def copy_(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Copy numbers into the `weight` and the `bias` of a module, in place; a bias that it has alone becomes zero."""
    with torch.no_grad():
        cast(Tensor, module.weight).copy_(weight)
        if module.bias is not None:
            cast(Tensor, module.bias).copy_(torch.tensor(0.0) if bias is None else bias)


def margins(conv: ConvSpec) -> tuple[Size, Size]:
    """Return the pixels that a conv pads (before, after), for rows and for columns."""
    left, right, top, bottom = conv.pads
    return (top, bottom), (left, right)


def unsupported(conv: ConvSpec) -> str | None:
    """Return the reason why a kernel has no centre row and column apart from each other, or None where it has."""
    shape = "x".join(map(str, conv.kernel))
    if conv.kernel == (1, 1):
        return "a 1x1 kernel has no row and column to tell apart"
    if 1 in conv.kernel:
        return f"{shape} is asymmetric already"
    if any(side % 2 == 0 for side in conv.kernel):
        return f"a {shape} kernel has no centre row and column, since not both of its sides are odd"
    return None


def centred(conv: ConvSpec, kernel: Size, dilation: Size | None = None) -> tuple[ConvSpec, Size]:
    """Return the conv of another size about the same middle, and its crop: see `CroppedSum`."""
    fields = replace(conv, kernel=kernel, dilation=dilation or conv.dilation)
    own = (0, 0) if isinstance(conv.padding, str) else conv.padding
    axes = zip(own, fields.dilation, kernel, conv.dilation, conv.kernel, strict=True)
    rows, columns = (pad + (d * (k - 1) - old_d * (old_k - 1)) // 2 for pad, d, k, old_d, old_k in axes)
    if conv.padding == "same" or (rows, columns) == own:
        return fields, (0, 0)
    return replace(fields, padding=(max(rows, 0), max(columns, 0))), (max(-rows, 0), max(-columns, 0))


def half(conv: ConvSpec, vertical: bool) -> ConvSpec:
    """Return the fields of a conv along one axis alone."""

    def along(size: Size, across: int = 1) -> Size:
        return (size[0], across) if vertical else (across, size[1])

    padding = conv.padding if isinstance(conv.padding, str) else along(conv.padding, 0)
    kernel, stride, dilation = along(conv.kernel), along(conv.stride), along(conv.dilation)
    return replace(conv, kernel=kernel, stride=stride, dilation=dilation, padding=padding)


class CroppedSum(nn.Module):
    """The sum of modules by name on (N, C, H, W) or (C, H, W), each with its crop: (rows, columns) cut on each side."""

    def __init__(self, parts: Mapping[str, tuple[nn.Module, Size]]) -> None:
        super().__init__()
        for name, (module, _) in parts.items():
            self.add_module(name, module)
        self.crops = {name: crop for name, (_, crop) in parts.items() if any(crop)}

    def forward(self, input: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for name, module in self.named_children():
            rows, columns = self.crops.get(name, (0, 0))
            seen = input[..., rows : input.shape[-2] - rows, columns : input.shape[-1] - columns]
            outputs.append(module(seen if rows or columns else input))
        return reduce(operator.add, outputs)

    def extra_repr(self) -> str:
        return f"crops={self.crops}" if self.crops else ""


def placed(w_OIHW: Tensor, kernel: Size, dilations: tuple[Size, Size] = ((1, 1), (1, 1))) -> Tensor:
    """Return the taps in a kernel of another size about the same middle, and from the first dilation to the second.

    Places without a tap are zero, taps without a place are left out.
    """
    found = w_OIHW.new_zeros(*w_OIHW.shape[:2], *kernel)
    places = []
    for *old_and_new, old_step, step in zip(w_OIHW.shape[2:], kernel, *dilations, strict=True):
        old, new = (torch.arange(1 - taps, taps, 2, device=w_OIHW.device) for taps in old_and_new)
        places.append(torch.nonzero(old[:, None] * old_step == new * step, as_tuple=True))
    (old_rows, rows), (old_columns, columns) = places
    found[:, :, rows[:, None], columns] = w_OIHW[:, :, old_rows[:, None], old_columns]
    return found


def float64(tensor: Tensor | None) -> Tensor:
    """Return the numbers of a tensor, which must be there, in float64 on the CPU."""
    return cast(Tensor, tensor).detach().to("cpu", torch.float64)


def set_norm_(
    norm: nn.BatchNorm2d,
    mean_O: Tensor,
    variance_O: Tensor,
    scale_O: Tensor | float = 1.0,
    shift_O: Tensor | float = 0.0,
) -> None:
    """Give a batch norm these statistics, in place, and in eval mode the function `scale * x + shift`."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    with torch.no_grad():
        store_(mean, mean_O)
        store_(variance, variance_O)
        # From the statistics as they are stored, rounded or cut, so that one undoes the other.
        norm.weight.copy_(scale_O * (float64(variance) + norm.eps).sqrt())
        norm.bias.copy_(scale_O * float64(mean) + shift_O)


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of a batch norm in eval mode, each (O) in float64."""
    scale_O = (1.0 if norm.weight is None else float64(norm.weight)) / (float64(norm.running_var) + norm.eps).sqrt()
    return scale_O, (0.0 if norm.bias is None else float64(norm.bias)) - float64(norm.running_mean) * scale_O
