"""A conv with parallel branches beside it, all summed: stronger in training, one conv again afterwards.

Each branch is linear, so that the block is one kernel, the sum of all (structural re-parameterisation). Taps sit about
the middle of the conv's kernel, whatever a branch's own size and dilation.

| branch | what | after |
| --- | --- | --- |
| `vertical`, `horizontal` | kh x 1 and 1 x kw | ACNet: Ding, Guo, Ding and Han, ICCV 2019 |
| `1x1`, `5x5`, `1x11` … | a kernel of this size, the conv's dilation | RepVGG: Ding et al., CVPR 2021; SegNeXt |
| `dilated` | the conv's own size at twice its dilation | UniRepLKNet: Ding et al., CVPR 2024 |
| `identity` | the input itself, by a weight for each channel | RepVGG |
| `1x1-kxk` | 1x1, then the conv's own size | DBB: Ding, Zhang, Han and Ding, CVPR 2021 |
| `avg` | 1x1, then the mean of the taps | DBB |
| `edge` | three branches: 1x1, then a Sobel filter across, one down, a Laplacian, scaled | ECBSR: Zhang et al., 2021 |
| `pair` | kh x 1 to R channels of each group, then 1 x kw: a conv LoRA (Hu et al., 2022) beside a frozen conv | - |

Branches start without effect but with a gradient of the usual size, or take their share of the kernel:

- `start = "nothing"`, `bn = "shared"`: weights of zero, of two convs in a row the second's. They get the full gradient.
- `start = "nothing"`, `bn = "branch"`: taps copied from the kernel, behind a batch norm of weight zero, which gets its
  gradient first. Behind zeros a batch norm would divide by sqrt(eps), and make the first gradient 300 times too large.
- `start = "share"`: each branch takes one part in (branches + 1) of what it can hold of the kernel, and the conv beside
  them keeps the rest.

With `bn = "branch"` the conv beside them takes over a batch norm that follows, so that the block does in eval mode (and
from nothing in train mode too) what conv and batch norm did. The running statistics of the branches are what they would
have been: from calibration exactly, as far as they lie inside the kernel, else as if the conv's inputs were white.
"""

from __future__ import annotations

import math
import operator
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.errors import PlanError, RecipeError, near_names
from asymswap.factorize import svd
from asymswap.replacements import _convs
from asymswap.replacements.base import GrowingSettings, Original, Replacement, as_size
from asymswap.types import ConvSpec, Cost, Option, Site, Size
from asymswap.utils.tensors import additions

_WEAKEST = 0.01  # a centre row or column below this share of the average one's energy gives way to the strongest one
_EDGES = {
    "sobel-x": ((1, 0, -1), (2, 0, -2), (1, 0, -1)),
    "sobel-y": ((1, 2, 1), (0, 0, 0), (-1, -2, -1)),
    "laplacian": ((0, 1, 0), (1, -4, 1), (0, 1, 0)),
}
_NAMES = ("vertical", "horizontal", "1x1", "identity", "dilated", "1x1-kxk", "avg", "edge", *_EDGES, "pair")
_LARGEST = 63  # taps along a side


class NormSettings(GrowingSettings):
    """Which batch norms the block holds."""

    bn: Literal["shared", "branch"] = "shared"
    """`shared`: none; one that follows the conv normalises the sum. `branch`: one a branch, as in the papers.

    A batch norm that follows is then taken over, if nothing else reads the conv. Where there is none, those of the
    branches do nothing in eval mode but normalise in train mode, which the original did not: by the output's mean and
    variance from calibration, and without calibration by mean 0 and variance 1.
    """
    eps: Annotated[float, Field(ge=0)] = 1e-5
    """Added to the variance by the branches' batch norms; one that is taken over keeps its own."""
    momentum: Annotated[float, Field(ge=0, le=1)] | Literal["cumulative"] = 0.1
    """Momentum of their running statistics, `cumulative` for torch's None; likewise."""

    @model_validator(mode="after")
    def _norms_have_constants(self) -> NormSettings:
        given = [name for name in ("eps", "momentum") if name in self.model_fields_set]
        if given and self.bn == "shared":
            raise ValueError(f'only bn = "branch" has batch norms to give {" and ".join(given)} to')
        return self


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Settings(NormSettings):
    """The branches, how they start, and which batch norms the block holds."""

    branches: Annotated[tuple[str, ...], Field(min_length=1, strict=False), BeforeValidator(_listed)] = ("1x1?", "3x3?")
    """Their names, or sizes such as "1x11"; `?` behind one leaves it out where the conv cannot have it."""
    start: Literal["nothing", "share"] = "nothing"
    """Without effect, or each with its share of the kernel."""
    rank: Annotated[int, Field(ge=1)] = 8
    """Channels between the two convs of `pair`, of each group."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Settings:
        names = [name.removesuffix("?") for name in self.branches]
        for name in names:
            size = re.fullmatch(r"(\d+)x(\d+)", name)
            if name not in _NAMES and size is None:
                known = near_names(name, _NAMES) or f"; known: {', '.join(_NAMES)}, and sizes such as 1x11"
                raise ValueError(f"no branch {name!r}{known}")
            if size is not None and not all(0 < int(side) <= _LARGEST for side in size.groups()):
                raise ValueError(f"a branch of {name} is larger than {_LARGEST} taps along a side, or has none")
        twice = [name for name in _expanded(names) if _expanded(names).count(name) > 1]
        if twice:
            raise ValueError(f"branch {twice[0]!r} is there twice")
        return self


def _expanded(names: Sequence[str]) -> list[str]:
    """Return the names with `edge` as its three filters, each with its `?`."""
    edges = {f"edge{mark}": [f"{one}{mark}" for one in _EDGES] for mark in ("", "?")}
    return [one for name in names for one in edges.get(name, [name])]


class FixedFilter(nn.Module):
    """A depthwise conv whose taps (H, W) never change, each output channel with a scale (O, 1, 1) that does."""

    taps: Tensor

    def __init__(self, conv: ConvSpec, taps: Tensor, scaled: bool) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("taps", taps.to(getattr(torch, conv.dtype)), persistent=False)
        self.scale = nn.Parameter(torch.ones(conv.out_channels, 1, 1, dtype=self.taps.dtype)) if scaled else None

    def forward(self, input: Tensor) -> Tensor:
        conv, mode = self.conv, self.conv.padding_mode
        padded = F.pad(input, conv.pads, mode="constant" if mode == "zeros" else mode)
        weight = self.taps.expand(conv.out_channels, 1, -1, -1)
        output = F.conv2d(padded, weight, None, conv.stride, 0, conv.dilation, conv.out_channels)
        return output if self.scale is None else output * self.scale


@dataclass(frozen=True)
class Branch:
    """One branch at one conv: its parts in run order, the sides of its taps, and how far they are apart."""

    name: str
    parts: tuple[ConvSpec, ...]
    kernel: Size
    dilation: Size
    crop: Size
    taps: Tensor | None = None  # of a fixed filter, which is the last part

    def build(self) -> list[nn.Module]:
        made: list[nn.Module] = [_convs.new_conv(part) for part in self.parts]
        if self.taps is not None:
            made[-1] = FixedFilter(self.parts[-1], self.taps, scaled=self.name in _EDGES)
        return made


def _branch(name: str, conv: ConvSpec, rank: int) -> Branch | str:
    """Return a branch at a conv, or the reason why the conv cannot have it."""
    kernel, dilation, taps = conv.kernel, conv.dilation, None
    size = re.fullmatch(r"\d+x\d+", name)
    if size is not None or name in ("vertical", "horizontal"):
        kernel = {"vertical": (kernel[0], 1), "horizontal": (1, kernel[1])}.get(name) or as_size(name)
    elif name == "identity":
        kernel = (1, 1)
    elif name == "dilated":
        dilation = (2 * dilation[0], 2 * dilation[1])
    elif name in _EDGES:
        kernel, taps = (3, 3), torch.tensor(_EDGES[name])
    elif name == "avg":
        taps = torch.full(kernel, 1 / math.prod(kernel), dtype=torch.float64)
    if any(side % 2 == 0 for side in kernel):
        return f"a kernel of {'x'.join(map(str, kernel))} has no middle, since not both of its sides are odd"
    if (kernel, dilation) == (conv.kernel, conv.dilation) and name not in ("1x1-kxk", "avg", "pair", *_EDGES):
        return "it is the conv itself"
    if name == "identity" and conv.in_channels != conv.out_channels:
        return f"{conv.in_channels} channels do not become {conv.out_channels} by an identity"
    if name in ("dilated", "pair", "avg", "1x1-kxk") and conv.kernel == (1, 1):
        return "a 1x1 kernel has no taps apart"
    if name in _EDGES and (conv.kernel[0] < 3 or conv.kernel[1] < 3):
        return f"a filter of 3x3 is larger than a kernel of {'x'.join(map(str, conv.kernel))}"
    # The same middle: what the branch lacks or has more of its sides is padding.
    padding, crop = conv.padding, (0, 0)
    if padding != "same":
        own = (0, 0) if isinstance(padding, str) else padding
        axes = zip(own, dilation, kernel, conv.dilation, conv.kernel, strict=True)
        rows, columns = (p + (d * (k - 1) - e * (n - 1)) // 2 for p, d, k, e, n in axes)
        padding, crop = (max(rows, 0), max(columns, 0)), (max(-rows, 0), max(-columns, 0))
    whole = replace(conv, kernel=kernel, dilation=dilation, padding=padding, bias=False)
    inside: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "kernel": (1, 1)}
    parts: tuple[ConvSpec, ...] = (whole,)
    if name == "identity":
        parts = (replace(whole, groups=conv.in_channels),)
    elif name == "1x1-kxk":
        parts = replace(whole, out_channels=conv.in_channels, **inside), whole
    elif taps is not None:
        fixed = replace(whole, in_channels=conv.out_channels, groups=conv.out_channels)
        parts = replace(whole, **inside), fixed
    elif name == "pair":
        middle = conv.groups * min(rank, conv.group_in * kernel[0], conv.group_out * kernel[1])
        down = replace(whole, kernel=(kernel[0], 1), stride=(conv.stride[0], 1), dilation=(dilation[0], 1))
        across = replace(whole, kernel=(1, kernel[1]), stride=(1, conv.stride[1]), dilation=(1, dilation[1]))
        if not isinstance(padding, str):
            down, across = replace(down, padding=(padding[0], 0)), replace(across, padding=(0, padding[1]))
        parts = replace(down, out_channels=middle), replace(across, in_channels=middle)
    return Branch(name, parts, kernel, dilation, crop, taps)


class BranchSum(nn.Module):
    """The sum of `square` and of branches by name, input (N, C, H, W) or (C, H, W); no input without N behind norms.

    `crops` is how many (rows, columns) are cut from each side of the input of a branch.
    """

    def __init__(self, conv: ConvSpec, square: nn.Module, branches: Sequence[tuple[Branch, nn.Module]]) -> None:
        super().__init__()
        self.conv, self.branches, self.square = conv, [branch for branch, _ in branches], square
        for branch, module in branches:
            self.add_module(branch.name, module)
        self.crops = {branch.name: branch.crop for branch, _ in branches if any(branch.crop)}

    def forward(self, input: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for name, branch in self.named_children():
            rows, columns = self.crops.get(name, (0, 0))
            seen = input[..., rows : input.shape[-2] - rows, columns : input.shape[-1] - columns]
            outputs.append(branch(seen if rows or columns else input))
        return reduce(operator.add, outputs)

    def extra_repr(self) -> str:
        return f"crops={self.crops}" if self.crops else ""


class Branches(Replacement):
    settings: ClassVar[type[NormSettings]] = Settings
    PRESERVES = "exact in eval mode; fuses back to one conv"

    def listed(self, settings: Any) -> Sequence[str]:
        """Return the names of the branches, with `?` behind those that may be left out."""
        return _expanded(settings.branches)

    def at(self, conv: ConvSpec, settings: Any) -> list[Branch]:
        """Return the branches of settled settings; raise RecipeError for one that the conv cannot have."""
        found = []
        for name in self.listed(settings):
            branch = _branch(name, conv, getattr(settings, "rank", 1))
            if isinstance(branch, str):
                raise RecipeError(f"branch {name!r}: {branch}")
            found.append(branch)
        return found

    def unsupported(self, conv: ConvSpec) -> str | None:
        if any(side % 2 == 0 for side in conv.kernel):
            return f"a {'x'.join(map(str, conv.kernel))} kernel has no middle, since not both of its sides are odd"
        return super().unsupported(conv)

    def preserves(self, conv: ConvSpec, settings: Any) -> bool:
        """Return True, except for batch norms in half precision, which round more than is promised."""
        return settings.bn == "shared" or conv.dtype in ("float32", "float64")

    def cost(self, site: Site, settings: Any) -> Cost:
        branches = self.at(site.conv, settings)
        macs, params = 0, 0
        for branch in branches:
            params += sum(part.params for part in branch.parts)
            if branch.taps is not None:
                params += (branch.name in _EDGES) * site.conv.out_channels - branch.parts[-1].params
            for call in site.calls:
                size = call.input[0] - 2 * branch.crop[0], call.input[1] - 2 * branch.crop[1]
                for part in branch.parts:
                    size = part.output(size)
                    macs += call.batch * math.prod(size) * part.macs_per_pixel()
        norms = 2 * (len(branches) + 1) * site.conv.out_channels if settings.bn == "branch" else 0
        return site.cost + Cost(macs, params + norms)

    def resolve(self, site: Site, original: Original, settings: Any) -> Option:
        kept: list[str] = []
        for name in self.listed(settings):
            branch = _branch(name.removesuffix("?"), site.conv, getattr(settings, "rank", 1))
            if isinstance(branch, Branch):
                kept.append(branch.name)
            elif not name.endswith("?"):
                raise RecipeError(f"branch {name!r}: {branch}")
        if not kept:
            raise RecipeError("the conv can have none of these branches")
        stored = {"bn", "eps", "momentum"} if settings.bn == "branch" else {"bn"}
        stored |= {"start"} if getattr(settings, "start", "nothing") == "share" else set()
        stored |= {"rank"} if "pair" in kept else set()
        listed = {"branches": tuple(kept)} if "branches" in type(settings).model_fields else {}
        return self.option(site, type(settings)(**listed, **settings.model_dump(include=stored)))

    def fold_norm(self, settings: Any, norm: nn.Module) -> NormSettings | None:
        """Return the settings with the constants of a batch norm, or None where it cannot be taken over.

        It cannot with `bn = "shared"`, and where the module is something else (an InstanceNorm2d counts as batch_norm
        too), has hooks or attributes of the user's, or keeps no running statistics.
        """
        if settings.bn == "shared" or type(norm) is not nn.BatchNorm2d:
            return None
        if norm.running_mean is None or norm.running_var is None or additions(norm, nn.BatchNorm2d(1, device="meta")):
            return None
        momentum = "cumulative" if norm.momentum is None else norm.momentum
        updated: NormSettings = settings.model_copy(update={"eps": norm.eps, "momentum": momentum})
        return updated

    def build(self, conv: ConvSpec, settings: Any) -> BranchSum:
        """Return a block of `square` (with the bias) and the branches by name: `conv`, or several, and maybe `norm`."""
        momentum = None if settings.momentum == "cumulative" else settings.momentum

        def built(parts: Sequence[nn.Module]) -> nn.Sequential:
            names = ["conv"] if len(parts) == 1 else ["first", "conv"]
            layers = OrderedDict[str, nn.Module](zip(names, parts, strict=True))
            if settings.bn == "branch":
                dtype = getattr(torch, conv.dtype)
                layers["norm"] = nn.BatchNorm2d(conv.out_channels, eps=settings.eps, momentum=momentum, dtype=dtype)
            return nn.Sequential(layers)

        branches = self.at(conv, settings)
        return BranchSum(conv, built([_convs.new_conv(conv)]), [(one, built(one.build())) for one in branches])

    def init_(self, module: nn.Module, original: Original, settings: Any) -> None:
        """Make the branches and the conv beside them compute what conv and batch norm did, in eval mode.

        Raises PlanError for a batch norm that cannot be taken over.
        """
        conv, norm = original.conv, original.norm
        if norm is not None and settings.bn == "shared":
            raise PlanError(f'kind {self.name!r} takes over a batch norm with bn = "branch" only')
        if norm is not None and self.fold_norm(settings, norm) is None:
            what = f"a {type(norm).__name__} with hooks or no running statistics"
            raise PlanError(f"kind {self.name!r} cannot take over {what}")
        block, spec, branches = cast(Any, module), cast(Any, module).conv, cast(Any, module).branches
        shares = getattr(settings, "start", "nothing") == "share"
        normed, weight_OIHW = settings.bn == "branch", _float64(conv.weight)
        left_OIHW, scale_O = weight_OIHW.clone(), torch.ones(())
        with torch.no_grad():
            if norm is not None:
                scale_O = (1 if norm.weight is None else _float64(norm.weight)) / _deviation(norm, norm.eps)
            for branch in branches:
                part = 1 / (len(branches) + 1) if shares else 1.0
                own = getattr(block, branch.name)
                _set_(branch, own, part * weight_OIHW, spec.groups, empty=not (shares or normed))
                kernel_OIHW = _inside(_kernel(branch, own, spec.groups), branch, spec)
                if normed:
                    _convs.set_neutral_(own.norm, *_moments(kernel_OIHW, conv, original))
                    factor = torch.as_tensor(scale_O if shares else 0.0).to(own.norm.weight)
                    own.norm.weight.mul_(factor)
                    own.norm.bias.mul_(factor)
                    if norm is not None:
                        cast(Tensor, own.norm.num_batches_tracked).copy_(cast(Tensor, norm.num_batches_tracked))
                left_OIHW -= kernel_OIHW if shares else 0.0
            _convs.copy_(block.square.conv, left_OIHW if shares else conv.weight, conv.bias)
            if normed:
                self._set_norm_(block.square, left_OIHW, original, scale_O)

    def _set_norm_(self, square: Any, kernel_OIHW: Tensor, original: Original, scale_O: Any) -> None:
        """Set the batch norm of the conv beside the branches: that which is taken over, or one that does nothing."""
        conv, norm, own = original.conv, original.norm, square.norm
        if norm is not None and torch.equal(kernel_OIHW, _float64(conv.weight)):
            for own_buffer, buffer in zip(own.buffers(), norm.buffers(), strict=True):
                own_buffer.copy_(buffer)
            # Where `eps` is not that of the norm, the scale in eval mode is still that of the norm.
            weight_O = (1 if norm.weight is None else _float64(norm.weight)) * _deviation(norm, own.eps)
            _convs.copy_(own, weight_O / _deviation(norm, norm.eps), norm.bias)
            return
        mean_O, variance_O = _moments(kernel_OIHW, conv, original)
        # Without calibration statistics we assume zero mean, bias or not.
        if conv.bias is not None and (original.statistics is not None or norm is not None):
            mean_O = mean_O + _float64(conv.bias)
        _convs.set_neutral_(own, mean_O, variance_O)
        if norm is not None:
            shift_O = (0.0 if norm.bias is None else _float64(norm.bias)) - scale_O * _float64(norm.running_mean)
            own.bias.copy_(scale_O * _float64(own.bias) + shift_O)
            own.weight.copy_(scale_O * _float64(own.weight))
            own.num_batches_tracked.copy_(norm.num_batches_tracked)

    def added(self, module: nn.Module) -> Sequence[str]:
        """Return the branches: the conv beside them was there."""
        return [name for name, _ in module.named_children() if name != "square"] or super().added(module)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Any) -> nn.Conv2d:
        """Return one conv: of the original fields, or larger as the branches are, with a bias where one is made."""
        block = cast(Any, module)
        kernels = [(_kernel(None, block.square, conv.groups), conv.kernel, conv.dilation, block.square)]
        for one in block.branches:
            own = getattr(block, one.name)
            kernels.append((_kernel(one, own, conv.groups), one.kernel, one.dilation, own))
        # Per axis: how far the taps reach from the middle, and the largest step that all of them keep.
        every = [(size, step) for _, size, step, _ in kernels]
        reach = tuple(max(step[axis] * (size[axis] - 1) // 2 for size, step in every) for axis in (0, 1))
        steps = [math.gcd(*(step[axis] for size, step in every if size[axis] > 1)) or 1 for axis in (0, 1)]
        sides = tuple(2 * far // step + 1 for far, step in zip(reach, steps, strict=True))
        like = block.square.conv.weight
        kernel_OIHW = like.new_zeros(*like.shape[:2], *sides, dtype=torch.float64)
        bias_O = like.new_zeros(len(like), dtype=torch.float64)
        for weight, size, step, own in kernels:
            bias = getattr(own.conv, "bias", None)
            shift_O = 0.0 if bias is None else bias.detach().to(torch.float64)
            if settings.bn == "branch":
                scale_O, moved_O = _convs.affine(own.norm)
                weight, shift_O = weight * scale_O[:, None, None, None], shift_O * scale_O + moved_O
            rows, columns = (
                slice((far - d * (k - 1) // 2) // s, (far + d * (k - 1) // 2) // s + 1, max(d // s, 1))
                for far, d, k, s in zip(reach, step, size, steps, strict=True)
            )
            kernel_OIHW[:, :, rows, columns] += weight
            bias_O += shift_O
        padding, own = conv.padding, (0, 0) if isinstance(conv.padding, str) else conv.padding
        beyond = [far - d * (k - 1) // 2 for far, d, k in zip(reach, conv.dilation, conv.kernel, strict=True)]
        if padding != "same" and any(beyond):
            padding = own[0] + beyond[0], own[1] + beyond[1]
        # Of a single tap the dilation says nothing: it stays the conv's own.
        dilation = tuple(step if side > 1 else own for step, side, own in zip(steps, sides, conv.dilation, strict=True))
        fields = replace(conv, padding=padding, dilation=cast(Size, dilation))
        bias = bias_O if conv.bias or settings.bn == "branch" else None
        return _convs.conv_of(fields, kernel_OIHW, bias, like=like)


def _kernel(branch: Branch | None, own: Any, groups: int) -> Tensor:
    """Return the taps (O, I, H, W) in float64 of a branch without its norm, None for the conv beside the branches."""
    last = own.conv
    if isinstance(last, FixedFilter):
        scale = 1.0 if last.scale is None else last.scale.detach().to(torch.float64)[:, None]
        found: Tensor = own.first.weight.detach().to(torch.float64) * last.taps.to(torch.float64) * scale
        return found
    weight: Tensor = last.weight.detach().to(torch.float64)
    if branch is None or len(branch.parts) == 1:
        if last.groups == groups:
            return weight
        # An identity: in each group, channel by channel.
        eye_OI = torch.eye(last.out_channels // groups, dtype=torch.float64, device=weight.device).repeat(groups, 1)
        return weight * eye_OI[:, :, None, None]
    first = own.first.weight.detach().to(torch.float64)
    if branch.name == "pair":
        return svd.compose(first, weight, groups, vertical_first=True)
    by_group = first[:, :, 0, 0].unflatten(0, (groups, -1))
    return torch.einsum("gomhw,gmi->goihw", weight.unflatten(0, (groups, -1)), by_group).flatten(0, 1)


def _set_(branch: Branch, own: Any, weight_OIHW: Tensor, groups: int, empty: bool) -> None:
    """Give a branch what it can hold of a kernel; with `empty` nothing, where it is trained first."""
    taps = branch.taps
    if taps is not None:
        # Onto the filter: the multiple that is nearest, on the taps that both have.
        rows, columns = (min(a, b) for a, b in zip(taps.shape, weight_OIHW.shape[2:], strict=True))
        near = _middle(weight_OIHW, (rows, columns))
        filter_HW = _middle(taps[None, None].to(near), (rows, columns))
        first = (near * filter_HW).sum((2, 3)) / filter_HW.square().sum().clamp_min(1e-12)
        own.first.weight.copy_(0 * first[:, :, None, None] if empty else first[:, :, None, None])
        if own.conv.scale is not None:
            nn.init.ones_(own.conv.scale)
        return
    if branch.name == "pair":
        rank = own.first.out_channels // groups
        factors = svd.factors(svd.as_matrix(weight_OIHW, groups, vertical_first=True), rank)
        first, second = svd.as_kernels(*factors, cast(Size, tuple(weight_OIHW.shape[2:])), vertical_first=True)
        own.first.weight.copy_(first)
        own.conv.weight.copy_(0 * second if empty else second)
        return
    if branch.name == "1x1-kxk":
        channels = own.first.in_channels // groups
        own.first.weight.copy_(torch.eye(channels).repeat(groups, 1)[:, :, None, None])
        own.conv.weight.copy_(0 * weight_OIHW if empty else weight_OIHW)
        return
    if branch.name == "identity":
        group_of = torch.arange(len(weight_OIHW)) % weight_OIHW.shape[1]
        middle = weight_OIHW.shape[2] // 2, weight_OIHW.shape[3] // 2
        taken = weight_OIHW[torch.arange(len(weight_OIHW)), group_of, middle[0], middle[1]]
        own.conv.weight.copy_(0 * taken[:, None, None, None] if empty else taken[:, None, None, None])
        return
    target = own.conv.weight
    nn.init.zeros_(target)
    if not empty:
        taken = weight_OIHW
        if branch.name == "dilated":
            # The two have the middle, and every second tap from it, in common.
            top, left = (side // 2 % 2 for side in taken.shape[2:])
            taken = taken[:, :, top::2, left::2]
        if target.shape[3] == 1 and taken.shape[3] > 1:
            taken = _strongest_column(taken)
        if target.shape[2] == 1 and taken.shape[2] > 1:
            taken = _strongest_column(taken.mT).mT
        size = cast(Size, tuple(min(a, b) for a, b in zip(target.shape[2:], taken.shape[2:], strict=True)))
        _middle(target, size).copy_(_middle(taken, size))


def _middle(w_OIHW: Tensor, size: Size) -> Tensor:
    """Return the middle of a kernel, a view."""
    rows, columns = ((whole - own) // 2 for whole, own in zip(w_OIHW.shape[2:], size, strict=True))
    return w_OIHW[:, :, rows : rows + size[0], columns : columns + size[1]]


def _inside(kernel_OIHW: Tensor, branch: Branch, conv: ConvSpec) -> Tensor:
    """Return a branch's taps as a kernel of the conv's size and dilation; those beside it are left out."""
    found = kernel_OIHW.new_zeros(*kernel_OIHW.shape[:2], *conv.kernel)
    for i, j in ((i, j) for i in range(branch.kernel[0]) for j in range(branch.kernel[1])):
        offsets = [d * (at - k // 2) for at, d, k in zip((i, j), branch.dilation, branch.kernel, strict=True)]
        places = [
            off // d + k // 2 if off % d == 0 else -1
            for off, d, k in zip(offsets, conv.dilation, conv.kernel, strict=True)
        ]
        if all(0 <= place < side for place, side in zip(places, conv.kernel, strict=True)):
            found[:, :, places[0], places[1]] += kernel_OIHW[:, :, i, j]
    return found


def _deviation(norm: nn.BatchNorm2d, eps: float) -> Tensor:
    return (_float64(norm.running_var) + eps).sqrt()


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
        kernel_GOD = kernel.unflatten(0, (conv.groups, -1)).to(statistics.mean_GD)
        mean_GO = torch.einsum("god,gd->go", kernel_GOD, statistics.mean_GD)
        variance_GO = torch.einsum("god,gde,goe->go", kernel_GOD, statistics.cov_GDD, kernel_GOD)
        return mean_GO.flatten().cpu(), variance_GO.flatten().clamp_min(0.0).cpu()
    if norm is None:
        return torch.zeros_like(kernel[:, 0]), torch.ones_like(kernel[:, 0])
    own = _float64(conv.weight).flatten(1)
    mean_O = _float64(norm.running_mean) - (0.0 if conv.bias is None else _float64(conv.bias))
    whole_O = own.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    along_O, share_O = (kernel * own).sum(1) / whole_O, kernel.square().sum(1) / whole_O
    return along_O * mean_O, share_O * _float64(norm.running_var)


def _float64(tensor: Tensor | None) -> Tensor:
    return cast(Tensor, tensor).detach().to("cpu", torch.float64)
