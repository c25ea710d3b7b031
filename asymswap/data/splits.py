"""Which images are trained on, and which are held back to see how well that goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asymswap.data.datasets import LabelledImages, open_data, open_part
from asymswap.errors import SourceError
from asymswap.types import Preprocessing
from asymswap.utils.tensors import generator_for

DEFAULT_FRACTION = 0.1


@dataclass(frozen=True)
class Parts:
    """Images to train on, and others to validate on, if there are any."""

    train: LabelledImages
    validation: LabelledImages | None


def open_parts(
    reference: str, preprocessing: Preprocessing, validation: str | None, seed: int, *, download: bool = False
) -> Parts:
    """Open data for training.

    `validation` is a fraction of the training images that is held back, the same in every class; `none`; `test` for the
    test part; or another data reference. By default it is the folder `val` where there is one, else a tenth: the test
    part stays unseen. Raises SourceError for what cannot be trained on.
    """
    train = open_data(reference, preprocessing, "train", download=download)
    _check_every_class(train)
    fraction = _fraction(validation)
    if validation is None and train.has_val:
        parts = Parts(train, open_part(reference, preprocessing, "val"))
    elif fraction is not None:
        parts = _held_back(train, fraction, seed) if fraction else Parts(train, None)
    elif validation == "test":
        parts = Parts(train, open_data(reference, preprocessing, "test", download=download))
    else:
        parts = Parts(train, open_data(str(validation), preprocessing, "test"))
    _check_same_classes(parts)
    return parts


def _fraction(validation: str | None) -> float | None:
    """The fraction that the text means, zero for none at all; None where it means something else."""
    if validation is None:
        return DEFAULT_FRACTION
    if validation == "none":
        return 0.0
    try:
        fraction = float(validation)
    except ValueError:
        return None
    if not 0 <= fraction < 1:
        raise SourceError(f"--validation {validation} is no fraction of the images; give 0.1, none, test or other data")
    return fraction


def _held_back(train: LabelledImages, fraction: float, seed: int) -> Parts:
    assert train.pictures is not None
    kept, held = split(train.pictures.labels, fraction, seed)
    if not held:
        raise SourceError(
            f"a validation part of {fraction:g} of {train.description} would be empty; give a larger --validation, "
            "or none"
        )
    about = f"of {train.description} (seed {seed})"
    return Parts(train.some(kept, f"{len(kept)} {about}"), train.some(held, f"{len(held)} {about}"))


def split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of those that stay, and of `fraction` of each class, rounded, chosen by the seed; both in order.

    Of each class one stays at least.
    """
    generator = generator_for(seed, "validation")
    order = torch.randperm(len(labels), generator=generator).tolist()
    left = {label: min(round(fraction * count), count - 1) for label, count in Counter(labels).items()}
    held = set()
    for index in order:
        if left[labels[index]] > 0:
            left[labels[index]] -= 1
            held.add(index)
    return [index for index in range(len(labels)) if index not in held], sorted(held)


def _check_every_class(train: LabelledImages) -> None:
    assert train.pictures is not None
    counts = Counter(train.pictures.labels)
    empty = [name for label, name in enumerate(train.classes) if not counts[label]]
    if empty:
        raise SourceError(
            f"there is no image of class {', '.join(map(repr, empty[:3]))} to train on in {train.description}; "
            "add some, or remove the class"
        )


def _check_same_classes(parts: Parts) -> None:
    train, other = parts.train, parts.validation
    if other is not None and other.classes != train.classes:
        raise SourceError(
            f"the classes to validate on ({', '.join(other.classes[:5])} …) are not those to train on "
            f"({', '.join(train.classes[:5])} …); give data of the same classes"
        )
