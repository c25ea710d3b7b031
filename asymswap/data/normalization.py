"""Find out, or check, how images are normalised for a network, by the statistics in its batch norms.

In training a batch norm keeps the mean and the variance of every channel that it gets. So we run a few images through
the network under each usual normalisation, and compare the statistics at its first batch norms with those kept there.
The distance of two channels is the squared Hellinger distance of normal distributions,

    1 - sqrt(2 s t / (s^2 + t^2)) exp(-(m - n)^2 / (4 (s^2 + t^2))),

0 where they agree and 1 where they have nothing in common, so that no single channel decides; the distance of a
normalisation is the mean over channels and over the first batch norms. Measurements: docs/results/normalization.md.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from asymswap.data.datasets import LabelledImages, Part, open_data
from asymswap.errors import SourceError, TraceError, reason_of
from asymswap.models import preprocessing as pre
from asymswap.models.opened import OpenedModel
from asymswap.types import Preprocessing
from asymswap.utils.inputs import output_of
from asymswap.utils.tensors import StopForward, hooked, seeded

_NORMS = 4  # later batch norms say less: differences from the training images add up from layer to layer
_IMAGES, _PIXELS = 64, 2**21  # how much to look at: fewer images if they are large
_ALIKE = 0.02  # two normalisations are alike if their inputs are closer than this, as ImageNet's and CIFAR-10's
_FITS = 0.12  # a normalisation fits up to this distance
_CLEARLY = 2.0  # the best one wins if every other that is not alike is at least this many times farther away
_PRECISELY = 3.0  # of those alike the most usual is taken, unless it is this many times farther away than the best
_WRONG = 0.02  # a given one is wrong if the best is `_PRECISELY` times nearer, and by at least this distance
_OWN = "its own"
_Warnings: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class _Answer:
    """What the batch norms say."""

    distances: Mapping[str, float]  # by normalisation
    alike: frozenset[str] = frozenset()  # those nearly the same as the best, itself included
    silence: str = ""  # why they say nothing


def settle(opened: OpenedModel, reference: str, part: Part, download: bool = False) -> OpenedModel:
    """Return an opened model with its preprocessing settled on the images of a data reference.

    An unknown size is the size of the images, if all have the same; an unknown normalisation is found out from the
    model's batch norms, and a known one is checked against them. Raises SourceError if it cannot be found out,
    TraceError if the model does not run on an image of that size.
    """
    label = opened.reference
    data = open_data(reference, opened.preprocessing, part, download=download, unlabelled=True)
    order = torch.randperm(len(data), generator=seeded(0)).tolist()
    known, warnings = _sized(opened.preprocessing, data, order)
    plain = pre.usual(known.channels)["none"]
    # What was settled when a file was converted holds for what comes after.
    if data.as_they_are and known.normalization_from not in ("given", "file"):
        known = pre.with_normalization(known, plain, "images")
        advice = "give `PreprocessingOptions(normalize=…)` if they are to be normalised"
        warnings = (f"{label} is fed the tensors of {reference} as they are: {advice}", *warnings)
    pixels = pre.with_normalization(known, plain, known.normalization_from)
    # Some data is never cropped.
    data = replace(data, preprocessing=replace(pixels, resize=data.preprocessing.resize and pixels.resize))
    count = max(8, min(_IMAGES, _PIXELS // math.prod(known.size)))
    images = [image for image, _ in itertools.islice(_readable(data.__getitem__, order), count)]
    answer = _ask(opened.model, known, images, label)
    pairs = reference.startswith("pairs:")
    if known.normalization_from == "assumed":
        known, decided = _decide(known, answer, label, reference if pairs else None)
    else:
        decided = _objections(known, answer, label)
    fed = replace(pre.fed(known), distances=answer.distances, own_size=pairs)
    return replace(opened, preprocessing=known, fed=fed, fed_warnings=(*decided, *warnings))


def _readable(read: Callable[[int], Any], order: Sequence[int]) -> Iterator[Any]:
    for index in order:
        with contextlib.suppress(SourceError):
            yield read(index)


def _sized(known: Preprocessing, data: LabelledImages, order: Sequence[int]) -> tuple[Preprocessing, _Warnings]:
    """Return the preprocessing with the size of the input, and a warning if the size is a guess."""
    if known.size_from not in ("assumed", "family"):
        return known, ()
    sizes: Iterator[Any] = map(tuple, map(v2.functional.get_size, _readable(data.picture, order[:_IMAGES])))
    native = next(sizes, None)
    if native is None or any(other != native for other in sizes):
        return known, pre.size_warning(known)
    if known.size_from == "family":
        if 2 * max(native) > min(known.size):
            return known, ()
        size = f"{native[0]}x{native[1]}"
        what = f"the images of {size} are enlarged to {known.describe()}, as networks of this family take them"
        advice = f"give `input_size={known.channels}x{size}` if this one was trained on them as they are"
        return known, (f"{what}: {advice}",)
    sized = replace(known, size=native, resize=None, size_from="images")
    what = f"input {sized.describe()} is the size of the images, for nobody said another"
    return sized, (f"{what}: give `input_size=…` for another",)


def _ask(model: nn.Module, known: Preprocessing, found: Sequence[Tensor], label: str) -> _Answer:
    """Run images (pixels from 0 to 1) through the first batch norms under every usual normalisation, or TraceError."""
    if not found:
        return _Answer({}, silence="no image can be read")
    images, own, candidates = torch.stack(list(found)), pre.name_of(known) or _OWN, pre.usual(known.channels)
    if own == _OWN:
        candidates = {_OWN: pre.Normalization(known.mean, known.std, known.bgr)} | candidates
    try:
        output_of(model, (_normalized(images[:1], candidates[own]),))
        norms = [name for name, module in model.named_modules() if _keeps_statistics(module)]
        if not norms:
            return _Answer({}, silence="it has no batch norm with statistics of its training")
        if known.normalization_from != "assumed":
            near = _distances(model, norms, _normalized(images, candidates[own]))
            if near and max(near) < _WRONG:
                # It fits, so no other one can be better by as much as matters.
                return _Answer({own: round(sum(near) / len(near), 4)}, frozenset({own}))
        seen = {name: _distances(model, norms, _normalized(images, how)) for name, how in candidates.items()}
    except Exception as error:
        # The network's own code may raise anything for an input that it does not take.
        what = f"{label} does not run on images of {known.describe()}: {reason_of(error)}"
        raise TraceError(f"{what}; give another `input_size=…`") from error
    rows = list(zip(*seen.values(), strict=False))
    # A batch norm whose input does not depend on the image says nothing.
    telling = [number for number, row in enumerate(rows) if max(row) - min(row) > 1e-3]
    if not telling:
        return _Answer({}, silence="its batch norms get the same whatever the normalisation")
    distances = {name: round(sum(row[number] for number in telling) / len(telling), 4) for name, row in seen.items()}
    moments = {}
    for name, how in candidates.items():
        inputs = _normalized(images, how).double()
        moments[name] = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3), correction=0) + 1e-9
    best = moments[min(distances, key=distances.__getitem__)]
    alike = (name for name, theirs in moments.items() if float(hellinger(*best, *theirs).mean()) < _ALIKE)
    return _Answer(distances, frozenset(alike))


def _keeps_statistics(module: nn.Module) -> bool:
    """Return whether it is a batch norm, of any class, that has seen training: new ones have mean 0, variance 1."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) or not isinstance(mean, Tensor) or mean.is_meta:
        return False
    return isinstance(variance, Tensor) and bool((mean != 0).any() or (variance != 1).any())


def _distances(model: nn.Module, norms: Sequence[str], images: Tensor) -> list[float]:
    """Return the distances at the first calls of batch norms, in order."""
    calls: list[tuple[Any, Tensor, Tensor]] = []

    def see(name: str, args: Any, _: Any) -> None:
        got = args[0].detach().double() if args[0].device.type == "cpu" else args[0].detach().float()
        every = [dim for dim in range(got.dim()) if dim != 1]
        calls.append((model.get_submodule(name), got.mean(every) * share, got.square().mean(every) * share))
        if len(calls) == _NORMS:
            raise StopForward

    batches, distances = [], []
    with hooked(model, norms, before=see):
        for batch in images.split(max(1, _PIXELS // 8 // images[0, 0].numel())):
            share, calls = len(batch) / len(images), []
            with contextlib.suppress(StopForward):
                output_of(model, (batch,))
            batches.append(calls)
    for column in zip(*batches, strict=False):
        (norm, *_), means, squares = zip(*column, strict=True)
        mean, square, epsilon = sum(means), sum(squares), float(getattr(norm, "eps", 1e-5))
        kept_mean, kept_variance = (t.detach().to(mean) for t in (norm.running_mean, norm.running_var))
        variance = (square - mean.square()).clamp(min=0) + epsilon
        distances.append(float(hellinger(mean, variance, kept_mean, kept_variance.clamp(min=0) + epsilon).mean()))
    return distances


def hellinger(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Return the squared Hellinger distance of normal distributions, element by element."""
    both = variance + other_variance
    overlap = (2 * (variance * other_variance).sqrt() / both).sqrt()
    return 1 - overlap * torch.exp(-((mean - other_mean) ** 2) / (4 * both))


def _normalized(images: Tensor, how: pre.Normalization) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    return ((images.flip(1) if how.bgr else images) - mean) / std


def _decide(known: Preprocessing, answer: _Answer, label: str, pairs: str | None) -> tuple[Preprocessing, _Warnings]:
    """Return the preprocessing with what clearly fits best, and a warning; if nothing, `pairs` stay as they are."""
    distances, doubt = answer.distances, answer.silence
    if not doubt:
        best = min(distances, key=distances.__getitem__)
        nearest = min((name for name in distances if name not in answer.alike), key=distances.__getitem__)
        figures = f"{best} {distances[best]:.3f}, {nearest} {distances[nearest]:.3f}, 0 is best"
        if distances[best] > _FITS:
            doubt = f"the statistics in its batch norms fit none of the usual ones: {figures}"
        elif distances[nearest] < _CLEARLY * distances[best]:
            doubt = f"its batch norms fit two alike: {figures}"
    if doubt and pairs is not None:
        return pre.with_normalization(known, pre.usual(known.channels)["none"], "images"), (
            f"{label} is fed the pixels, 0 to 1, of {pairs} as they are: give `normalize=…` if it takes others",
        )
    if doubt:
        what = f"nobody said how images are normalised for {label}, and it cannot be found out ({doubt})"
        names = ", ".join(list(pre.usual(known.channels))[:3])
        raise SourceError(f"{what}: give `PreprocessingOptions(normalize=…)` ({names} …), or `mean=…` and `std=…`")
    limit = _PRECISELY * distances[best]
    taken = next(name for name in distances if name in answer.alike and distances[name] <= limit)  # the most usual
    settled = pre.with_normalization(known, pre.usual(known.channels)[taken], "asked")
    same = [name for name in distances if name in answer.alike and name != taken]
    nearly = f"; {', '.join(same)} would be nearly the same" if same else ""
    return settled, (
        f"{label} is fed images normalised as {_named(settled)}: nobody said it, but the statistics in its batch norms "
        f"fit (distance {distances[taken]:.3f}, {nearest} {distances[nearest]:.3f}, 0 is best){nearly}; "
        f'`normalize="{taken}"` settles it',
    )


def _objections(known: Preprocessing, answer: _Answer, label: str) -> _Warnings:
    """Return a warning if the batch norms contradict a known normalisation, or cannot confirm a guess."""
    distances, own = answer.distances, pre.name_of(known) or _OWN
    fed_as = f"{label} is fed images normalised as {_named(known)}"
    if not distances:
        what = f"{fed_as}, which is usual in its family, but cannot be checked ({answer.silence})"
        return (f"{what}: give `normalize=…` to settle it",) if known.normalization_from == "family" else ()
    best = min(distances, key=distances.__getitem__)
    beaten = distances[own] >= max(_PRECISELY * distances[best], distances[best] + _WRONG)
    if own in answer.alike or not beaten or distances[best] > _FITS:
        return ()
    origins = {
        "given": "as you gave it",
        "images": "as the tensors are",
        "family": "as is usual in its family",
        "weights": "as its weights say",
    }
    what = f"{fed_as}, {origins.get(known.normalization_from, 'as its file says')}"
    figures = f"distance {distances[best]:.3f} instead of {distances[own]:.3f}, 0 is best"
    fits = f"the statistics in its batch norms fit {best} better ({figures})"
    return (f'{what}, but {fits}: try `normalize="{best}"`',)


def _named(preprocessing: Preprocessing) -> str:
    name = pre.name_of(preprocessing)
    means, stds = (", ".join(f"{value:.4g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return f"{name + ' ' if name else ''}(mean {means}, std {stds})"
