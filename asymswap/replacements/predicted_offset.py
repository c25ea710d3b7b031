"""A k x k conv whose taps are moved at every pixel by offsets that a second conv, the predictor, reads off the input.

This is the deformable convolution of Dai, Qi, Xiong, Li, Zhang, Hu and Wei, "Deformable Convolutional Networks",
ICCV 2017; with `mask = true` each sampled value is also scaled, by 2 * sigmoid, so that zero means one: Zhu, Hu, Lin
and Dai, "Deformable ConvNets v2", CVPR 2019.

The predictor has the kernel, stride, padding and dilation of the conv, as in both papers: one offset for every tap at
every pixel of the output. It starts at zero, is dense even where the conv is depthwise, and has 2 (with masks 3) output
channels for each tap.

Samples between pixels are bilinear, samples beyond the input are zero. Padding of another mode is laid around the input
first: samples up to its rim see it, samples beyond the rim are zero.
"""

import math
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx, nn
from torchvision import ops

from asymswap.errors import RecipeError
from asymswap.replacements import _convs
from asymswap.replacements.base import GrowingSettings, Original, Replacement
from asymswap.types import ConvSpec, Cost, Site, Size
from asymswap.utils.tensors import is_channels_last

BILINEAR_MACS = 4  # multiply-adds of one sample between pixels: one for each of the four pixels around it


class Settings(GrowingSettings):
    """Masks, and the number of groups of channels that move on their own."""

    mask: bool = False
    """Also predict a factor for every sample: 0 to 2, and 1 at conversion."""
    offset_groups: int = Field(1, ge=1)
    """Equal groups of input channels with offsets (and masks) of their own."""


class PredictorConv2d(nn.Conv2d):
    """The conv that predicts offsets. No kind swaps it: two factors of zero would have no gradient, and never learn."""


class PredictedOffsetConv2d(nn.Module):
    """A conv of these fields whose taps are moved; takes (N, C, H, W) or (C, H, W), as an `nn.Conv2d` does.

    `predictor` gives, for T taps and G offset groups, 2 * G * T channels of offsets in pixels of the input, as pairs
    (down, right) for each tap of each group, and then, with `mask`, G * T channels of masks before their sigmoid.
    """

    def __init__(self, conv: ConvSpec, *, mask: bool = False, offset_groups: int = 1) -> None:
        super().__init__()
        self.conv, self.mask, self.offset_groups = conv, mask, offset_groups
        # deform_conv2d adds as many zeros after as before: one row or column more, as "same" has for even kernels, and
        # any other padding mode come beforehand. Zeros either way are the same: samples beyond the input are zero too.
        left, right, top, bottom = conv.pads
        self.margins, self.padding = conv.pads, (0, 0)
        if conv.padding_mode == "zeros":
            self.margins, self.padding = (0, right - left, 0, bottom - top), (top, left)
        self.predictor = _convs.new_conv(_predictor(conv, mask, offset_groups), cls=PredictorConv2d)
        dtype = self.predictor.weight.dtype
        self.weight = nn.Parameter(torch.empty(conv.out_channels, conv.group_in, *conv.kernel, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(conv.out_channels, dtype=dtype)) if conv.bias else None

    def predict_offsets(self, x: Tensor) -> Tensor:
        """Return the offsets in pixels, (N, 2 * offset_groups * taps, H, W) of the output's size."""
        channels = _predictor(self.conv, False, self.offset_groups).out_channels
        return cast(Tensor, self.predictor(x)).narrow(-3, 0, channels)

    def forward(self, input: Tensor) -> Tensor:
        x, predicted = input, self.predictor(input)
        if any(self.margins):
            x = F.pad(x, self.margins, "constant" if self.conv.padding_mode == "zeros" else self.conv.padding_mode)
        geometry = (self.conv.stride, self.padding, self.conv.dilation)
        return _deform_conv2d(x, predicted, self.weight, self.bias, geometry, self.mask)

    def extra_repr(self) -> str:
        mask = ", mask" if self.mask else ""
        return f"{self.conv.describe()}, padding={self.conv.padding}, offset_groups={self.offset_groups}{mask}"


class PredictedOffset(Replacement):
    settings = Settings
    PRESERVES = "exact until its predictor is trained"

    def cost(self, site: Site, settings: Settings) -> Cost:
        """Count the predictor, the sampling (`BILINEAR_MACS` each, one more with a mask) and the conv's products."""
        predictor = _predictor(site.conv, settings.mask, settings.offset_groups)
        samples = site.conv.in_channels * math.prod(site.conv.kernel)
        pixels = sum(math.prod(call.output) * call.batch for call in site.calls)
        sampling = Cost(pixels * samples * (BILINEAR_MACS + settings.mask), 0)
        return site.cost + replace(site, conv=predictor).cost + sampling

    def build(self, conv: ConvSpec, settings: Settings) -> PredictedOffsetConv2d:
        return PredictedOffsetConv2d(conv, mask=settings.mask, offset_groups=settings.offset_groups)

    def init_(self, module: nn.Module, original: Original, settings: Settings) -> None:
        super().init_(module, original, settings)
        for parameter in cast(PredictedOffsetConv2d, module).predictor.parameters():
            nn.init.zeros_(parameter)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d | None:
        """Return the conv with the replacement's weights while the predictor is zero; None once it has learned."""
        predictor = cast(PredictedOffsetConv2d, module).predictor
        trained = any(bool(parameter.any()) for parameter in predictor.parameters())
        return None if trained else self.without_offsets(module, conv)

    def tap_offsets(self, module: nn.Module, x: Tensor) -> Tensor:
        own = cast(PredictedOffsetConv2d, module)
        predicted_NGTCHW: Tensor = own.predict_offsets(x).detach().unflatten(1, (own.offset_groups, -1, 2))
        return predicted_NGTCHW.permute(0, 1, 4, 5, 2, 3).flatten(0, 3)

    def without_offsets(self, module: nn.Module, conv: ConvSpec) -> nn.Conv2d:
        """Return the conv with the replacement's weights; masks, near one where offsets are near zero, are left out."""
        own = cast(PredictedOffsetConv2d, module)
        return _convs.conv_of(conv, own.weight, own.bias, own.weight)


def _predictor(conv: ConvSpec, mask: bool, offset_groups: int) -> ConvSpec:
    if conv.in_channels % offset_groups:
        raise RecipeError(f"offset_groups = {offset_groups} does not divide the {conv.in_channels} input channels")
    channels = (3 if mask else 2) * offset_groups * math.prod(conv.kernel)
    return replace(conv, out_channels=channels, groups=1, bias=True)


# torch.fx cannot follow torchvision's function, which decides by shapes: the call stays one node of a graph.
@fx.wrap
def _deform_conv2d(
    x: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Size, Size, Size], masked: bool
) -> Tensor:
    """Run torchvision's operator (`geometry`: stride, padding, dilation), with a conv's dtype and memory format."""
    if x.dim() == 3:
        return _deform_conv2d(x[None], predicted[None], weight, bias, geometry, masked)[0]
    # The operator wants one dtype, which autocast does not see to on the CPU, and it has no kernels for bfloat16.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, moved, weight = x.to(dtype), predicted.to(dtype), weight.to(dtype)
    mask = None
    if masked:
        offset_channels = moved.shape[1] // 3 * 2
        moved, mask = moved[:, :offset_channels], 2 * moved[:, offset_channels:].sigmoid()
    # A NaN for an offset makes the operator read outside of the input's memory, which ends the process.
    lost = moved.isnan().any(1, keepdim=True)
    bias = None if bias is None else bias.to(dtype)
    output: Tensor = ops.deform_conv2d(x, moved.nan_to_num(), weight, bias, *geometry, mask)
    output = output.masked_fill(lost, math.nan).to(predicted.dtype)
    # The operator forgets the input's format; the predictor is a conv, and chose that which any conv would.
    if is_channels_last(predicted):
        output = output.contiguous(memory_format=torch.channels_last)
    return output
