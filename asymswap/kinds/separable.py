"""A k x k conv as a pair: (kh x 1, C -> R) then (1 x kw, R -> O), or the other order.

The first conv carries the stride, padding and dilation of its own axis, the second those of the other; groups are
solved group by group, and the rank R is that of one group; both convs keep the padding mode, the bias stays on the
second. Nothing stands between the two, so that the pair is exact at full rank: without a bias on the first conv,
padding its output by zeros is the same as padding its input. Mathematics and papers: `asymswap.factorize.svd` for the
weights alone, `asymswap.factorize.covariance` for calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from asymswap.errors import PlanError, RecipeError
from asymswap.factorize import covariance, svd
from asymswap.factorize.evidence import Evidence
from asymswap.factorize.loss import loss
from asymswap.kinds import KindSettings
from asymswap.spec import ConvSpec, Cost, Option, Site, Size

SIZES = ("rank", "ratio", "energy")
_SMALL = 10_000_000
"""MACs of a conv below which its time is not that of its arithmetic."""

PRESERVES = "the function, as well as the rank allows; exactly at full rank"

_UNSETTLED = "kind 'separable' needs a settled rank and order, not {}"

Order = Literal["vertical-first", "horizontal-first"]


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
    """A budget chooses ranks among the multiples of this number, and 1, 2, 4 … below it; see `_multiple` for `auto`."""

    bias: bool = False
    """Give the second conv a bias even where the conv has none; calibration corrects the output's mean by it."""

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


def options(site: Site, conv: nn.Conv2d, settings: Settings, evidence: Evidence | None = None) -> Sequence[Option]:
    """The ranks of every order that the settings allow, whatever they cost."""
    every: list[Option] = []
    for order in _orders(settings):
        curve = _curve(site, conv, order, settings, evidence)
        step = _multiple(curve, site) if settings.multiple == "auto" else settings.multiple
        every += [option for option in curve if _is_round(option.settings["rank"], step) or option is curve[-1]]
    return every


def settle(site: Site, conv: nn.Conv2d, settings: Settings, evidence: Evidence | None = None) -> Option:
    """Choose the rank and the order; raises RecipeError for a rank above the full one or a ratio below rank 1."""
    spec = site.conv
    found: list[Option] = []
    for order in _orders(settings):
        if settings.rank is not None and settings.rank > full_rank(spec, order):
            continue
        option = _pick(_curve(site, conv, order, settings, evidence), site.cost, settings)
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
    """At full rank."""
    return settings.order != "auto" and settings.rank == full_rank(conv, settings.order)


def cost(site: Site, settings: Settings) -> Cost:
    """MACs over all calls and parameters of the settled pair."""
    if settings.rank is None or settings.order == "auto":
        raise PlanError(_UNSETTLED.format(settings.model_dump(exclude_none=True)))
    return pair_cost(site, settings.rank, settings.order, settings.bias)


def build(conv: ConvSpec, settings: Settings) -> nn.Sequential:
    """An `nn.Sequential` of two convs named `vertical` and `horizontal`, in the order in which they run."""
    if settings.rank is None or settings.order == "auto":
        raise PlanError(_UNSETTLED.format(settings.model_dump(exclude_none=True)))
    middle = conv.groups * settings.rank
    ends = [(conv.in_channels, middle, False), (middle, conv.out_channels, conv.bias or settings.bias)]
    pair = nn.Sequential()
    for (inputs, outputs, bias), vertical in zip(ends, _axes(settings.order), strict=True):
        module = nn.utils.skip_init(
            nn.Conv2d,
            inputs,
            outputs,
            _along(conv.kernel, vertical),
            stride=_along(conv.stride, vertical),
            padding=conv.padding if isinstance(conv.padding, str) else _along(conv.padding, vertical, rest=0),
            dilation=_along(conv.dilation, vertical),
            groups=conv.groups,
            bias=bias,
            padding_mode=conv.padding_mode,
            dtype=getattr(torch, conv.dtype),
        )
        pair.add_module("vertical" if vertical else "horizontal", module)
    return pair


def init_(module: nn.Module, conv: nn.Conv2d, settings: Settings, evidence: Evidence | None = None) -> None:
    """The best pair of each group, by truncated SVD of the kernel or on the evidence, the scale shared evenly."""
    assert settings.rank is not None
    first, second = _pair(module)
    vertical_first = settings.order == "vertical-first"
    kernel = cast(Size, conv.kernel_size)
    if evidence is None:
        matrix = svd.as_matrix(conv.weight, conv.groups, vertical_first)
        a_GAR, b_GRB = svd.factors(matrix, settings.rank)
    else:
        a_GAR, b_GRB = covariance.factors(covariance.arrange(evidence, kernel, vertical_first), settings.rank)
    weights = svd.as_kernels(a_GAR, b_GRB, kernel, vertical_first)
    with torch.no_grad():
        for half, weight in zip((first, second), weights, strict=True):
            half.weight.copy_(weight)
        if second.bias is not None:
            second.bias.copy_(_bias(conv, weights, settings, evidence))


def _bias(conv: nn.Conv2d, weights: tuple[Tensor, Tensor], settings: Settings, evidence: Evidence | None) -> Tensor:
    """The conv's own bias, or with evidence the one that gives the output its wanted mean."""
    if evidence is None:
        return torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
    kernel = svd.compose(*weights, conv.groups, settings.order == "vertical-first")
    seen = torch.einsum("god,gd->go", kernel.flatten(1).unflatten(0, (conv.groups, -1)), evidence.mean_GD)
    return (evidence.target_mean_GO - seen).flatten()


def fuse(module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
    """One k x k conv of the original fields whose kernel is the product of the pair's, with the pair's bias."""
    first, second = _pair(module)
    fused: nn.Conv2d = nn.utils.skip_init(
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        conv.kernel,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=second.bias is not None,
        padding_mode=conv.padding_mode,
        dtype=first.weight.dtype,
        device=first.weight.device,
    )
    weights = (first.weight.to(torch.float64), second.weight.to(torch.float64))
    with torch.no_grad():
        fused.weight.copy_(svd.compose(*weights, conv.groups, settings.order == "vertical-first"))
        if fused.bias is not None:
            fused.bias.copy_(cast(Tensor, second.bias))
    return fused


def full_rank(conv: ConvSpec, order: Order) -> int:
    """The rank of one group at which the pair is exact."""
    vertical = order == "vertical-first"
    along, across = conv.kernel if vertical else conv.kernel[::-1]
    return min(conv.group_in * along, conv.group_out * across)


def pair_cost(site: Site, rank: int, order: Order, bias: bool = False) -> Cost:
    """MACs over all calls and parameters of the pair, from the formula alone; `bias` is the setting of that name."""
    conv = site.conv
    vertical = order == "vertical-first"
    along, across = conv.kernel if vertical else conv.kernel[::-1]
    middle = conv.groups * rank
    first, second = middle * conv.group_in * along, conv.out_channels * rank * across
    macs = 0
    for call in site.calls:
        # The first conv has walked its own axis only: the other one still has its input size.
        between = (call.output[0], call.input[1]) if vertical else (call.input[0], call.output[1])
        macs += call.batch * (first * math.prod(between) + second * math.prod(call.output))
    return Cost(macs, first + second + conv.out_channels * (conv.bias or bias))


def _orders(settings: Settings) -> tuple[Order, ...]:
    return ("vertical-first", "horizontal-first") if settings.order == "auto" else (settings.order,)


def _axes(order: Order) -> tuple[bool, bool]:
    """For each conv of the pair, in run order, whether it is the vertical one."""
    return (True, False) if order == "vertical-first" else (False, True)


def _along(pair: Size, vertical: bool, rest: int = 1) -> Size:
    """The part of a (height, width) field that belongs to one conv of the pair."""
    return (pair[0], rest) if vertical else (rest, pair[1])


def _curve(site: Site, conv: nn.Conv2d, order: Order, settings: Settings, evidence: Evidence | None) -> list[Option]:
    """One option for each rank; the error is what truncation leaves out, relative to the whole."""
    vertical_first = order == "vertical-first"
    bias = settings.bias or (evidence is not None and not site.conv.bias)
    if evidence is None:
        errors = _left(svd.energies(svd.as_matrix(conv.weight, conv.groups, vertical_first)))
    else:
        problem = covariance.arrange(evidence, site.conv.kernel, vertical_first)
        plain = replace(problem, p_GOO=torch.eye(site.conv.group_out, dtype=torch.float64)[None])
        errors = _left(covariance.spectrum(plain)[1])
    divergences: Sequence[float | None] = [None] * len(errors)
    if evidence is not None and evidence.weight_GOO is not None:
        weighted = covariance.spectrum(problem)[1]
        whole = 0.5 * float(weighted.sum())
        divergences = [whole * left for left in _left(weighted)]
    extra = {"bias": True} if bias and not site.conv.bias else {}
    return [
        Option({"rank": rank, "order": order, **extra}, pair_cost(site, rank, order, bias), error, loss(error, nats))
        for rank, (error, nats) in enumerate(zip(errors, divergences, strict=True), start=1)
        if rank <= full_rank(site.conv, order)
    ]


def _multiple(curve: Sequence[Option], site: Site) -> int:
    """The largest of 16, 8, 4 and 2 that leaves six ranks below the break-even; one for small convs.

    Processors work on 16 channels at once (AVX-512), or on 8 or 4: a pair of rank 65 takes as long as one of rank 80.
    The time of small convs does not depend on their rank, so that rounding would cost accuracy for nothing
    (docs/calibration.md).
    """
    if site.cost.macs < _SMALL:
        return 1
    paying = sum(option.cost.macs < site.cost.macs for option in curve)
    return next((step for step in (16, 8, 4, 2) if 6 * step <= paying), 1)


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
    least = min(pair_cost(site, 1, order).macs for order in _orders(settings)) / max(site.cost.macs, 1)
    return f"ratio = {settings.ratio} cannot be met: rank 1 keeps {least:.3f} of the MACs already"


def _pair(module: nn.Module) -> tuple[nn.Conv2d, nn.Conv2d]:
    first, second = module.children()
    return cast(nn.Conv2d, first), cast(nn.Conv2d, second)
