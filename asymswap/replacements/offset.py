"""A conv whose taps sit at learned offsets between the pixels, the same at every pixel and for all channels.

The kernel is built by bilinear interpolation onto a larger ordinary kernel, which runs as an ordinary convolution:
fast on every device, and fused to a plain `nn.Conv2d` once it is trained. On zero padding it is exactly
`deform_conv2d` with constant offsets. At conversion all offsets are zero. Mathematics and papers:
`asymswap.factorize.bilinear`.

The built kernel has no dilation: one of dilation d and limit L covers d*(k - 1) + 1 + 2*ceil(L) pixels along each
axis, and costs as many MACs; a 3 x 3 kernel becomes 5 x 5 with L = 1, and one of dilation 12 becomes 27 x 27.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx, nn

from asymswap.factorize import bilinear
from asymswap.factorize.statistics import SiteStatistics
from asymswap.replacements import KindSettings
from asymswap.types import ConvSpec, Cost, Option, Site, Size

SIZES = ()
PRESERVES = "the function, exactly: every offset starts at zero"


class Settings(KindSettings):
    """How far a tap may move."""

    limit: Annotated[float, Field(ge=0.01, le=16, allow_inf_nan=False)] = 1.0
    """The largest offset, in pixels of the input; the larger, the larger the kernel that is trained."""

    allow_growth: bool = True
    """The kernel that is trained covers more pixels than the conv's by its nature."""


class OffsetConv2d(nn.Module):
    """A 2-d convolution of an input (N, C, H, W) or (C, H, W), each tap of whose kernel has an offset of its own.

    `raw_offsets` (T, 2) is what is trained; the offsets are `limit * tanh(raw_offsets / limit)`, which `offsets` gives.
    Near zero the two are the same. The slope at an offset o is 1 - (o / limit)^2, so that a tap near its limit can
    still return (in float32 the slope vanishes only beyond nine limits), where a clamp would leave one that has been
    stepped past it without a gradient; no optimiser can pass the limit, and no tap rests on the outermost cell of the
    grid, where half of its derivative would be missing. With `weighted`, `tap_weights` (T) are factors of the taps, for
    all channels.
    """

    def __init__(self, conv: ConvSpec, limit: float, weighted: bool = False) -> None:
        super().__init__()
        self.conv = conv
        self.limit = limit
        self.padding = conv.padding if conv.padding == "same" else _added(conv.padding, (_reach(limit),) * 2)
        dtype = getattr(torch, conv.dtype)
        count = math.prod(conv.kernel)
        self.weight = nn.Parameter(torch.empty(conv.out_channels, conv.group_in, *conv.kernel, dtype=dtype))
        self.raw_offsets = nn.Parameter(torch.empty(count, 2, dtype=dtype))
        self.tap_weights = nn.Parameter(torch.empty(count, dtype=dtype)) if weighted else None
        self.bias = nn.Parameter(torch.empty(conv.out_channels, dtype=dtype)) if conv.bias else None

    def forward(self, input: Tensor) -> Tensor:
        """The convolution; its kernel is built anew for each call."""
        return F.conv2d(input, self.kernel(), self.bias, self.conv.stride, self.padding, groups=self.conv.groups)

    def offsets(self) -> Tensor:
        """The offsets (T, 2) of the taps, row by row: (down, right) in pixels of the input; in float32 at least."""
        return _bounded(self.raw_offsets, self.limit)

    def shares(self) -> Tensor:
        """Which share of which tap falls on which cell of the built kernel: `share_TYX` of `factorize.taps`."""
        return bilinear.spread(self.offsets(), self.conv.kernel, self.conv.dilation, _reach(self.limit))

    def kernel(self) -> Tensor:
        """The kernel (O, C, Y, X) that runs, of dilation 1, in the dtype of the weights."""
        return _built_kernel(self.weight, self.raw_offsets, self.tap_weights, self.conv.dilation, self.limit)

    def extra_repr(self) -> str:
        """What `print(module)` tells."""
        return f"{self.conv.describe()}, limit={self.limit:g}"


def _bounded(raw_T2: Tensor, limit: float) -> Tensor:
    # Half precision would round what falls on each cell to a 256th of the tap.
    raw_T2 = raw_T2.to(torch.promote_types(raw_T2.dtype, torch.float32))
    return limit * torch.tanh(raw_T2 / limit)


# Asked once: torch.compile of torch 2.9 cannot trace the question.
_WITH_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")))


@fx.wrap
def _built_kernel(w_OIHW: Tensor, raw_T2: Tensor, factor_T: Tensor | None, dilation: Size, limit: float) -> Tensor:
    """The grown kernel, computed in float32 at least, in the dtype of the weights; to torch.fx one step."""
    device = w_OIHW.device.type
    if device in _WITH_AUTOCAST and torch.is_autocast_enabled(device):
        # The convolution may run in half precision, but its taps would lose their places.
        with torch.autocast(device, enabled=False):
            return _grown(w_OIHW, raw_T2, factor_T, dilation, limit)
    return _grown(w_OIHW, raw_T2, factor_T, dilation, limit)


def _grown(w_OIHW: Tensor, raw_T2: Tensor, factor_T: Tensor | None, dilation: Size, limit: float) -> Tensor:
    kernel = (w_OIHW.shape[2], w_OIHW.shape[3])
    share_TYX = bilinear.spread(_bounded(raw_T2, limit), kernel, dilation, _reach(limit))
    if factor_T is not None:
        share_TYX = share_TYX * factor_T[:, None, None]
    return bilinear.grow(w_OIHW.to(share_TYX.dtype), share_TYX).to(w_OIHW.dtype)


_WIDEST = 31
"""Pixels that a conv's taps may span. The built kernel has no holes, and costs far more than a dilated conv."""


def refuse(conv: ConvSpec) -> str | None:
    """Offsets need zeros beyond the border, more than one tap, and real weights.

    The one tap of a 1 x 1 kernel could move too, but it would take the whole feature map along and cost 9 times as
    much: whoever wants a shift has cheaper ways to it.
    """
    if conv.kernel == (1, 1):
        return "a 1x1 kernel has a single tap, whose offset could only shift the whole feature map"
    if conv.padding_mode != "zeros":
        return f"a tap with an offset reaches beyond the {conv.padding_mode} padding, where nothing is defined"
    widest = max(step * (taps - 1) + 1 for step, taps in zip(conv.dilation, conv.kernel, strict=True))
    if widest > _WIDEST:
        return f"its taps span {widest} pixels, and one ordinary kernel would have to hold all that is between them"
    if conv.dtype not in ("float64", "float32", "float16", "bfloat16"):
        return f"{conv.dtype} weights cannot be interpolated"
    return None


def preserves(conv: ConvSpec, settings: Settings) -> bool:
    """Always: at zero offset the built kernel holds the conv's own, and zeros around it."""
    return True


def cost(site: Site, settings: Settings) -> Cost:
    """MACs over all calls of the built kernel's convolution and of the matrix product that builds it; parameters.

    The building is counted, since the package counts matrix products; it is next to nothing: as much as the
    convolution spends on kh*kw pixels. A fused conv is without it, and no larger.
    """
    conv = site.conv
    cells = math.prod(bilinear.grid_size(conv.kernel, conv.dilation, _reach(settings.limit)))
    running = sum(conv.out_channels * conv.group_in * cells * math.prod(c.output) * c.batch for c in site.calls)
    building = conv.macs_per_pixel() * cells * len(site.calls)
    return Cost(running + building, conv.params + 2 * math.prod(conv.kernel))


def options(
    site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None
) -> Sequence[Option]:
    """The one size that there is."""
    return [settle(site, conv, settings, statistics)]


def settle(site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None) -> Option:
    """The limit is all there is to settle, and it is given."""
    return Option({"limit": settings.limit}, cost(site, settings), error=0.0, loss=0.0)


def build(conv: ConvSpec, settings: Settings) -> OffsetConv2d:
    """An `OffsetConv2d` with its weights unset."""
    return OffsetConv2d(conv, settings.limit)


def init_(module: nn.Module, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None) -> None:
    """The conv's own weights at zero offset; statistics have nothing to add to an exact replacement."""
    assert isinstance(module, OffsetConv2d)
    with torch.no_grad():
        nn.init.zeros_(module.raw_offsets)
        if module.tap_weights is not None:
            nn.init.ones_(module.tap_weights)
        module.weight.copy_(conv.weight)
        if module.bias is not None:
            module.bias.copy_(cast(Tensor, conv.bias))


def tap_offsets(module: nn.Module, x: Tensor) -> Tensor:
    """The offsets (1, T, 2), whatever the input."""
    with torch.no_grad():
        return cast(OffsetConv2d, module).offsets()[None]


def fuse(module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
    """One conv with the built kernel, cut to the pixels that taps touch; the original's fields where none has moved.

    `nn.Conv2d` pads both sides alike, so the kernel is cut and grown by the same on both sides.
    """
    assert isinstance(module, OffsetConv2d)
    # "same" follows the kernel by itself, however short that becomes.
    shrink = None if conv.padding == "same" else _added(conv.padding, (0, 0))
    rows, columns = bilinear.windows(module.shares(), conv.kernel, conv.dilation, _reach(settings.limit), shrink)
    growth = (rows.growth, columns.growth)
    fused: nn.Conv2d = nn.utils.skip_init(
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        (rows.count, columns.count),
        stride=conv.stride,
        padding=conv.padding if conv.padding == "same" or growth == (0, 0) else _added(conv.padding, growth),
        dilation=(rows.step, columns.step),
        groups=conv.groups,
        bias=conv.bias,
        dtype=module.weight.dtype,
        device=module.weight.device,
    )
    with torch.no_grad():
        fused.weight.copy_(module.kernel()[:, :, rows.cells][..., columns.cells])
        if fused.bias is not None:
            fused.bias.copy_(cast(Tensor, module.bias))
    return fused


def _reach(limit: float) -> int:
    """Whole pixels that a tap may move at most."""
    return math.ceil(limit)


def _added(padding: Size | str, growth: Size) -> Size:
    """A conv's padding as numbers, larger by so many pixels; "valid" is none."""
    height, width = (0, 0) if isinstance(padding, str) else padding
    return height + growth[0], width + growth[1]
