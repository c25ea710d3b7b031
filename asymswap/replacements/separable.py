"""A k x k conv as a pair: (kh x 1, C -> R) then (1 x kw, R -> O), or the other order.

The first conv carries the stride, padding and dilation of its own axis, the second those of the other; groups are
solved group by group, and the rank R is that of one group; both convs keep the padding mode, the bias stays on the
second. With nothing between the two the pair is exact at full rank: without a bias on the first conv, padding its
output by zeros is the same as padding its input. Mathematics and papers: `asymswap.factorize.svd` for the weights
alone, `asymswap.factorize.covariance` for calibration data.

A batch norm, a ReLU or both can stand between (Inception: Szegedy et al., 2016; ERFNet: Romera et al., 2018), for a
network that is trained on. They start as near to nothing as they can:

- The batch norm has the mean and variance of the first conv's output as its statistics, and a weight and bias that
  undo them. In eval mode it passes everything on, so that the pair computes what it would without it, at the borders
  too; in train mode it does so as far as a batch has these statistics. They come from the statistics, else from the
  assumption of white inputs: then eval mode is just as exact, but train mode rescales.
- The ReLU gets every channel raised by what brings three deviations below its mean above zero (by the batch norm's
  bias or else the first conv's), and the second conv's bias takes that away again. What lies lower is cut. Zeros that
  the second conv would pad were not raised: where it pads zeros, the first conv pads in its place, on both axes, and
  walks over that many pixels more. (A batch norm then sees the padding in train mode, of which the patches tell only
  in part.) For `same` padding that is not alike on both sides no conv can do that: there the borders come out wrong.

At the usual padding a smaller shift would be a compromise between what is cut and what the borders lose. On
digits-resnet at a quarter of its MACs, those for the padding counted, calibrated in one pass on 256 images, top-1 is
94 % with no ReLU, 92 % with one, and 68 % at the usual padding with the best shift (1.5 deviations); at half of the
MACs without calibration it is 98, 97 and 81 %. On two other draws of the images no ReLU has 96 % and one 90 %.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from asymswap.errors import PlanError, RecipeError
from asymswap.factorize import covariance, intermediate, svd
from asymswap.factorize.allocation_cost import loss
from asymswap.factorize.statistics import SiteStatistics
from asymswap.replacements import KindSettings
from asymswap.replacements import _strip_convs as strip_convs
from asymswap.types import ConvSpec, Cost, Option, Site, Size
from asymswap.utils.tensors import store_

SIZES = ("rank", "ratio", "energy")
_SMALL = 10_000_000
"""MACs of a conv below which its time is not that of its arithmetic."""

PRESERVES = "the function, as well as the rank allows; exactly at full rank, in eval mode, unless a ReLU stands between"

_UNSETTLED = "kind 'separable' needs a settled rank and order, not {}"

_DEVIATIONS = 3.0
"""What is so far below a channel's mean still passes the ReLU.

On digits-resnet at a quarter of its MACs, calibrated in one pass, three draws of the images, the output's error is
0.58 at 2 deviations, 0.54 at 2.5, 0.52 at 3 and 0.52 at 4, with no ReLU 0.40.
"""

Order = Literal["vertical-first", "horizontal-first"]
Between = Literal["none", "relu", "bn", "bn-relu"]


class Settings(KindSettings):
    """Order of the two convs, and one of three ways to say how wide the middle is (or none, where a budget decides)."""

    order: Literal["auto", "vertical-first", "horizontal-first"] = "auto"
    """`auto`: the order with the smaller error at equal cost, or the cheaper one at equal error."""

    rank: Annotated[int, Field(ge=1)] | None = None
    """Channels between the two convs, of each group."""

    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """The largest rank that keeps at most this fraction of the conv's MACs."""

    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    """The smallest rank that keeps at least this fraction of the kernel's squared Frobenius norm."""

    multiple: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """A budget chooses ranks among the multiples of this number, and 1, 2, 4 … below it.

    `auto`: 16, 8, 4, 2 or 1, by the conv's size.
    """

    bias: bool = False
    """Give the second conv a bias even where the conv has none; calibration corrects the output's mean by it."""

    between: Between = "none"
    """What stands between the two convs: nothing, a ReLU, a batch norm, or a batch norm and a ReLU.

    The errors by which ranks are chosen are those of the pair without it. A ReLU implies `bias`.
    """

    @model_validator(mode="after")
    def _one_size(self) -> Settings:
        given = [f"{name} = {getattr(self, name)}" for name in SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of rank, ratio and energy, not {' and '.join(given)}")
        return self


def refuse(conv: ConvSpec) -> str | None:
    """A kernel of one row or one column has nothing to separate; only real floating-point weights can be."""
    if 1 in conv.kernel:
        shape = "x".join(map(str, conv.kernel))
        return (
            f"a {shape} kernel has nothing to separate" if conv.kernel == (1, 1) else f"{shape} is asymmetric already"
        )
    if conv.dtype not in ("float64", "float32", "float16", "bfloat16"):
        return f"{conv.dtype} weights cannot be factorised"
    return None


def options(
    site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None
) -> Sequence[Option]:
    """The ranks of every order that the settings allow, whatever they cost."""
    every: list[Option] = []
    for order in _orders(settings):
        curve = _curve(site, conv, order, settings, statistics)
        step = _multiple(curve, site) if settings.multiple == "auto" else settings.multiple
        every += [option for option in curve if _is_round(option.settings["rank"], step) or option is curve[-1]]
    return every


def settle(site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None) -> Option:
    """Choose the rank and the order; raises RecipeError for a rank above the full one or a ratio below rank 1."""
    spec = site.conv
    found: list[Option] = []
    for order in _orders(settings):
        if settings.rank is not None and settings.rank > full_rank(spec, order):
            continue
        option = _pick(_curve(site, conv, order, settings, statistics), site.cost, settings)
        if option is not None:
            found.append(option)
    if not found:
        raise RecipeError(_unmet(site, settings))
    if settings.energy is not None:
        return min(found, key=lambda option: (option.cost.macs, option.cost.params, option.error))
    best = min(found, key=lambda option: option.loss)
    # Errors that differ by rounding only are equal, and then the cheaper order wins.
    equal = [option for option in found if math.isclose(option.loss, best.loss, rel_tol=1e-9, abs_tol=1e-12)]
    return min(equal, key=lambda option: (option.cost.macs, option.cost.params))


def preserves(conv: ConvSpec, settings: Settings) -> bool:
    """At full rank where no ReLU stands between; only a batch norm in half precision rounds more than is promised."""
    if settings.order == "auto" or settings.rank != full_rank(conv, settings.order) or _rectifies(settings.between):
        return False
    return settings.between == "none" or conv.dtype in ("float32", "float64")


def cost(site: Site, settings: Settings) -> Cost:
    """MACs over all calls and parameters of the settled pair."""
    if settings.rank is None or settings.order == "auto":
        raise PlanError(_UNSETTLED.format(settings.model_dump(exclude_none=True)))
    return pair_cost(site, settings.rank, settings.order, settings.bias, settings.between)


def build(conv: ConvSpec, settings: Settings) -> nn.Sequential:
    """An `nn.Sequential` of two convs named `vertical` and `horizontal`, in the order in which they run.

    Between them stand `norm` and `relu` where they are wanted.
    """
    if settings.rank is None or settings.order == "auto":
        raise PlanError(_UNSETTLED.format(settings.model_dump(exclude_none=True)))
    channels, rectified = conv.groups * settings.rank, _rectifies(settings.between)
    ends = [
        (conv.in_channels, channels, settings.between == "relu"),
        (channels, conv.out_channels, conv.bias or settings.bias or rectified),
    ]
    halves: list[tuple[str, nn.Module]] = []
    paddings = _paddings(conv, settings.order, settings.between)
    for (inputs, outputs, bias), vertical, padding in zip(ends, _axes(settings.order), paddings, strict=True):
        half = replace(
            conv,
            in_channels=inputs,
            out_channels=outputs,
            kernel=_along(conv.kernel, vertical),
            stride=_along(conv.stride, vertical),
            padding=padding,
            dilation=_along(conv.dilation, vertical),
            bias=bias,
        )
        halves.append(("vertical" if vertical else "horizontal", strip_convs.new_conv(half)))
    between: list[tuple[str, nn.Module]] = []
    if settings.between in ("bn", "bn-relu"):
        between.append(("norm", nn.BatchNorm2d(channels, dtype=getattr(torch, conv.dtype))))
    if rectified:
        between.append(("relu", nn.ReLU()))
    return nn.Sequential(OrderedDict([halves[0], *between, halves[1]]))


def init_(module: nn.Module, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None) -> None:
    """The best pair of each group, by truncated SVD of the kernel or on the statistics, the scale shared evenly.

    What stands between the two starts as the head of this file tells.
    """
    assert settings.rank is not None
    parts = _parts(module)
    vertical_first = settings.order == "vertical-first"
    kernel = cast(Size, conv.kernel_size)
    if statistics is None:
        matrix = svd.as_matrix(conv.weight, conv.groups, vertical_first)
        a_GAR, b_GRB = svd.factors(matrix, settings.rank)
    else:
        a_GAR, b_GRB = covariance.factors(covariance.arrange(statistics, kernel, vertical_first), settings.rank)
    weights = svd.as_kernels(a_GAR, b_GRB, kernel, vertical_first)
    bias_O = _bias(conv, weights, settings, statistics)
    with torch.no_grad():
        for half, weight in zip((parts.first, parts.second), weights, strict=True):
            half.weight.copy_(weight)
        if settings.between != "none":
            shift_GR = _init_between_(parts, conv, weights[0], settings, statistics)
            bias_O = bias_O - intermediate.carried(shift_GR, weights[1])
        if parts.second.bias is not None:
            parts.second.bias.copy_(bias_O)


def _init_between_(
    parts: _Parts, conv: nn.Conv2d, first_OIHW: Tensor, settings: Settings, statistics: SiteStatistics | None
) -> Tensor:
    """Let the batch norm pass on what it gets, and the ReLU as much as it can; returns by how much that is shifted."""
    if statistics is None:
        moments = intermediate.white(first_OIHW, conv.groups)
    else:
        moments = intermediate.seen(statistics, first_OIHW, cast(Size, conv.kernel_size), _read_taps(parts.first, conv))
    shift_GR = moments.shift(_DEVIATIONS if _rectifies(settings.between) else None)
    if parts.norm is None:
        assert parts.first.bias is not None
        parts.first.bias.copy_(shift_GR.flatten())
        return shift_GR
    norm, mean, variance = parts.norm, *_statistics(parts.norm)
    store_(mean, moments.mean_GR.flatten())
    store_(variance, moments.variance_GR.flatten())
    # From the statistics as they are stored, rounded or cut: what one does the other undoes.
    norm.weight.copy_((variance.to(torch.float64) + norm.eps).sqrt())
    norm.bias.copy_(mean.to(shift_GR) + shift_GR.flatten())
    return shift_GR


def _read_taps(first: nn.Conv2d, conv: nn.Conv2d) -> list[int]:
    """The taps of the second conv through which the first one's output map is seen best.

    Those that see no padding of the second conv, or the least: it is no output of the first. Where the first pads in
    its place, all of them.
    """
    axis = 1 if first.kernel_size[1] == 1 else 0
    taps = range(conv.kernel_size[axis])
    if not isinstance(first.padding, str) and first.padding[axis]:
        return list(taps)
    before, after = _margin(conv.padding, cast(Size, conv.kernel_size), cast(Size, conv.dilation), axis)
    step = conv.dilation[axis]
    outside = [max(before - step * tap, 0) + max(after - step * (taps[-1] - tap), 0) for tap in taps]
    return [tap for tap in taps if outside[tap] == min(outside)]


def _bias(
    conv: nn.Conv2d, weights: tuple[Tensor, Tensor], settings: Settings, statistics: SiteStatistics | None
) -> Tensor:
    """The conv's own bias, or with statistics the one that gives the output its wanted mean."""
    if statistics is None:
        return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    kernel = svd.compose(*weights, conv.groups, settings.order == "vertical-first")
    seen = torch.einsum("god,gd->go", kernel.flatten(1).unflatten(0, (conv.groups, -1)), statistics.mean_GD)
    return (statistics.target_mean_GO - seen).flatten()


def fuse(module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d | None:
    """One k x k conv of the original fields whose kernel is the product of the pair's, with the pair's bias.

    A batch norm between is folded into it. None with a ReLU between, or where the batch norm shifts what it passes on
    (as it does once it is trained) and zeros are padded behind it: the borders do not get what the rest gets.
    """
    parts = _parts(module)
    folded = None if _rectifies(settings.between) else _fold(parts, conv, settings)
    if folded is None:
        return None
    own = parts.second.weight
    fused = strip_convs.new_conv(replace(conv, bias=folded.bias_O is not None), own.dtype, own.device)
    second = own.to(torch.float64)
    with torch.no_grad():
        fused.weight.copy_(svd.compose(folded.first_OIHW, second, conv.groups, settings.order == "vertical-first"))
        if fused.bias is not None:
            fused.bias.copy_(cast(Tensor, folded.bias_O))
    return fused


def full_rank(conv: ConvSpec, order: Order) -> int:
    """The rank of one group at which the pair is exact."""
    vertical = order == "vertical-first"
    along, across = conv.kernel if vertical else conv.kernel[::-1]
    return min(conv.group_in * along, conv.group_out * across)


def pair_cost(site: Site, rank: int, order: Order, bias: bool = False, between: Between = "none") -> Cost:
    """MACs over all calls and parameters of the pair, from the formula alone.

    `bias` and `between` are the settings of these names.
    """
    conv = site.conv
    vertical = order == "vertical-first"
    along, across = conv.kernel if vertical else conv.kernel[::-1]
    channels = conv.groups * rank
    first, second = channels * conv.group_in * along, conv.out_channels * rank * across
    more = 2 * _early_padding(conv, order, between)
    macs = 0
    for call in site.calls:
        # The first conv has walked its own axis only: the other one still has its input size.
        walked = (call.output[0], call.input[1] + more) if vertical else (call.input[0] + more, call.output[1])
        macs += call.batch * (first * math.prod(walked) + second * math.prod(call.output))
    held = {"none": 0, "relu": channels, "bn": 2 * channels, "bn-relu": 2 * channels}[between]
    return Cost(macs, first + second + held + conv.out_channels * (conv.bias or bias or _rectifies(between)))


def _rectifies(between: Between) -> bool:
    """Whether a ReLU stands between the two convs."""
    return between in ("relu", "bn-relu")


def _early_padding(conv: ConvSpec, order: Order, between: Between) -> int:
    """How many pixels the first conv pads on either side of the axis of the second, in its place."""
    margins = [_margin(conv.padding, conv.kernel, conv.dilation, axis) for axis in (0, 1)]
    can = all(before == after for before, after in margins)
    needed = _rectifies(between) and conv.padding_mode == "zeros"
    return margins[1 if order == "vertical-first" else 0][0] if needed and can else 0


def _paddings(conv: ConvSpec, order: Order, between: Between) -> tuple[Size | str, Size | str]:
    """The padding of the first and of the second conv."""
    if _early_padding(conv, order, between):
        rows, columns = (_margin(conv.padding, conv.kernel, conv.dilation, axis)[0] for axis in (0, 1))
        return (rows, columns), (0, 0)
    if isinstance(conv.padding, str):
        return conv.padding, conv.padding
    first, second = (_along(conv.padding, vertical, rest=0) for vertical in _axes(order))
    return first, second


def _margin(padding: Sequence[int] | str, kernel: Size, dilation: Size, axis: int) -> Size:
    """How many pixels a conv adds before and after its input along one axis."""
    if not isinstance(padding, str):
        return (padding[axis], padding[axis])
    total = dilation[axis] * (kernel[axis] - 1) if padding == "same" else 0
    return (total // 2, total - total // 2)


def _orders(settings: Settings) -> tuple[Order, ...]:
    return ("vertical-first", "horizontal-first") if settings.order == "auto" else (settings.order,)


def _axes(order: Order) -> tuple[bool, bool]:
    """For each conv of the pair, in run order, whether it is the vertical one."""
    return (True, False) if order == "vertical-first" else (False, True)


def _along(pair: Size, vertical: bool, rest: int = 1) -> Size:
    """The part of a (height, width) field that belongs to one conv of the pair."""
    return (pair[0], rest) if vertical else (rest, pair[1])


def _curve(
    site: Site, conv: nn.Conv2d, order: Order, settings: Settings, statistics: SiteStatistics | None
) -> list[Option]:
    """One option for each rank; the error is what truncation leaves out, relative to the whole."""
    vertical_first = order == "vertical-first"
    bias = settings.bias or (statistics is not None and not site.conv.bias)
    if statistics is None:
        errors = _left(svd.energies(svd.as_matrix(conv.weight, conv.groups, vertical_first)))
    else:
        problem = covariance.arrange(statistics, site.conv.kernel, vertical_first)
        plain = replace(problem, p_GOO=torch.eye(site.conv.group_out, dtype=torch.float64)[None])
        errors = _left(covariance.energies(plain))
    divergences: Sequence[float | None] = [None] * len(errors)
    if statistics is not None and statistics.weight_GOO is not None:
        weighted = covariance.energies(problem)
        whole = 0.5 * float(weighted.sum())
        divergences = [whole * left for left in _left(weighted)]
    extra: dict[str, Any] = {"bias": True} if bias and not site.conv.bias else {}
    if settings.between != "none":
        extra["between"] = settings.between
    costs = [pair_cost(site, rank, order, bias, settings.between) for rank in range(1, len(errors) + 1)]
    return [
        Option({"rank": rank, "order": order, **extra}, costs[rank - 1], error, loss(error, nats))
        for rank, (error, nats) in enumerate(zip(errors, divergences, strict=True), start=1)
        if rank <= full_rank(site.conv, order)
    ]


def _multiple(curve: Sequence[Option], site: Site) -> int:
    """The largest of 16, 8, 4 and 2 that leaves five ranks below the break-even; one for small convs.

    Processors work on 16 channels at once (AVX-512), or on 8 or 4: a pair of rank 65 takes as long as one of rank 80.
    The time of small convs does not depend on their rank, so that rounding would cost accuracy for nothing
    (docs/results/calibration-experiments.md).
    """
    if site.cost.macs < _SMALL:
        return 1
    paying = sum(option.cost.macs < site.cost.macs for option in curve)
    return next((step for step in (16, 8, 4, 2) if 5 * step <= paying), 1)


def _is_round(rank: int, step: int) -> bool:
    """Whether it is a multiple of the step, or below it a power of two: the cheapest ranks stay within reach."""
    return rank % step == 0 or (rank < step and rank.bit_count() == 1)


def _left(energy_GK: Tensor) -> list[float]:
    """The share of the energy, summed over the groups, that ranks 1, 2, … leave out."""
    energy_K = energy_GK.sum(0)
    left = energy_K.flip(0).cumsum(0).flip(0) / energy_K.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return [*left[1:].tolist(), 0.0]


def _pick(curve: list[Option], whole: Cost, settings: Settings) -> Option | None:
    """The point of one order's curve that the settings ask for, or None where it has none."""
    if settings.rank is not None:
        return curve[settings.rank - 1]
    if settings.ratio is not None:
        fitting: Iterator[Option] = (o for o in reversed(curve) if o.cost.macs <= settings.ratio * whole.macs)
        return next(fitting, None)
    assert settings.energy is not None
    return next(option for option in curve if 1 - option.error >= settings.energy or option is curve[-1])


def _unmet(site: Site, settings: Settings) -> str:
    if settings.rank is not None:
        most = max(full_rank(site.conv, order) for order in _orders(settings))
        return f"rank = {settings.rank} is above the full rank {most}"
    least = min(pair_cost(site, 1, order, between=settings.between).macs for order in _orders(settings))
    kept = least / max(site.cost.macs, 1)
    return f"ratio = {settings.ratio} cannot be met: rank 1 keeps {kept:.3f} of the MACs already"


@dataclass(frozen=True)
class _Parts:
    """The modules of a pair that hold numbers."""

    first: nn.Conv2d
    norm: nn.BatchNorm2d | None
    second: nn.Conv2d


def _parts(module: nn.Module) -> _Parts:
    first, *between, second = module.children()
    norm = next((part for part in between if isinstance(part, nn.BatchNorm2d)), None)
    return _Parts(cast(nn.Conv2d, first), norm, cast(nn.Conv2d, second))


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The running mean and variance, the tensors themselves."""
    return cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The factor and the shift of a batch norm in eval mode, in float64; a shift that is mere rounding is zero."""
    mean, variance = (tensor.to(torch.float64) for tensor in _statistics(norm))
    bias = norm.bias.detach().to(torch.float64)
    scale = norm.weight.detach().to(torch.float64) / (variance + norm.eps).sqrt()
    shift = bias - mean * scale
    rounding = 4 * torch.finfo(norm.weight.dtype).eps * (bias.abs() + (mean * scale).abs())
    return scale, torch.where(shift.abs() > rounding, shift, 0.0)


class _Folded(NamedTuple):
    """The first conv's weight with a batch norm's factor in it, the second's bias with its shift; in float64."""

    first_OIHW: Tensor
    bias_O: Tensor | None


def _fold(parts: _Parts, conv: ConvSpec, settings: Settings) -> _Folded | None:
    """The batch norm folded into the convs beside it, or None where the borders would not get what they get now."""
    first = parts.first.weight.detach().to(torch.float64)
    bias_O = None if parts.second.bias is None else parts.second.bias.detach().to(torch.float64)
    if parts.norm is None:
        return _Folded(first, bias_O)
    scale_R, shift_R = _affine(parts.norm)
    first = first * scale_R[:, None, None, None]
    if not bool(shift_R.any()):
        return _Folded(first, bias_O)
    axis = 1 if settings.order == "vertical-first" else 0
    if conv.padding_mode == "zeros" and any(_margin(conv.padding, conv.kernel, conv.dilation, axis)):
        return None
    shift_O = intermediate.carried(shift_R.unflatten(0, (conv.groups, -1)), parts.second.weight)
    return _Folded(first, shift_O if bias_O is None else bias_O + shift_O)
