"""Calibration as the user asks for it: images from a data reference, statistics from them or from a file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from asymswap.calibration.gather import (
    Batches,
    OutputKind,
    StatisticsSummary,
    gather,
    images_hash,
    load_statistics,
    model_hash,
    output_kind,
    save_statistics,
)
from asymswap.calibration.polish import Polish, Polished, polish_
from asymswap.calibration.sequential import refinable, refine_
from asymswap.data.datasets import LabelledImages, Part, open_data
from asymswap.errors import AsymswapError, SourceError, check_choice
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.surgery import swap
from asymswap.graph.trace import Trace
from asymswap.models.opened import OpenedModel
from asymswap.planning.apply import apply_plan, apply_structure
from asymswap.types import Plan, Preprocessing, Progress, Site, silent
from asymswap.utils.distributed import ALONE, Team
from asymswap.utils.files import check_output
from asymswap.utils.inputs import Inputs, probe
from asymswap.utils.tensors import eval_mode, seeded, store_

__all__ = [
    "UNSEEN",
    "Calibration",
    "Gathered",
    "Polished",
    "convert_on",
    "fed_on",
    "gather_statistics",
    "in_own_precision",
    "polish",
    "some_inputs",
]

_HELD_BACK = 32

UNSEEN = "did not run on the calibration images"
"""Why a conv is kept of which calibration has learned nothing."""


@dataclass(frozen=True)
class Calibration:
    """What the user wants: `data` is a data reference, `cache` a file of statistics to read or, with
    data, to write.

    `sequential` is None where it is up to us: done where there are images. `outputs` says what the network gives:
    `scores` of classes, or `values` (of a regressor, an embedder, a denoiser); None lets us judge. In a `team` of
    several processes, each looks at its share of the images; all must call alike. `memory_gib` bounds what each keeps
    of covariances, and of activations.
    `polish_steps` or `polish_minutes` let the converted network learn from the original's outputs afterwards, on up to
    `polish_images` images of the same data.
    """

    data: str | None = None
    images: int = 512
    cache: Path | None = None
    sequential: bool | None = None
    memory_gib: float = 4.0
    seed: int = 0
    polish_steps: int | None = None
    polish_minutes: float | None = None
    polish_images: int = 5000
    outputs: OutputKind | None = None
    team: Team = ALONE

    def __post_init__(self) -> None:
        if self.data is None and self.cache is None:
            raise AsymswapError("calibration needs --calibrate DATA or an --calibration-cache file that exists")
        if self.images < 1:
            raise AsymswapError(f"--calibration-images {self.images} is no number of images; give 128 to 2048")
        if self.outputs is not None:
            check_choice("the kind of outputs", self.outputs, get_args(OutputKind))
        polish = (self.polish_steps, self.polish_minutes)
        if None not in polish or any(value is not None and value <= 0 for value in polish):
            raise AsymswapError("polish takes either a number of steps or a number of minutes, above zero")
        if self.polishes and self.data is None:
            raise AsymswapError("--polish needs images: give --calibrate DATA too")
        if self.memory_gib <= 0:
            raise AsymswapError(f"--calibration-memory {self.memory_gib:g} is no amount of memory; give GiB, such as 4")

    @property
    def polishes(self) -> bool:
        """Whether the converted network is to be polished."""
        return self.polish_steps is not None or self.polish_minutes is not None


def fed_on(calibration: Calibration | None, evaluate: str) -> tuple[str, Part]:
    """The data reference, and its part, on whose images it is settled how images are prepared."""
    if calibration is None or calibration.data is None:
        return evaluate, "test"
    return calibration.data, "train"


@dataclass
class Gathered:
    """The statistics of every site, what it was made of, and the images for what comes after.

    `images` is how many the batches of all processes hold; statistics that were read may be of another number. `opened`
    is the model that is solved on: the given one, or a copy of it in float32 where that has half precision.
    """

    by_site: Mapping[str, SiteStatistics]
    summary: StatisticsSummary
    opened: OpenedModel
    batches: Batches | None = None
    images: int = 0
    held_back: Tensor | None = None
    description: str = ""
    notes: list[str] = field(default_factory=list)


def gather_statistics(
    opened: OpenedModel,
    sites: Sequence[Site],
    wanted: Calibration,
    progress: Progress = silent,
    classes: int | None = None,
) -> Gathered:
    """Statistics of the given sites, from the file where there is one, else from images (and then written to it).

    Raises SourceError where the data or the file cannot be used for this model, OutputError where the file cannot be
    written, before anything is gathered. `classes` is how many the data for the evaluation has.
    """
    opened = _in_float32(opened)
    images = None if wanted.data is None else _Images(wanted.data, opened, wanted)
    if wanted.cache is not None and wanted.cache.exists():
        found, summary = load_statistics(wanted.cache)
        if summary.model != model_hash(opened.model):
            raise SourceError(
                f"the calibration cache {wanted.cache} was gathered from another model; give another file name"
            )
        lacking = [site.name for site in sites if site.name not in found and site.name not in summary.unseen]
        if lacking:
            raise SourceError(
                f"the calibration cache {wanted.cache} lacks {lacking[0]}; gather it anew under another name"
            )
        for site in sites:
            if site.name in summary.unseen:
                continue
            conv = site.conv
            shape = (conv.groups, conv.group_out, conv.group_in * math.prod(conv.kernel))
            if found[site.name].target_GOD.shape != shape:
                raise SourceError(f"the calibration cache {wanted.cache} does not fit {site.name} ({conv.describe()})")
        gathered = Gathered(found, summary, opened, notes=[f"statistics read from {wanted.cache}"])
    else:
        if images is None:
            raise SourceError(f"no calibration cache {wanted.cache}; --calibrate DATA gathers and writes it")
        if wanted.cache is not None:
            target = wanted.cache
            wanted.team.first(lambda: check_output(target, force=False, option="--calibration-cache"))
        outputs, why = _outputs(opened, images, wanted, classes)
        found = gather(
            opened.model,
            sites,
            images.batches,
            images.count,
            outputs=outputs,
            memory_gib=wanted.memory_gib,
            seed=wanted.seed,
            team=wanted.team,
            progress=progress,
        )
        digest = images_hash(images.batches, wanted.team)
        summary = StatisticsSummary(
            data=str(wanted.data),
            images=images.count,
            sha256=digest,
            seed=wanted.seed,
            model=model_hash(opened.model),
            unseen=tuple(site.name for site in sites if site.name not in found),
            outputs=f"{'class scores' if outputs == 'scores' else 'values'} ({why})",
        )
        gathered = Gathered(found, summary, opened)
        if wanted.cache is not None and wanted.team.leads:
            save_statistics(wanted.cache, found, summary)
    if images is not None:
        gathered.batches, gathered.images, gathered.held_back = images.batches, images.count, images.held_back
        gathered.description = images.description
    gathered.notes += _notes(summary, found, sites)
    return gathered


def _outputs(opened: OpenedModel, images: _Images, wanted: Calibration, classes: int | None) -> tuple[OutputKind, str]:
    if wanted.outputs is not None:
        return wanted.outputs, "as given"
    kind, why = wanted.team.first(lambda: output_kind(opened.model, images.batches, classes))
    return kind, f"{why}; --outputs {'values' if kind == 'scores' else 'scores'} says otherwise"


_HALF = (torch.float16, torch.bfloat16)


def _in_float32(opened: OpenedModel) -> OpenedModel:
    """The same model with float32 in place of half precision, where it has such and then still runs."""
    if not any(parameter.dtype in _HALF for parameter in opened.model.parameters()):
        return opened
    copied = swap(opened.model, {})
    for tensor in itertools.chain(copied.parameters(), copied.buffers()):
        if tensor.dtype in _HALF:
            tensor.data = tensor.data.to(torch.float32)
    try:
        # The model's own code may insist on its precision: then it is solved as it is.
        with eval_mode(copied), torch.no_grad():
            copied(*probe(opened.preprocessing, torch.float32, images=1))
    except Exception:
        return opened
    return replace(opened, model=copied)


def in_own_precision(opened: OpenedModel, plan: Plan, converted: nn.Module, gathered: Gathered) -> nn.Module:
    """The converted model in the precision of the model that was given, where it was solved in another."""
    if gathered.opened.model is opened.model:
        return converted
    lowered = apply_structure(opened.model, plan)
    own = lowered.state_dict()
    for key, value in converted.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            store_(own[key], value)
        elif isinstance(value, Tensor):
            own[key].copy_(value)
    return lowered


def convert_on(
    traced: Trace,
    plan: Plan,
    gathered: Gathered,
    wanted: Calibration,
    progress: Progress = silent,
) -> tuple[nn.Module, bool]:
    """The converted model, its replacements solved layer by layer where that is wanted and can be; and whether it was.

    It is in the precision of `gathered.opened`. Raises AsymswapError where solving layer by layer is wanted and cannot
    be.
    """
    opened = gathered.opened
    names = refinable(traced.sites, plan) if _goes_layer_by_layer(gathered, wanted) else set()
    converted = apply_plan(opened.model, plan, progress, gathered.by_site, unset=names)
    if not names or gathered.batches is None:
        return converted, False
    if gathered.images != gathered.summary.images:
        gathered.notes.append(f"solved layer by layer on {gathered.images} images")
    refined = refine_(
        opened.model,
        converted,
        traced.sites,
        plan,
        gathered.by_site,
        gathered.batches,
        gathered.images,
        opened.example()[0],
        memory_gib=wanted.memory_gib,
        seed=wanted.seed,
        team=wanted.team,
        progress=progress,
    )
    if not refined.by_graph:
        gathered.notes.append("layer by layer in real forward passes, since no graph of the whole model is what runs")
    if refined.one_pass:
        name, reason = next(iter(refined.one_pass.items()))
        gathered.notes.append(f"{len(refined.one_pass)} of {len(names)} convs solved in one pass ({name}: {reason})")
    return converted, len(refined.one_pass) < len(names)


def _goes_layer_by_layer(gathered: Gathered, wanted: Calibration) -> bool:
    if wanted.sequential is False:
        return False
    if gathered.batches is not None:
        return True
    reason = "the images are not given, only their statistics"
    if wanted.sequential:
        raise AsymswapError(f"--sequential cannot be done: {reason}")
    gathered.notes.append(f"not refined layer by layer: {reason}")
    return False


def polish(gathered: Gathered, converted: nn.Module, wanted: Calibration, progress: Progress = silent) -> Polished:
    """Let the converted network learn, in place, from the original's outputs on images of the calibration data."""
    opened = gathered.opened
    images = _Images(str(wanted.data), opened, replace(wanted, images=wanted.polish_images, team=ALONE))
    every = torch.cat([batch for _, batch in images.batches()])
    how = Polish(wanted.polish_steps, wanted.polish_minutes)
    return polish_(opened.model, converted, every, how, seed=wanted.seed, progress=progress)


def some_inputs(
    reference: str | None, preprocessing: Preprocessing, dtype: torch.dtype, seed: int
) -> tuple[Inputs, str]:
    """Inputs to compare outputs on, and what they are: up to 32 images of a reference's test part, or 8 random ones.

    Raises SourceError for data that cannot be used.
    """
    if reference is None:
        return probe(preprocessing, dtype, images=8, seed=seed), f"8 random images (seed {seed})"
    data = open_data(reference, preprocessing, "test", unlabelled=True)
    order = torch.randperm(len(data), generator=seeded(seed)).tolist()[:_HELD_BACK]
    images = torch.stack([data.images[index][0] for index in order]).to(dtype)
    return (images,), f"{len(images)} images of {reference} (seed {seed})"


class _Images:
    """The chosen images of a data reference, in the same order and batches every time, and some more held back.

    In a team these are the batches that fall to this process.
    """

    def __init__(self, reference: str, opened: OpenedModel, wanted: Calibration) -> None:
        self.data: LabelledImages = open_data(reference, opened.preprocessing, "train", unlabelled=True)
        self.description = self.data.description
        order = torch.randperm(len(self.data), generator=seeded(wanted.seed)).tolist()
        self.count = min(wanted.images, len(order))
        height, width = opened.preprocessing.size
        size = max(4, min(128, 2**20 // (height * width)))
        self._batches = list(wanted.team.share(_batched(order[: self.count], size)))
        self._dtype = opened.dtype()
        # Where all images were asked for, none is left to be held back: the report says which were probed.
        self.held_back = self._load(order[self.count : self.count + _HELD_BACK] or order[:_HELD_BACK])
        small = self.count * self.held_back[0].numel() * 4 < 2**30
        self._kept: dict[int, Tensor] | None = {} if small else None

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """Batches of preprocessed images with their numbers; decoded once where they all fit into a GiB."""
        for number, chosen in self._batches:
            if self._kept is None:
                yield number, self._load(chosen)
                continue
            if number not in self._kept:
                self._kept[number] = self._load(chosen)
            yield number, self._kept[number]

    def _load(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self.data.images[index][0] for index in indices]).to(self._dtype)


def _batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Runs of `size` items, the last of what is left."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _notes(summary: StatisticsSummary, found: Mapping[str, SiteStatistics], sites: Sequence[Site]) -> list[str]:
    """What the statistics was made by, and where the images say little."""
    notes = [f"outputs taken for {summary.outputs}"] if summary.outputs else []
    if summary.unseen:
        number = len(summary.unseen)
        convs = "1 conv did not run on the images and is" if number == 1 else f"{number} convs did not run and are"
        notes.append(f"{convs} kept: {', '.join(summary.unseen[:3])}")
    if found and all(statistics.weight_GOO is None for statistics in found.values()):
        notes.append("the outputs have no gradient (no_grad or argmax): all outputs of a layer count alike")
    seen = [site for site in sites if site.name in found]
    thin = [site.name for site in seen if found[site.name].patches < 2 * found[site.name].mean_GD.shape[1]]
    if thin:
        one = found[thin[0]]
        notes.append(
            f"{len(thin)} of {len(sites)} convs saw fewer than two patches per dimension ({thin[0]}: {one.patches} for "
            f"{one.mean_GD.shape[1]}); where the images say nothing a ridge keeps the original kernel; more images help"
        )
    flat = [site.name for site in seen if site.name not in thin and _hardly_varies(found[site.name])]
    if flat:
        notes.append(
            f"the input of {len(flat)} of {len(sites)} convs hardly varies ({flat[0]}): these images say little of "
            "them, and a ridge keeps the original kernel; give images like those that the network is for"
        )
    return notes


_LOOKED_AT = 256


def _hardly_varies(statistics: SiteStatistics) -> bool:
    """Whether most directions of the patches, of the first ones in each group, have next to no variance."""
    part_GDD = statistics.cov_GDD[:, :_LOOKED_AT, :_LOOKED_AT]
    energy_GD = torch.linalg.eigvalsh(part_GDD)
    largest_G = energy_GD[:, -1:]
    return bool(((energy_GD > 1e-6 * largest_G) & (largest_G > 0)).double().mean() < 0.5)
