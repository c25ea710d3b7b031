"""A k x k conv as a pair: (kh x 1, C -> R) then (1 x kw, R -> O), or the other order.

Each conv carries the stride, padding and dilation of its own axis; groups are solved one by one, and R is the rank of
one; both convs keep the padding mode, the bias stays on the second. With nothing between them the pair is exact at full
rank: without a bias on the first conv, padding its output by zeros is the same as padding its input. Mathematics and
papers: `asymswap.factorize.svd` for the weights alone, `asymswap.factorize.covariance` for calibration data.

There can be a batch norm, a ReLU or both between them (Inception: Szegedy et al., 2016; ERFNet: Romera et al., 2018),
for a network that is trained on. They start as near to nothing as they can:

- The batch norm has the mean and variance of the first conv's output as its statistics, and a weight and bias that
  undo them: in eval mode the pair computes the same as without it, at the borders too; in train mode as far as a batch
  has these statistics. They come from calibration, else from white inputs: then train mode rescales.
- The ReLU gets every channel raised by what brings three deviations below its mean above zero (by the batch norm's
  bias or else the first conv's), and the second conv's bias takes that away again. What lies lower is cut. Zeros that
  the second conv would pad were not raised: where it pads zeros, the first conv pads in its place, on both axes, and
  walks over that many pixels more. (A batch norm then sees the padding in train mode, which the patches show only in
  part.) For uneven `same` padding no conv can do that: there the borders come out wrong.

At the usual padding a smaller shift would be a compromise: on digits-resnet at a quarter of its MACs, calibrated in one
pass on 256 images, top-1 is 94 % with no ReLU, 92 % with one, 68 % at the usual padding at best (1.5 deviations).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from asymswap.factorize import svd
from asymswap.replacements import _convs
from asymswap.replacements._pairs import Pair, PairSettings, SettledPair, merge, solve
from asymswap.replacements.base import Original
from asymswap.types import ConvSpec, Cost, Site, Size

# This many deviations below a channel's mean still pass the ReLU. On digits-resnet at a quarter of its MACs, calibrated
# in one pass, the output's error is 0.58 at 2 deviations, 0.54 at 2.5, 0.52 at 3 and 0.52 at 4, with no ReLU 0.40.
_DEVIATIONS = 3.0

Order = Literal["vertical-first", "horizontal-first"]
Between = Literal["none", "relu", "bn", "bn-relu"]


class Settings(PairSettings):
    """Order of the two convs, what is between them, and one of three ways to give the rank."""

    order: Literal["auto", "vertical-first", "horizontal-first"] = "auto"
    """`auto`: the order with the smaller error at equal cost, or the cheaper one at equal error."""
    between: Between = "none"
    """A ReLU (which implies `bias`), a batch norm or both between the convs, ignored in choosing ranks."""


class Settled(SettledPair):
    """What a plan stores: the rank of one group, the order, and what is between the two convs."""

    order: Order
    between: Between = "none"


class Separable(Pair):
    settings = Settings
    settled = Settled
    PRESERVES = "approximate (exact at full rank, in eval mode, without a ReLU between)"

    def unsupported(self, conv: ConvSpec) -> str | None:
        if conv.kernel == (1, 1):
            return "a 1x1 kernel has nothing to separate"
        if 1 in conv.kernel:
            return f"{'x'.join(map(str, conv.kernel))} is asymmetric already"
        return super().unsupported(conv)

    def preserves(self, conv: ConvSpec, settings: Settled) -> bool:
        """Return True at full rank without a ReLU, unless a batch norm in half precision rounds too much."""
        if "relu" in settings.between or not super().preserves(conv, settings):
            return False
        return settings.between == "none" or conv.dtype in ("float32", "float64")

    def forms(self, settings: Settings) -> Sequence[Settled]:
        more: dict[str, Any] = {} if settings.between == "none" else {"between": settings.between}
        return [Settled(rank=1, order=order, **more) for order in get_args(Order) if settings.order in ("auto", order)]

    def cost(self, site: Site, settings: Settled) -> Cost:
        norm = 2 * site.conv.groups * settings.rank if "bn" in settings.between else 0
        return super().cost(site, settings) + Cost(0, norm)

    def halves(self, conv: ConvSpec, settings: Settled) -> dict[str, ConvSpec]:
        """Return the convs `vertical` and `horizontal`, in run order."""
        vertical_first, channels = settings.vertical_first, conv.groups * settings.rank
        first = replace(_convs.half(conv, vertical_first), out_channels=channels, bias=settings.between == "relu")
        has_bias = conv.bias or settings.bias or "relu" in settings.between
        second = replace(_convs.half(conv, not vertical_first), in_channels=channels, bias=has_bias)
        evenly = conv.padding_mode == "zeros" and all(before == after for before, after in _convs.margins(conv))
        if "relu" in settings.between and evenly:
            first, second = replace(first, padding=(conv.pads[2], conv.pads[0])), replace(second, padding=(0, 0))
        names = ("vertical", "horizontal") if vertical_first else ("horizontal", "vertical")
        return dict(zip(names, (first, second), strict=True))

    def build(self, conv: ConvSpec, settings: Settled) -> nn.Sequential:
        (name, first), (other, second) = super().build(conv, settings).named_children()
        layers = OrderedDict({name: first})
        if "bn" in settings.between:
            layers["norm"] = nn.BatchNorm2d(conv.groups * settings.rank, dtype=getattr(torch, conv.dtype))
        if "relu" in settings.between:
            layers["relu"] = nn.ReLU()
        return nn.Sequential(OrderedDict(layers, **{other: second}))

    def init_(self, module: nn.Module, original: Original, settings: Settled) -> None:
        """Set the best pair of each group; what is between the two starts as said above."""
        if settings.between == "none":
            super().init_(module, original, settings)
            return
        conv, statistics, norm = original.conv, original.statistics, getattr(module, "norm", None)
        first, *_, second = cast(Any, module)
        weight, second_weight, bias_O = solve(original, settings)
        if statistics is None:
            # White inputs: of mean 0 and variance 1.
            variance_GR = weight.to(torch.float64).flatten(1).unflatten(0, (conv.groups, -1)).square().sum(2)
            mean_GR = torch.zeros_like(variance_GR)
        else:
            kernel = cast(Size, conv.kernel_size)
            mean_GR, variance_GR = statistics.intermediate(weight, kernel, _read_taps(first, conv))
        shift_GR = torch.zeros_like(mean_GR)
        if "relu" in settings.between:
            # None below zero, so that a zero that was padded stays above it too.
            shift_GR = (_DEVIATIONS * variance_GR.sqrt() - mean_GR).clamp_min(0.0)
        if norm is not None:
            _convs.set_norm_(norm, mean_GR.flatten(), variance_GR.flatten(), shift_O=shift_GR.flatten())
        _convs.copy_(first, weight, shift_GR.flatten())
        _convs.copy_(second, second_weight, bias_O - svd.carried(shift_GR, second_weight))

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Settled) -> nn.Conv2d | None:
        """Return one k x k conv of the original fields, its kernel the product of the pair's, with the pair's bias.

        A batch norm between is folded in. None with a ReLU between, or where zeros are padded behind a batch norm that
        shifts its input (as it does once it is trained): the borders do not get that shift.
        """
        if "relu" in settings.between:
            return None
        if settings.between == "none":
            return super().fuse(module, conv, settings)
        first, norm, second = cast(Any, module)
        (scale_R, shift_R), bias_O = _convs.affine(norm), second.bias
        # A shift that is mere rounding is none.
        own = _convs.float64(norm.bias).abs()
        rounding = 4 * torch.finfo(norm.weight.dtype).eps * (own + (own - shift_R).abs())
        shift_R = torch.where(shift_R.abs() > rounding, shift_R, 0.0)
        if bool(shift_R.any()):
            if conv.padding_mode == "zeros" and any(_convs.margins(conv)[1 if settings.vertical_first else 0]):
                return None
            shift_O = svd.carried(shift_R.unflatten(0, (conv.groups, -1)), second.weight)
            bias_O = shift_O if bias_O is None else _convs.float64(bias_O) + shift_O
        return merge(conv, _convs.float64(first.weight) * scale_R[:, None, None, None], second, bias_O)


def _read_taps(first: nn.Conv2d, conv: nn.Conv2d) -> list[int]:
    """Return the second conv's taps that see the least of its padding: all of them where the first one pads for it."""
    axis = 1 if first.kernel_size[1] == 1 else 0
    taps = range(conv.kernel_size[axis])
    if not isinstance(first.padding, str) and first.padding[axis]:
        return list(taps)
    kernel, dilation, padding = (cast(Any, field) for field in (conv.kernel_size, conv.dilation, conv.padding))
    fields = ConvSpec(conv.in_channels, conv.out_channels, kernel, padding=padding, dilation=dilation)
    (before, after), step = _convs.margins(fields)[axis], conv.dilation[axis]
    outside = [max(before - step * tap, 0) + max(after - step * (taps[-1] - tap), 0) for tap in taps]
    return [tap for tap in taps if outside[tap] == min(outside)]
