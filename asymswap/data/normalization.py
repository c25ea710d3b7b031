"""What a network is fed where nobody said it: the network itself is asked, by the statistics in its batch norms.

In training a batch norm keeps the mean and the variance of every channel that it gets. Images that are normalised as in
training give the same ones again; normalised otherwise, they do not. So a few images are run through the network under
each usual normalisation, and the statistics at its first batch norms are held against those kept there. The distance of
two channels is the squared Hellinger distance of normal distributions,

    1 - sqrt(2 s t / (s^2 + t^2)) exp(-(m - n)^2 / (4 (s^2 + t^2))),

0 where they agree and 1 where they have nothing in common, so that no single channel decides; that of a normalisation
is the mean over channels and over the first batch norms. docs/preprocessing.md has what was measured.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
"""Later batch norms say less: what the images differ in from those of training adds up from layer to layer."""

_IMAGES = 64
_PIXELS = 2**21
"""Images that are looked at: fewer where they are large."""

_ALIKE = 0.02
"""Two normalisations are alike where the distance of what the network gets is below this: ImageNet's and CIFAR-10's."""

_FITS = 0.12
"""A normalisation fits up to this distance."""

_CLEARLY = 2.0
"""The best one is a clear winner where every other, if it is not alike, is at least so many times farther away."""

_PRECISELY = 3.0
"""Of those that are alike the most usual one is taken, unless it is so many times farther away than the best."""

_WRONG = 0.02
"""What was given is wrong where the best is `_PRECISELY` times nearer, and by at least so much."""


@dataclass(frozen=True)
class Feeding:
    """How images are prepared for a network, settled; the same for a report; and what a reader must know first."""

    preprocessing: Preprocessing
    fed: Fed
    warnings: tuple[str, ...] = ()


def settle(opened: OpenedModel, reference: str, part: Part, download: bool = False) -> tuple[OpenedModel, Feeding]:
    """An opened model with its preprocessing settled on images of a data reference; see `feeding_of`."""
    known = opened.preprocessing
    found = feeding_of(opened.model, known, reference, part, opened.reference, download=download)
    return replace(opened, preprocessing=found.preprocessing), found


def fed_of(feeding: Feeding | None) -> Fed | None:
    """What a model is fed, for its report."""
    return None if feeding is None else feeding.fed


def all_warnings(feedings: Iterable[Feeding | None]) -> tuple[str, ...]:
    """What a reader must know first of all models, once."""
    return tuple(dict.fromkeys(line for one in feedings if one is not None for line in one.warnings))


def feeding_of(
    model: nn.Module, known: Preprocessing, reference: str, part: Part, label: str, *, download: bool = False
) -> Feeding:
    """Settle how the images of a data reference are prepared for a model.

    A size that nobody knows is that of the images, where all have the same; a normalisation that nobody knows is asked
    of the model's batch norms, and one that is known is held against them. Raises SourceError where it cannot be told,
    TraceError where the model does not run on an image of that size.
    """
    data = open_data(reference, known, part, download=download, unlabelled=True)
    assert data.pictures is not None
    chosen = torch.randperm(len(data), generator=seeded(0)).tolist()
    known, warnings = _sized(known, data.pictures, chosen)
    found = _ask(model, known, _sample(reference, known, part, chosen), label)
    settled, told = _decide(known, found, label, reference if _holds_tensors(reference) else None)
    return Feeding(settled, fed(settled, found.distances), (*told, *warnings))


def _holds_tensors(reference: str) -> bool:
    """Whether a data reference is a file: folders and data sets by name hold pictures."""
    return os.path.isfile(reference)  # noqa: PTH113 (never raises)


def _sized(known: Preprocessing, pictures: Pictures, chosen: Sequence[int]) -> tuple[Preprocessing, tuple[str, ...]]:
    """The size of the input, and what to say of it where it is a guess."""
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
    """The (height, width) of the pictures, if those looked at have the same."""
    sizes = set()
    for index in chosen[:_IMAGES]:
        try:
            picture = pictures.picture(index)
        except SourceError:
            continue
        # PIL says width first.
        own = picture.shape[-2:] if isinstance(picture, Tensor) else (picture.height, picture.width)
        sizes.add((int(own[0]), int(own[1])))
        if len(sizes) > 1:
            return None
    return sizes.pop() if sizes else None


def _sample(reference: str, known: Preprocessing, part: Part, chosen: Sequence[int]) -> Tensor | None:
    """Some images of the network's size with pixels from 0 to 1 (N x C x H x W), those that can be read."""
    plain = Normalization((0.0,) * known.channels, (1.0,) * known.channels)
    data = open_data(reference, with_normalization(known, plain, known.normalization_from), part, unlabelled=True)
    height, width = known.size
    wanted, found = max(8, min(_IMAGES, _PIXELS // (height * width))), []
    for index in chosen:
        try:
            found.append(data.images[index][0])
        except SourceError:
            continue
        if len(found) == wanted:
            break
    return torch.stack(found) if found else None


@dataclass(frozen=True)
class _Answer:
    """What the batch norms said: the distance of each normalisation, or why they say nothing."""

    distances: Mapping[str, float]
    alike: Mapping[str, frozenset[str]]
    silence: str = ""


_OWN = "its own"


def _ask(model: nn.Module, known: Preprocessing, images: Tensor | None, label: str) -> _Answer:
    """Run the images through the network's first batch norms under every usual normalisation."""
    if images is None:
        return _Answer({}, {}, "no image can be read")
    norms = [module for module in model.modules() if _keeps_statistics(module)]
    own = name_of(known) or _OWN
    candidates = dict(usual(known.channels))
    if own == _OWN:
        candidates = {own: normalization_of(known), **candidates}
    with _naming_the_input(known, label):
        _run(model, _normalized(images[:1], candidates[own]))
        if not norms:
            return _Answer({}, {}, "it has no batch norm with statistics of its training")
        if known.normalization_from != "assumed":
            found = _distances(model, norms, _normalized(images, candidates[own]))
            if found and max(found) < _WRONG:
                # It fits, so that no other one can be better by as much as matters.
                return _Answer({own: round(sum(found) / len(found), 4)}, {own: frozenset({own})})
        elif own == _OWN:
            del candidates[own]
        seen = {name: _distances(model, norms, _normalized(images, how)) for name, how in candidates.items()}
    rows = list(zip(*seen.values(), strict=False))
    # A batch norm to which the image does not matter says nothing.
    telling = [number for number, row in enumerate(rows) if max(row) - min(row) > 1e-3]
    if not telling:
        return _Answer({}, {}, "its batch norms get the same whatever the normalisation")
    distances = {name: sum(row[number] for number in telling) / len(telling) for name, row in seen.items()}
    return _Answer({name: round(value, 4) for name, value in distances.items()}, _alike(images, candidates))


@contextlib.contextmanager
def _naming_the_input(known: Preprocessing, label: str) -> Iterator[None]:
    """Raise TraceError, which names the option, where a network does not run on images of a size."""
    try:
        yield
    except Exception as error:
        # Whatever the network says about an input that it does not take is its own.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TraceError(
            f"{label} does not run on images of {known.describe()}: {reason}; give another --input"
        ) from error


def _run(model: nn.Module, images: Tensor) -> None:
    device, dtype = placement(model)
    with eval_mode(model), torch.no_grad():
        model(images.to(device, dtype))


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether it is a batch norm (of whatever class) that has seen training: untrained ones keep mean 0, variance 1."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not (isinstance(mean, Tensor) and isinstance(variance, Tensor)) or mean.is_meta:
        return False
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return bool((mean != 0).any() or (variance != 1).any())


class _EnoughError(Exception):
    """The forward pass has come as far as is needed."""


def _distances(model: nn.Module, norms: Sequence[nn.Module], images: Tensor) -> list[float]:
    """The distances of the first calls of batch norms, in order."""
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
    return [_distance(module, mean, square - mean.square()) for module, (mean, square) in sums]


def _distance(module: Any, mean: Tensor, variance: Tensor) -> float:
    epsilon = float(getattr(module, "eps", 1e-5))
    kept = [t.detach().to(mean) for t in (module.running_mean, module.running_var)]
    return float(hellinger(mean, variance.clamp(min=0) + epsilon, kept[0], kept[1].clamp(min=0) + epsilon).mean())


def hellinger(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """The squared Hellinger distance of normal distributions, element by element, between 0 and 1."""
    both = variance + other_variance
    overlap = (2 * (variance * other_variance).sqrt() / both).sqrt()
    return 1 - overlap * torch.exp(-((mean - other_mean) ** 2) / (4 * both))


def _normalized(images: Tensor, how: Normalization) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    return ((images.flip(1) if how.bgr else images) - mean) / std


def _alike(images: Tensor, candidates: Mapping[str, Normalization]) -> dict[str, frozenset[str]]:
    """For each normalisation those that give the network nearly the same."""
    moments = {}
    for name, how in candidates.items():
        inputs = _normalized(images, how).double()
        moments[name] = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3), correction=0) + 1e-9
    return {
        one: frozenset(other for other, theirs in moments.items() if float(hellinger(*own, *theirs).mean()) < _ALIKE)
        for one, own in moments.items()
    }


def _decide(
    known: Preprocessing, answer: _Answer, label: str, tensors: str | None
) -> tuple[Preprocessing, tuple[str, ...]]:
    """The normalisation to take, and what to say first.

    Tensors are what their maker feeds his network, so that they are taken as they are where nobody says otherwise;
    `tensors` names the data if it holds some.
    """
    if known.normalization_from == "assumed":
        try:
            return _taken(known, answer, label)
        except SourceError:
            if tensors is None:
                raise
        plain = Normalization((0.0,) * known.channels, (1.0,) * known.channels)
        return with_normalization(known, plain, "images"), (
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
    told = {"given": "as you gave it", "family": "as is usual in its family", "weights": "as its weights say"}
    origin = told.get(known.normalization_from, "as its file says")
    return known, (
        f"{label} is fed images normalised as {_named(known)}, {origin}, but the statistics in its batch norms fit "
        f"{best} better (distance {distances[best]:.3f} instead of {distances[own]:.3f}, 0 is best): try --normalize "
        f"{best}",
    )


def _taken(known: Preprocessing, answer: _Answer, label: str) -> tuple[Preprocessing, tuple[str, ...]]:
    """The normalisation that clearly fits best; raises SourceError where none does."""
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
