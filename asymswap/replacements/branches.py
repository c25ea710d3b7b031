"""A conv with parallel branches beside it, all summed: stronger in training, one conv again afterwards.

Each branch is linear, so that the block is one kernel, the sum of all (structural re-parameterisation). Taps sit about
the middle of the conv's kernel, whatever a branch's own size and dilation. The branches and the papers that they are
from: docs/reference/kinds.md.

Branches start without effect but with a gradient of the usual size, or take their share of the kernel:

- `start = "nothing"`, `bn = "shared"`: weights of zero, of two convs in a row the second's. They get the full gradient.
- `start = "nothing"`, `bn = "branch"`: taps copied from the kernel, behind a batch norm of weight zero, which gets its
  gradient first. Behind zeros a batch norm would divide by sqrt(eps), and make the first gradient 300 times too large.
- `start = "share"`: each takes one part in (branches + 1) of what it can hold of the kernel; the conv keeps the rest.

With `bn = "branch"` the conv beside them takes over a batch norm that follows, so that the block does in eval mode (and
from nothing in train mode too) what conv and batch norm did. The running statistics of the branches are what they would
have been: from calibration exactly, as far as they lie inside the kernel, else as if the conv's inputs were white.
"""

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.errors import RecipeError, near_names
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
    """Momentum of their running statistics, `cumulative` for torch's None; one that is taken over keeps its own."""

    @model_validator(mode="after")
    def _norms_have_constants(self) -> Self:
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
    def _names_are_known(self) -> Self:
        names = [name.removesuffix("?") for name in self.branches]
        for name in names:
            size = re.fullmatch(r"(\d+)x(\d+)", name)
            if name not in _NAMES and size is None:
                known = near_names(name, _NAMES) or f"; known: {', '.join(_NAMES)}, and sizes such as 1x11"
                raise ValueError(f"no branch {name!r}{known}")
            if size is not None and not all(0 < int(side) <= _LARGEST for side in size.groups()):
                raise ValueError(f"a branch of {name} is larger than {_LARGEST} taps along a side, or has none")
        twice = [name for name, count in Counter(_expanded(names)).items() if count > 1]
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

    def kernel(self) -> Tensor:
        """Return the scaled taps (O, 1, H, W)."""
        taps = self.taps.expand(self.conv.out_channels, 1, -1, -1)
        return taps if self.scale is None else taps * self.scale[:, None]

    def forward(self, input: Tensor) -> Tensor:
        conv, mode = self.conv, self.conv.padding_mode
        padded = F.pad(input, conv.pads, mode="constant" if mode == "zeros" else mode)
        return F.conv2d(padded, self.kernel(), None, conv.stride, 0, conv.dilation, conv.out_channels)


@dataclass(frozen=True)
class Branch:
    """One branch at one conv: its parts in run order, the sides of its taps, and how far they are apart."""

    name: str
    parts: tuple[ConvSpec, ...]
    kernel: Size
    dilation: Size
    crop: Size
    taps: Tensor | None = None  # of a fixed filter, which is the last part

    def build(self, settings: NormSettings) -> nn.Sequential:
        """Return `conv` or `first` and `conv`, and maybe `norm`."""
        made: list[nn.Module] = [_convs.new_conv(part) for part in self.parts]
        if self.taps is not None:
            made[-1] = FixedFilter(self.parts[-1], self.taps, scaled=self.name in _EDGES)
        if settings.bn == "branch":
            last, momentum = self.parts[-1], None if settings.momentum == "cumulative" else settings.momentum
            made.append(nn.BatchNorm2d(last.out_channels, settings.eps, momentum, dtype=getattr(torch, last.dtype)))
        names = ("first", "conv", "norm") if len(self.parts) > 1 else ("conv", "norm")
        return nn.Sequential(OrderedDict(zip(names, made, strict=False)))


def _branch(name: str, conv: ConvSpec, rank: int) -> Branch | str:
    """Return a branch at a conv, or the reason why the conv cannot have it."""
    sizes = {"vertical": (conv.kernel[0], 1), "horizontal": (1, conv.kernel[1]), "identity": (1, 1)}
    sizes |= dict.fromkeys(_EDGES, (3, 3)) | dict.fromkeys(("dilated", "1x1-kxk", "avg", "pair"), conv.kernel)
    kernel, dilation, taps = sizes.get(name) or as_size(name), conv.dilation, None
    if name == "dilated":
        dilation = (2 * dilation[0], 2 * dilation[1])
    elif name in _EDGES:
        taps = torch.tensor(_EDGES[name])
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
    whole, crop = _convs.centred(replace(conv, bias=False), kernel, dilation)
    first = replace(whole, kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    parts: tuple[ConvSpec, ...] = (whole,)
    if name == "identity":
        parts = (replace(whole, groups=conv.in_channels),)
    elif name == "1x1-kxk":
        parts = replace(first, out_channels=conv.in_channels), whole
    elif taps is not None:
        parts = first, replace(whole, in_channels=conv.out_channels, groups=conv.out_channels)
    elif name == "pair":
        middle = conv.groups * min(rank, conv.group_in * kernel[0], conv.group_out * kernel[1])
        down, across = _convs.half(whole, vertical=True), _convs.half(whole, vertical=False)
        parts = replace(down, out_channels=middle), replace(across, in_channels=middle)
    return Branch(name, parts, kernel, dilation, crop, taps)


class BranchSum(_convs.CroppedSum):
    """The sum of `square`, the conv itself, and of branches by name; no input without N behind norms."""

    def __init__(self, branches: Sequence[Branch], settings: NormSettings) -> None:
        super().__init__({branch.name: (branch.build(settings), branch.crop) for branch in branches})
        self.branches = branches


class Branches(Replacement):
    settings: ClassVar[type[NormSettings]] = Settings
    PRESERVES = "exact in eval mode; fuses back to one conv"

    def listed(self, settings: Any) -> Sequence[str]:
        """Return the names of the branches, with `?` behind those that may be left out."""
        return _expanded(settings.branches)

    def at(self, conv: ConvSpec, settings: Any) -> list[Branch]:
        """Return the conv as `square` and the branches that it can have; RecipeError where it lacks one without `?`."""
        found = [Branch("square", (conv,), conv.kernel, conv.dilation, (0, 0))]
        for name in self.listed(settings):
            branch = _branch(name.removesuffix("?"), conv, getattr(settings, "rank", 1))
            if isinstance(branch, Branch):
                found.append(branch)
            elif not name.endswith("?"):
                raise RecipeError(f"branch {name!r}: {branch}")
        return found

    def unsupported(self, conv: ConvSpec) -> str | None:
        if any(side % 2 == 0 for side in conv.kernel):
            return f"a {'x'.join(map(str, conv.kernel))} kernel has no middle, since not both of its sides are odd"
        return super().unsupported(conv)

    def preserves(self, conv: ConvSpec, settings: Any) -> bool:
        """Return True, except for batch norms in half precision, which round more than is promised."""
        return settings.bn == "shared" or conv.dtype in ("float32", "float64")

    def cost(self, site: Site, settings: Any) -> Cost:
        macs, params, channels = 0, 0, site.conv.out_channels
        for branch in self.at(site.conv, settings):
            trained = branch.parts if branch.taps is None else branch.parts[:-1]
            params += sum(part.params for part in trained) + channels * (branch.name in _EDGES)
            params += 2 * channels * (settings.bn == "branch")
            for call in site.calls:
                size = call.input[0] - 2 * branch.crop[0], call.input[1] - 2 * branch.crop[1]
                for part in branch.parts:
                    size = part.output(size)
                    macs += call.batch * math.prod(size) * part.macs_per_pixel()
        return Cost(macs, params)

    def resolve(self, site: Site, original: Original, settings: Any) -> Option:
        _, *kept = (branch.name for branch in self.at(site.conv, settings))
        if not kept:
            raise RecipeError("the conv can have none of these branches")
        stored = {"bn", "eps", "momentum"} if settings.bn == "branch" else {"bn"}
        stored |= {"start"} if getattr(settings, "start", "nothing") == "share" else set()
        stored |= {"rank"} if "pair" in kept else set()
        listed = {"branches": tuple(kept)} if "branches" in type(settings).model_fields else {}
        return self.option(site, type(settings)(**listed, **settings.model_dump(include=stored)))

    def fold_norm(self, settings: NormSettings, norm: nn.Module) -> NormSettings | None:
        """Return the settings with the constants of a batch norm, or None where it cannot be taken over.

        An InstanceNorm2d, which counts as batch_norm too, cannot, nor one with additions or no running statistics.
        """
        if settings.bn == "shared" or type(norm) is not nn.BatchNorm2d or norm.running_mean is None:
            return None
        if additions(norm, nn.BatchNorm2d(1, device="meta")):
            return None
        momentum = "cumulative" if norm.momentum is None else norm.momentum
        return settings.model_copy(update={"eps": norm.eps, "momentum": momentum})

    def build(self, conv: ConvSpec, settings: Any) -> BranchSum:
        return BranchSum(self.at(conv, settings), settings)

    def init_(self, module: nn.Module, original: Original, settings: Any) -> None:
        """Make the branches and the conv beside them compute what conv and batch norm did, in eval mode."""
        conv, norm = original.conv, original.norm
        scale_O, shift_O = (torch.ones(()), torch.zeros(())) if norm is None else _convs.affine(norm)
        square, *branches = cast(BranchSum, module).branches
        shares, normed = getattr(settings, "start", "nothing") == "share", settings.bn == "branch"
        weight_OIHW = left_OIHW = _convs.float64(conv.weight)
        part = 1 / (len(branches) + 1) if shares else 1.0
        for branch in branches:
            own: Any = module.get_submodule(branch.name)
            held = _held(branch, part * weight_OIHW, square)
            if not (shares or normed):
                held[-1] = 0 * held[-1]
            for parameter in own.parameters():
                nn.init.ones_(parameter)  # the scale of a filter stays so
            for layer, weight in zip(own, held, strict=False):
                _convs.copy_(layer, weight, None)
            kernel_OIHW = _convs.placed(_kernel(own, conv.groups), square.kernel, (branch.dilation, square.dilation))
            if normed:
                _convs.set_norm_(own.norm, *_moments(kernel_OIHW, original), scale_O if shares else 0.0)
            if shares:
                left_OIHW = left_OIHW - kernel_OIHW
        own = module.get_submodule("square")
        _convs.copy_(own.conv, left_OIHW, conv.bias)
        if normed:
            mean_O, variance_O = _moments(left_OIHW, original)
            if norm is not None and torch.equal(left_OIHW, weight_OIHW):
                mean_O, variance_O = _convs.float64(norm.running_mean), _convs.float64(norm.running_var)
            # Without calibration statistics we assume zero mean, bias or not.
            elif conv.bias is not None and (original.statistics is not None or norm is not None):
                mean_O = mean_O + _convs.float64(conv.bias)
            _convs.set_norm_(own.norm, mean_O, variance_O, scale_O, shift_O)
        if norm is not None:
            for name, buffer in module.named_buffers():
                if name.endswith("num_batches_tracked"):
                    buffer.copy_(cast(Tensor, norm.num_batches_tracked))

    def added(self, module: nn.Module) -> Sequence[str]:
        """Return the branches: the conv beside them was there."""
        return [name for name, _ in module.named_children() if name != "square"] or super().added(module)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Any) -> nn.Conv2d:
        """Return one conv: of the original fields, or larger as the branches are, with a bias where one is made."""
        branches = cast(BranchSum, module).branches
        # Per axis: the largest step that all taps keep (a single tap has none), and how many taps that makes.
        steps, sides = list(conv.dilation), [1, 1]
        for axis in (0, 1):
            every = [(one.kernel[axis], one.dilation[axis]) for one in branches if one.kernel[axis] > 1]
            if every:
                steps[axis] = math.gcd(*(step for _, step in every))
                sides[axis] = max(step * (taps - 1) for taps, step in every) // steps[axis] + 1
        kernel, dilation = (sides[0], sides[1]), (steps[0], steps[1])
        kernel_OIHW = torch.zeros(conv.out_channels, conv.group_in, *kernel, dtype=torch.float64)
        bias_O = torch.zeros(conv.out_channels, dtype=torch.float64)
        for branch in branches:
            own: Any = module.get_submodule(branch.name)
            weight_OIHW, bias = _kernel(own, conv.groups), getattr(own.conv, "bias", None)
            shift_O = 0.0 if bias is None else _convs.float64(bias)
            if settings.bn == "branch":
                scale_O, moved_O = _convs.affine(own.norm)
                weight_OIHW, shift_O = weight_OIHW * scale_O[:, None, None, None], shift_O * scale_O + moved_O
            kernel_OIHW += _convs.placed(weight_OIHW, kernel, (branch.dilation, dilation))
            bias_O += shift_O
        fields, _ = _convs.centred(conv, kernel, dilation)
        bias = bias_O if conv.bias or settings.bn == "branch" else None
        return _convs.conv_of(fields, kernel_OIHW, bias, like=cast(Any, module).square.conv.weight)


def _kernel(own: Any, groups: int) -> Tensor:
    """Return the taps (O, I, H, W) in float64 of a branch without its norm."""
    if isinstance(own.conv, FixedFilter):
        return _convs.float64(own.first.weight) * _convs.float64(own.conv.kernel())
    weight = _convs.float64(own.conv.weight)
    if own.conv.groups != groups:
        # An identity: in each group, channel by channel.
        return weight * nn.init.dirac_(weight.new_empty(len(weight), len(weight) // groups, 1, 1), groups)
    return svd.compose(_convs.float64(own.first.weight), weight, groups) if hasattr(own, "first") else weight


def _held(branch: Branch, weight_OIHW: Tensor, square: Branch) -> list[Tensor]:
    """Return the weights, in run order, with which a branch computes what it can of a kernel of the conv itself."""
    conv = square.parts[0]
    if branch.taps is not None:
        # Onto the filter: the multiple that is nearest.
        near_OIHW, filter_HW = _convs.placed(weight_OIHW, branch.kernel), branch.taps.to(weight_OIHW)
        return [(near_OIHW * filter_HW).sum((2, 3), keepdim=True) / filter_HW.square().sum()]
    if branch.name == "pair":
        rank = branch.parts[0].out_channels // conv.groups
        factors = svd.factors(svd.as_matrix(weight_OIHW, conv.groups, vertical_first=True), rank)
        return [*svd.as_kernels(*factors, conv.kernel, vertical_first=True)]
    if branch.name == "1x1-kxk":
        first = weight_OIHW.new_empty(conv.in_channels, conv.group_in, 1, 1)
        return [nn.init.dirac_(first, conv.groups), weight_OIHW]
    if branch.name == "identity":
        channels = nn.init.dirac_(torch.zeros_like(weight_OIHW), conv.groups)
        return [(weight_OIHW * channels).sum((1, 2, 3), keepdim=True)]
    if branch.kernel[1] == 1:
        weight_OIHW = _strongest_column(weight_OIHW)
    if branch.kernel[0] == 1:
        weight_OIHW = _strongest_column(weight_OIHW.mT).mT
    return [_convs.placed(weight_OIHW, branch.kernel, (conv.dilation, branch.dilation))]


def _strongest_column(w_OIHW: Tensor) -> Tensor:
    """Return the centre column (O, I, H, 1) of each output channel, or its strongest where the centre is near zero.

    A kernel such as [-1 0 1] has no weight at its centre: that column would never see a gradient.
    """
    energy_OW = w_OIHW.to(torch.float64).square().sum((1, 2))
    centre = torch.full_like(energy_OW[:, 0], energy_OW.shape[1] // 2, dtype=torch.long)
    weak_O = energy_OW.gather(1, centre[:, None])[:, 0] < _WEAKEST * energy_OW.mean(1)
    chosen = torch.where(weak_O, energy_OW.argmax(1), centre)
    return w_OIHW[torch.arange(len(w_OIHW), device=w_OIHW.device), ..., chosen][..., None]


def _moments(kernel_OIHW: Tensor, original: Original) -> tuple[Tensor, Tensor]:
    """Return mean and variance (O) of the output of a kernel in the place of the conv's own, without its bias.

    Without statistics, for white inputs that explain the batch norm's: the variance goes with the kernel's squared
    norm, the mean with its part along the conv's kernel. With neither, for outputs that are normal already.
    """
    conv, statistics, norm, kernel = original.conv, original.statistics, original.norm, kernel_OIHW.flatten(1)
    if statistics is not None:
        kernel_GOD = kernel.unflatten(0, (conv.groups, -1)).to(statistics.mean_GD)
        mean_GO = torch.einsum("god,gd->go", kernel_GOD, statistics.mean_GD)
        variance_GO = torch.einsum("god,gde,goe->go", kernel_GOD, statistics.cov_GDD, kernel_GOD)
        return mean_GO.flatten().cpu(), variance_GO.flatten().clamp_min(0.0).cpu()
    if norm is None:
        return torch.zeros_like(kernel[:, 0]), torch.ones_like(kernel[:, 0])
    own = _convs.float64(conv.weight).flatten(1)
    mean_O = _convs.float64(norm.running_mean) - (0.0 if conv.bias is None else _convs.float64(conv.bias))
    whole_O = own.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    along_O, share_O = (kernel * own).sum(1) / whole_O, kernel.square().sum(1) / whole_O
    return along_O * mean_O, share_O * _convs.float64(norm.running_var)
