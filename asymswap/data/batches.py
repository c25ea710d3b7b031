"""The order of training images, their distribution over processes, reading and augmenting them.

An epoch is one permutation, cut into steps of nearly equal size, none larger than was asked for: every image is seen
once, and no step is left with a handful. A step is cut into its forward passes and processes in the same way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import InterpolationMode, v2

from asymswap.data.datasets import Pictures, geometry, to_input
from asymswap.errors import AsymswapError, SourceError, near_names
from asymswap.types import Preprocessing
from asymswap.utils.distributed import Team
from asymswap.utils.tensors import drawn_from, generator_for

Key = tuple[int, int]
"""An epoch and the number of an image."""

PRESETS = ("none", "flip", "crop", "flip-crop", "randaugment")
MIXES = ("mixup", "cutmix")

_MOST_SKIPPED = 100
"""Unreadable images in a row from which on something else must be wrong."""


@dataclass(frozen=True)
class Batch:
    images: Tensor  # N x C x H x W
    labels: Tensor
    skipped: int  # unreadable images that a neighbour replaces


class Schedule(Sampler[list[Key]]):
    """The batches of this process, epoch by epoch; `begin` sets the epoch and step to continue with."""

    def __init__(self, images: int, batch_size: int, accumulate: int, team: Team, seed: int) -> None:
        parts = accumulate * team.size
        if images < parts:
            raise AsymswapError(
                f"{images} images cannot be shared among {team.size} processes x `accumulate={accumulate}`; give more "
                "images, or fewer of those"
            )
        # At least one image for each, even where a batch of one image then has two.
        self.steps = min(-(-images // (batch_size * parts)), images // parts)
        self._images, self._accumulate, self._team, self._seed = images, accumulate, team, seed
        self._epoch = self._start = 0

    def begin(self, epoch: int, start: int) -> None:
        self._epoch, self._start = epoch, start

    def size(self, step: int) -> int:
        """Return how many images all processes together see in this step of an epoch."""
        return len(torch.arange(self._images).tensor_split(self.steps)[step])

    def __len__(self) -> int:
        return (self.steps - self._start) * self._accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.randperm(self._images, generator=generator_for(self._seed, "order", self._epoch))
        for group in order.tensor_split(self.steps)[self._start :]:
            pieces = group.tensor_split(self._accumulate * self._team.size)
            for piece in pieces[self._team.rank :: self._team.size]:
                yield [(self._epoch, index) for index in piece.tolist()]


class TrainingImages(Dataset[Any]):
    """Augmented network inputs; the augmentation depends only on the seed, the epoch and the image's number.

    The next image replaces one that cannot be read; with `strict` the error is the sample.
    """

    def __init__(self, pictures: Pictures, transform: Any, seed: int, strict: bool) -> None:
        self._pictures, self._transform, self._seed, self._strict = pictures, transform, seed, strict

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int] | SourceError:
        (epoch, index), labels = key, self._pictures.labels
        for skipped in range(min(len(labels), _MOST_SKIPPED)):
            place = (index + skipped) % len(labels)
            try:
                picture = self._pictures.picture(place)
            except SourceError as error:
                # Returned: raised in a worker it would arrive as a page of traceback.
                if self._strict:
                    return error
                continue
            with drawn_from(self._seed, "augment", epoch, index):
                return self._transform(picture), labels[place], int(skipped > 0)
        return SourceError("no image of the data can be read; `strict=True` names the first that cannot")


def _collate(samples: Sequence[Any]) -> Batch | SourceError:
    for sample in samples:
        if isinstance(sample, SourceError):
            return sample
    images, labels, skipped = default_collate(list(samples))
    return Batch(images, labels, int(skipped.sum()))


class Reader:
    """Reads the batches of a schedule, ahead of time if there are workers."""

    def __init__(self, images: TrainingImages, schedule: Schedule, workers: int) -> None:
        self.schedule = schedule
        self._loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=schedule,
            num_workers=workers,
            collate_fn=_collate,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: the loader would otherwise draw from the global one.
            generator=torch.Generator(),
        )

    def read(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch from a step on; raise SourceError for an image that cannot be read."""
        self.schedule.begin(epoch, start)
        for batch in self._loader:
            if isinstance(batch, SourceError):
                raise batch
            yield batch


def parse_presets(text: str) -> tuple[str, ...]:
    """Parse `flip-crop` or `randaugment,mixup`: at most one preset for pictures, and any for batches."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in PRESETS + MIXES:
            hint = near_names(name, PRESETS + MIXES) or f"; known: {', '.join(PRESETS + MIXES)}"
            raise SourceError(f"no augmentation {name!r}{hint}")
    if sum(name in PRESETS for name in names) > 1:
        raise SourceError(f"`augment={text}`: give one of {', '.join(PRESETS)}; mixup and cutmix may be added to it")
    return names


def presets_for(reference: str) -> tuple[str, ...]:
    """Return the default for a data reference: digits are not mirrored, which would change what they are."""
    drawn = reference == "digits" or reference.partition(":")[0] == "mnist"
    return ("crop",) if drawn else ("flip-crop",)


def training_transform(preprocessing: Preprocessing, presets: Sequence[str]) -> v2.Transform:
    """Return the random transform from a picture to a network's input.

    Small pictures are shifted, their borders reflected; large ones are cropped at random, as for ImageNet.
    """
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


class Mixing:
    """Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019); with both, one of them for each batch."""

    def __init__(self, presets: Sequence[str], classes: int) -> None:
        known = {"mixup": v2.MixUp(alpha=0.2, num_classes=classes), "cutmix": v2.CutMix(num_classes=classes)}
        chosen = [known[name] for name in MIXES if name in presets]
        self._mix = v2.RandomChoice(chosen) if len(chosen) > 1 else chosen[0] if chosen else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed batch with its labels as shares of classes; unchanged where there is nothing to mix."""
        if self._mix is None or len(images) < 2:
            return images, labels
        mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
        return mixed
