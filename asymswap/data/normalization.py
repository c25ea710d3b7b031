"""Find out, or check, how images are normalised for a network, by the statistics in its batch norms.

In training a batch norm keeps the mean and the variance of every channel that it gets. Images normalised as in training
give the same statistics again; normalised otherwise, they do not. So we run a few images through the network under each
usual normalisation, and compare the statistics at its first batch norms with those kept there. The distance of two
channels is the squared Hellinger distance of normal distributions,

    1 - sqrt(2 s t / (s^2 + t^2)) exp(-(m - n)^2 / (4 (s^2 + t^2))),

0 where they agree and 1 where they have nothing in common, so that no single channel decides; that of a normalisation
is the mean over channels and over the first batch norms. docs/results/normalization.md has measurements.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from asymswap.data.datasets import Part, open_data
from asymswap.data.images import Pictures
from asymswap.data.predict import placement
from asymswap.errors import SourceError, TraceError
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import (
    Normalization,
    fed,
    name_of,
    normalization_of,
    size_warning,
    usual,
    with_normalization,
)
from asymswap.types import Fed, Preprocessing, Size
from asymswap.utils.tensors import eval_mode, seeded

_NORMS = 4
"""Later batch norms say less: differences from the training images add up from layer to layer."""

_IMAGES = 64
_PIXELS = 2**21
"""Images to look at: fewer where they are large."""

_ALIKE = 0.02
"""Two normalisations are alike if the distance of their inputs is below this, as ImageNet's and CIFAR-10's."""

_FITS = 0.12
"""A normalisation fits up to this distance."""

_CLEARLY = 2.0
"""The best one wins clearly if every other that is not alike is at least so many times farther away."""

_PRECISELY = 3.0
"""Of those that are alike the most usual one is taken, unless it is so many times farther away than the best."""

_WRONG = 0.02
"""A given normalisation is wrong if the best is `_PRECISELY` times nearer, and by at least so much."""


@dataclass(frozen=True)
class Feeding:
    """How images are prepared for a network, the same for a report, and warnings for its first lines."""

    preprocessing: Preprocessing
    fed: Fed
    warnings: tuple[str, ...] = ()


def settle(opened: OpenedModel, reference: str, part: Part, download: bool = False) -> tuple[OpenedModel, Feeding]:
    """Return an opened model with its preprocessing settled on images of a data reference; see `feeding_of`."""
    known = opened.preprocessing
    found = feeding_of(opened.model, known, reference, part, opened.reference, download=download)
    return replace(opened, preprocessing=found.preprocessing), found


def fed_of(feeding: Feeding | None) -> Fed | None:
    """Return the preprocessing for a model's report."""
    return None if feeding is None else feeding.fed


def all_warnings(feedings: Iterable[Feeding | None]) -> tuple[str, ...]:
    """Return the warnings of all models, each once."""
    return tuple(dict.fromkeys(line for one in feedings if one is not None for line in one.warnings))


def feeding_of(
    model: nn.Module, known: Preprocessing, reference: str, part: Part, label: str, *, download: bool = False
) -> Feeding:
    """Settle how the images of a data reference are prepared for a model.

    An unknown size is that of the images, if all have the same; an unknown normalisation is found out from the model's
    batch norms, and a known one is checked against them. Raises SourceError where it cannot be found out, TraceError
    where the model does not run on an image of that size.
    """
    data = open_data(reference, known, part, download=download, unlabelled=True)
    assert data.pictures is not None
    chosen = torch.randperm(len(data), generator=seeded(0)).tolist()
    known, warnings = _sized(known, data.pictures, chosen)
    found = _ask(model, known, _sample(reference, known, part, chosen), label)
    settled, decided = _decide(known, found, label, reference if _holds_tensors(reference) else None)
    return Feeding(settled, fed(settled, found.distances), (*decided, *warnings))


def _holds_tensors(reference: str) -> bool:
    """True if a data reference is a file: folders and data sets by name hold pictures."""
    return os.path.isfile(reference)  # noqa: PTH113 (never raises)


def _sized(known: Preprocessing, pictures: Pictures, chosen: Sequence[int]) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the preprocessing with the size of the input, and a warning where the size is a guess."""
    if known.size_from not in ("assumed", "family"):
        return known, ()
    native = _common_size(pictures, chosen)
    if known.size_from == "family":
        if native is None or not 2 * max(native) <= min(known.size):
            return known, ()
        own = f"{known.channels}x{native[0]}x{native[1]}"
        return known, (
            f"the images of {native[0]}x{native[1]} are enlarged to {known.describe()}, as networks of this family take"
            f" them: give --input {own} if this one was trained on them as they are",
        )
    if native is None:
        return known, size_warning(known)
    sized = replace(known, size=native, resize=None, size_from="images")
    return sized, (
        f"input {sized.describe()} is the size of the images, for nobody said another: give --input if the network "
        "takes one",
    )


def _common_size(pictures: Pictures, chosen: Sequence[int]) -> Size | None:
    """Return the (height, width) of the pictures, if those looked at all have the same."""
    sizes = set()
    for index in chosen[:_IMAGES]:
        with contextlib.suppress(SourceError):
            picture = pictures.picture(index)
            # PIL says width first.
            own = picture.shape[-2:] if isinstance(picture, Tensor) else (picture.height, picture.width)
            sizes.add((int(own[0]), int(own[1])))
        if len(sizes) > 1:
            return None
    return sizes.pop() if sizes else None


def _sample(reference: str, known: Preprocessing, part: Part, chosen: Sequence[int]) -> Tensor | None:
    """Return some readable images of the network's size with pixels from 0 to 1 (N x C x H x W)."""
    unnormalized = with_normalization(known, _none(known.channels), known.normalization_from)
    data = open_data(reference, unnormalized, part, unlabelled=True)
    height, width = known.size
    count, found = max(8, min(_IMAGES, _PIXELS // (height * width))), []
    for index in chosen:
        with contextlib.suppress(SourceError):
            found.append(data.images[index][0])
        if len(found) == count:
            break
    return torch.stack(found) if found else None


def _none(channels: int) -> Normalization:
    return Normalization((0.0,) * channels, (1.0,) * channels)


@dataclass(frozen=True)
class _Distances:
    """The distance of each normalisation, and those that are alike; or why the batch norms say nothing."""

    distances: Mapping[str, float]
    alike: Mapping[str, frozenset[str]]
    silence: str = ""


_OWN = "its own"


def _ask(model: nn.Module, known: Preprocessing, images: Tensor | None, label: str) -> _Distances:
    """Run the images through the network's first batch norms under every usual normalisation.

    Raises TraceError where the network does not run on images of this size.
    """
    if images is None:
        return _Distances({}, {}, "no image can be read")
    norms = [module for module in model.modules() if _keeps_statistics(module)]
    own = name_of(known) or _OWN
    candidates = dict(usual(known.channels))
    if own == _OWN:
        candidates = {own: normalization_of(known), **candidates}
    try:
        _run(model, _normalized(images[:1], candidates[own]))
        if not norms:
            return _Distances({}, {}, "it has no batch norm with statistics of its training")
        if known.normalization_from != "assumed":
            found = _distances(model, norms, _normalized(images, candidates[own]))
            if found and max(found) < _WRONG:
                # It fits, so that no other one can be better by as much as matters.
                return _Distances({own: round(sum(found) / len(found), 4)}, {own: frozenset({own})})
        elif own == _OWN:
            del candidates[own]
        seen = {name: _distances(model, norms, _normalized(images, how)) for name, how in candidates.items()}
    except Exception as error:
        # The network's own code may raise anything for an input that it does not take.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TraceError(
            f"{label} does not run on images of {known.describe()}: {reason}; give another --input"
        ) from error
    rows = list(zip(*seen.values(), strict=False))
    # A batch norm whose input does not depend on the image says nothing.
    telling = [number for number, row in enumerate(rows) if max(row) - min(row) > 1e-3]
    if not telling:
        return _Distances({}, {}, "its batch norms get the same whatever the normalisation")
    means = {name: sum(row[number] for number in telling) / len(telling) for name, row in seen.items()}
    return _Distances({name: round(value, 4) for name, value in means.items()}, _alike(images, candidates))


def _run(model: nn.Module, images: Tensor) -> None:
    device, dtype = placement(model)
    with eval_mode(model), torch.no_grad():
        model(images.to(device, dtype))


def _keeps_statistics(module: nn.Module) -> bool:
    """True for a batch norm (of whatever class) that has seen training: untrained ones keep mean 0, variance 1."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not (isinstance(mean, Tensor) and isinstance(variance, Tensor)) or mean.is_meta:
        return False
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return bool((mean != 0).any() or (variance != 1).any())


class _EnoughError(Exception):
    """Ends a forward pass after the last batch norm that is needed."""


def _distances(model: nn.Module, norms: Sequence[nn.Module], images: Tensor) -> list[float]:
    """Return the distances at the first calls of batch norms, in order."""
    batches = images.split(max(1, _PIXELS // 8 // images[0, 0].numel()))
    sums: list[tuple[nn.Module, list[Tensor]]] = []
    count = 0

    def see(module: nn.Module, args: Any) -> None:
        nonlocal count
        got = args[0].detach().double() if args[0].device.type == "cpu" else args[0].detach().float()
        every = [dim for dim in range(got.dim()) if dim != 1]
        moments = [got.mean(every), got.square().mean(every)]
        if count == len(sums):
            sums.append((module, [torch.zeros_like(one) for one in moments]))
        for total, one in zip(sums[count][1], moments, strict=True):
            total += one * share
        count += 1
        if count == _NORMS:
            raise _EnoughError

    handles = [module.register_forward_pre_hook(see) for module in norms]
    try:
        for batch in batches:
            share, count = len(batch) / len(images), 0
            with contextlib.suppress(_EnoughError):
                _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    distances = []
    for module, (mean, square) in sums:
        norm: Any = module
        epsilon = float(getattr(norm, "eps", 1e-5))
        kept_mean, kept_variance = (t.detach().to(mean) for t in (norm.running_mean, norm.running_var))
        variance = (square - mean.square()).clamp(min=0) + epsilon
        distances.append(float(hellinger(mean, variance, kept_mean, kept_variance.clamp(min=0) + epsilon).mean()))
    return distances


def hellinger(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Return the squared Hellinger distance of normal distributions, element by element, between 0 and 1."""
    both = variance + other_variance
    overlap = (2 * (variance * other_variance).sqrt() / both).sqrt()
    return 1 - overlap * torch.exp(-((mean - other_mean) ** 2) / (4 * both))


def _normalized(images: Tensor, how: Normalization) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    return ((images.flip(1) if how.bgr else images) - mean) / std


def _alike(images: Tensor, candidates: Mapping[str, Normalization]) -> dict[str, frozenset[str]]:
    """Return for each normalisation those that give the network nearly the same input."""
    moments = {}
    for name, how in candidates.items():
        inputs = _normalized(images, how).double()
        moments[name] = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3), correction=0) + 1e-9
    return {
        one: frozenset(other for other, theirs in moments.items() if float(hellinger(*own, *theirs).mean()) < _ALIKE)
        for one, own in moments.items()
    }


def _decide(
    known: Preprocessing, answer: _Distances, label: str, tensors: str | None
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the preprocessing to use, and warnings.

    Tensors in a file (named by `tensors`) are usually what their maker feeds his network: they are used as they are
    where nobody says otherwise.
    """
    if known.normalization_from == "assumed":
        try:
            return _clear_winner(known, answer, label)
        except SourceError:
            if tensors is None:
                raise
        return with_normalization(known, _none(known.channels), "images"), (
            f"{label} is fed the tensors of {tensors} as they are: give --normalize if the network takes others",
        )
    own = name_of(known) or _OWN
    if not answer.distances:
        if known.normalization_from != "family":
            return known, ()
        return known, (
            f"{label} is fed images normalised as {_named(known)}, which is usual in its family, but cannot be checked "
            f"({answer.silence}): give --normalize to settle it",
        )
    distances = answer.distances
    best = min(distances, key=lambda name: distances[name])
    beaten = distances[own] >= max(_PRECISELY * distances[best], distances[best] + _WRONG)
    if own in answer.alike[best] or not beaten or distances[best] > _FITS:
        return known, ()
    origins = {"given": "as you gave it", "family": "as is usual in its family", "weights": "as its weights say"}
    origin = origins.get(known.normalization_from, "as its file says")
    return known, (
        f"{label} is fed images normalised as {_named(known)}, {origin}, but the statistics in its batch norms fit "
        f"{best} better (distance {distances[best]:.3f} instead of {distances[own]:.3f}, 0 is best): try --normalize "
        f"{best}",
    )


def _clear_winner(known: Preprocessing, answer: _Distances, label: str) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the normalisation that clearly fits best; raise SourceError where none does."""
    distances = answer.distances
    if not distances:
        _cannot_tell(known, label, answer.silence)
    best = min(distances, key=lambda name: distances[name])
    rivals = {name: value for name, value in distances.items() if name not in answer.alike[best]}
    nearest = min(rivals, key=lambda name: rivals[name])
    figures = f"{best} {distances[best]:.3f}, {nearest} {distances[nearest]:.3f}"
    if distances[best] > _FITS:
        _cannot_tell(
            known, label, f"the statistics in its batch norms fit none of the usual ones: {figures}, 0 is best"
        )
    if rivals[nearest] < _CLEARLY * distances[best]:
        _cannot_tell(known, label, f"its batch norms fit two alike: {figures}, 0 is best")
    # The most usual first.
    limit = _PRECISELY * distances[best]
    taken = next(name for name in distances if name in answer.alike[best] and distances[name] <= limit)
    settled = with_normalization(known, usual(known.channels)[taken], "asked")
    same = [name for name in distances if name in answer.alike[best] and name != taken]
    nearly = f"; {', '.join(same)} would be nearly the same" if same else ""
    return settled, (
        f"{label} is fed images normalised as {_named(settled)}: nobody said it, but the statistics in its batch norms "
        f"fit (distance {distances[taken]:.3f}, {nearest} {rivals[nearest]:.3f}, 0 is best){nearly}; --normalize "
        f"{taken} settles it",
    )


def _cannot_tell(known: Preprocessing, label: str, reason: str) -> NoReturn:
    raise SourceError(
        f"nobody said how images are normalised for {label}, and it cannot be told ({reason}): give --normalize "
        f"{', '.join(list(usual(known.channels))[:3])} …, or --mean and --std"
    )


def _named(preprocessing: Preprocessing) -> str:
    name = name_of(preprocessing)
    means, stds = (", ".join(f"{value:.4g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return f"{name + ' ' if name else ''}(mean {means}, std {stds})"
