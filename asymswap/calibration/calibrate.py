"""Calibration of a model: images from a data reference, statistics from them or from a file."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from asymswap.calibration import gather
from asymswap.calibration.config import Calibration
from asymswap.calibration.gather import Images, StatisticsSummary
from asymswap.calibration.polish import Polished, polish_
from asymswap.calibration.sequential import refinable, refine_
from asymswap.data.datasets import open_data
from asymswap.data.inputs import Batches, open_inputs, settle_on
from asymswap.errors import AsymswapError, SourceError
from asymswap.factorize.statistics import SiteStatistics
from asymswap.graph.surgery import swap
from asymswap.graph.trace import Trace
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import PreprocessingOptions
from asymswap.planning.apply import apply_plan
from asymswap.types import Plan, Progress, Site, UserData, silent
from asymswap.utils.distributed import ALONE
from asymswap.utils.files import check_output
from asymswap.utils.inputs import Inputs, output_of, samples_in
from asymswap.utils.tensors import device_of, seeded, store_

PROBED = 32  # samples on which outputs are compared layer by layer, at most
UNSEEN = "did not run on the calibration images"  # why a conv without statistics is kept
_HALF = (torch.float16, torch.bfloat16)


def options_of(given: PreprocessingOptions | None, calibration: Calibration | None) -> PreprocessingOptions | None:
    """Return the user's preprocessing, given to the verb or to its calibration."""
    own = None if calibration is None else calibration.preprocessing
    if None not in (own, given) and own != given:
        raise AsymswapError("`preprocessing=…` of the verb and of its Calibration contradict each other; give one")
    return given or own


def settle_for(opened: OpenedModel, calibration: Calibration | None, evaluate: Any) -> OpenedModel:
    """Return an opened model with its preprocessing settled on what it is calibrated on, or else evaluated on."""
    if calibration is not None and calibration.data is not None:
        return settle_on(opened, calibration.given())
    return settle_on(opened, UserData(evaluate), "test") if isinstance(evaluate, str) else opened


@dataclass
class Gathered:
    """The statistics of every site, how they were made, and the images for later steps, maybe of other data."""

    by_site: Mapping[str, SiteStatistics]
    summary: StatisticsSummary
    opened: OpenedModel  # to solve on: the given model, or a copy in float32 if it has half precision
    images: Images | None = None
    held_back: Batches | None = None
    notes: list[str] = field(default_factory=list)


def gather_statistics(
    opened: OpenedModel, sites: Sequence[Site], calibration: Calibration, progress: Progress, classes: int | None
) -> Gathered:
    """Return the statistics of the given sites, from the cache if it exists, else from images (and then cache them).

    Raises SourceError for data or a file that cannot be used for this model, and, before anything is gathered,
    OutputError for a file that cannot be written. `classes` is the number of classes of the data for the evaluation.
    """
    opened = _in_float32(opened)
    cache, team, notes = calibration.cache, calibration.team, list[str]()
    images, held_back = (None, None) if calibration.data is None else _open_images(opened, calibration)
    if cache is not None and cache.exists():
        found, summary = gather.load_statistics(cache)
        if summary.model != gather.model_hash(opened.model):
            raise SourceError(f"the calibration cache {cache} was gathered from another model; give another file name")
        for site in (site for site in sites if site.name not in summary.unseen):
            if site.name not in found:
                raise SourceError(f"the calibration cache {cache} lacks {site.name}; give another file name")
            if found[site.name].target_GOD.shape != (site.conv.groups, site.conv.group_out, gather.patch_length(site)):
                raise SourceError(f"the calibration cache {cache} does not fit {site.name} ({site.conv.describe()})")
        notes.append(f"statistics read from {cache}")
    else:
        if images is None or held_back is None:
            raise SourceError(f"no calibration cache {cache}; `data=…` gathers and writes it")
        batches, given = images.batches, calibration.given()
        if cache is not None:
            team.first(lambda: check_output(cache, force=False))
        if calibration.outputs is not None:
            outputs, why = calibration.outputs, "as given"
        else:
            outputs, why = team.first(lambda: gather.output_kind(opened.model, batches, classes))
            why += f"; `outputs={'values' if outputs == 'scores' else 'scores'}` says otherwise"
        found = gather.gather(opened.model, sites, images, outputs, progress)
        summary = StatisticsSummary(
            data=held_back.description if given.reference is None else f"{given.reference}{given.patches}",
            images=images.count,
            sha256=gather.images_hash(batches, team),
            seed=calibration.seed,
            model=gather.model_hash(opened.model),
            unseen=tuple(site.name for site in sites if site.name not in found),
            outputs=f"{'class scores' if outputs == 'scores' else 'values'} ({why})",
        )
        if cache is not None and team.leads:
            gather.save_statistics(cache, found, summary)
    notes += _notes(summary, found, sites)
    if device_of(opened.model).type != "cpu":
        notes.append(f"computed on {device_of(opened.model)}")
    if held_back is not None and held_back.shared:
        notes.append("too few samples to hold any back: the agreement is on those calibrated on; give more")
    return Gathered(found, summary, opened, images, held_back, notes)


def _in_float32(opened: OpenedModel) -> OpenedModel:
    """Return the model with float32 in place of half precision, if it has any and still runs."""
    if not any(parameter.dtype in _HALF for parameter in opened.model.parameters()):
        return opened
    copied = swap(opened.model, {})
    for tensor in (one for one in itertools.chain(copied.parameters(), copied.buffers()) if one.dtype in _HALF):
        tensor.data = tensor.data.to(torch.float32)
    try:
        # The model's own code may insist on its precision: then we solve in that.
        output_of(copied, opened.probe(1))
    except Exception:
        return opened
    return replace(opened, model=copied)


def in_own_precision(opened: OpenedModel, plan: Plan, converted: nn.Module, gathered: Gathered) -> nn.Module:
    """Return the converted model in the precision of the given model."""
    if gathered.opened.model is opened.model:
        return converted
    lowered = apply_plan(opened.model, plan, weights="unset")
    own = lowered.state_dict()
    for key, value in converted.state_dict().items():
        if isinstance(value, Tensor):
            (store_ if value.is_floating_point() else Tensor.copy_)(own[key], value)
    return lowered


def convert_on(
    traced: Trace, plan: Plan, gathered: Gathered, calibration: Calibration, progress: Progress = silent
) -> tuple[nn.Module, bool]:
    """Return the converted model, in the precision of `gathered.opened`, and True if it was solved layer by layer."""
    opened, images, notes, by_site = gathered.opened, gathered.images, gathered.notes, gathered.by_site
    if images is None and calibration.sequential is not False:
        reason = "the images are not given, only their statistics"
        if calibration.sequential:
            raise AsymswapError(f"`sequential=True` is not possible: {reason}")
        notes.append(f"not refined layer by layer: {reason}")
    names = set() if images is None or calibration.sequential is False else refinable(traced.sites, plan)
    converted = apply_plan(opened.model, plan, progress, by_site, unset=names)
    if not names or images is None:
        return converted, False
    if images.count != gathered.summary.images:
        notes.append(f"solved layer by layer on {images.count} images")
    refined = refine_(opened.model, converted, traced.sites, plan, by_site, images, opened.example(), progress)
    if not refined.by_graph:
        notes.append("layer by layer in real forward passes, since no graph of the whole model is what runs")
    if refined.one_pass:
        name, reason = next(iter(refined.one_pass.items()))
        notes.append(f"{len(refined.one_pass)} of {len(names)} convs solved in one pass ({name}: {reason})")
    return converted, len(refined.one_pass) < len(names)


def polish(
    gathered: Gathered, converted: nn.Module, plan: Plan, calibration: Calibration, progress: Progress = silent
) -> Polished:
    """Train a network converted by a plan, in place, on the original's outputs on images of the calibration data."""
    chosen = replace(calibration, images=calibration.polish_images, team=ALONE)
    images = [batch for _, batch in _open_images(gathered.opened, chosen)[0].batches()]
    return polish_(gathered.opened.model, converted, images, calibration, progress, plan)


def some_inputs(reference: str | None, opened: OpenedModel, seed: int, images: int = 8) -> tuple[Inputs, str]:
    """Return inputs to compare outputs on, and a description: up to 32 images of the test part, or random ones."""
    if reference is None:
        inputs = opened.probe(images, seed)
        about = f"{samples_in(inputs)} random images (seed {seed})"
        return inputs, about if opened.example_inputs is None else "the example"
    data = open_data(reference, opened.preprocessing, "test", unlabelled=True)
    order = torch.randperm(len(data), generator=seeded(seed)).tolist()[:PROBED]
    images_NCHW = torch.stack([data[index][0] for index in order]).to(opened.dtype())
    return (images_NCHW,), f"{len(images_NCHW)} images of {reference} (seed {seed})"


def _open_images(opened: OpenedModel, calibration: Calibration) -> tuple[Images, Batches]:
    """Return this process's share of the chosen batches, and those held back."""
    memory_gib, seed, team = calibration.memory_gib, calibration.seed, calibration.team
    chosen, held_back = open_inputs(opened, calibration.given(), calibration.images, seed, memory_gib)
    batches = lambda: ((number, chosen.load(number)) for number, _ in team.share(chosen.counts))  # noqa: E731
    return Images(batches, chosen.count, memory_gib, seed, team), held_back


def _notes(summary: StatisticsSummary, found: Mapping[str, SiteStatistics], sites: Sequence[Site]) -> list[str]:
    """Return notes on how the statistics were made, and where the images say little."""
    notes = [f"outputs taken for {summary.outputs}"] if summary.outputs else []
    if number := len(summary.unseen):
        convs = "1 conv did not run on the images and is" if number == 1 else f"{number} convs did not run and are"
        notes.append(f"{convs} kept: {', '.join(summary.unseen[:3])}")
    if found and all(statistics.weight_GOO is None for statistics in found.values()):
        notes.append("the outputs have no gradient (no_grad or argmax): all outputs of a layer count the same")
    seen = [site for site in sites if site.name in found]
    thin = [site.name for site in seen if found[site.name].patches < 2 * found[site.name].mean_GD.shape[1]]
    if thin:
        one = found[thin[0]]
        notes.append(
            f"{len(thin)} of {len(sites)} convs saw fewer than two patches per dimension ({thin[0]}: {one.patches} for "
            f"{one.mean_GD.shape[1]}); where the images say nothing a ridge keeps the original kernel; more images help"
        )
    flat = []  # where most directions of the patches, of the first 256 dimensions, have next to no variance
    for name in (site.name for site in seen if site.name not in thin):
        energy_GD = torch.linalg.eigvalsh(found[name].cov_GDD[:, :256, :256])
        if ((energy_GD > 1e-6 * energy_GD[:, -1:]) & (energy_GD[:, -1:] > 0)).double().mean() < 0.5:
            flat.append(name)
    if flat:
        notes.append(
            f"the input of {len(flat)} of {len(sites)} convs hardly varies ({flat[0]}), so a ridge keeps the original "
            "kernel; give images like those that the network is for"
        )
    return notes
