"""Calibration statistics of every site from unlabelled images, in one pass, in memory independent of their number.

While the unconverted model runs, we sum mean and covariance of each site's input patches, at random positions, in
float64; in the backward pass of the network's own prediction, the second moment of each site's output gradient. See
`asymswap.factorize.statistics` for their use.
"""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.calibration.config import OutputKind
from asymswap.errors import SourceError, validation_text
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.trace import conv_hooks, read_conv
from asymswap.types import Progress, Site, Strict, silent
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.files import whole_file
from asymswap.utils.inputs import Inputs, copied, samples_in
from asymswap.utils.tensors import (
    bytes_of,
    eval_mode,
    generator_for,
    hooked,
    list_tensors,
    map_tensors,
    on_disk,
    tensors_hash,
)

Batches = Callable[[], Iterable[tuple[int, Inputs]]]
"""Returns a new iterator over the same batches of the forward's arguments, with their numbers, at every call."""

_POSITIONS = 32  # positions of a feature map to look at in each image, at least, if it has as many
# Patches for each row of a covariance, if the images have as many: at least, at most. With 8 a pair fits the noise of
# the sample: on a DnCNN at half of its MACs 64 leave a third of the error (docs/results/calibration-experiments.md).
_SAMPLES_PER_DIMENSION = 8, 64
_ENOUGH = 2**16  # patches; more only for the least number of each row
_ASYMMETRY = 1e-5  # that rounding in float32 may cause, relative to a matrix's norm
_JUDGED = 128  # images whose outputs decide what kind of outputs they are
_BLOCK = 256  # rows of a Gram matrix to multiply at once


@dataclass(frozen=True)
class Images:
    """The images of a calibration, of which each process of the team has some batches."""

    batches: Batches
    count: int  # in all processes
    memory_gib: float = 4.0
    seed: int = 0  # random numbers depend on it and a batch's number, and not on the process that has the batch
    team: Team = ALONE

    def each(self, site: Site) -> int:
        """Return the number of positions to look at in each image: enough for the covariance, and no more."""
        least, most = (number * patch_length(site) for number in _SAMPLES_PER_DIMENSION)
        return max(_POSITIONS, math.ceil(max(least, min(most, _ENOUGH)) / max(self.count, 1)))

    def positions(self, site: Site, output: Tensor, *numbers: int) -> tuple[Tensor, Tensor]:
        """Return rows and columns of as many pixels of the output, drawn for a batch, and a run, of these numbers."""
        (height, width), most = output.shape[-2:], self.each(site)
        flat = torch.arange(height * width)
        if len(flat) > most:
            flat = torch.randperm(len(flat), generator=generator_for(self.seed, site.name, *numbers))[:most]
        return flat // width, flat % width


class PatchSums:
    """Means and co-moments of one conv's patches, and with `targets` of its target outputs, in float64.

    Each batch is summed about its own mean, then merged (Chan, Golub and LeVeque, 1983): a large mean cancels nothing.
    """

    def __init__(self, conv: nn.Conv2d, targets: bool = False) -> None:
        outputs, length = conv.out_channels // conv.groups if targets else 0, conv.weight[0].numel()
        zeros = partial(torch.zeros, dtype=torch.float64, device=conv.weight.device)
        self.conv, self.patches = conv, 0
        self._mean_GD, self._gram_GDD = zeros(conv.groups, length), zeros(conv.groups, length, length)
        self._mean_GO, self._cross_GOD = zeros(conv.groups, outputs), zeros(conv.groups, outputs, length)
        self._energy_G = zeros(conv.groups)

    def add(self, patches_GDN: Tensor, targets_GON: Tensor | None = None) -> None:
        """Add N patches, and their target outputs; raise ValueError where they are not finite."""
        number = patches_GDN.shape[2]
        if not number:
            return
        x_GDN, mean_GD, rest_GD = _centred(patches_GDN)
        weight = self.patches * number / (self.patches + number)
        share = number / (self.patches + number)
        step_GD = mean_GD - self._mean_GD
        # The Gram matrix is symmetric: we leave out what is right of the blocks on its diagonal.
        for start in range(0, x_GDN.shape[1], _BLOCK):
            end = start + _BLOCK
            block = (x_GDN[:, start:end] @ x_GDN[:, :end].mT).to(torch.float64)
            if not bool(torch.isfinite(block).all()):
                raise ValueError("not finite")
            block -= rest_GD[:, start:end, None] * rest_GD[:, None, :end] / number
            block += weight * step_GD[:, start:end, None] * step_GD[:, None, :end]
            self._gram_GDD[:, start:end, :end] += block
        if targets_GON is not None:
            y_GON, mean_GO, rest_GO = _centred(targets_GON)
            step_GO = mean_GO - self._mean_GO
            self._cross_GOD += (y_GON @ x_GDN.mT).to(torch.float64)
            self._cross_GOD -= rest_GO[:, :, None] * rest_GD[:, None, :] / number
            self._cross_GOD += weight * step_GO[:, :, None] * step_GD[:, None, :]
            self._energy_G += y_GON.square().sum((1, 2)).to(torch.float64) - rest_GO.square().sum(1) / number
            self._energy_G += weight * step_GO.square().sum(1)
            self._mean_GO += share * step_GO
        self._mean_GD += share * step_GD
        self.patches += number

    def meet(self, team: Team) -> None:
        """Merge the sums of all processes."""
        if team.size == 1:
            return
        own, self.patches = self.patches, int(team.sum(torch.tensor(self.patches)))
        mean_GD, mean_GO = (team.sum(own * mean) / max(self.patches, 1) for mean in (self._mean_GD, self._mean_GO))
        step_GD, step_GO = self._mean_GD - mean_GD, self._mean_GO - mean_GO
        self._mean_GD, self._mean_GO = mean_GD, mean_GO
        self._gram_GDD = team.sum(self._gram_GDD + own * step_GD[:, :, None] * step_GD[:, None, :])
        if self._cross_GOD.numel():
            self._cross_GOD = team.sum(self._cross_GOD + own * step_GO[:, :, None] * step_GD[:, None, :])
            self._energy_G = team.sum(self._energy_G + own * step_GO.square().sum(1))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean (G, D) and covariance (G, D, D) of the patches, and give up their sums."""
        cov_GDD, self._gram_GDD = self._gram_GDD.div_(self.patches).tril_(), torch.empty(0)
        # Mirrored by blocks: with thousands of channels a whole copy takes gigabytes.
        for start in range(0, cov_GDD.shape[1], _BLOCK):
            columns_GDB = cov_GDD[:, start:, start : start + _BLOCK]
            cov_GDD[:, start : start + _BLOCK, start:] += columns_GDB.tril(-1).mT
        return self._mean_GD, cov_GDD

    def targets(self) -> tuple[Tensor, Tensor]:
        """Return the mean (G, O) of the target outputs, and their covariance (G, O, D) with the patches."""
        return self._mean_GO, self._cross_GOD / self.patches

    def unexplained(self, kernel_GOD: Tensor, cov_GDD: Tensor) -> float:
        """Return the fraction of the targets' variance that a kernel leaves unexplained, corrected for chance."""
        _, cross_GOD = self.targets()
        free = 1 - kernel_GOD.shape[2] / self.patches
        total = float(self._energy_G.sum()) / self.patches
        if free <= 0.5 or total <= 0:
            return 0.0
        explained = ((2 * cross_GOD - kernel_GOD @ cov_GDD) * kernel_GOD).sum()
        return max(0.0, 1 - float(explained) / total) / free


def _centred(values_GCN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return centred values, their mean in float64, and the sum that rounding left; ValueError if not finite."""
    # Products in half precision would overflow, or drown in rounding, before they reach the float64 sums.
    values_GCN = _at_least_float32(values_GCN)
    centre_GC = values_GCN.mean(2)
    if not bool(torch.isfinite(centre_GC).all()):
        raise ValueError("not finite")
    centred_GCN = values_GCN - centre_GC[:, :, None]
    rest_GC = centred_GCN.sum(2).to(torch.float64)
    return centred_GCN, centre_GC.to(torch.float64) + rest_GC / values_GCN.shape[2], rest_GC


def output_kind(model: nn.Module, batches: Batches, classes: int | None = None) -> tuple[OutputKind, str]:
    """Decide whether outputs are scores of classes, of which the user's labelled data may have `classes`; and say why.

    Scores of a trained classifier set one class apart in most images, and add up to about zero, since a softmax ignores
    an offset common to all.
    """
    norms, seen = list[Tensor](), list[Tensor]()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d | nn.LayerNorm)]
    with hooked(model, names, after=lambda *given: norms.append(given[-1])), eval_mode(model), torch.no_grad():
        for _, batch in batches():
            norms.clear()
            output, *others = list_tensors(model(*copied(batch))) or [torch.empty(0)]
            if others or not output.is_floating_point() or output.dim() != 2:
                return "values", "they are not images x classes"
            if output.shape[1] < 2 or any(norm is output for norm in norms):
                return "values", "a single number" if output.shape[1] < 2 else "they are normalised"
            seen.append(output.to(torch.float64))
            if sum(map(len, seen)) >= _JUDGED:
                break
    outputs_NK = torch.cat(seen)
    if _are_probabilities(outputs_NK):
        return "scores", "they are probabilities"
    if outputs_NK.shape[1] == classes:
        return "scores", "there are as many as the data has classes"
    lengths = outputs_NK.norm(dim=1)
    if bool(((lengths - lengths.mean()).abs() < 1e-3 * lengths.mean()).all()):
        return "values", "all have the same length"
    log = F.log_softmax(outputs_NK, 1)
    surest = float(log.exp().max(1).values.mean())
    offset = float(outputs_NK.mean(1).abs().mean() / outputs_NK.std(1).mean().clamp_min(1e-12))
    about = f"a softmax would give {surest:.0%} to the first class on average, and the mean is {offset:.2f} deviations"
    mixed = log.exp().mean(0)
    shared = float(-(mixed * mixed.clamp_min(1e-300).log()).sum()) + float((log.exp() * log).sum(1).mean())
    most = math.log(max(2, min(outputs_NK.shape)))
    return ("scores" if offset < 1 and (surest > 0.5 or shared > 0.5 * most) else "values"), about


def _are_probabilities(outputs_NK: Tensor) -> bool:
    return bool((outputs_NK >= 0).all()) and bool(((outputs_NK.sum(1) - 1).abs() < 1e-3).all())


def gather(
    model: nn.Module, sites: Sequence[Site], images: Images, outputs: OutputKind = "scores", progress: Progress = silent
) -> dict[str, SiteStatistics]:
    """Return the statistics of the sites that run, from all images of all processes; the model is unchanged.

    If the prediction has no gradient at one of the sites, no site has output weights, as they could not be compared.
    One pass over the images gathers the covariances of as many sites as fit into `images.memory_gib`; where there are
    several passes, those of earlier ones wait in temporary files. Raises SourceError, naming the first layer, for
    activations that are not finite.
    """
    groups = within(images.memory_gib * 2**30, sites, lambda site: 8.0 * site.conv.groups * patch_length(site) ** 2)
    found, everywhere, total = dict[str, SiteStatistics](), True, len(groups) * images.count
    for number, group in enumerate(groups):
        step = lambda done, before=number * images.count: progress("calibrating", before + done, total)  # noqa: E731
        gathered, with_gradient = _pass(model, group, images, outputs, step)
        if len(groups) > 1:
            gathered = {name: replace(one, cov_GDD=on_disk(one.cov_GDD)) for name, one in gathered.items()}
        found |= gathered
        everywhere = everywhere and with_gradient
    return found if everywhere else {name: replace(one, weight_GOO=None) for name, one in found.items()}


def _pass(
    model: nn.Module, sites: Sequence[Site], images: Images, outputs: OutputKind, step: Callable[[int], None]
) -> tuple[dict[str, SiteStatistics], bool]:
    """Return the statistics of the sites that run, and whether the prediction has a gradient at all of them."""
    by_name = {site.name: site for site in sites}
    sums = {name: PatchSums(cast(nn.Conv2d, model.get_submodule(name))) for name in by_name}
    shapes = {site.name: (site.conv.groups, site.conv.group_out, site.conv.group_out) for site in sites}
    weights = {name: one.conv.weight.new_zeros(shapes[name], dtype=torch.float64) for name, one in sums.items()}
    gradients = Counter[str]()
    number, done, runs = 0, 0, Counter[str]()  # of the current batch, and how often each conv has run on it

    def see(name: str, seen: Tensor, output: Tensor) -> None:
        if name not in by_name:
            return
        runs[name] += 1
        with torch.no_grad():
            at = images.positions(by_name[name], output, number, runs[name])
            try:
                sums[name].add(patches_of(sums[name].conv, seen.detach(), at))
            except ValueError:
                what = f"the input of {name} is not finite on the calibration images; check the preprocessing"
                raise SourceError(what) from None

        def back(gradient: Tensor) -> None:
            g = _at_least_float32(gradient).unflatten(1, (by_name[name].conv.groups, -1))
            g = g.permute(1, 0, 3, 4, 2).flatten(1, 3)
            weights[name] += (g.mT @ g).to(torch.float64)
            gradients[name] += 1

        if output.requires_grad:
            output.register_hook(back)

    # The model may change what it gets in place, which no leaf allows.
    as_followed = lambda one: one.requires_grad_(True) * 1 if one.is_floating_point() else one  # noqa: E731
    with ExitStack() as frozen, eval_mode(model), torch.enable_grad(), conv_hooks(model, see):
        # No gradients of parameters: we need those of the outputs alone.
        for parameter in model.parameters():
            frozen.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for number, batch in images.batches():
            runs.clear()
            output = model(*map_tensors(copied(batch), as_followed))
            surprise = _surprise(output, outputs, generator_for(images.seed, "labels", number))
            if surprise is not None:
                surprise.backward()
            done += samples_in(batch)
            step(min(images.team.size * done, images.count))
    found, with_gradient = {}, True
    for name, own in sums.items():
        own.meet(images.team)
        if not own.patches:
            continue
        conv, (mean_GD, cov_GDD) = own.conv, own.moments()
        kernel_GOD = conv.weight.detach().to(torch.float64).flatten(1).unflatten(0, (conv.groups, -1))
        target_GO = torch.einsum("god,gd->go", kernel_GOD, mean_GD)
        if conv.bias is not None:
            target_GO = target_GO + conv.bias.detach().to(torch.float64).unflatten(0, (conv.groups, -1))
        weight_GOO = images.team.sum(weights[name]) / images.count
        weight = weight_GOO if torch.isfinite(weight_GOO).all() and weight_GOO.any() else None
        found[name] = SiteStatistics(mean_GD, cov_GDD, kernel_GOD, target_GO, weight, own.patches)
        with_gradient = with_gradient and bool(images.team.sum(torch.tensor(gradients[name])))
    return found, with_gradient


def patch_length(site: Site) -> int:
    return site.conv.group_in * math.prod(site.conv.kernel)


def patches_of(conv: nn.Conv2d, x_NCHW: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """Return the patches (G, D, N) that a conv sees at the given output pixels, in its kernel's order (c, i, j)."""
    spec = read_conv(conv)
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    x_CNHW = F.pad(x_NCHW, spec.pads, mode=mode).transpose(0, 1)
    channels, images = x_CNHW.shape[:2]
    (kh, kw), (dh, dw), (sh, sw) = spec.kernel, spec.dilation, spec.stride
    patches = x_NCHW.new_empty(channels, kh, kw, images, len(at[0]))
    for i in range(kh):
        for j in range(kw):
            patches[:, i, j] = x_CNHW[:, :, at[0] * sh + i * dh, at[1] * sw + j * dw]
    return patches.view(spec.groups, channels // spec.groups * kh * kw, -1)


def outputs_at(y_NCHW: Tensor, groups: int, at: tuple[Tensor, Tensor]) -> Tensor:
    """Return the outputs (G, O, N) at the given pixels, in the order of `patches_of`."""
    taken = y_NCHW.transpose(0, 1)[:, :, at[0], at[1]]
    return taken.reshape(groups, taken.shape[0] // groups, -1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _surprise(output: Any, kind: OutputKind, generator: torch.Generator) -> Tensor | None:
    """Return a scalar whose gradient has the second moment of the Fisher information; None if there is no gradient.

    It is summed over the images. Outputs are taken as normal distributions with the deviation of the output itself, or
    its size where it never varies. Scores of classes (N, classes, ...) mean the same with any number added to all of
    them. Their softmax is so sure of most images that a few would decide all the weights
    (docs/results/calibration-experiments.md).
    """
    tensors = [tensor for tensor in list_tensors(output) if tensor.is_floating_point() and tensor.requires_grad]
    if not tensors:
        return None
    scores = kind == "scores" and len(tensors) == 1 and tensors[0].dim() >= 2 and tensors[0].shape[1] > 1
    parts = []
    for tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
        if scores:
            noise = noise - noise.mean(1, keepdim=True)
            if _are_probabilities(tensor.detach().movedim(1, -1).flatten(0, -2)):
                tensor = tensor.clamp_min(1e-12).log()
        values, deviation = tensor.detach(), tensor.detach().std(correction=0)
        scale = torch.where(deviation > 0, deviation, values.abs().mean())
        parts.append((tensor * noise).sum() / scale.clamp_min(1e-12))
    return torch.stack(parts).sum()


def within(limit: float, sites: Sequence[Site], size_of: Callable[[Site], float]) -> list[list[Site]]:
    """Split sites, in order, into groups whose `size_of` (bytes) adds up to the limit at most, or of a single site."""
    groups, held = list[list[Site]](), 0.0
    for site in sites:
        held += size_of(site)
        if not groups or held > limit:
            groups.append([])
            held = size_of(site)
        groups[-1].append(site)
    return groups


@dataclass(frozen=True)
class StatisticsSummary(Strict):
    """What statistics were made from; `unseen` sites did not run on the images, `outputs` is the kind of outputs."""

    data: str
    images: int
    sha256: str
    seed: int
    model: str
    unseen: tuple[str, ...] = ()
    outputs: str = ""


def images_hash(batches: Batches, team: Team = ALONE) -> str:
    """Return the SHA-256 over the SHA-256 of every image's pixels, as the network gets them, in their order."""
    own = []
    for number, batch in batches():
        rows = itertools.chain.from_iterable(torch.atleast_1d(one) for one in list_tensors(batch))
        own.append((number, b"".join(hashlib.sha256(bytes_of(row)).digest() for row in rows)))
    every = sorted(itertools.chain.from_iterable(team.gather(own)))
    return hashlib.sha256(b"".join(digests for _, digests in every)).hexdigest()


def model_hash(model: nn.Module) -> str:
    """Return the SHA-256 over the keys and values of a state dict."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        digest.update(bytes_of(tensor) if isinstance(tensor, Tensor) else repr(tensor).encode())
    return digest.hexdigest()


def save_statistics(path: Path, found: Mapping[str, SiteStatistics], summary: StatisticsSummary) -> None:
    """Write statistics to a safetensors file."""
    tensors: dict[str, Tensor] = {}
    for name, statistics in found.items():
        known = {key: value for key, value in vars(statistics).items() if value is not None}
        tensors |= {f"{name}/{key}": torch.as_tensor(value).contiguous() for key, value in known.items()}
    header = {**vars(summary), "tensors": tensors_hash(tensors)}
    with whole_file(path) as draft:
        save_file(tensors, draft, metadata={"asymswap-evidence": json.dumps(header)})


def load_statistics(path: Path) -> tuple[dict[str, SiteStatistics], StatisticsSummary]:
    """Read what `save_statistics` wrote; raise SourceError for any other file."""
    try:
        with safetensors.safe_open(path, framework="pt", backend="pread") as file:
            text = (file.metadata() or {}).get("asymswap-evidence")
            if text is None:
                raise SourceError(f"{path} holds no statistics; give as `cache=…` a file that a calibration wrote")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(text)
        if header.pop("tensors", None) != tensors_hash(tensors):
            raise ValueError("its numbers are not those that were written")
        summary = TypeAdapter(StatisticsSummary).validate_json(json.dumps(header))
        names = sorted({key.rpartition("/")[0] for key in tensors})
        return {name: _read_statistics(name, tensors) for name in names}, summary
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = validation_text(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise SourceError(f"cannot read the calibration cache {path}: {reason}") from None


def _read_statistics(name: str, tensors: Mapping[str, Tensor]) -> SiteStatistics:
    """Return the statistics of one site; raise ValueError where their parts do not fit each other."""
    sizes: dict[str, int] = {}  # by the letters in which the names end
    parts: dict[str, Any] = {"weight_GOO": None}
    for key in ("target_GOD", "mean_GD", "cov_GDD", "target_mean_GO", "weight_GOO"):
        tensor, letters = tensors.get(f"{name}/{key}"), key.rpartition("_")[2]
        if tensor is None and key == "weight_GOO":
            continue
        if tensor is None or tensor.dtype != torch.float64 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}/{key} is missing, or is no tensor of finite float64 numbers")
        sizes = sizes or dict(zip(letters, tensor.shape, strict=False))
        if tensor.shape != tuple(sizes.get(letter) for letter in letters):
            raise ValueError(f"{name}/{key} has the shape {tuple(tensor.shape)}, which does not fit the rest")
        parts[key] = tensor
    patches = tensors.get(f"{name}/patches")
    if patches is None or patches.shape != () or patches.dtype != torch.int64 or int(patches) < 1:
        raise ValueError(f"{name}/patches is no number of patches")
    found = SiteStatistics(**parts, patches=int(patches))
    for key, definite in (("cov_GDD", found.ridged()), ("weight_GOO", found.output_weight())):
        moment = parts[key]
        if moment is not None:
            symmetric = torch.allclose(moment, moment.mT, atol=_ASYMMETRY * float(moment.norm()))
            factor, failed = torch.linalg.cholesky_ex(definite)
            if not symmetric or bool(failed.any()) or not bool(factor.isfinite().all()):
                raise ValueError(f"{name}/{key} is not symmetric and positive semidefinite, as second moments are")
    return found
