"""Evidence of every site from images without labels, in one pass, with memory that does not grow with their number.

While the unconverted model runs, each site's input patches are taken at random positions and their mean and covariance
summed in float64; while the gradient of the network's own prediction runs back, the second moment of each site's output
gradient is summed too. See `asymswap.factorize.evidence` for what these are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import safetensors
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap.distributed import ALONE, Team
from asymswap.errors import SourceError, validation_text
from asymswap.factorize.evidence import Evidence
from asymswap.graph.trace import conv_hooks
from asymswap.output import whole_file
from asymswap.spec import STRICT, Progress, Site, silent
from asymswap.tensors import eval_mode, generator_for, list_tensors

Batches = Callable[[], Iterable[tuple[int, Tensor]]]
"""Makes a fresh iterator over the same batches of images (N, C, H, W) and their numbers at every call.

Several processes have different ones of the batches. What is drawn for a batch depends on its number alone, so that it
does not matter which process it is in.
"""

_POSITIONS = 32
"""Positions of a feature map that are looked at in each image, at least, where it has so many."""

_SAMPLES_PER_DIMENSION = 8
"""Patches, at least, for each row of a covariance, where the images have so many."""


_ASYMMETRY = 1e-5
"""What rounding in float32 may make of a symmetric matrix, relative to its norm."""

_BLOCK = 256
"""Rows of a gram that are multiplied at once."""


class PatchSums:
    """Running sums of one conv's patches, and of their products with the wanted output, in float64.

    The products are there only for a conv whose output is `wanted`.
    """

    def __init__(self, conv: nn.Conv2d, wanted: bool = False) -> None:
        groups, device = conv.groups, conv.weight.device
        outputs, length = conv.out_channels // groups, conv.weight[0].numel()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.patches = 0
        self.sum_GD, self.gram_GDD = zeros(length), zeros(length, length)
        self.sum_GO, self.cross_GOD = (zeros(outputs), zeros(outputs, length)) if wanted else (zeros(0), zeros(0, 0))

    def add(self, patches_GDN: Tensor, wanted_GON: Tensor | None = None) -> None:
        """Add N patches, and the outputs that are wanted of them; raises ValueError where they are not finite."""
        # Products of half precision would overflow, or drown in rounding, before they reach the float64 sums.
        patches_GDN = _at_least_float32(patches_GDN)
        sum_GD = patches_GDN.sum(2)
        if not bool(torch.isfinite(sum_GD).all()):
            raise ValueError("not finite")
        self.patches += patches_GDN.shape[2]
        self.sum_GD += sum_GD
        # The gram is symmetrical: what is right of the blocks on its diagonal is left out.
        for start in range(0, patches_GDN.shape[1], _BLOCK):
            end = start + _BLOCK
            self.gram_GDD[:, start:end, :end] += patches_GDN[:, start:end] @ patches_GDN[:, :end].mT
        if wanted_GON is not None:
            wanted_GON = _at_least_float32(wanted_GON)
            self.sum_GO += wanted_GON.sum(2)
            self.cross_GOD += wanted_GON @ patches_GDN.mT

    def meet(self, team: Team) -> None:
        """Add up what all processes have seen."""
        self.patches = int(team.sum(torch.tensor(self.patches)))
        for name in ("sum_GD", "gram_GDD", "sum_GO", "cross_GOD"):
            setattr(self, name, team.sum(getattr(self, name)))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the patches."""
        mean_GD: Tensor = self.sum_GD / self.patches
        lower_GDD = self.gram_GDD.tril()
        gram_GDD = lower_GDD + lower_GDD.tril(-1).mT
        return mean_GD, gram_GDD / self.patches - mean_GD[:, :, None] * mean_GD[:, None, :]


def gather(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Batches,
    images: int,
    *,
    memory_gib: float = 4.0,
    seed: int = 0,
    team: Team = ALONE,
    progress: Progress = silent,
) -> dict[str, Evidence]:
    """Evidence of the given sites from all batches, which hold `images` images; the model is unchanged.

    In a team each process has its share of the batches and gets the evidence from all of them.

    The covariances of as many sites as fit into `memory_gib` are gathered in one pass over the images. Raises
    SourceError for activations that are not finite, naming the first layer.
    """
    groups = list(_groups(sites, memory_gib * 2**30))
    found: dict[str, Evidence] = {}
    for number, group in enumerate(groups):

        def step(done: int, number: int = number) -> None:
            progress("calibrating", done + number * images, len(groups) * images)

        found |= _pass(model, group, batches, images, seed, team, step)
    return found


def _pass(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Batches,
    images: int,
    seed: int,
    team: Team,
    step: Callable[[int], None],
) -> dict[str, Evidence]:
    convs = {site.name: cast(nn.Conv2d, model.get_submodule(site.name)) for site in sites}
    sums = {name: PatchSums(conv) for name, conv in convs.items()}
    weights = {name: _no_weight(conv) for name, conv in convs.items()}
    positions = {site.name: positions_for(site, images) for site in sites}
    # The number of the batch that is on its way, and how often each conv has run on it.
    number = 0
    runs: Counter[str] = Counter()

    def see(name: str, seen: Tensor, output: Tensor) -> None:
        if name not in convs:
            return
        conv = convs[name]
        runs[name] += 1
        with torch.no_grad():
            generator = generator_for(seed, name, number, runs[name])
            at = choose_positions(output.shape[-2:], positions[name], generator)
            try:
                sums[name].add(patches_of(conv, seen.detach(), at))
            except ValueError:
                advice = "check the preprocessing"
                raise SourceError(f"the input of {name} is not finite on the calibration images; {advice}") from None

        def back(gradient: Tensor) -> None:
            weights[name] += _output_gram(gradient, conv.groups)

        if output.requires_grad:
            output.register_hook(back)

    done = 0
    with eval_mode(model), _frozen(model), conv_hooks(model, see):
        for number, batch in batches():
            runs.clear()
            # A copy that is no leaf: the model may change its input in place.
            output = model(batch.clone().requires_grad_(True) * 1)
            _surprise(output, generator_for(seed, "labels", number)).backward()
            done += len(batch)
            step(min(team.size * done, images))
    for one in sums.values():
        one.meet(team)
    return {name: _evidence(conv, sums[name], team.sum(weights[name]) / images) for name, conv in convs.items()}


def _no_weight(conv: nn.Conv2d) -> Tensor:
    outputs = conv.out_channels // conv.groups
    return torch.zeros(conv.groups, outputs, outputs, dtype=torch.float64, device=conv.weight.device)


def _evidence(conv: nn.Conv2d, sums: PatchSums, weight_GOO: Tensor) -> Evidence:
    mean_GD, cov_GDD = sums.moments()
    kernel_GOD = conv.weight.detach().to(torch.float64).flatten(1).unflatten(0, (conv.groups, -1))
    wanted_GO = torch.einsum("god,gd->go", kernel_GOD, mean_GD)
    if conv.bias is not None:
        wanted_GO = wanted_GO + conv.bias.detach().to(torch.float64).unflatten(0, (conv.groups, -1))
    known = bool(torch.isfinite(weight_GOO).all()) and bool(weight_GOO.any())
    weight = weight_GOO if known else None
    return Evidence(mean_GD, cov_GDD, kernel_GOD, wanted_GO, weight, sums.patches)


def positions_for(site: Site, images: int) -> int:
    """How many positions of an image are looked at: enough for the covariance, and no more."""
    length = site.conv.group_in * math.prod(site.conv.kernel)
    return max(_POSITIONS, math.ceil(_SAMPLES_PER_DIMENSION * length / max(images, 1)))


def choose_positions(size: Sequence[int], most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows and columns of at most so many pixels of a feature map, drawn without repetition."""
    pixels = size[0] * size[1]
    flat = torch.arange(pixels) if pixels <= most else torch.randperm(pixels, generator=generator)[:most]
    return flat // size[1], flat % size[1]


def patches_of(conv: nn.Conv2d, x_NCHW: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """The patches (G, D, N) that a conv sees at the given output pixels, in the order of its kernel (c, i, j)."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x_CNHW = F.pad(x_NCHW, conv._reversed_padding_repeated_twice, mode=mode).transpose(0, 1)
    channels, images = x_CNHW.shape[:2]
    (kh, kw), (dh, dw), (sh, sw) = conv.kernel_size, conv.dilation, conv.stride
    patches = x_NCHW.new_empty(channels, kh, kw, images, len(at[0]))
    for i in range(kh):
        for j in range(kw):
            patches[:, i, j] = x_CNHW[:, :, at[0] * sh + i * dh, at[1] * sw + j * dw]
    return patches.view(conv.groups, channels // conv.groups * kh * kw, -1)


def outputs_at(y_NCHW: Tensor, groups: int, at: tuple[Tensor, Tensor]) -> Tensor:
    """The outputs (G, O, N) at the given pixels, in the order of `patches_of`."""
    taken = y_NCHW.transpose(0, 1)[:, :, at[0], at[1]]
    return taken.reshape(groups, taken.shape[0] // groups, -1)


def _output_gram(gradient_NCHW: Tensor, groups: int) -> Tensor:
    """The second moment of the gradient, summed over images and pixels: (G, O, O)."""
    g = _at_least_float32(gradient_NCHW).unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)
    gram_GOO: Tensor = (g.mT @ g).to(torch.float64)
    return gram_GOO


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _surprise(output: Any, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient has the second moment of the Fisher information, summed over the images.

    Scores of classes (N, classes) stand for a categorical distribution: a label is drawn from it. Any other output
    stands for a normal one of the deviation that the output itself has; or, where it never varies, as a single number
    cannot, of its own size.
    """
    tensors = [tensor for tensor in list_tensors(output) if tensor.is_floating_point() and tensor.requires_grad]
    if not tensors:
        raise SourceError("the model's output has no gradient, so it cannot be calibrated")
    first = tensors[0]
    if len(tensors) == 1 and first.dim() == 2 and first.shape[1] > 1:
        log = F.log_softmax(first.to(torch.float32), 1)
        drawn = torch.multinomial(log.detach().exp(), 1, generator=generator)
        return -log.gather(1, drawn).sum()
    parts = []
    for tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
        values = tensor.detach()
        deviation = values.std(correction=0)
        scale = torch.where(deviation > 0, deviation, values.abs().mean())
        parts.append((tensor * noise).sum() / scale.clamp_min(1e-12))
    return torch.stack(parts).sum()


def _groups(sites: Sequence[Site], limit: float) -> Iterator[list[Site]]:
    """Sites in runs whose covariances fit into the limit, one at a time at least."""
    group: list[Site] = []
    held = 0.0
    for site in sites:
        length = site.conv.group_in * math.prod(site.conv.kernel)
        size = 8.0 * site.conv.groups * length**2
        if group and held + size > limit:
            yield group
            group, held = [], 0.0
        group.append(site)
        held += size
    if group:
        yield group


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters for a while: only those of the outputs are wanted."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class EvidenceSummary:
    """What evidence was made of, so that it can be made again: the data, how many images, their hash, and the seed."""

    __pydantic_config__: ClassVar = STRICT

    data: str
    images: int
    sha256: str
    seed: int
    model: str


_SUMMARY = TypeAdapter(EvidenceSummary)


def images_hash(batches: Batches, team: Team = ALONE) -> str:
    """SHA-256 over the SHA-256 of every image's pixels, as the network sees them, in their order."""
    own = [(number, [hashlib.sha256(_bytes(image)).digest() for image in batch]) for number, batch in batches()]
    every = sorted(itertools.chain.from_iterable(team.gather(own)))
    return hashlib.sha256(b"".join(itertools.chain.from_iterable(digests for _, digests in every))).hexdigest()


def model_hash(model: nn.Module) -> str:
    """SHA-256 over the keys and values of a state dict."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def save_evidence(path: Path, found: Mapping[str, Evidence], summary: EvidenceSummary) -> None:
    """Write evidence to a safetensors file."""
    tensors: dict[str, Tensor] = {}
    for name, evidence in found.items():
        parts = {key: value for key, value in vars(evidence).items() if isinstance(value, Tensor)}
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in parts.items()}
        tensors[f"{name}/patches"] = torch.tensor(evidence.patches)
    told = {**vars(summary), "tensors": _tensors_hash(tensors)}
    with whole_file(path) as draft:
        save_file(tensors, draft, metadata={"asymswap-evidence": json.dumps(told)})


def _tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values: a flipped bit of a covariance would show nowhere else."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(_bytes(tensors[key]))
    return digest.hexdigest()


def load_evidence(path: Path) -> tuple[dict[str, Evidence], EvidenceSummary]:
    """Read what `save_evidence` wrote; raises SourceError for any other file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("asymswap-evidence")
            if text is None:
                raise SourceError(f"{path} holds no evidence; --evidence names a file that a calibration wrote")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        told = json.loads(text)
        if told.pop("tensors", None) != _tensors_hash(tensors):
            raise ValueError("its numbers are not those that were written")
        summary = _SUMMARY.validate_json(json.dumps(told))
        names = sorted({key.rpartition("/")[0] for key in tensors})
        return {name: _read_evidence(name, tensors) for name in names}, summary
    except ValidationError as error:
        raise SourceError(f"cannot read the evidence {path}: {validation_text(error)}") from None
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SourceError(f"cannot read the evidence {path}: {' '.join(str(error).split())}") from None


def _read_evidence(name: str, tensors: Mapping[str, Tensor]) -> Evidence:
    """The evidence of one site; raises ValueError where its parts do not fit each other."""

    def part(key: str, *shape: int) -> Tensor:
        tensor = tensors.get(f"{name}/{key}")
        if tensor is None or tensor.dtype != torch.float64 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}/{key} is missing, or is no tensor of finite float64 numbers")
        if tensor.shape != shape if shape else tensor.dim() != 3:
            raise ValueError(f"{name}/{key} has the shape {tuple(tensor.shape)}, which does not fit the rest")
        return tensor

    target_GOD = part("target_GOD")
    groups, outputs, length = target_GOD.shape
    patches = tensors.get(f"{name}/patches")
    if patches is None or patches.shape != () or patches.dtype != torch.int64 or int(patches) < 1:
        raise ValueError(f"{name}/patches is no number of patches")
    found = Evidence(
        mean_GD=part("mean_GD", groups, length),
        cov_GDD=part("cov_GDD", groups, length, length),
        target_GOD=target_GOD,
        target_mean_GO=part("target_mean_GO", groups, outputs),
        weight_GOO=part("weight_GOO", groups, outputs, outputs) if f"{name}/weight_GOO" in tensors else None,
        patches=int(patches),
    )
    _check_moment(f"{name}/cov_GDD", found.cov_GDD, found.ridged())
    if found.weight_GOO is not None:
        _check_moment(f"{name}/weight_GOO", found.weight_GOO, found.output_weight())
    return found


def _check_moment(name: str, matrix: Tensor, definite: Tensor) -> None:
    """Raise ValueError where a matrix is no second moment: `definite` is what is factorised of it."""
    symmetric = torch.allclose(matrix, matrix.mT, atol=_ASYMMETRY * float(matrix.norm()))
    factor, failed = torch.linalg.cholesky_ex(definite)
    if not symmetric or bool(failed.any()) or not bool(factor.isfinite().all()):
        raise ValueError(f"{name} is not symmetric and positive semidefinite, as every second moment is")
