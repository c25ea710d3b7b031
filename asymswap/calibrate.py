"""Calibration as the user asks for it: images from a data reference, evidence from them or from a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from asymswap.distributed import ALONE, Team
from asymswap.errors import AsymswapError, SourceError
from asymswap.factorize.evidence import Evidence
from asymswap.graph.trace import Trace
from asymswap.inputs import Inputs, probe
from asymswap.opening import Opened
from asymswap.output import check_output
from asymswap.planning.apply import apply_plan
from asymswap.planning.calibration import (
    Batches,
    EvidenceSummary,
    gather,
    images_hash,
    load_evidence,
    model_hash,
    save_evidence,
)
from asymswap.planning.sequential import refinable, refine_
from asymswap.spec import Plan, Preprocessing, Progress, Site, silent
from asymswap.tensors import seeded
from asymswap.training.data import LabelledImages, open_data
from asymswap.training.polish import Polish, Polished, polish_

__all__ = ["Calibration", "Gathered", "Polished", "convert_on", "gather_evidence", "polish", "some_inputs"]

_HELD_BACK = 32


@dataclass(frozen=True)
class Calibration:
    """What the user wants: `data` is a data reference, `evidence` a file to read or, with data, to write.

    `sequential` is None where it is up to us: done where the model traces whole. In a `team` of several processes, each
    looks at its share of the images; all must call alike. `memory_gib` bounds what each keeps of covariances, and of
    activations.
    `polish_steps` or `polish_minutes` let the converted network learn from the original's outputs afterwards, on up to
    `polish_images` images of the same data.
    """

    data: str | None = None
    images: int = 512
    evidence: Path | None = None
    sequential: bool | None = None
    memory_gib: float = 4.0
    seed: int = 0
    polish_steps: int | None = None
    polish_minutes: float | None = None
    polish_images: int = 5000
    team: Team = ALONE

    def __post_init__(self) -> None:
        if self.data is None and self.evidence is None:
            raise AsymswapError("calibration needs --calibrate DATA or an --evidence file that exists")
        if self.images < 1:
            raise AsymswapError(f"--calibration-images {self.images} is no number of images; give 128 to 2048")
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


@dataclass
class Gathered:
    """The evidence of every site, what it was made of, and the images for what comes after.

    `images` is how many the batches of all processes hold; evidence that was read may be of another number.
    """

    by_site: Mapping[str, Evidence]
    summary: EvidenceSummary
    batches: Batches | None = None
    images: int = 0
    held_back: Tensor | None = None
    description: str = ""
    notes: list[str] = field(default_factory=list)


def gather_evidence(
    opened: Opened, sites: Sequence[Site], wanted: Calibration, progress: Progress = silent
) -> Gathered:
    """Evidence of the given sites, from the file where there is one, else from images (and then written to it).

    Raises SourceError where the data or the file cannot be used for this model, OutputError where the file cannot be
    written, before anything is gathered.
    """
    images = None if wanted.data is None else _Images(wanted.data, opened, wanted)
    if wanted.evidence is not None and wanted.evidence.exists():
        found, summary = load_evidence(wanted.evidence)
        if summary.model != model_hash(opened.model):
            raise SourceError(f"the evidence {wanted.evidence} was gathered from another model; give another file name")
        lacking = [site.name for site in sites if site.name not in found]
        if lacking:
            raise SourceError(f"the evidence {wanted.evidence} lacks {lacking[0]}; gather it anew under another name")
        for site in sites:
            conv = site.conv
            shape = (conv.groups, conv.group_out, conv.group_in * math.prod(conv.kernel))
            if found[site.name].target_GOD.shape != shape:
                raise SourceError(f"the evidence {wanted.evidence} does not fit {site.name} ({conv.describe()})")
        gathered = Gathered(found, summary, notes=[f"evidence read from {wanted.evidence}"])
    else:
        if images is None:
            raise SourceError(f"no evidence file {wanted.evidence}; --calibrate DATA gathers and writes it")
        if wanted.evidence is not None:
            target = wanted.evidence
            wanted.team.first(lambda: check_output(target, force=False, option="--evidence"))
        found = gather(
            opened.model,
            sites,
            images.batches,
            images.count,
            memory_gib=wanted.memory_gib,
            seed=wanted.seed,
            team=wanted.team,
            progress=progress,
        )
        digest = images_hash(images.batches, wanted.team)
        summary = EvidenceSummary(str(wanted.data), images.count, digest, wanted.seed, model_hash(opened.model))
        gathered = Gathered(found, summary)
        if wanted.evidence is not None and wanted.team.leads:
            save_evidence(wanted.evidence, found, summary)
    if images is not None:
        gathered.batches, gathered.images, gathered.held_back = images.batches, images.count, images.held_back
        gathered.description = images.description
    gathered.notes += list(_thin(found, sites))
    return gathered


def convert_on(
    opened: Opened,
    traced: Trace,
    plan: Plan,
    gathered: Gathered,
    wanted: Calibration,
    progress: Progress = silent,
) -> tuple[nn.Module, bool]:
    """The converted model, its replacements solved layer by layer where that is wanted and can be; and whether it was.

    Raises AsymswapError where it is wanted and cannot be.
    """
    names = refinable(traced.sites, plan) if _goes_layer_by_layer(traced, gathered, wanted) else set()
    converted = apply_plan(opened.model, plan, progress, gathered.by_site, unset=names)
    if not names or gathered.batches is None:
        return converted, False
    if gathered.images != gathered.summary.images:
        gathered.notes.append(f"solved layer by layer on {gathered.images} images")
    refine_(
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
    return converted, True


def _goes_layer_by_layer(traced: Trace, gathered: Gathered, wanted: Calibration) -> bool:
    if wanted.sequential is False:
        return False
    reason = None
    if gathered.batches is None:
        reason = "the images are not given, only their evidence"
    elif traced.by != "torch.fx":
        reason = f"the model was read by {traced.by}, not as one graph"
    if reason is None:
        return True
    if wanted.sequential:
        raise AsymswapError(f"--sequential cannot be done: {reason}")
    gathered.notes.append(f"not refined layer by layer: {reason}")
    return False


def polish(opened: Opened, converted: nn.Module, wanted: Calibration, progress: Progress = silent) -> Polished:
    """Let the converted network learn, in place, from the original's outputs on images of the calibration data."""
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

    def __init__(self, reference: str, opened: Opened, wanted: Calibration) -> None:
        self.data: LabelledImages = open_data(reference, opened.source.preprocessing, "train", unlabelled=True)
        self.description = self.data.description
        order = torch.randperm(len(self.data), generator=seeded(wanted.seed)).tolist()
        self.count = min(wanted.images, len(order))
        height, width = opened.source.preprocessing.size
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


def _thin(found: Mapping[str, Evidence], sites: Sequence[Site]) -> Iterator[str]:
    """Say where there are too few patches for a covariance, and what is done about it."""
    thin = [site.name for site in sites if found[site.name].patches < 2 * found[site.name].mean_GD.shape[1]]
    if thin:
        one = found[thin[0]]
        yield (
            f"{len(thin)} of {len(sites)} convs saw fewer than two patches per dimension ({thin[0]}: {one.patches} for "
            f"{one.mean_GD.shape[1]}); where the images say nothing a ridge keeps the original kernel; more images help"
        )
