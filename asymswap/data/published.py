"""Published collections of images that torchvision reads: `cifar10:PATH` and its like."""

from __future__ import annotations

import urllib.error
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from asymswap.data.images import PIL_MODES
from asymswap.errors import SourceError

# The name in references: torchvision's class, and the folder that it looks for.
COLLECTIONS: dict[str, tuple[Any, str]] = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST"),
    "mnist": (datasets.MNIST, "MNIST"),
}


class Collection:
    """The pictures of one of torchvision's datasets that keep them in memory."""

    ready = True

    def __init__(self, images: Any, labels: Sequence[int], channels: int) -> None:
        self._images = images
        self.labels = labels
        self._mode = PIL_MODES[channels]

    def picture(self, index: int) -> Image.Image:
        """One picture in the channels that are wanted."""
        # Arrays of NumPy and tensors both give their pixels so.
        return Image.fromarray(self._images[index].__array__()).convert(self._mode)


def open_collection(
    name: str, folder: Path, train: bool, channels: int, download: bool
) -> tuple[Collection, tuple[str, ...]]:
    """The training or test part of a collection below a folder, and the names of its classes.

    Raises SourceError where it is not there, is damaged, or cannot be downloaded.
    """
    make, holds = COLLECTIONS[name]
    # Whoever gives the unpacked folder itself means it.
    root = folder.parent if folder.name == holds else folder
    if not download and not (root / holds).is_dir():
        raise SourceError(f"data {name}:{folder} has no folder {holds}; give the folder that holds it, or --download")
    try:
        found = make(str(root), train=train, download=download)
    except (urllib.error.URLError, HTTPException) as error:
        raise SourceError(f"data {name} cannot be downloaded ({getattr(error, 'reason', error)})") from None
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise SourceError(f"data {name}:{folder} cannot be read ({reason}); --download fetches it anew") from None
    labels = [int(label) for label in found.targets]
    return Collection(found.data, labels, channels), tuple(found.classes)
