"""Two convs in the place of one, through R channels of each group: what `separable` and `low-rank` share.

R is the rank of the kernel, arranged as a matrix: `asymswap.factorize.svd` for the weights alone,
`asymswap.factorize.covariance` for calibration data. The first conv has no bias, the second has the conv's.
"""

import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from asymswap.errors import RecipeError
from asymswap.factorize import covariance, svd
from asymswap.replacements import _convs
from asymswap.replacements.base import KindSettings, Original, Replacement
from asymswap.types import ConvSpec, Cost, Option, Site, Size

_SMALL = 10_000_000  # MACs of a conv below which its time does not depend on its arithmetic


class PairSettings(KindSettings):
    """One of three ways to give the rank (or none, where a budget decides)."""

    rank: int | None = Field(None, ge=1, description="Channels between the two convs, of each group.")
    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """The largest rank with at most this fraction of the MACs."""
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    """The smallest rank that keeps at least this fraction of the kernel's squared Frobenius norm."""
    multiple: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """A budget chooses ranks among its multiples, and 1, 2, 4 … below it; `auto`: by the conv's size."""
    bias: bool = False
    """Give the second conv a bias even where the conv has none, for calibration to set."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        given = [f"{name} = {getattr(self, name)}" for name in Pair.SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of rank, ratio and energy, not {' and '.join(given)}")
        return self


class SettledPair(KindSettings):
    """What a plan stores: the rank of one group."""

    rank: int = Field(ge=1)
    bias: bool = False

    @property
    def vertical_first(self) -> bool:
        """True if the first conv has the kernel's rows, and the second one its columns; so it is without an order."""
        return getattr(self, "order", "vertical-first") == "vertical-first"


class Pair(Replacement):
    """A conv as an `nn.Sequential` of two."""

    settings: ClassVar[type[PairSettings]]
    settled: ClassVar[type[SettledPair]]
    SIZES = ("rank", "ratio", "energy")

    def forms(self, settings: Any) -> Sequence[SettledPair]:
        """Return the pairs of rank 1, one in each form that the settings allow."""
        return (self.settled.model_validate({"rank": 1}),)

    @abstractmethod
    def halves(self, conv: ConvSpec, settings: Any) -> dict[str, ConvSpec]:
        """Return the two convs by their names, in run order."""

    def preserves(self, conv: ConvSpec, settings: Any) -> bool:
        return bool(settings.rank == full_rank(conv, settings))

    def cost(self, site: Site, settings: Any) -> Cost:
        first, second = self.halves(site.conv, settings).values()
        between = sum(call.batch * math.prod(first.output(call.input)) for call in site.calls)
        behind = sum(call.batch * math.prod(call.output) for call in site.calls)
        macs = between * first.macs_per_pixel() + behind * second.macs_per_pixel()
        return Cost(macs, first.params + second.params)

    def options(self, site: Site, original: Original, settings: PairSettings) -> Sequence[Option]:
        """Return the ranks of every form that the settings allow, whatever they cost."""
        found: list[Option] = []
        for form in self.forms(settings):
            curve = self._curve(site, original, form, settings)
            step = 1 if settings.multiple == "auto" else settings.multiple
            # Processors work on 16 channels at once (AVX-512), or on 8 or 4: rank 65 takes as long as rank 80. The time
            # of small convs does not depend on their rank (docs/results/calibration-experiments.md).
            if settings.multiple == "auto" and site.cost.macs >= _SMALL:
                paying = sum(option.cost.macs < site.cost.macs for option in curve)
                step = next((step for step in (16, 8, 4, 2) if 5 * step <= paying), 1)
            for rank, option in enumerate(curve, start=1):
                # Powers of two below the step keep the cheapest ranks within reach.
                if rank % step == 0 or (rank < step and rank.bit_count() == 1) or option is curve[-1]:
                    found.append(option)
        return found

    def resolve(self, site: Site, original: Original, settings: PairSettings) -> Option:
        """Choose the rank and the form; raises RecipeError for a rank above the full one or a ratio below rank 1."""
        curves = [self._curve(site, original, form, settings) for form in self.forms(settings)]
        found: list[Option] = []
        for curve in curves:
            if settings.rank is not None:
                found += curve[settings.rank - 1 : settings.rank]
            elif settings.ratio is not None:
                found += [option for option in curve if option.cost.macs <= settings.ratio * site.cost.macs][-1:]
            else:
                least = settings.energy or 0.0
                found.append(next(option for option in curve if 1 - option.error >= least or option is curve[-1]))
        if not found and settings.rank is not None:
            raise RecipeError(f"rank = {settings.rank} is above the full rank {max(map(len, curves))}")
        if not found:
            kept = min(curve[0].cost.macs for curve in curves) / max(site.cost.macs, 1)
            raise RecipeError(f"ratio = {settings.ratio} cannot be met: rank 1 keeps {kept:.3f} of the MACs already")
        if settings.energy is not None:
            return min(found, key=lambda option: (option.cost.macs, option.cost.params, option.error))
        best = min(found, key=lambda option: option.loss)
        # Errors that differ by rounding only are equal, and then the cheaper form wins.
        equal = [option for option in found if math.isclose(option.loss, best.loss, rel_tol=1e-9, abs_tol=1e-12)]
        return min(equal, key=lambda option: (option.cost.macs, option.cost.params))

    def _curve(self, site: Site, original: Original, form: SettledPair, settings: PairSettings) -> list[Option]:
        """Return one option for each rank; its error is the share of the energy that truncation leaves out."""
        statistics, nats = original.statistics, list[float]()
        if statistics is None:
            matrix = svd.as_matrix(original.conv.weight, site.conv.groups, form.vertical_first)
            errors = _left(svd.eigenvalues(svd.gram(matrix)))
        else:
            problem = covariance.arrange(statistics, site.conv.kernel, form.vertical_first)
            plain = replace(problem, p_GOO=torch.eye(site.conv.group_out).to(problem.p_GOO)[None])
            errors = _left(covariance.energies(plain))
            if statistics.weight_GOO is not None:
                weighted = covariance.energies(problem)
                nats = [0.5 * float(weighted.sum()) * left for left in _left(weighted)]
        extra = {"bias": True} if not site.conv.bias and (settings.bias or statistics is not None) else {}
        return [
            self.option(site, form.model_copy(update={"rank": rank, **extra}), error, nats[rank - 1] if nats else None)
            for rank, error in enumerate(errors[: full_rank(site.conv, form)], start=1)
        ]

    def build(self, conv: ConvSpec, settings: Any) -> nn.Sequential:
        halves = self.halves(conv, settings).items()
        return nn.Sequential(OrderedDict((name, _convs.new_conv(half)) for name, half in halves))

    def init_(self, module: nn.Module, original: Original, settings: Any) -> None:
        """Set the best pair of each group, by truncated SVD or on statistics, with the bias for their target mean."""
        (reduce, expand), (first, second, bias_O) = module.children(), solve(original, settings)
        _convs.copy_(reduce, first, None)
        _convs.copy_(expand, second, bias_O)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Any) -> nn.Conv2d | None:
        """Return one conv of the original fields, its kernel the product of the pair's, with the pair's bias."""
        first, second = (cast(nn.Conv2d, half) for half in module.children())
        return merge(conv, _convs.float64(first.weight), second, second.bias)


def full_rank(conv: ConvSpec, form: SettledPair) -> int:
    """Return the rank of one group at which a pair of this form is exact."""
    along, across = conv.kernel if form.vertical_first else conv.kernel[::-1]
    return min(conv.group_in * along, conv.group_out * across)


def solve(original: Original, settings: SettledPair) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of the best pair in run order, on the statistics if there are any, and the second's bias."""
    conv, statistics, vertical_first = original.conv, original.statistics, settings.vertical_first
    kernel = cast(Size, conv.kernel_size)
    if statistics is None:
        factors = svd.factors(svd.as_matrix(conv.weight, conv.groups, vertical_first), settings.rank)
    else:
        factors = covariance.factors(covariance.arrange(statistics, kernel, vertical_first), settings.rank)
    first, second = svd.as_kernels(*factors, kernel, vertical_first)
    if statistics is None:
        return first, second, conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    product_GOD = svd.compose(first, second, conv.groups).flatten(1).unflatten(0, (conv.groups, -1))
    return first, second, statistics.bias_of(product_GOD)


def merge(conv: ConvSpec, first: Tensor, second: nn.Conv2d, bias_O: Tensor | None) -> nn.Conv2d:
    """Return the conv of these fields whose kernel is the product of a weight in float64 and a second conv's."""
    kernel = svd.compose(first, _convs.float64(second.weight), conv.groups)
    return _convs.conv_of(conv, kernel, bias_O, second.weight)


def _left(energy_GK: Tensor) -> list[float]:
    """Return the share of the energy, summed over the groups, that ranks 1, 2, … leave out."""
    energy_K = energy_GK.sum(0)
    left = energy_K.flip(0).cumsum(0).flip(0) / energy_K.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return [*left[1:].tolist(), 0.0]
