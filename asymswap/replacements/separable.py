"""A k x k conv as a pair: (kh x 1, C -> R) then (1 x kw, R -> O), or the other order.

Each conv carries the stride, padding and dilation of its own axis; groups are solved one by one, and R is the rank of
one; both convs keep the padding mode, the bias stays on the second. With nothing between them the pair is exact at full
rank: without a bias on the first conv, padding its output by zeros is the same as padding its input. Mathematics and
papers: `asymswap.factorize.svd` for the weights alone, `asymswap.factorize.covariance` for calibration data.

There can be a batch norm, a ReLU or both between them (Inception: Szegedy et al., 2016; ERFNet: Romera et al., 2018),
for a network that is trained on. They start as near to nothing as they can:

- The batch norm has the mean and variance of the first conv's output as its statistics, and a weight and bias that
  undo them, so that in eval mode the pair computes the same as without it, at the borders too; in train mode as far as
  a batch has these statistics. They come from calibration, else from the assumption of white inputs: then eval mode is
  just as exact, but train mode rescales.
- The ReLU gets every channel raised by what brings three deviations below its mean above zero (by the batch norm's
  bias or else the first conv's), and the second conv's bias takes that away again. What lies lower is cut. Zeros that
  the second conv would pad were not raised: where it pads zeros, the first conv pads in its place, on both axes, and
  walks over that many pixels more. (A batch norm then sees the padding in train mode, which the patches show only in
  part.) For uneven `same` padding no conv can do that: there the borders come out wrong.

At the usual padding a smaller shift would be a compromise between what is cut and what the borders lose: on
digits-resnet at a quarter of its MACs, calibrated in one pass on 256 images, top-1 is 94 % with no ReLU, 92 % with one,
and 68 % at the usual padding with the best shift (1.5 deviations).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from asymswap.errors import RecipeError
from asymswap.factorize import covariance, intermediate, svd
from asymswap.factorize.allocation_cost import loss
from asymswap.replacements import _convs
from asymswap.replacements.base import KindSettings, Original, Replacement
from asymswap.types import ConvSpec, Cost, Option, Site, Size

_SMALL = 10_000_000  # MACs of a conv below which its time does not depend on its arithmetic
# This many deviations below a channel's mean still pass the ReLU. On digits-resnet at a quarter of its MACs, calibrated
# in one pass, the output's error is 0.58 at 2 deviations, 0.54 at 2.5, 0.52 at 3 and 0.52 at 4, with no ReLU 0.40.
_DEVIATIONS = 3.0

Order = Literal["vertical-first", "horizontal-first"]
Between = Literal["none", "relu", "bn", "bn-relu"]
_RECTIFYING = ("relu", "bn-relu")


class Settings(KindSettings):
    """Order of the two convs, and one of three ways to give the rank (or none, where a budget decides)."""

    order: Literal["auto", "vertical-first", "horizontal-first"] = Field(
        "auto", description="`auto`: the order with the smaller error at equal cost, or the cheaper one at equal error."
    )
    rank: int | None = Field(None, ge=1, description="Channels between the two convs, of each group.")
    ratio: float | None = Field(
        None, gt=0, le=1, description="The largest rank with at most this fraction of the MACs."
    )
    energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="The smallest rank that keeps at least this fraction of the kernel's squared Frobenius norm.",
    )
    multiple: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="A budget chooses ranks among its multiples, and 1, 2, 4 … below it; `auto`: by the conv's size.",
    )
    bias: bool = Field(
        False, description="Give the second conv a bias even where the conv has none, for calibration to set."
    )
    between: Between = Field(
        "none",
        description="A ReLU (which implies `bias`), a batch norm or both between the convs, ignored in choosing ranks.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> Settings:
        sizes = {"rank": self.rank, "ratio": self.ratio, "energy": self.energy}
        given = [f"{name} = {size}" for name, size in sizes.items() if size is not None]
        if len(given) > 1:
            raise ValueError(f"give one of rank, ratio and energy, not {' and '.join(given)}")
        return self


class Settled(KindSettings):
    """What a plan stores: the rank of one group, the order, and what is between the two convs."""

    rank: int = Field(ge=1)
    order: Order
    bias: bool = False
    between: Between = "none"

    @property
    def rectifies(self) -> bool:
        """True if there is a ReLU between the two convs."""
        return self.between in _RECTIFYING


class Separable(Replacement):
    settings = Settings
    settled = Settled
    SIZES = ("rank", "ratio", "energy")
    PRESERVES = "approximate (exact at full rank, in eval mode, without a ReLU between)"

    def unsupported(self, conv: ConvSpec) -> str | None:
        if conv.kernel == (1, 1):
            return "a 1x1 kernel has nothing to separate"
        if 1 in conv.kernel:
            return f"{'x'.join(map(str, conv.kernel))} is asymmetric already"
        return super().unsupported(conv)

    def preserves(self, conv: ConvSpec, settings: Settled) -> bool:
        """Return True at full rank without a ReLU, unless a batch norm in half precision rounds too much."""
        if settings.rank != full_rank(conv, settings.order) or settings.rectifies:
            return False
        return settings.between == "none" or conv.dtype in ("float32", "float64")

    def cost(self, site: Site, settings: Settled) -> Cost:
        return pair_cost(site, settings.rank, settings.order, settings.bias, settings.between)

    def options(self, site: Site, original: Original, settings: Settings) -> Sequence[Option]:
        """Return the ranks of every order that the settings allow, whatever they cost."""
        found: list[Option] = []
        for order in _orders(settings):
            curve = self._curve(site, original, order, settings)
            step = settings.multiple if settings.multiple != "auto" else _multiple(curve, site)
            for option in curve:
                rank = option.settings["rank"]
                # Powers of two below the step keep the cheapest ranks within reach.
                if rank % step == 0 or (rank < step and rank.bit_count() == 1) or option is curve[-1]:
                    found.append(option)
        return found

    def resolve(self, site: Site, original: Original, settings: Settings) -> Option:
        """Choose the rank and the order; raises RecipeError for a rank above the full one or a ratio below rank 1."""
        found: list[Option] = []
        for order in _orders(settings):
            curve = self._curve(site, original, order, settings)
            if settings.rank is not None:
                found += curve[settings.rank - 1 : settings.rank]
            elif settings.ratio is not None:
                most = settings.ratio * site.cost.macs
                found += [option for option in curve if option.cost.macs <= most][-1:]
            else:
                assert settings.energy is not None
                least = settings.energy
                found.append(next(option for option in curve if 1 - option.error >= least or option is curve[-1]))
        if not found and settings.rank is not None:
            most_rank = max(full_rank(site.conv, order) for order in _orders(settings))
            raise RecipeError(f"rank = {settings.rank} is above the full rank {most_rank}")
        if not found:
            rank_1 = min(pair_cost(site, 1, order, between=settings.between).macs for order in _orders(settings))
            kept = rank_1 / max(site.cost.macs, 1)
            raise RecipeError(f"ratio = {settings.ratio} cannot be met: rank 1 keeps {kept:.3f} of the MACs already")
        if settings.energy is not None:
            return min(found, key=lambda option: (option.cost.macs, option.cost.params, option.error))
        best = min(found, key=lambda option: option.loss)
        # Errors that differ by rounding only are equal, and then the cheaper order wins.
        equal = [option for option in found if math.isclose(option.loss, best.loss, rel_tol=1e-9, abs_tol=1e-12)]
        return min(equal, key=lambda option: (option.cost.macs, option.cost.params))

    def _curve(self, site: Site, original: Original, order: Order, settings: Settings) -> list[Option]:
        """Return one option for each rank; its error is the share of the energy that truncation leaves out."""
        vertical_first, statistics = order == "vertical-first", original.statistics
        divergences: list[float] | None = None
        if statistics is None:
            errors = _left(svd.energies(svd.as_matrix(original.conv.weight, site.conv.groups, vertical_first)))
        else:
            problem = covariance.arrange(statistics, site.conv.kernel, vertical_first)
            plain = replace(problem, p_GOO=torch.eye(site.conv.group_out, dtype=torch.float64)[None])
            errors = _left(covariance.energies(plain))
            if statistics.weight_GOO is not None:
                weighted = covariance.energies(problem)
                divergences = [0.5 * float(weighted.sum()) * left for left in _left(weighted)]
        extra: dict[str, Any] = {}
        if not site.conv.bias and (settings.bias or statistics is not None):
            extra["bias"] = True
        if settings.between != "none":
            extra["between"] = settings.between
        curve = []
        for rank in range(1, min(len(errors), full_rank(site.conv, order)) + 1):
            error, nats = errors[rank - 1], None if divergences is None else divergences[rank - 1]
            curve.append(self.option(site, Settled(rank=rank, order=order, **extra), error, loss(error, nats)))
        return curve

    def build(self, conv: ConvSpec, settings: Settled) -> nn.Sequential:
        """Return the convs `vertical` and `horizontal` in run order, with `norm` and `relu` between if requested."""
        vertical_first = settings.order == "vertical-first"
        channels = conv.groups * settings.rank
        first = replace(_half(conv, vertical_first), out_channels=channels, bias=settings.between == "relu")
        has_bias = conv.bias or settings.bias or settings.rectifies
        second = replace(_half(conv, not vertical_first), in_channels=channels, bias=has_bias)
        if _early_padding(conv, settings.order, settings.between):
            first, second = replace(first, padding=(conv.pads[2], conv.pads[0])), replace(second, padding=(0, 0))
        names = ("vertical", "horizontal") if vertical_first else ("horizontal", "vertical")
        layers = OrderedDict[str, nn.Module]({names[0]: _convs.new_conv(first)})
        if settings.between in ("bn", "bn-relu"):
            layers["norm"] = nn.BatchNorm2d(channels, dtype=getattr(torch, conv.dtype))
        if settings.rectifies:
            layers["relu"] = nn.ReLU()
        layers[names[1]] = _convs.new_conv(second)
        return nn.Sequential(layers)

    def init_(self, module: nn.Module, original: Original, settings: Settled) -> None:
        """Set the best pair of each group, by truncated SVD of the kernel or on the statistics, scale shared evenly.

        With statistics the bias gives the output its target mean. What is between the two starts as said above.
        """
        conv, statistics, parts = original.conv, original.statistics, _parts(module)
        vertical_first = settings.order == "vertical-first"
        kernel = cast(Size, conv.kernel_size)
        if statistics is None:
            a_GAR, b_GRB = svd.factors(svd.as_matrix(conv.weight, conv.groups, vertical_first), settings.rank)
        else:
            a_GAR, b_GRB = covariance.factors(covariance.arrange(statistics, kernel, vertical_first), settings.rank)
        first, second = svd.as_kernels(a_GAR, b_GRB, kernel, vertical_first)
        if statistics is None:
            bias_O = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        else:
            product = svd.compose(first, second, conv.groups, vertical_first).flatten(1)
            mean_GO = torch.einsum("god,gd->go", product.unflatten(0, (conv.groups, -1)), statistics.mean_GD)
            bias_O = (statistics.target_mean_GO - mean_GO).flatten()
        first_bias = None
        if settings.between != "none":
            if statistics is None:
                moments = intermediate.white(first, conv.groups)
            else:
                moments = intermediate.seen(statistics, first, kernel, _read_taps(parts.first, conv))
            shift_GR = moments.shift(_DEVIATIONS if settings.rectifies else None)
            bias_O = bias_O - intermediate.carried(shift_GR, second)
            if parts.norm is None:
                first_bias = shift_GR.flatten()
            else:
                with torch.no_grad():
                    _convs.set_neutral_(parts.norm, moments.mean_GR.flatten(), moments.variance_GR.flatten())
                    parts.norm.bias.add_(shift_GR.flatten())
        _convs.copy_(parts.first, first, first_bias)
        _convs.copy_(parts.second, second, bias_O)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Settled) -> nn.Conv2d | None:
        """Return one k x k conv of the original fields, its kernel the product of the pair's, with the pair's bias.

        A batch norm between is folded into it. None with a ReLU between, or where the batch norm shifts its input (as
        it does once it is trained) and zeros are padded behind it: the borders do not get that shift.
        """
        if settings.rectifies:
            return None
        parts = _parts(module)
        vertical_first = settings.order == "vertical-first"
        first = parts.first.weight.detach().to(torch.float64)
        second = parts.second.weight.detach().to(torch.float64)
        bias_O = None if parts.second.bias is None else parts.second.bias.detach().to(torch.float64)
        if parts.norm is not None:
            scale_R, shift_R = _convs.affine(parts.norm)
            first = first * scale_R[:, None, None, None]
            # A shift that is mere rounding is none.
            own = parts.norm.bias.detach().to(torch.float64).abs()
            rounding = 4 * torch.finfo(parts.norm.weight.dtype).eps * (own + (own - shift_R).abs())
            shift_R = torch.where(shift_R.abs() > rounding, shift_R, 0.0)
            if bool(shift_R.any()):
                if conv.padding_mode == "zeros" and any(_convs.margins(conv)[1 if vertical_first else 0]):
                    return None
                shift_O = intermediate.carried(shift_R.unflatten(0, (conv.groups, -1)), parts.second.weight)
                bias_O = shift_O if bias_O is None else bias_O + shift_O
        kernel = svd.compose(first, second, conv.groups, vertical_first)
        return _convs.conv_of(conv, kernel, bias_O, parts.second.weight)


def _half(conv: ConvSpec, vertical: bool) -> ConvSpec:
    """Return the fields of a conv along one axis alone."""

    def along(size: Size, across: int = 1) -> Size:
        return (size[0], across) if vertical else (across, size[1])

    padding = conv.padding if isinstance(conv.padding, str) else along(conv.padding, 0)
    return replace(
        conv, kernel=along(conv.kernel), stride=along(conv.stride), dilation=along(conv.dilation), padding=padding
    )


def full_rank(conv: ConvSpec, order: Order) -> int:
    """Return the rank of one group at which the pair is exact."""
    along, across = conv.kernel if order == "vertical-first" else conv.kernel[::-1]
    return min(conv.group_in * along, conv.group_out * across)


def pair_cost(site: Site, rank: int, order: Order, bias: bool = False, between: Between = "none") -> Cost:
    """Return MACs over all calls and parameters of the pair with these settings, from the formula alone."""
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
    has_bias = conv.bias or bias or between in _RECTIFYING
    return Cost(macs, first + second + held + conv.out_channels * has_bias)


def _early_padding(conv: ConvSpec, order: Order, between: Between) -> int:
    """Return the pixels that the first conv pads on either side of the second one's axis, in its place."""
    rows, columns = _convs.margins(conv)
    if between not in _RECTIFYING or conv.padding_mode != "zeros":
        return 0
    if rows[0] != rows[1] or columns[0] != columns[1]:
        return 0
    return columns[0] if order == "vertical-first" else rows[0]


def _orders(settings: Settings) -> tuple[Order, ...]:
    return ("vertical-first", "horizontal-first") if settings.order == "auto" else (settings.order,)


def _read_taps(first: nn.Conv2d, conv: nn.Conv2d) -> list[int]:
    """Return the taps of the second conv through which the first one's output map is seen best.

    All of them where the first conv pads for the second; else those that see the least of the second one's padding.
    """
    axis = 1 if first.kernel_size[1] == 1 else 0
    taps = range(conv.kernel_size[axis])
    if not isinstance(first.padding, str) and first.padding[axis]:
        return list(taps)
    kernel, dilation = cast(Size, conv.kernel_size), cast(Size, conv.dilation)
    padding = cast("Size | str", conv.padding)
    fields = ConvSpec(conv.in_channels, conv.out_channels, kernel, padding=padding, dilation=dilation)
    before, after = _convs.margins(fields)[axis]
    step = conv.dilation[axis]
    outside = [max(before - step * tap, 0) + max(after - step * (taps[-1] - tap), 0) for tap in taps]
    return [tap for tap in taps if outside[tap] == min(outside)]


def _multiple(curve: Sequence[Option], site: Site) -> int:
    """Return the largest of 16, 8, 4 and 2 that leaves five ranks below the break-even; 1 for small convs.

    Processors work on 16 channels at once (AVX-512), or on 8 or 4: rank 65 takes as long as rank 80. The time of small
    convs does not depend on their rank (docs/results/calibration-experiments.md).
    """
    if site.cost.macs < _SMALL:
        return 1
    paying = sum(option.cost.macs < site.cost.macs for option in curve)
    return next((step for step in (16, 8, 4, 2) if 5 * step <= paying), 1)


def _left(energy_GK: Tensor) -> list[float]:
    """Return the share of the energy, summed over the groups, that ranks 1, 2, … leave out."""
    energy_K = energy_GK.sum(0)
    left = energy_K.flip(0).cumsum(0).flip(0) / energy_K.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return [*left[1:].tolist(), 0.0]


class _Parts(NamedTuple):
    """The modules of a pair that hold numbers."""

    first: nn.Conv2d
    norm: nn.BatchNorm2d | None
    second: nn.Conv2d


def _parts(module: nn.Module) -> _Parts:
    first, *between, second = module.children()
    norm = next((part for part in between if isinstance(part, nn.BatchNorm2d)), None)
    return _Parts(cast(nn.Conv2d, first), norm, cast(nn.Conv2d, second))
