"""Labelled pictures before they are preprocessed: in memory, or in image files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as TensorImage

from asymswap.errors import SourceError

PIL_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Pictures:
    """Pictures by number, before they are preprocessed."""

    labels: Sequence[int]  # class numbers, -1 without labels
    picture: Callable[[int], Any]  # a PIL image, or a float C x H x W tensor from 0 to 1; SourceError if unreadable
    ready: bool = True  # in memory, so that no workers are needed

    @classmethod
    def in_memory(cls, images: Tensor, labels: Sequence[int], channels: int) -> Pictures:
        """Return pictures N x C x H x W, of bytes or of floats from 0 to 1; made grey or coloured as needed."""
        return cls(labels, partial(_from_memory, images, channels))

    @classmethod
    def in_files(cls, paths: Sequence[str | Path], labels: Sequence[int], channels: int) -> Pictures:
        """Return the pictures in image files."""
        return cls(labels, partial(_from_file, paths, PIL_MODES[channels]), ready=False)

    @classmethod
    def in_class_folders(cls, root: Path, classes: Sequence[str], channels: int) -> Pictures:
        """Return the images in the class folders of `root`.

        As torchvision's ImageFolder, but without hidden files, which editors and archives leave (`._x.jpg`).
        """
        numbers = {name: number for number, name in enumerate(classes)}
        samples = make_dataset(str(root), numbers, is_valid_file=lambda path: _is_image(Path(path)), allow_empty=True)
        return cls.in_files([path for path, _ in samples], [label for _, label in samples], channels)

    def some(self, chosen: Sequence[int]) -> Pictures:
        """Return some of the pictures, in a given order."""
        return Pictures([self.labels[index] for index in chosen], partial(_nth, self.picture, chosen), self.ready)


def _nth(picture: Callable[[int], Any], chosen: Sequence[int], index: int) -> Any:
    return picture(chosen[index])


def _from_memory(images: Tensor, channels: int, index: int) -> TensorImage:
    image = images[index]
    image = image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image.to(torch.float32)
    if image.shape[0] < channels:
        image = image.expand(channels, -1, -1)
    elif image.shape[0] > channels:
        image = v2.functional.rgb_to_grayscale(image)
    return TensorImage(image)


def _from_file(paths: Sequence[str | Path], mode: str, index: int) -> Image.Image:
    try:
        with Image.open(paths[index]) as image:
            if image.mode.startswith("I;16"):
                # Pillow itself would cut off all that is brighter than 255 of 65,535.
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits, of which nobody knows what is white")
            return image.convert(mode)
    # Besides its own OSErrors, Pillow passes decoders' errors on, and refuses decompression bombs.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SourceError(f"image '{paths[index]}' cannot be read ({error}); remove or replace it") from error


def image_files(folder: Path) -> list[Path]:
    """Return the visible image files in a folder itself, by name."""
    return sorted(path for path in folder.iterdir() if _is_image(path) and path.is_file())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def class_names(folder: Path) -> list[str]:
    """Return the names of the visible folders in a folder, sorted; none if it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
