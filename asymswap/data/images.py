"""Labelled pictures before they are preprocessed, and datasets that preprocess them one by one."""

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
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as TensorImage

from asymswap.errors import SourceError

PIL_MODES = {1: "L", 3: "RGB"}


class Pictures(Protocol):
    """Pictures by number, each a PIL image or a float C x H x W tensor on the scale [0, 1], with their class numbers.

    `ready` says that they lie in memory, so that no workers are needed to read them. `picture` raises SourceError for
    one that cannot be read.
    """

    @property
    def labels(self) -> Sequence[int]: ...

    @property
    def ready(self) -> bool: ...

    def picture(self, index: int) -> Any: ...


class Preprocessed(Dataset[tuple[Tensor, int]]):
    """Network inputs (C x H x W) with their class numbers."""

    def __init__(self, pictures: Pictures, transform: Callable[[Any], Tensor]) -> None:
        self.pictures = pictures
        self._transform = transform

    def __len__(self) -> int:
        return len(self.pictures.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self.pictures.picture(index)), self.pictures.labels[index]


class Subset:
    """Some of other pictures, in a given order."""

    def __init__(self, pictures: Pictures, chosen: Sequence[int]) -> None:
        self._pictures = pictures
        self._chosen = chosen

    @cached_property
    def labels(self) -> list[int]:
        """The class numbers of those that were chosen."""
        every = self._pictures.labels
        return [every[index] for index in self._chosen]

    @property
    def ready(self) -> bool:
        """As the pictures that they were chosen from."""
        return self._pictures.ready

    def picture(self, index: int) -> Any:
        """The picture itself."""
        return self._pictures.picture(self._chosen[index])


class InMemory:
    """Pictures N x C x H x W, of bytes on the scale [0, 255] or floats on [0, 1]; made grey or coloured as needed."""

    ready = True

    def __init__(self, images: Tensor, labels: Sequence[int], channels: int) -> None:
        self._images = images
        self.labels = labels
        self._channels = channels

    def picture(self, index: int) -> TensorImage:
        """One picture as floats."""
        image = self._images[index]
        image = image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image.to(torch.float32)
        if image.shape[0] != self._channels:
            image = (
                image.expand(self._channels, -1, -1) if image.shape[0] == 1 else v2.functional.rgb_to_grayscale(image)
            )
        return TensorImage(image)


class ClassFolders(ImageFolder):  # type: ignore[misc]  # torchvision ships no types
    """torchvision's ImageFolder without hidden folders and files, as editors and archives leave behind (`._x.jpg`)."""

    ready = False

    def __init__(self, root: Path, channels: int) -> None:
        super().__init__(str(root), is_valid_file=lambda path: _is_image(Path(path)), allow_empty=True)
        self.extensions = IMG_EXTENSIONS
        self._mode = PIL_MODES[channels]
        self.labels: list[int] = self.targets

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Every visible folder is a class."""
        classes = class_names(Path(directory))
        return classes, {name: index for index, name in enumerate(classes)}

    def picture(self, index: int) -> Image.Image:
        """The decoded file."""
        return _decoded(self.samples[index][0], self._mode)


class ImageFiles:
    """Files of images without labels."""

    ready = False

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        self._paths, self._mode = paths, PIL_MODES[channels]
        self.labels = [-1] * len(paths)

    def picture(self, index: int) -> Image.Image:
        """The decoded file."""
        return _decoded(self._paths[index], self._mode)


def _decoded(path: str | Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                # Pillow itself would cut off all that is brighter than 255 of 65,535.
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits, of which nobody knows what is white")
            return image.convert(mode)
    # Beside its own OSErrors, Pillow lets decoders' errors through, and refuses decompression bombs.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SourceError(f"image '{path}' cannot be read ({error}); remove or replace it") from error


def image_files(folder: Path) -> list[Path]:
    """The visible files of images that lie in a folder itself, by name."""
    return sorted(path for path in folder.iterdir() if _is_image(path) and path.is_file())


def _is_image(path: Path) -> bool:
    """True for a visible file with the ending of an image."""
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def class_names(folder: Path) -> list[str]:
    """The names of the visible folders in a folder, sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
