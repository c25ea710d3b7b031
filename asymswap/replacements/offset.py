"""A conv whose taps sit at learned offsets between the pixels, the same at every pixel and for all channels.

A larger ordinary kernel is built by bilinear interpolation and runs as an ordinary convolution: fast on every device,
and fused to a plain `nn.Conv2d` once it is trained. On zero padding it is exactly `deform_conv2d` with constant
offsets, which are zero at conversion. Mathematics and papers: `asymswap.factorize.bilinear`.

The built kernel has no dilation: one of dilation d and limit L covers d*(k - 1) + 1 + 2*ceil(L) pixels along each
axis, and costs as many MACs; a 3 x 3 kernel becomes 5 x 5 with L = 1, and one of dilation 12 becomes 27 x 27.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx, nn

from asymswap.factorize import bilinear
from asymswap.replacements import _convs
from asymswap.replacements.base import GrowingSettings, Original, Replacement
from asymswap.types import ConvSpec, Cost, Site, Size


class Settings(GrowingSettings):
    """How far a tap may move."""

    limit: Annotated[float, Field(ge=0.01, le=16, allow_inf_nan=False)] = 1.0
    """The largest offset, in pixels of the input; the larger, the larger the kernel that is trained."""


class OffsetConv2d(nn.Module):
    """A 2-d convolution of an input (N, C, H, W) or (C, H, W), each tap of whose kernel has an offset of its own.

    `raw_offsets` (T, 2) are trained; the offsets are `limit * tanh(raw_offsets / limit)`: a clamp would leave a tap
    that was stepped past the limit without a gradient, and half of its derivative is missing on the grid's outermost
    cell. With `weighted`, `tap_weights` (T) are factors of the taps, for all channels.
    """

    def __init__(self, conv: ConvSpec, limit: float, weighted: bool = False) -> None:
        super().__init__()
        self.conv, self.limit = conv, limit
        self.padding = _grown(conv, limit).padding
        dtype, count = getattr(torch, conv.dtype), math.prod(conv.kernel)
        self.weight = nn.Parameter(torch.empty(conv.out_channels, conv.group_in, *conv.kernel, dtype=dtype))
        self.raw_offsets = nn.Parameter(torch.zeros(count, 2, dtype=dtype))
        self.tap_weights = nn.Parameter(torch.ones(count, dtype=dtype)) if weighted else None
        self.bias = nn.Parameter(torch.empty(conv.out_channels, dtype=dtype)) if conv.bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.kernel(), self.bias, self.conv.stride, self.padding, groups=self.conv.groups)

    def offsets(self) -> Tensor:
        """Return the offsets (T, 2), row by row: (down, right) in pixels of the input; in float32 at least."""
        return _bounded(self.raw_offsets, self.limit)

    def kernel(self) -> Tensor:
        """Return the kernel (O, C, Y, X) that runs, of dilation 1, in the dtype of the weights."""
        return _built_kernel(self.weight, self.raw_offsets, self.tap_weights, self.conv.dilation, self.limit)

    def extra_repr(self) -> str:
        return f"{self.conv.describe()}, limit={self.limit:g}"


def _bounded(raw_T2: Tensor, limit: float) -> Tensor:
    # Half precision would round what falls on each cell to a 256th of the tap.
    raw_T2 = raw_T2.to(torch.promote_types(raw_T2.dtype, torch.float32))
    return limit * torch.tanh(raw_T2 / limit)


# Asked once: torch.compile of torch 2.9 cannot trace the question.
_WITH_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")))


@fx.wrap
def _built_kernel(w_OIHW: Tensor, raw_T2: Tensor, factor_T: Tensor | None, dilation: Size, limit: float) -> Tensor:
    """Return the grown kernel, computed in float32 at least, in the dtype of the weights; one node to torch.fx."""
    device, kernel = w_OIHW.device.type, (w_OIHW.shape[2], w_OIHW.shape[3])
    autocast = device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)
    # The convolution may run in half precision, but its taps would lose their places.
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        share_TYX = bilinear.spread(_bounded(raw_T2, limit), kernel, dilation, math.ceil(limit))
        if factor_T is not None:
            share_TYX = share_TYX * factor_T[:, None, None]
        return bilinear.grow(w_OIHW.to(share_TYX.dtype), share_TYX).to(w_OIHW.dtype)


_WIDEST = 31  # pixels that a conv's taps may span: the built kernel has no holes, and costs more than a dilated conv


class Offset(Replacement):
    settings = Settings
    PRESERVES = "exact: every offset starts at zero"

    weighted = False  # True for a learned factor of each tap

    def unsupported(self, conv: ConvSpec) -> str | None:
        if conv.kernel == (1, 1):
            return "a 1x1 kernel has a single tap, whose offset could only shift the whole feature map"
        if conv.padding_mode != "zeros":
            return f"a tap with an offset reaches beyond the {conv.padding_mode} padding, where nothing is defined"
        widest = max(step * (taps - 1) + 1 for step, taps in zip(conv.dilation, conv.kernel, strict=True))
        if widest > _WIDEST:
            return f"its taps span {widest} pixels, and one ordinary kernel would have to hold all that is between them"
        return super().unsupported(conv)

    def cost(self, site: Site, settings: Settings) -> Cost:
        """Count the built kernel's convolution and the matrix product that builds it, but not the taps' factors.

        Building costs as much as the convolution spends on kh*kw pixels, and a fused conv does without it.
        """
        conv, grown = site.conv, _grown(site.conv, settings.limit)
        building = conv.macs_per_pixel() * math.prod(grown.kernel) * len(site.calls)
        running = replace(site, conv=grown).cost.macs
        return Cost(running + building, conv.params + (3 if self.weighted else 2) * math.prod(conv.kernel))

    def build(self, conv: ConvSpec, settings: Settings) -> OffsetConv2d:
        return OffsetConv2d(conv, settings.limit, self.weighted)

    def init_(self, module: nn.Module, original: Original, settings: Settings) -> None:
        super().init_(module, original, settings)
        own = cast(OffsetConv2d, module)
        nn.init.zeros_(own.raw_offsets)
        if own.tap_weights is not None:
            nn.init.ones_(own.tap_weights)

    def tap_offsets(self, module: nn.Module, x: Tensor) -> Tensor:
        return cast(OffsetConv2d, module).offsets().detach()[None]

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
        """Return one conv with the built kernel, cut to the pixels that taps touch, by the same on both sides."""
        own, reach = cast(OffsetConv2d, module), math.ceil(settings.limit)
        # "same" follows the kernel by itself, however short that becomes.
        shrink = None if conv.padding == "same" else (conv.pads[2], conv.pads[0])
        share_TYX = bilinear.spread(own.offsets(), conv.kernel, conv.dilation, reach)
        rows, columns = bilinear.windows(share_TYX, conv.kernel, conv.dilation, reach, shrink)
        fields, _ = _convs.centred(conv, (len(rows), len(columns)), (rows.step, columns.step))
        kernel = own.kernel()[:, :, list(rows)][..., list(columns)]
        return _convs.conv_of(fields, kernel, own.bias, own.weight)


def _grown(conv: ConvSpec, limit: float) -> ConvSpec:
    """Return the conv of the built kernel."""
    return _convs.centred(conv, bilinear.grid_size(conv.kernel, conv.dilation, math.ceil(limit)), (1, 1))[0]
