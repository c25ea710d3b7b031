"""A k x k conv with a k x 1 and a 1 x k conv beside it, the three outputs summed (asymmetric convolution block).

Ding, Guo, Ding and Han, ACNet, ICCV 2019: the strips strengthen the kernel's skeleton in training, and afterwards all
three fuse into one k x k conv. The square conv keeps the original weights; the strips start without effect, but with a
gradient of the usual size:

- `bn = "shared"`: strips of zeros. They get the full gradient of the sum, as the square kernel's centre row or column.
- `bn = "branch"`: strips copied from the square kernel, behind batch norms of weight zero, which get their gradient
  first. Behind strips of zeros a batch norm would divide by sqrt(eps), and make the first gradient 300 times too large.

The square branch takes over a batch norm that follows the conv, so that the block does in eval mode and in train mode
what conv and batch norm did. The running statistics of the strips are what they would have been: from calibration
exactly, else from the batch norm as if the conv's inputs were white.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from asymswap.errors import PlanError
from asymswap.replacements import _convs
from asymswap.replacements.base import GrowingSettings, Original, Replacement
from asymswap.types import ConvSpec, Cost, Option, Site
from asymswap.utils.tensors import additions

_WEAKEST = 0.01  # a centre row or column below this share of the average one's energy gives way to the strongest one


class Settings(GrowingSettings):
    """Which batch norms the block holds."""

    bn: Literal["shared", "branch"] = "shared"
    """`shared`: none; one that follows the conv normalises the sum. `branch`: one a branch, as in the paper.

    A batch norm that follows is then taken over, if nothing else reads the conv. Where there is none, those of the
    branches do nothing in eval mode but normalise in train mode, which the original did not: by the output's mean and
    variance from calibration, and without calibration by mean 0 and variance 1.
    """
    eps: Annotated[float, Field(ge=0)] = 1e-5
    """Added to the variance by the branches' batch norms; one that is taken over keeps its own."""
    momentum: Annotated[float, Field(ge=0, le=1)] | Literal["cumulative"] = 0.1
    """Momentum of their running statistics, `cumulative` for torch's None; likewise."""

    @model_validator(mode="after")
    def _norms_have_constants(self) -> Settings:
        given = [name for name in ("eps", "momentum") if name in self.model_fields_set]
        if given and self.bn == "shared":
            raise ValueError(f'only bn = "branch" has batch norms to give {" and ".join(given)} to')
        return self


class AsymmetricBlock(_convs.StripSum):
    """The sum of three branches, each a conv and maybe a batch norm, which takes no input without N."""


class AsymmetricConvBlock(Replacement):
    settings = Settings
    PRESERVES = "exact in eval mode; fuses back to one k x k conv"

    def unsupported(self, conv: ConvSpec) -> str | None:
        return _convs.unsupported(conv) or super().unsupported(conv)

    def preserves(self, conv: ConvSpec, settings: Settings) -> bool:
        """Return True, except for batch norms in half precision, which round more than is promised."""
        return settings.bn == "shared" or conv.dtype in ("float32", "float64")

    def cost(self, site: Site, settings: Settings) -> Cost:
        vertical, horizontal, _ = _convs.strip_convs(site.conv)
        norms = Cost(0, 6 * site.conv.out_channels if settings.bn == "branch" else 0)
        return site.cost + replace(site, conv=vertical).cost + replace(site, conv=horizontal).cost + norms

    def resolve(self, site: Site, original: Original, settings: Settings) -> Option:
        stored = {"bn"} if settings.bn == "shared" else {"bn", "eps", "momentum"}
        return self.option(site, Settings(**settings.model_dump(include=stored)))

    def fold_norm(self, settings: Settings, norm: nn.Module) -> Settings | None:
        """Return the settings with the constants of a batch norm, or None where it cannot be taken over.

        It cannot with `bn = "shared"`, and where the module is something else (an InstanceNorm2d counts as batch_norm
        too), has hooks or attributes of the user's, or keeps no running statistics.
        """
        if settings.bn == "shared" or type(norm) is not nn.BatchNorm2d:
            return None
        if norm.running_mean is None or norm.running_var is None or additions(norm, nn.BatchNorm2d(1, device="meta")):
            return None
        momentum = "cumulative" if norm.momentum is None else norm.momentum
        return settings.model_copy(update={"eps": norm.eps, "momentum": momentum})

    def build(self, conv: ConvSpec, settings: Settings) -> AsymmetricBlock:
        """Return a block of branches `square` (with the bias), `vertical` and `horizontal`: `conv`, maybe `norm`."""
        momentum = None if settings.momentum == "cumulative" else settings.momentum

        def branch(own: ConvSpec) -> nn.Sequential:
            layers = OrderedDict[str, nn.Module](conv=_convs.new_conv(own))
            if settings.bn == "branch":
                dtype = getattr(torch, conv.dtype)
                layers["norm"] = nn.BatchNorm2d(conv.out_channels, eps=settings.eps, momentum=momentum, dtype=dtype)
            return nn.Sequential(layers)

        vertical, horizontal, crop = _convs.strip_convs(conv)
        return AsymmetricBlock(crop, branch(vertical), branch(horizontal), square=branch(conv))

    def init_(self, module: nn.Module, original: Original, settings: Settings) -> None:
        """Make the square branch the conv and the batch norm that is taken over, and the strips without effect.

        The statistics set those of the branches alone. Raises PlanError for a batch norm that cannot be taken over.
        """
        conv, norm = original.conv, original.norm
        if norm is not None and settings.bn == "shared":
            raise PlanError("kind 'acb' takes over a batch norm with bn = \"branch\" only")
        if norm is not None and self.fold_norm(settings, norm) is None:
            raise PlanError(f"kind 'acb' cannot take over a {type(norm).__name__} with hooks or no running statistics")
        (square, square_norm), *strips = _branches(module)
        _convs.copy_(square, conv.weight, conv.bias)
        with torch.no_grad():
            if square_norm is not None and norm is not None:
                for own_buffer, buffer in zip(square_norm.buffers(), norm.buffers(), strict=True):
                    own_buffer.copy_(buffer)
                variance_O = _float64(norm.running_var)
                # Where `eps` is not that of the norm, the scale in eval mode is still that of the norm.
                weight_O = ((variance_O + square_norm.eps) / (variance_O + norm.eps)).sqrt()
                _convs.copy_(square_norm, weight_O * (1 if norm.weight is None else _float64(norm.weight)), norm.bias)
            elif square_norm is not None:
                mean_O, variance_O = _moments(square.weight, square, original)
                # Without calibration statistics we assume zero mean, bias or not.
                if original.statistics is not None and conv.bias is not None:
                    mean_O = mean_O + _float64(square.bias)
                _convs.set_neutral_(square_norm, mean_O, variance_O)
            column, row = _strongest_column(conv.weight), _strongest_column(conv.weight.mT).mT
            nothing = torch.zeros_like(column), torch.zeros_like(row)
            kernels = (column, _convs.as_square(column, nothing[1])), (row, _convs.as_square(nothing[0], row))
            for (strip, own), (taps, kernel) in zip(strips, kernels, strict=True):
                strip.weight.copy_(taps if own is not None else torch.zeros_like(taps))
                if own is not None:
                    _convs.set_neutral_(own, *_moments(kernel, square, original))
                    nn.init.zeros_(own.weight)
                    nn.init.zeros_(own.bias)
                if own is not None and norm is not None:
                    cast(Tensor, own.num_batches_tracked).copy_(cast(Tensor, norm.num_batches_tracked))

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Settings) -> nn.Conv2d:
        """Return one k x k conv of the original fields, with a bias where the conv or the batch norms make one."""
        weights, biases = [], []
        for own, norm in _branches(module):
            weight = own.weight.detach().to(torch.float64)
            bias = torch.zeros_like(weight[:, 0, 0, 0]) if own.bias is None else own.bias.detach().to(torch.float64)
            if norm is not None:
                scale_O, shift_O = _convs.affine(norm)
                weight, bias = weight * scale_O[:, None, None, None], bias * scale_O + shift_O
            weights.append(weight)
            biases.append(bias)
        bias_O = biases[0] + biases[1] + biases[2] if conv.bias or settings.bn == "branch" else None
        kernel = weights[0] + _convs.as_square(weights[1], weights[2])
        return _convs.conv_of(conv, kernel, bias_O, like=own.weight)


def _branches(module: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
    """Return the conv and the batch norm of the square, the vertical and the horizontal branch."""
    return [(cast(Any, branch).conv, getattr(branch, "norm", None)) for branch in module.children()]


def _strongest_column(w_OIHW: Tensor) -> Tensor:
    """Return the centre column (O, I, H, 1) of each output channel, or its strongest where the centre is near zero.

    A kernel such as [-1 0 1] has no weight at its centre: that column would never see a gradient.
    """
    energy_OW = w_OIHW.to(torch.float64).square().sum((1, 2))
    centre = torch.full_like(energy_OW[:, 0], energy_OW.shape[1] // 2, dtype=torch.long)
    weak_O = energy_OW.gather(1, centre[:, None])[:, 0] < _WEAKEST * energy_OW.mean(1)
    chosen = torch.where(weak_O, energy_OW.argmax(1), centre)
    return w_OIHW[torch.arange(len(w_OIHW), device=w_OIHW.device), ..., chosen][..., None]


def _moments(kernel_OIHW: Tensor, conv: nn.Conv2d, original: Original) -> tuple[Tensor, Tensor]:
    """Return mean and variance (O) of the output of a kernel in the place of the conv's own, without its bias.

    Without statistics we assume white inputs that explain the batch norm's: the variance goes with the kernel's squared
    norm, the mean with its part along the conv's kernel. With neither, outputs that are normal already.
    """
    statistics, norm, kernel = original.statistics, original.norm, _float64(kernel_OIHW).flatten(1)
    if statistics is not None:
        kernel_GOD = kernel.unflatten(0, (conv.groups, -1))
        mean_GO = torch.einsum("god,gd->go", kernel_GOD, statistics.mean_GD)
        variance_GO = torch.einsum("god,gde,goe->go", kernel_GOD, statistics.cov_GDD, kernel_GOD)
        return mean_GO.flatten(), variance_GO.flatten().clamp_min(0.0)
    if norm is None:
        return torch.zeros_like(kernel[:, 0]), torch.ones_like(kernel[:, 0])
    own = _float64(conv.weight).flatten(1)
    mean_O = _float64(norm.running_mean) - (0.0 if conv.bias is None else _float64(conv.bias))
    whole_O = own.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    along_O, share_O = (kernel * own).sum(1) / whole_O, kernel.square().sum(1) / whole_O
    return along_O * mean_O, share_O * _float64(norm.running_var)


def _float64(tensor: Tensor | None) -> Tensor:
    return cast(Tensor, tensor).detach().to("cpu", torch.float64)
