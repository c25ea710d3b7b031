"""A k x k conv whose taps are moved at every pixel by offsets that a second conv, the predictor, reads off the input.

This is the deformable convolution of Dai, Qi, Xiong, Li, Zhang, Hu and Wei, "Deformable Convolutional Networks",
ICCV 2017; with `mask = true` each sampled value is also scaled, as in Zhu, Hu, Lin and Dai, "Deformable ConvNets v2",
CVPR 2019. A mask is 2 * sigmoid, so that zero means one.

The predictor has the kernel, stride, padding and dilation of the conv itself, as in both papers, so that there is one
offset for every tap at every pixel of the output whatever form the conv has. It starts at zero: the replacement then
computes what the conv does, and learns where to look when it is trained. It is dense where the conv is depthwise, and
costs 2 (with masks 3) times as many output channels as the kernel has taps: the replacement always costs more.

Samples between pixels are bilinear, samples beyond the input are zero. Padding of another mode is laid around the input
first: samples up to its rim see it, samples beyond the rim are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx, nn
from torchvision import ops

from asymswap.errors import PlanError, RecipeError
from asymswap.factorize.statistics import SiteStatistics
from asymswap.replacements import KindSettings
from asymswap.replacements import _strip_convs as strip_convs
from asymswap.types import ConvSpec, Cost, Option, Site, Size
from asymswap.utils.tensors import is_channels_last

SIZES = ()
PRESERVES = "the function, exactly, until its predictor is trained"

BILINEAR_MACS = 4
"""Multiply-adds of one sample between pixels: one for each of the four pixels around it."""


class Settings(KindSettings):
    """Whether samples are also scaled, and how many groups of channels move on their own."""

    allow_growth: bool = True
    """Swap even where the replacement has more MACs or parameters than the original conv, which it always has."""

    mask: bool = False
    """Also predict a factor between 0 and 2 for every sample, which is one at conversion."""

    offset_groups: Annotated[int, Field(ge=1)] = 1
    """Equal groups of input channels that have offsets (and masks) of their own."""


class PredictorConv2d(nn.Conv2d):
    """The conv that predicts offsets; a type of its own, which no kind swaps.

    Factorised while it is zero it could never learn: both factors would be zero, and so the gradient of each.
    """


class PredictedOffsetConv2d(nn.Module):
    """A conv of these fields whose taps are moved; takes (N, C, H, W) or (C, H, W), as an `nn.Conv2d` does.

    `predictor` gives, for T taps and G offset groups, 2 * G * T channels of offsets in pixels of the input, as pairs
    (down, right) for each tap of each group, and then, with `mask`, G * T channels of masks before their sigmoid.
    """

    def __init__(self, conv: ConvSpec, *, mask: bool = False, offset_groups: int = 1) -> None:
        super().__init__()
        self.conv, self.mask, self.offset_groups = conv, mask, offset_groups
        self.margins, self.padding = _paddings(conv)
        self.predictor: PredictorConv2d = nn.utils.skip_init(
            PredictorConv2d,
            conv.in_channels,
            _predicted_channels(conv, mask, offset_groups),
            conv.kernel,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            padding_mode=conv.padding_mode,
            dtype=getattr(torch, conv.dtype),
        )
        dtype = self.predictor.weight.dtype
        self.weight = nn.Parameter(torch.empty(conv.out_channels, conv.group_in, *conv.kernel, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(conv.out_channels, dtype=dtype)) if conv.bias else None

    def predict_offsets(self, x: Tensor) -> Tensor:
        """The offsets in pixels, (N, 2 * offset_groups * taps, H, W) of the output's size; `.abs().max()` is how far
        the taps move on this input."""
        return cast(Tensor, self.predictor(x)).narrow(-3, 0, _predicted_channels(self.conv, False, self.offset_groups))

    def forward(self, input: Tensor) -> Tensor:
        """The output of the conv with every tap moved by its offset."""
        x, predicted = input, self.predictor(input)
        if any(self.margins):
            x = F.pad(x, self.margins, "constant" if self.conv.padding_mode == "zeros" else self.conv.padding_mode)
        return _deform_conv2d(
            x, predicted, self.weight, self.bias, self.conv.stride, self.padding, self.conv.dilation, self.mask
        )

    def extra_repr(self) -> str:
        """The fields in one phrase."""
        mask = ", mask" if self.mask else ""
        return f"{self.conv.describe()}, padding={self.conv.padding}, offset_groups={self.offset_groups}{mask}"


def refuse(conv: ConvSpec) -> str | None:
    """Every form of conv can be moved; only real floating-point weights can be sampled for."""
    if conv.dtype not in ("float64", "float32", "float16", "bfloat16"):
        return f"{conv.dtype} convs cannot sample between pixels"
    return None


def preserves(conv: ConvSpec, settings: Settings) -> bool:
    """True: a predictor of zeros moves nothing."""
    return True


def cost(site: Site, settings: Settings) -> Cost:
    """MACs over all calls and parameters: the predictor, the sampling, and the products of the conv itself.

    Each of the C * kh * kw samples of an output pixel costs `BILINEAR_MACS`, and one more where it has a mask.
    """
    conv = site.conv
    taps = math.prod(conv.kernel)
    predicted = _predicted_channels(conv, settings.mask, settings.offset_groups)
    predictor = predicted * conv.in_channels * taps
    sampling = conv.in_channels * taps * (BILINEAR_MACS + settings.mask)
    pixels = sum(math.prod(call.output) * call.batch for call in site.calls)
    return Cost(pixels * (predictor + sampling + conv.macs_per_pixel()), predictor + predicted + conv.params)


def options(
    site: Site,
    conv: nn.Conv2d,
    settings: Settings,
    statistics: SiteStatistics | None = None,
) -> Sequence[Option]:
    """The one replacement that the settings describe."""
    return [settle(site, conv, settings, statistics)]


def settle(
    site: Site,
    conv: nn.Conv2d,
    settings: Settings,
    statistics: SiteStatistics | None = None,
) -> Option:
    """The settings as they are; raises RecipeError where the channels do not divide into the offset groups."""
    problem = _uneven(site.conv, settings)
    if problem is not None:
        raise RecipeError(problem)
    settled = {"mask": settings.mask, "offset_groups": settings.offset_groups}
    return Option(settled, cost(site, settings), error=0.0, loss=0.0)


def build(conv: ConvSpec, settings: Settings) -> PredictedOffsetConv2d:
    """A `PredictedOffsetConv2d`; raises PlanError where the channels do not divide into the offset groups."""
    problem = _uneven(conv, settings)
    if problem is not None:
        raise PlanError(f"kind 'predicted-offset': {problem}")
    return PredictedOffsetConv2d(conv, mask=settings.mask, offset_groups=settings.offset_groups)


def init_(
    module: nn.Module,
    conv: nn.Conv2d,
    settings: Settings,
    statistics: SiteStatistics | None = None,
) -> None:
    """The conv's own weights and a predictor of zeros; statistics have nothing to add to an exact replacement."""
    deformable = cast(PredictedOffsetConv2d, module)
    with torch.no_grad():
        deformable.weight.copy_(conv.weight)
        if deformable.bias is not None:
            deformable.bias.copy_(cast(Tensor, conv.bias))
        for parameter in deformable.predictor.parameters():
            parameter.zero_()


def fuse(module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d | None:
    """The conv with the replacement's weights while its predictor is still zero; None once it has learned anything."""
    deformable = cast(PredictedOffsetConv2d, module)
    if any(bool(parameter.any()) for parameter in deformable.predictor.parameters()):
        return None
    return without_offsets(module, conv)


def largest_offset(module: nn.Module, x: Tensor) -> float:
    """The largest offset along an axis, in pixels, that the predictor gives for inputs (N, C, H, W)."""
    with torch.no_grad():
        return float(cast(PredictedOffsetConv2d, module).predict_offsets(x).abs().max())


def tap_offsets(module: nn.Module, x: Tensor) -> Tensor:
    """The offsets (S, T, 2) that the predictor gives for inputs (N, C, H, W): for each image, group and pixel."""
    deformable = cast(PredictedOffsetConv2d, module)
    with torch.no_grad():
        predicted_NGTCHW: Tensor = deformable.predict_offsets(x).unflatten(1, (deformable.offset_groups, -1, 2))
    return predicted_NGTCHW.permute(0, 1, 4, 5, 2, 3).flatten(0, 3)


def without_offsets(module: nn.Module, conv: ConvSpec) -> nn.Conv2d:
    """The conv with the replacement's weights; a mask, which is near one where offsets are near zero, is left out."""
    deformable = cast(PredictedOffsetConv2d, module)
    plain = strip_convs.new_conv(conv, deformable.weight.dtype, deformable.weight.device)
    with torch.no_grad():
        plain.weight.copy_(deformable.weight)
        if plain.bias is not None:
            plain.bias.copy_(cast(Tensor, deformable.bias))
    return plain


def _predicted_channels(conv: ConvSpec, mask: bool, offset_groups: int) -> int:
    return (3 if mask else 2) * offset_groups * math.prod(conv.kernel)


def _uneven(conv: ConvSpec, settings: Settings) -> str | None:
    if conv.in_channels % settings.offset_groups == 0:
        return None
    return f"offset_groups = {settings.offset_groups} does not divide the {conv.in_channels} input channels"


def _paddings(conv: ConvSpec) -> tuple[tuple[int, int, int, int], Size]:
    """What is laid around the input beforehand (left, right, top, bottom), and what deform_conv2d adds (height, width).

    deform_conv2d adds as many zeros after as before: one row or column more, as "same" has for even kernels, and any
    other padding mode come beforehand. Zeros on either way are the same, for samples beyond the input are zero too.
    """
    before, after = [0, 0], [0, 0]
    for axis, (kernel, dilation) in enumerate(zip(conv.kernel, conv.dilation, strict=True)):
        if not isinstance(conv.padding, str):
            before[axis] = after[axis] = conv.padding[axis]
        elif conv.padding == "same":
            before[axis] = dilation * (kernel - 1) // 2
            after[axis] = dilation * (kernel - 1) - before[axis]
    if conv.padding_mode == "zeros":
        return (0, after[1] - before[1], 0, after[0] - before[0]), (before[0], before[1])
    return (before[1], after[1], before[0], after[0]), (0, 0)


def _deform_conv2d(
    x: Tensor,
    predicted: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    dilation: Size,
    with_mask: bool,
) -> Tensor:
    """torchvision's operator on what the predictor gave, in the dtype and memory format that a conv would give."""
    if x.dim() == 3:
        return _deform_conv2d(x[None], predicted[None], weight, bias, stride, padding, dilation, with_mask)[0]
    # The operator wants one dtype, which autocast does not see to on the CPU, and it has no kernels for bfloat16.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, moved, weight = x.to(dtype), predicted.to(dtype), weight.to(dtype)
    mask = None
    if with_mask:
        offset_channels = moved.shape[1] // 3 * 2
        moved, mask = moved[:, :offset_channels], 2 * moved[:, offset_channels:].sigmoid()
    # A NaN for an offset makes the operator read outside of the input's memory, which ends the process.
    lost = moved.isnan().any(1, keepdim=True)
    output: Tensor = ops.deform_conv2d(
        x,
        moved.nan_to_num(),
        weight,
        None if bias is None else bias.to(dtype),
        stride=stride,
        padding=padding,
        dilation=dilation,
        mask=mask,
    )
    output = output.masked_fill(lost, math.nan).to(predicted.dtype)
    # The operator forgets the input's format; the predictor is a conv, and chose that which any conv would.
    if is_channels_last(predicted):
        output = output.contiguous(memory_format=torch.channels_last)
    return output


# torch.fx cannot follow torchvision's function, which decides by shapes: the call stays one node of a graph.
fx.wrap("_deform_conv2d")
