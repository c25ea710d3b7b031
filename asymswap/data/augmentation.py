"""Augmentation: presets of torchvision.transforms.v2, for single pictures and for whole batches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from asymswap.data.datasets import geometry, to_input
from asymswap.errors import SourceError, near_names
from asymswap.types import Preprocessing

PRESETS = ("none", "flip", "crop", "flip-crop", "randaugment")
MIXES = ("mixup", "cutmix")
_BORDER = 8
"""Small pictures are shifted by up to this part of their sides: one eighth, 4 of CIFAR's 32 pixels."""


def parse_presets(text: str) -> tuple[str, ...]:
    """Read `flip-crop` or `randaugment,mixup`: at most one preset for pictures, and any for batches."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in PRESETS + MIXES:
            hint = near_names(name, PRESETS + MIXES) or f"; known: {', '.join(PRESETS + MIXES)}"
            raise SourceError(f"no augmentation {name!r}{hint}")
    if sum(name in PRESETS for name in names) > 1:
        raise SourceError(f"--augment {text}: give one of {', '.join(PRESETS)}; mixup and cutmix may be added to it")
    return names


def presets_for(reference: str) -> tuple[str, ...]:
    """What suits the data where nobody says it: mirrored digits would be other signs."""
    drawn = reference == "digits" or reference.partition(":")[0] == "mnist"
    return ("crop",) if drawn else ("flip-crop",)


def training_transform(preprocessing: Preprocessing, presets: Sequence[str]) -> v2.Transform:
    """The transform from a picture to a network's input, at random as the presets say."""
    cropped = {"crop", "flip-crop", "randaugment"} & set(presets)
    steps = _cropped(preprocessing) if cropped else list(geometry(preprocessing))
    if {"flip", "flip-crop", "randaugment"} & set(presets):
        steps.append(v2.RandomHorizontalFlip())
    if "randaugment" in presets:
        steps.append(v2.RandAugment(interpolation=InterpolationMode.BILINEAR))
    return v2.Compose([*steps, *to_input(preprocessing)])


def _cropped(preprocessing: Preprocessing) -> list[v2.Transform]:
    """Small pictures shifted, their borders reflected; of large ones a part, as networks for ImageNet are trained."""
    size = list(preprocessing.size)
    if preprocessing.resize is not None:
        return [v2.RandomResizedCrop(size, interpolation=InterpolationMode(preprocessing.interpolation))]
    border = [max(1, side // _BORDER) for side in reversed(size)]
    return [*geometry(preprocessing), v2.RandomCrop(size, padding=border, padding_mode="reflect")]


class Mixing:
    """Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019), one of them for each batch where both are wanted."""

    def __init__(self, presets: Sequence[str], classes: int) -> None:
        known = {"mixup": v2.MixUp(alpha=0.2, num_classes=classes), "cutmix": v2.CutMix(num_classes=classes)}
        chosen = [known[name] for name in MIXES if name in presets]
        self._mix = v2.RandomChoice(chosen) if len(chosen) > 1 else chosen[0] if chosen else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch mixed, its labels as shares of classes; or as it is, where nothing is to be mixed."""
        if self._mix is None or len(images) < 2:
            return images, labels
        mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
        return mixed
