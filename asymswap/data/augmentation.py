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
