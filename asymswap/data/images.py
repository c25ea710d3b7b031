"""Labelled pictures before they are preprocessed, and the dataset that preprocesses them one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as TensorImage

from asymswap.errors import SourceError

PIL_MODES = {1: "L", 3: "RGB"}


class Pictures(Protocol):
    """Pictures by number, each a PIL image or a float C x H x W tensor on the scale [0, 1], with their class numbers.

    `ready` is True for pictures in memory, for which no workers are needed. `picture` raises SourceError for one that
    cannot be read.
    """

    @property
    def labels(self) -> Sequence[int]: ...

    @property
    def ready(self) -> bool: ...

    def picture(self, index: int) -> Any: ...


class Preprocessed(Dataset[tuple[Tensor, int]]):
    """Network inputs (C x H x W) with their class numbers."""

    def __init__(self, pictures: Pictures, transform: Callable[[Any], Tensor]) -> None:
        self.pictures, self._transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self.pictures.picture(index)), self.pictures.labels[index]


class Subset:
    """Some of other pictures, in a given order."""

    def __init__(self, pictures: Pictures, chosen: Sequence[int]) -> None:
        self._pictures, self._chosen = pictures, chosen
        self.ready = pictures.ready

    @cached_property
    def labels(self) -> list[int]:
        """The class numbers of the chosen pictures."""
        every = self._pictures.labels
        return [every[index] for index in self._chosen]

    def picture(self, index: int) -> Any:
        """Return one picture."""
        return self._pictures.picture(self._chosen[index])


class InMemory:
    """Pictures N x C x H x W, of bytes on the scale [0, 255] or floats on [0, 1]; made grey or coloured as needed."""

    ready = True

    def __init__(self, images: Tensor, labels: Sequence[int], channels: int) -> None:
        self._images, self.labels, self._channels = images, labels, channels

    def picture(self, index: int) -> TensorImage:
        """Return one picture as floats."""
        image = self._images[index]
        image = image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image.to(torch.float32)
        if image.shape[0] < self._channels:
            image = image.expand(self._channels, -1, -1)
        elif image.shape[0] > self._channels:
            image = v2.functional.rgb_to_grayscale(image)
        return TensorImage(image)


class ImageFiles:
    """Image files with their class numbers, -1 where there are none."""

    ready = False

    def __init__(self, paths: Sequence[str | Path], labels: Sequence[int], channels: int) -> None:
        self._paths, self.labels, self._mode = paths, labels, PIL_MODES[channels]

    def picture(self, index: int) -> Image.Image:
        """Return the decoded file."""
        path = self._paths[index]
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I;16"):
                    # Pillow itself would cut off all that is brighter than 255 of 65,535.
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(self._mode)
                if image.mode in ("I", "F"):
                    raise ValueError("pixels of 32 bits, of which nobody knows what is white")
                return image.convert(self._mode)
        # Besides its own OSErrors, Pillow passes decoders' errors on, and refuses decompression bombs.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise SourceError(f"image '{path}' cannot be read ({error}); remove or replace it") from error


def read_class_folders(root: Path, channels: int) -> tuple[ImageFiles, list[str]]:
    """Return the images in the class folders of `root`, and the classes.

    As torchvision's ImageFolder, but without hidden files and folders, which editors and archives leave (`._x.jpg`).
    """
    classes = class_names(root)
    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(str(root), numbers, is_valid_file=lambda path: _is_image(Path(path)), allow_empty=True)
    return ImageFiles([path for path, _ in samples], [label for _, label in samples], channels), classes


def image_files(folder: Path) -> list[Path]:
    """Return the visible image files in a folder itself, by name."""
    return sorted(path for path in folder.iterdir() if _is_image(path) and path.is_file())


def _is_image(path: Path) -> bool:
    """True for a visible file with the ending of an image."""
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def class_names(folder: Path) -> list[str]:
    """Return the names of the visible folders in a folder, sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
