"""Sources of batches for training: images and datasets in an order of ours, and batches that the user makes.

Of images and datasets an epoch is one permutation, cut into steps of nearly equal size, and those into forward passes
and processes: every image is seen once, and no step is left with a handful. Of the user's own batches, which are taken
in their order, each process takes every n-th.
"""

import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms import InterpolationMode, v2

from asymswap.data.datasets import LabelledImages, geometry, to_input
from asymswap.errors import AsymswapError, SourceError, call, check_choice
from asymswap.types import Preprocessing
from asymswap.utils.distributed import Team
from asymswap.utils.tensors import generator_for, map_tensors, number_for, random_state_kept, seed_

Groups = Generator[tuple[list["Batch"], int], None, None]
"""The batches of this process for one step after another, each with the sum of the counts in all processes."""

PRESETS = ("none", "flip", "crop", "flip-crop", "randaugment")
MIXES = ("mixup", "cutmix")

_MOST_SKIPPED = 100  # unreadable images in a row: from there on something else must be wrong
_MOST_COUNTED = 1_000_000  # batches after which we stop to look for the end of data without a length
_END = object()


@dataclass(frozen=True)
class Batch:
    content: Any  # (images N x C x H x W, labels), or what the user's data gave
    count: int  # images or samples; 1 for a batch of the user's
    skipped: int = 0  # unreadable images that a neighbour replaces


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on the device; a batch of another kind is asked to move itself there."""
    content = batch.content
    if hasattr(content, "to") and not isinstance(content, Tensor):
        return replace(batch, content=content.to(device))
    return replace(batch, content=map_tensors(content, lambda tensor: tensor.to(device, non_blocking=True)))


class TrainingImages:
    """Augmented network inputs: item `epoch * len(data) + number` depends on the seed, the epoch and the number alone.

    The next image replaces one that cannot be read, unless it is `strict`. In batches images become of `dtype`.
    """

    def __init__(
        self, data: LabelledImages, transform: Any, seed: int, strict: bool, dtype: torch.dtype | None = torch.float32
    ) -> None:
        self.data, self.seed, self.dtype, self._transform, self._strict = data, seed, dtype, transform, strict

    def __getitem__(self, key: int) -> tuple[Any, int, int]:
        labels = self.data.labels
        epoch, index = divmod(key, len(labels))
        for skipped in range(min(len(labels), _MOST_SKIPPED)):
            place = (index + skipped) % len(labels)
            with torch.random.fork_rng(devices=[]):
                # torch's CPU generator, which augmentations use.
                torch.default_generator.manual_seed(number_for(self.seed, "augment", epoch, index))
                try:
                    return self._transform(self.data.picture(place)), labels[place], int(skipped > 0)
                except SourceError:
                    if self._strict:
                        raise
        raise SourceError("no image of the data can be read; `strict=True` names the first that cannot")

    def batch(self, keys: Sequence[int]) -> Batch | SourceError:
        """Return images with their labels, or alone where they have none; or the error of one that cannot be read."""
        hint = "; give a DataLoader with a collate_fn of yours"
        try:
            samples = [self[key] for key in keys]
            images, labels, skipped = call("putting samples into a batch", default_collate, samples, hint=hint)
        except SourceError as error:
            # Raised in a worker it would arrive as a page of traceback.
            return error
        images = images if self.dtype is None else images.to(self.dtype)
        return Batch(images if -1 in labels else (images, labels), len(labels), int(skipped.sum()))


class Reader:
    """A source of images, or of samples of the user's; reads ahead of time if there are workers."""

    notes: tuple[str, ...] = ()

    def __init__(self, images: TrainingImages, batch_size: int, accumulate: int, team: Team, workers: int) -> None:
        self.count, parts = len(images.data.labels), accumulate * team.size
        if self.count < parts:
            among = f"{team.size} processes x `accumulate={accumulate}`"
            raise AsymswapError(f"{self.count} images cannot be shared among {among}: too few")
        # At least one image for each, even where a batch of one image then has two.
        self.steps = min(-(-self.count // (batch_size * parts)), self.count // parts)
        self.unit = "samples" if images.dtype is None else "images"
        self._seed, self._accumulate, self._team = images.seed, accumulate, team
        self._keys: list[list[int]] = []  # of the batches that the loader reads next
        self._loader: DataLoader[Any] = DataLoader(
            range(sys.maxsize),  # type: ignore[arg-type]  # of which each number is itself
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=images.batch,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: the loader would otherwise draw from the global one.
            generator=torch.Generator(),
        )

    def groups(self, epoch: int, start: int) -> Groups:
        """Yield the batches of each step of an epoch, from `start` on; SourceError for an image that cannot be read."""
        order = torch.randperm(self.count, generator=generator_for(self._seed, "order", epoch)) + epoch * self.count
        steps, team = order.tensor_split(self.steps)[start:], self._team
        shares = [step.tensor_split(self._accumulate * team.size)[team.rank :: team.size] for step in steps]
        self._keys[:] = [share.tolist() for step in shares for share in step]
        batches = iter(self._loader)
        for step in steps:
            group = list(itertools.islice(batches, self._accumulate))
            for batch in group:
                if isinstance(batch, SourceError):
                    raise batch
            yield group, len(step)


class Batches:
    """A source of the user's batches: a DataLoader, another iterable, or a function that returns one.

    The data is read from its start for every epoch, also where an epoch is continued. Before each batch the random
    generators are seeded, by the epoch and the batch's number: a resumed run gets the same batches, and so does every
    process. Of data without a length at most `most` steps are counted. Raises SourceError for data that cannot be read
    twice, or gives nothing.
    """

    unit = "batches"

    def __init__(self, data: Any, accumulate: int, team: Team, seed: int, most: int | None = None) -> None:
        self._team, self._seed, self._each = team, seed, accumulate * team.size
        self.count, self.notes = 0, tuple[str, ...]()
        makes = callable(data) and not hasattr(data, "__iter__")
        self._what = what = f"{data.__name__}()" if makes and hasattr(data, "__name__") else "`data=…`"
        made = call(what, data) if makes else data
        self.name, once = type(made).__name__, isinstance(made, Iterator)
        if not hasattr(made, "__iter__") or isinstance(made, Mapping | str):
            takes = "a data reference, a DataLoader, a Dataset, any iterable of batches, or a function that returns one"
            raise SourceError(f"{what} gives a {self.name}, not batches; give {takes}")
        if isinstance(made, IterableDataset):
            raise SourceError(f"{what} gives samples, not batches; give a DataLoader of the {self.name}")
        if once and not makes:
            raise SourceError(f"{what} is a {self.name}, which can be read only once; give a function that returns one")
        if team.size > 1 and isinstance(getattr(made, "sampler", None), DistributedSampler):
            raise SourceError("every process takes its share of the batches itself; leave out the DistributedSampler")
        self._make: Callable[[], Iterable[Any]] = data if once else lambda: made
        try:
            # That of a loader of an IterableDataset is an estimate.
            known = None if isinstance(getattr(made, "dataset", None), IterableDataset) else len(made)
        except TypeError:
            known = None
        if known is None:
            with random_state_kept():
                limit = _MOST_COUNTED if most is None else most * self._each
                known = sum(1 for _ in itertools.islice(self._read(0), limit))
            if known == _MOST_COUNTED:
                raise SourceError(f"{what} has no end within {known:,} batches; give `steps=…` instead of `epochs=…`")
            self.notes = (f"the data has no length: its {known} batches were counted by reading it once",)
        self.count, rest = known, known % self._each
        self.steps = known // self._each + (rest >= team.size)
        if not self.steps:
            few = f"gives {known} batches for {team.size} processes" if known else "gives no batch"
            raise SourceError(f"{what} {few}; give more, from an iterable that can be read again")
        if rest % team.size:
            self.notes += (f"the last {rest % team.size} batches of each epoch are left out, fewer than the processes",)

    def _read(self, epoch: int) -> Generator[Any, None, None]:
        seed_(self._seed, "data", epoch)
        data = call(self._what, self._make)
        own = getattr(data, "generator", None)
        own = own if isinstance(own, torch.Generator) else torch.Generator()
        before = own.get_state()
        own.manual_seed(number_for(self._seed, "data", epoch))
        try:
            batches = call(self._what, iter, data)
            for number in itertools.count():
                seed_(self._seed, "data", epoch, number)
                batch = call(self._what, next, batches, _END)
                if batch is _END:
                    break
                yield batch
            if number < self.count:
                gave = f"{self._what} gave {number} batches in epoch {epoch + 1}, not {self.count}"
                raise SourceError(f"{gave}: if one reading uses it up, give a function that returns a new one")
        finally:
            own.set_state(before)

    def groups(self, epoch: int, start: int) -> Groups:
        """Yield the batches of each step of an epoch, from `start` on."""
        with closing(self._read(epoch)) as batches:
            for step in range(self.steps):
                wanted = min(self._each, self.count - step * self._each)
                mine = [Batch(batch, 1) for _, batch in self._team.share(itertools.islice(batches, wanted))]
                if step >= start:
                    whole = wanted // self._team.size
                    yield mine[:whole], whole * self._team.size


Source = Reader | Batches


def parse_presets(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names in `flip-crop` or `randaugment,mixup`: at most one preset for pictures, and any for batches."""
    names = tuple(name.strip() for name in (given.split(",") if isinstance(given, str) else given))
    for name in names:
        check_choice("`augment=…`", name, PRESETS + MIXES)
    if sum(name in PRESETS for name in names) > 1:
        given, known = ",".join(names), ", ".join(PRESETS)
        raise SourceError(f"`augment={given}`: give one of {known}; mixup and cutmix may be added to it")
    return names


def presets_for(reference: str) -> tuple[str, ...]:
    """Return the default for a data reference: digits are not mirrored, which would change what they are."""
    return ("crop",) if reference.partition(":")[0] in ("digits", "mnist") else ("flip-crop",)


def training_transform(preprocessing: Preprocessing, presets: Sequence[str]) -> v2.Transform:
    """Return the random transform from a picture to a network's input: large ones are cropped as for ImageNet."""
    size, steps = list(preprocessing.size), geometry(preprocessing)
    if {"crop", "flip-crop", "randaugment"} & set(presets):
        if preprocessing.resize is not None:
            steps = [v2.RandomResizedCrop(size, interpolation=InterpolationMode(preprocessing.interpolation))]
        else:
            # By up to an eighth of their sides, 4 of CIFAR's 32 pixels.
            border = [max(1, side // 8) for side in reversed(size)]
            steps.append(v2.RandomCrop(size, padding=border, padding_mode="reflect"))
    if {"flip", "flip-crop", "randaugment"} & set(presets):
        steps.append(v2.RandomHorizontalFlip())
    if "randaugment" in presets:
        steps.append(v2.RandAugment(interpolation=InterpolationMode.BILINEAR))
    return v2.Compose([*steps, *to_input(preprocessing)])


def mixing(presets: Sequence[str], classes: int) -> nn.Module | None:
    """Return mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) of a batch, or with both one of them for each."""
    known = {"mixup": v2.MixUp(alpha=0.2, num_classes=classes), "cutmix": v2.CutMix(num_classes=classes)}
    chosen = [known[name] for name in MIXES if name in presets]
    return v2.RandomChoice(chosen) if len(chosen) > 1 else next(iter(chosen), None)
