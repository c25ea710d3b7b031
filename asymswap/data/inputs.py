"""Inputs without labels, from whatever a user has: a data reference, tensors, a Dataset, batches of their own.

What is held back is chosen first, and never depends on how many others are wanted: so every verb that is given the same
data compares outputs on the same held-back inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from asymswap.data import arrays
from asymswap.data.datasets import LabelledImages, open_data, patches_from
from asymswap.data.normalization import settle
from asymswap.data.references import TENSORS
from asymswap.errors import SourceError, call
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import with_size
from asymswap.types import Patches, UserData
from asymswap.utils.inputs import Inputs, arguments_of, placed, samples_in, samples_of
from asymswap.utils.tensors import generator_for, list_tensors, map_tensors, random_state_kept, seed_

HELD_BACK = 256
"""Samples held back of data whose samples can be chosen; a fifth of them at most. If the user says how many, a half."""

_HELD_BACK_BATCHES = 32  # samples held back of data that comes in batches, at least: the first ones with so many
_PIXELS = 2**20  # numbers of a channel in a batch of samples that can be chosen
_END = object()


@dataclass(frozen=True)
class Batches:
    """Batches of a network's arguments, the same whenever they are read."""

    counts: tuple[int, ...]  # the samples in each
    load: Callable[[int], Inputs]
    description: str
    shared: bool = False  # too few samples to hold any back: these are used for calibration too

    def __iter__(self) -> Iterator[Inputs]:
        return map(self.load, range(len(self.counts)))

    @property
    def count(self) -> int:
        return sum(self.counts)


Parts: TypeAlias = tuple[Batches, Batches]
"""Batches of as many samples as are asked for, or of all there are, and the held-back ones."""


@random_state_kept()
def open_inputs(opened: OpenedModel, given: UserData, count: int, seed: int = 0, memory_gib: float = 4.0) -> Parts:
    """Return batches of `count` samples, and the held-back ones.

    Samples that can be chosen are drawn by the seed; batches come in order, up to the memory limit. What is random
    is drawn alike at every reading. Raises SourceError for data that holds nothing for the network.
    """
    seed_("calibration data")
    data, model = given.data, opened.model
    if given.reference is not None:
        named, known, side = _named_arguments(model, Path(given.reference)), opened.preprocessing, given.patches.size
        known = known if side is None else replace(known, size=(side, side), resize=None)
        data = open_data(given.reference, known, "train", unlabelled=True) if named is None else _Rows(named)
    elif given.patches != Patches():
        raise SourceError("`patch=`, `patches=` and `noise=` are for images by a data reference; cut your own batches")
    if callable(data) and not isinstance(data, Iterable | Dataset):
        data = call("the data's function", data)
    data = _Rows((data,)) if isinstance(data, Tensor) else data
    if isinstance(data, _Rows) or (isinstance(data, Dataset) and hasattr(data, "__len__")):
        return _chosen(model, data, given, count, seed)
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        takes = "a data reference, a tensor, a Dataset, an iterable of batches or a function that returns one"
        raise SourceError(f"data cannot be {type(data).__name__}: give {takes}")
    return _read(model, data, given, count, memory_gib)


@dataclass(frozen=True)
class _Rows:
    """Samples that are the rows of tensors: the arguments of the forward, in their order."""

    arguments: Inputs

    def __len__(self) -> int:
        return samples_in(self.arguments)


def _named_arguments(model: nn.Module, path: Path) -> Inputs | None:
    """Return the forward's arguments of a file that holds several of them by name; None for other data."""
    if path.suffix not in TENSORS or not path.is_file():
        return None
    tensors = arrays.read_tensors(path)
    if len(tensors) < 2 or arrays.IMAGES & tensors.keys():
        return None
    if len({tensor.shape[:1] for tensor in tensors.values()}) > 1:
        listed = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise SourceError(f"data {path} holds inputs of different numbers of samples ({listed})")
    return arguments_of(model, tensors)


def _chosen(model: nn.Module, data: _Rows | Dataset[Any], given: UserData, count: int, seed: int) -> Parts:
    total = len(data)  # type: ignore[arg-type]  # a Dataset without a length is read in batches
    if not total:
        raise SourceError("the calibration data holds no samples")
    # Always the same ones are held back, whatever the seed and the number of others.
    held, rest = held_back_of(total, given)
    chosen = [rest[place] for place in torch.randperm(len(rest), generator=generator_for(seed, "calibration")).tolist()]
    parts: list[tuple[Any, Sequence[int]]] = [(data, chosen[:count]), (data, held)]
    if isinstance(data, LabelledImages) and given.patches != Patches():
        # Patches that are held back are of other images.
        counts = given.patches.count or count, given.held_back or len(held)
        if given.patches.size is None:
            counts = min(counts[0], len(chosen)), len(held)
        drawn = zip((chosen, held), counts, (seed, 0), strict=True)
        patches = [patches_from(data.some(some, data.description), given.patches, *how) for some, *how in drawn]
        parts = [(one, range(len(one))) for one in patches]
    seen, others = (_grouped(model, source, given, numbers) for source, numbers in parts)
    return seen, replace(others, shared=len(held) == total)


def held_back_of(total: int, given: UserData) -> tuple[list[int], list[int]]:
    """Return the numbers of the samples that are held back, and of the others; of a handful all are both."""
    # Any number of patches can be cut of a few images.
    many = given.held_back and given.patches.size is None
    back = min(given.held_back, total // 2) if many else min(HELD_BACK, total // 5)
    order = torch.randperm(total, generator=generator_for("held back")).tolist()
    return order[:back] or order, order[back:]


def _grouped(model: nn.Module, data: _Rows | Dataset[Any], given: UserData, indices: Sequence[int]) -> Batches:
    """Return batches of chosen samples, of about as many numbers each; up to a GiB is kept once it is read."""

    @random_state_kept()
    def load(group: Sequence[int]) -> Inputs:
        seed_("samples", *group)
        if isinstance(data, _Rows):
            return placed(model, map_tensors(data.arguments, lambda one: one[group] if one.dim() else one))
        what, hint = f"putting samples of {type(data).__name__} into a batch", "; give a DataLoader with a collate_fn"
        batch = call(what, lambda: default_collate([data[index] for index in group]), hint=hint)
        if isinstance(data, LabelledImages):
            return placed(model, ([*batch[0]] if data.preprocessing.form == "image-list" else batch[0],))
        return placed(model, arguments_of(model, batch, given.inputs))

    first = list_tensors(load(indices[:1]))
    size = max(4, min(128, _PIXELS // max(one.shape[-2:].numel() if one.dim() > 2 else 1 for one in first)))
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    loaded: Callable[[int], Inputs] = lambda number: load(groups[number])  # noqa: E731
    if len(indices) * sum(one.nbytes for one in first) < 2**30:
        loaded = cache(loaded)
    about = given.reference if isinstance(data, _Rows) else type(data).__name__
    about = data.description if isinstance(data, LabelledImages) else f"{len(data)} samples of {about or 'a tensor'}"  # type: ignore[arg-type]
    return Batches(tuple(map(len, groups)), loaded, about)


def _read(model: nn.Module, data: Iterable[Any], given: UserData, count: int, memory_gib: float) -> Parts:
    kept: list[Inputs] = []
    held, used, back, limit = 0, 0, 0, memory_gib * 2**30
    # Of as many as are to be held back again, whatever the count, it is known that those are no more than half.
    need = max(count, given.held_back)
    batches = call("the data", iter, data)
    while used < need and (limit >= 0 or len(kept) <= (1 if given.held_back else back)):
        batch = call("the data", next, batches, _END)
        if batch is _END:
            break
        kept.append(placed(model, arguments_of(model, batch, given.inputs)))
        if held < (given.held_back or _HELD_BACK_BATCHES):
            held, back = held + samples_in(kept[-1]), back + 1
        else:
            used += samples_in(kept[-1])
        limit -= sum(tensor.nbytes for tensor in list_tensors(kept[-1]))
    if not kept:
        raise SourceError(
            f"the data ({type(data).__name__}) gives no batch; a generator that was read before is exhausted"
        )
    if given.held_back:
        sums = list(accumulate(map(samples_in, kept)))
        back = min(back, sum(one <= sums[-1] / 2 for one in sums))
    back = int(back > 1) if back == len(kept) else back  # too few to hold back so many

    def batches_of(some: Sequence[Inputs]) -> Batches:
        return Batches(tuple(map(samples_in, some)), some.__getitem__, f"a {type(data).__name__}")

    held_back, others = replace(batches_of(kept[:back] or kept), shared=not back), kept[back:]
    above = sum(map(samples_in, others)) - count
    while above >= samples_in(others[-1]):
        above -= samples_in(others.pop())
    others[-1] = samples_of(others[-1], 0, samples_in(others[-1]) - max(above, 0))
    return batches_of(others), held_back


def settle_on(opened: OpenedModel, given: UserData, part: Any = "train") -> OpenedModel:
    """Return the opened model with its preprocessing settled on images, or the first sample of own data as example."""
    reference = given.reference
    if reference is not None and _named_arguments(opened.model, Path(reference)) is None:
        return settle(opened, reference, part)
    if opened.example_inputs is not None:
        return opened
    first = next(iter(open_inputs(opened, replace(given, held_back=0), 1)[0]))
    example = samples_of(first, 0, 1)
    x_NCHW, known = example[0] if len(example) == 1 else None, opened.preprocessing
    if isinstance(x_NCHW, Tensor) and x_NCHW.dim() == 4 and x_NCHW.is_floating_point() and known.form == "images":
        if known.size_from in ("given", "file") and known.size != tuple(x_NCHW.shape[-2:]):
            return opened
        return replace(opened, preprocessing=replace(with_size(known, tuple(x_NCHW.shape[1:])), size_from="images"))
    return replace(opened, example_inputs=example)
