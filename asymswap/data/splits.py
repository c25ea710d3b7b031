"""Which images are trained on, and which are held back for validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asymswap.data.datasets import LabelledImages, open_data
from asymswap.errors import SourceError
from asymswap.types import Preprocessing
from asymswap.utils.tensors import generator_for


@dataclass(frozen=True)
class Parts:
    """Images to train on, and others to validate on, if any."""

    train: LabelledImages
    validation: LabelledImages | None


def open_parts(
    reference: str, preprocessing: Preprocessing, validation: str | None, seed: int, *, download: bool = False
) -> Parts:
    """Open data for training.

    `validation` is the fraction of each class's training images to hold back; `none`; `test` for the test part; or
    another data reference. By default it is the folder `val` if there is one, else a tenth: the test part stays unseen.
    Raises SourceError for data that cannot be trained on.
    """
    train = open_data(reference, preprocessing, "train", download=download)
    counts = Counter(train.pictures.labels)
    empty = [name for label, name in enumerate(train.classes) if not counts[label]]
    if empty:
        raise SourceError(
            f"there is no image of class {', '.join(map(repr, empty[:3]))} to train on in {train.description}; "
            "add some, or remove the class"
        )
    if validation is None and train.has_val:
        other = open_data(reference, preprocessing, "val")
    elif validation == "test":
        other = open_data(reference, preprocessing, "test", download=download)
    else:
        text = "0.1" if validation is None else "0" if validation == "none" else validation
        try:
            fraction = float(text)
        except ValueError:
            other = open_data(text, preprocessing, "test")
        else:
            return _hold_back(train, fraction, seed)
    if other.classes != train.classes:
        raise SourceError(
            f"the classes to validate on ({', '.join(other.classes[:5])} …) are not those to train on "
            f"({', '.join(train.classes[:5])} …); give data of the same classes"
        )
    return Parts(train, other)


def _hold_back(train: LabelledImages, fraction: float, seed: int) -> Parts:
    if not 0 <= fraction < 1:
        raise SourceError(f"`validation={fraction}` is no fraction of the images; give 0.1, none, test or other data")
    if fraction == 0:
        return Parts(train, None)
    kept, held = split(train.pictures.labels, fraction, seed)
    if not held:
        raise SourceError(
            f"a validation part of {fraction:g} of {train.description} would be empty; give a larger fraction in "
            "`validation=…`, or none"
        )
    about = f"of {train.description} (seed {seed})"
    return Parts(train.some(kept, f"{len(kept)} {about}"), train.some(held, f"{len(held)} {about}"))


def split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the images that stay and of those held back: `fraction` of each class, rounded.

    The seed chooses them; both lists are in order. At least one of each class stays.
    """
    order = torch.randperm(len(labels), generator=generator_for(seed, "validation")).tolist()
    left = {label: min(round(fraction * count), count - 1) for label, count in Counter(labels).items()}
    held = set()
    for index in order:
        if left[labels[index]] > 0:
            left[labels[index]] -= 1
            held.add(index)
    return [index for index in range(len(labels)) if index not in held], sorted(held)
