"""A k x k conv with a k x 1 and a 1 x k conv beside it, the three outputs summed (asymmetric convolution block).

Ding, Guo, Ding and Han, ACNet, ICCV 2019: the strips strengthen the kernel's skeleton in training, and afterwards all
three fuse into one k x k conv. The square conv keeps the weights of the original; the strips start without effect, but
with a gradient of the usual size:

- `bn = "shared"`: strips of zeros. What follows sees the plain sum, whose gradient a kernel of zeros gets in full: it
  is that of the square kernel's centre row or column.
- `bn = "branch"`: strips copied from the square kernel, behind batch norms of weight zero. A strip of zeros would not
  do here: the deviation by which its batch norm divides would be nothing but sqrt(eps), and the first gradient about
  1 / sqrt(eps) = 300 times too large. So the batch norm's weight gets its gradient first, and through it the strip.

The square branch takes over the batch norm that follows the conv, where there is one, so that the block does in eval
mode and in train mode what conv and batch norm did. The running statistics of the strips are those which they would
have had: from the statistics exactly, else from the batch norm as if the conv's inputs were white.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from asymswap.errors import PlanError
from asymswap.factorize.statistics import SiteStatistics
from asymswap.replacements import KindSettings
from asymswap.replacements import _strip_convs as strip_convs
from asymswap.types import ConvSpec, Cost, Option, Site, Size
from asymswap.utils.tensors import additions, store_

SIZES = ()
PRESERVES = "the function exactly, in eval mode; fuses back to one k x k conv"

_WEAKEST = 0.01
"""A centre row or column below this share of the average one's energy gives way to the strongest one."""


class Settings(KindSettings):
    """Which batch norms the block holds."""

    allow_growth: bool = True
    """Swap although the block has more MACs and parameters than the conv, which is its nature."""

    bn: Literal["shared", "branch"] = "shared"
    """`shared`: none; one that follows the conv normalises the sum. `branch`: one a branch, as in the paper.

    A batch norm that follows is then taken over, if nothing else reads the conv. Where there is none, those of the
    branches do nothing in eval mode but normalise in train mode, which the original did not: by the output's mean and
    variance from calibration, and without calibration by mean 0 and variance 1.
    """

    eps: Annotated[float, Field(ge=0)] = 1e-5
    """Added to the variance by the branches' batch norms; that of a batch norm that is taken over goes before it."""

    momentum: Annotated[float, Field(ge=0, le=1)] | Literal["cumulative"] = 0.1
    """Of their running statistics, `cumulative` being torch's None; likewise."""

    @model_validator(mode="after")
    def _norms_have_constants(self) -> Settings:
        given = [name for name in ("eps", "momentum") if name in self.model_fields_set]
        if given and self.bn == "shared":
            raise ValueError(f'only bn = "branch" has batch norms to give {" and ".join(given)} to')
        return self


def refuse(conv: ConvSpec) -> str | None:
    """Only a kernel with two odd sides has a centre row and column, and only real weights can be normalised."""
    return strip_convs.refuse(conv)


def preserves(conv: ConvSpec, settings: Settings) -> bool:
    """Always in eval mode; only batch norms in half precision round more than is promised."""
    return settings.bn == "shared" or conv.dtype in ("float32", "float64")


def cost(site: Site, settings: Settings) -> Cost:
    """MACs over all calls and parameters of the block, those of its batch norms included."""
    conv = site.conv
    taps = conv.kernel[0] * conv.kernel[1] + sum(conv.kernel)
    weights = conv.out_channels * conv.group_in * taps
    pixels = sum(call.batch * call.output[0] * call.output[1] for call in site.calls)
    norms = 6 if settings.bn == "branch" else 0
    return Cost(weights * pixels, weights + conv.out_channels * (conv.bias + norms))


def options(
    site: Site, conv: nn.Conv2d, settings: Settings, statistics: SiteStatistics | None = None
) -> Sequence[Option]:
    """The one block there is, which changes nothing."""
    return [settle(site, conv, settings, statistics)]


def settle(
    site: Site,
    conv: nn.Conv2d,
    settings: Settings,
    statistics: SiteStatistics | None = None,
) -> Option:
    """The settings as they are, with the constants of the batch norms where there are some."""
    constants = {"eps": settings.eps, "momentum": settings.momentum} if settings.bn == "branch" else {}
    return Option({"bn": settings.bn, **constants}, cost(site, settings), error=0.0, loss=0.0)


def absorbs(site: Site, settings: Settings) -> str | None:
    """The name of the batch norm that alone reads the conv, and that `bn = "branch"` takes over; None otherwise.

    Whether it can be is for `adopt` to say.
    """
    return site.norm_behind if settings.bn == "branch" else None


def adopt(settings: Settings, norm: nn.Module) -> Settings | None:
    """The settings with the constants of a batch norm that is to be taken over, or None where that cannot be.

    It cannot where the module is something else (an InstanceNorm2d or a FrozenBatchNorm2d stands for batch_norm too),
    has hooks or attributes of the user's, or keeps no running statistics.
    """
    if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or norm.running_var is None:
        return None
    if additions(norm, nn.BatchNorm2d(1, device="meta")) is not None:
        return None
    momentum = "cumulative" if norm.momentum is None else norm.momentum
    return settings.model_copy(update={"eps": norm.eps, "momentum": momentum})


class AsymmetricBlock(nn.Module):
    """The sum of three branches, each a conv and maybe a batch norm; the strips see the input less `crop` pixels.

    Input (N, C, H, W), output that of the square conv; without batch norms also without N.
    """

    def __init__(self, square: nn.Module, vertical: nn.Module, horizontal: nn.Module, crop: Size) -> None:
        super().__init__()
        self.square, self.vertical, self.horizontal = square, vertical, horizontal
        self.crop = crop

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.crop
        vertical, horizontal = strip_convs.cut(input, (0, columns)), strip_convs.cut(input, (rows, 0))
        y: Tensor = self.square(input) + self.vertical(vertical) + self.horizontal(horizontal)
        return y

    def extra_repr(self) -> str:
        return f"crop={self.crop}" if any(self.crop) else ""


def build(conv: ConvSpec, settings: Settings) -> AsymmetricBlock:
    """A block of the branches `square` (with the bias), `vertical` and `horizontal`: `conv`, then `norm` if wanted."""
    vertical, horizontal = strip_convs.vertical_strip(conv), strip_convs.horizontal_strip(conv)
    return AsymmetricBlock(
        _branch(conv, settings),
        _branch(vertical.conv, settings),
        _branch(horizontal.conv, settings),
        crop=(horizontal.crop[0], vertical.crop[1]),
    )


def _branch(conv: ConvSpec, settings: Settings) -> nn.Sequential:
    layers = OrderedDict[str, nn.Module](conv=strip_convs.new_conv(conv))
    if settings.bn == "branch":
        momentum = None if settings.momentum == "cumulative" else settings.momentum
        dtype = getattr(torch, conv.dtype)
        layers["norm"] = nn.BatchNorm2d(conv.out_channels, eps=settings.eps, momentum=momentum, dtype=dtype)
    return nn.Sequential(layers)


def init_(
    module: nn.Module,
    conv: nn.Conv2d,
    settings: Settings,
    statistics: SiteStatistics | None = None,
    norm: nn.BatchNorm2d | None = None,
) -> None:
    """The square branch becomes the conv and the batch norm that is taken over, the strips nothing yet.

    The conv's own weights are kept, whatever the target of the statistics: it tells the branches' statistics alone.
    Raises PlanError for a batch norm that cannot be taken over.
    """
    if norm is not None and settings.bn == "shared":
        raise PlanError("kind 'acb' takes over a batch norm with bn = \"branch\" only")
    if norm is not None and adopt(settings, norm) is None:
        raise PlanError(f"kind 'acb' cannot take over a {type(norm).__name__} with hooks or no running statistics")
    square, vertical, horizontal = _branches(module)
    with torch.no_grad():
        square.conv.weight.copy_(conv.weight)
        if square.conv.bias is not None:
            square.conv.bias.copy_(cast(Tensor, conv.bias))
        if settings.bn == "shared":
            nn.init.zeros_(vertical.conv.weight)
            nn.init.zeros_(horizontal.conv.weight)
            return
        vertical.conv.weight.copy_(_strongest_column(conv.weight))
        horizontal.conv.weight.copy_(_strongest_column(conv.weight.mT).mT)
        _init_square_norm_(square, statistics, norm)
        column, row = vertical.conv.weight, horizontal.conv.weight
        for strip, kernel in (
            (vertical, strip_convs.as_square(column, torch.zeros_like(row))),
            (horizontal, strip_convs.as_square(torch.zeros_like(column), row)),
        ):
            _init_strip_norm_(strip, _moments(kernel, square.conv, statistics, norm), norm)


def fuse(module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
    """One k x k conv of the original fields, with a bias where the conv or the branches' batch norms make one."""
    branches = _branches(module)
    own = branches[0].conv.weight
    fused = strip_convs.new_conv(replace(conv, bias=conv.bias or settings.bn == "branch"), own.dtype, own.device)
    with torch.no_grad():
        square, vertical, horizontal = (_fold(branch) for branch in branches)
        fused.weight.copy_(square.weight + strip_convs.as_square(vertical.weight, horizontal.weight))
        if fused.bias is not None:
            fused.bias.copy_(square.bias + vertical.bias + horizontal.bias)
    return fused


class _Branch(NamedTuple):
    """The layers of one branch."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None


class _Folded(NamedTuple):
    """A branch as one conv, in float64."""

    weight: Tensor
    bias: Tensor


class _Moments(NamedTuple):
    """Mean and variance of each output channel of a branch's conv, in float64."""

    mean_O: Tensor
    variance_O: Tensor


def _branches(module: nn.Module) -> tuple[_Branch, _Branch, _Branch]:
    block = cast(AsymmetricBlock, module)
    parts = [cast(nn.Sequential, part) for part in (block.square, block.vertical, block.horizontal)]
    square, vertical, horizontal = (
        _Branch(cast(nn.Conv2d, part[0]), cast(nn.BatchNorm2d, part[1]) if len(part) > 1 else None) for part in parts
    )
    return square, vertical, horizontal


def _strongest_column(w_OIHW: Tensor) -> Tensor:
    """The centre column (O, I, H, 1) of each output channel, or its strongest where the centre is next to nothing.

    A kernel such as [-1 0 1] has no weight at its centre: that column would never see a gradient.
    """
    energy_OW = w_OIHW.to(torch.float64).square().sum((1, 2))
    centre = torch.full_like(energy_OW[:, 0], energy_OW.shape[1] // 2, dtype=torch.long)
    weak_O = energy_OW.gather(1, centre[:, None])[:, 0] < _WEAKEST * energy_OW.mean(1)
    chosen = torch.where(weak_O, energy_OW.argmax(1), centre)
    return w_OIHW[torch.arange(len(w_OIHW), device=w_OIHW.device), ..., chosen][..., None]


def _moments(
    kernel_OIHW: Tensor, conv: nn.Conv2d, statistics: SiteStatistics | None, norm: nn.BatchNorm2d | None
) -> _Moments:
    """Mean and variance of what a kernel in the place of the conv's own, without its bias, makes of the conv's inputs.

    Known from the statistics. Without them, white inputs that explain those of the batch norm behind the conv: the
    output varies with the kernel's squared norm, and its mean is foretold by the part that is along the conv's kernel.
    With neither, those of outputs that are normal already.
    """
    kernel = _float64(kernel_OIHW).flatten(1)
    if statistics is not None:
        kernel_GOD = kernel.unflatten(0, (conv.groups, -1))
        mean_GO = torch.einsum("god,gd->go", kernel_GOD, statistics.mean_GD)
        variance_GO = torch.einsum("god,gde,goe->go", kernel_GOD, statistics.cov_GDD, kernel_GOD)
        return _Moments(mean_GO.flatten(), variance_GO.flatten().clamp_min(0.0))
    if norm is None:
        return _Moments(torch.zeros_like(kernel[:, 0]), torch.ones_like(kernel[:, 0]))
    own = _float64(conv.weight).flatten(1)
    mean_O = _float64(norm.running_mean) - (0.0 if conv.bias is None else _float64(conv.bias))
    whole_O = own.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    along_O, share_O = (kernel * own).sum(1) / whole_O, kernel.square().sum(1) / whole_O
    return _Moments(along_O * mean_O, share_O * _float64(norm.running_var))


def _init_square_norm_(branch: _Branch, statistics: SiteStatistics | None, norm: nn.BatchNorm2d | None) -> None:
    """The batch norm that is taken over, or one that does nothing in eval mode."""
    own = cast(nn.BatchNorm2d, branch.norm)
    if norm is None:
        seen = _moments(branch.conv.weight, branch.conv, statistics, None)
        # Without statistics we assume zero mean, so the bias is not adjusted.
        bias = branch.conv.bias if statistics is not None else None
        store_(_tensor(own.running_mean), seen.mean_O if bias is None else seen.mean_O + _float64(bias))
        store_(_tensor(own.running_var), seen.variance_O)
        # From the statistics as they are stored, rounded or cut: what one does the other undoes.
        own.weight.copy_((_float64(own.running_var) + own.eps).sqrt())
        own.bias.copy_(_tensor(own.running_mean))
        return
    _tensor(own.running_mean).copy_(_tensor(norm.running_mean))
    _tensor(own.running_var).copy_(_tensor(norm.running_var))
    _tensor(own.num_batches_tracked).copy_(_tensor(norm.num_batches_tracked))
    variance_O = _float64(norm.running_var)
    # The two are one where the settings were adopted; where not, the scale in eval mode is still that of the norm.
    weight_O = ((variance_O + own.eps) / (variance_O + norm.eps)).sqrt()
    own.weight.copy_(weight_O if norm.weight is None else weight_O * _float64(norm.weight))
    own.bias.copy_(torch.zeros_like(own.bias) if norm.bias is None else norm.bias)


def _init_strip_norm_(branch: _Branch, seen: _Moments, norm: nn.BatchNorm2d | None) -> None:
    """A batch norm without effect, with the statistics that it would have gathered."""
    own = cast(nn.BatchNorm2d, branch.norm)
    store_(_tensor(own.running_mean), seen.mean_O)
    store_(_tensor(own.running_var), seen.variance_O)
    nn.init.zeros_(own.weight)
    nn.init.zeros_(own.bias)
    if norm is not None:
        _tensor(own.num_batches_tracked).copy_(_tensor(norm.num_batches_tracked))


def _fold(branch: _Branch) -> _Folded:
    """The conv of a branch with its batch norm in it, as that is in eval mode."""
    weight, bias = branch.conv.weight.to(torch.float64), branch.conv.bias
    bias_O = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias.to(torch.float64)
    norm = branch.norm
    if norm is None:
        return _Folded(weight, bias_O)
    mean_O, variance_O = _tensor(norm.running_mean).to(torch.float64), _tensor(norm.running_var).to(torch.float64)
    scale_O = norm.weight.to(torch.float64) / (variance_O + norm.eps).sqrt()
    return _Folded(weight * scale_O[:, None, None, None], norm.bias.to(torch.float64) + (bias_O - mean_O) * scale_O)


def _float64(tensor: Tensor | None) -> Tensor:
    return _tensor(tensor).detach().to("cpu", torch.float64)


def _tensor(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
