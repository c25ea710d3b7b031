"""Data references: text that names labelled images, and how it becomes a dataset of network inputs."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from asymswap.errors import SourceError, near_names
from asymswap.spec import Preprocessing

Part = Literal["train", "test"]

_HOW_TO_NAME = "give digits, or a folder that holds one folder of images for each class"
_PART_FOLDERS: dict[Part, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
_PIL_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class LabelledImages:
    """Images as a network takes them (float C x H x W) with their class numbers, the classes' names, and what it is."""

    images: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]
    description: str

    def __len__(self) -> int:
        return len(cast(Sized, self.images))


def open_data(reference: str, preprocessing: Preprocessing, part: Part) -> LabelledImages:
    """Open the part of the data that `reference` names: `digits`, or a folder of class folders.

    A folder that holds `train` and `test` (or `val`) folders of class folders is split by them; any other folder is
    the same for both parts. A folder that is itself called digits is named `./digits`.

    Raises:
        SourceError: there is no such data, it holds no images, or it cannot be preprocessed so.
    """
    _check(preprocessing)
    if reference == "digits":
        return _open_digits(preprocessing, part)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return _open_folder(folder, preprocessing, part)
    if folder.exists():
        raise SourceError(f"data {reference!r} is a file; {_HOW_TO_NAME}")
    hint = near_names(reference, ["digits"]) or f"; {_HOW_TO_NAME}"
    raise SourceError(f"data {reference!r} is neither a known name nor an existing folder{hint}")


def _check(preprocessing: Preprocessing) -> None:
    if preprocessing.form != "images":
        takes = {"image-list": "lists of images", "image-pair": "pairs of images", "clips": "clips"}[preprocessing.form]
        raise SourceError(f"this network takes {takes}; data can be given to networks that take single images")
    channels, means, stds = preprocessing.channels, len(preprocessing.mean), len(preprocessing.std)
    if channels not in _PIL_MODES:
        raise SourceError(
            f"the model takes {channels} channels, but images have 1 or 3; give a model that takes images"
        )
    if not channels == means == stds:
        raise SourceError(
            f"preprocessing has {means} means and {stds} standard deviations for {channels} channels; "
            "give one of each per channel"
        )
    known = [mode.value for mode in InterpolationMode]
    if preprocessing.interpolation not in known:
        hint = near_names(preprocessing.interpolation, known) or f"; known are {', '.join(known)}"
        raise SourceError(f"there is no interpolation {preprocessing.interpolation!r}{hint}")


class _Digits(Dataset[tuple[Tensor, int]]):
    """N x 8 x 8 images on the scale [0, 1], preprocessed one by one: all at once may not fit into memory."""

    def __init__(self, images: Tensor, labels: list[int], preprocessing: Preprocessing) -> None:
        self._images = images
        self._labels = labels
        self._channels = preprocessing.channels
        # The digits fill their images, so a crop would cut them: they are always resized as a whole.
        self._transform = v2.Compose([_resize_whole(preprocessing), _normalize(preprocessing)])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images[index].expand(self._channels, -1, -1)), self._labels[index]


def _open_digits(preprocessing: Preprocessing, part: Part) -> LabelledImages:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        raise SourceError("data 'digits' needs scikit-learn: pip install 'asymswap[demo]'") from error
    digits = load_digits()
    labels = digits.target.tolist()
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    chosen = train if part == "train" else test
    # scikit-learn's pixels count from 0 to 16.
    images = torch.from_numpy(digits.images).to(torch.float32)[chosen] / 16
    classes = tuple(str(name) for name in digits.target_names)
    description = f"digits (scikit-learn): {len(chosen)} {part} images of {len(classes)} classes"
    return LabelledImages(_Digits(images, [labels[i] for i in chosen], preprocessing), classes, description)


class _ClassFolders(ImageFolder):  # type: ignore[misc]  # torchvision ships no types
    """torchvision's ImageFolder, blind to hidden folders: editors leave such behind and they are no class."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = _class_names(Path(directory))
        return classes, {name: index for index, name in enumerate(classes)}


def _open_folder(folder: Path, preprocessing: Preprocessing, part: Part) -> LabelledImages:
    root = _part_folder(folder, part)
    if not _class_names(root):
        raise SourceError(f"data folder '{root}' holds no class folders; put each class's images into its own folder")
    mode = _PIL_MODES[preprocessing.channels]
    images = _ClassFolders(
        str(root), image_transform(preprocessing), loader=partial(_read_image, mode=mode), allow_empty=True
    )
    if len(images) == 0:
        raise SourceError(f"the class folders of '{root}' hold no images; known are {', '.join(images.extensions)}")
    classes = tuple(images.classes)
    return LabelledImages(images, classes, f"folder {root}: {len(images)} images of {len(classes)} classes")


def _part_folder(folder: Path, part: Part) -> Path:
    """The folder of the part where `folder` is split into parts, else `folder` itself."""
    parts = {name: classes for name in ("train", "test", "val") if (classes := _class_names(folder / name))}
    if not parts:
        return folder
    name = next((name for name in _PART_FOLDERS[part] if name in parts), None)
    if name is None:
        wanted = " or ".join(_PART_FOLDERS[part])
        raise SourceError(
            f"data folder '{folder}' holds {' and '.join(parts)}, but no folder {wanted} that holds class folders; "
            "add it, or give the folder that is meant"
        )
    # Labels are positions among the sorted names: other classes in one part would shift its labels in silence.
    if parts.get("train", parts[name]) != parts[name]:
        odd = sorted(set(parts["train"]) ^ set(parts[name]))
        raise SourceError(
            f"data folder '{folder}' has other classes in train than in {name} (only in one: {', '.join(odd)}); "
            "give both the same class folders"
        )
    return folder / name


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_image(path: str, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except OSError as error:
        raise SourceError(f"image '{path}' cannot be read ({error}); remove or replace it") from error


def image_transform(preprocessing: Preprocessing) -> v2.Transform:
    """The torchvision transform from a PIL image to a network's input, a float C x H x W tensor."""
    if preprocessing.resize is None:
        geometry = [_resize_whole(preprocessing)]
    else:
        interpolation = InterpolationMode(preprocessing.interpolation)
        geometry = [v2.Resize(preprocessing.resize, interpolation), v2.CenterCrop(list(preprocessing.size))]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*geometry, *to_tensor, _normalize(preprocessing), v2.ToPureTensor()])


def _resize_whole(preprocessing: Preprocessing) -> v2.Transform:
    return v2.Resize(list(preprocessing.size), InterpolationMode(preprocessing.interpolation))


def _normalize(preprocessing: Preprocessing) -> v2.Transform:
    return v2.Normalize(list(preprocessing.mean), list(preprocessing.std))
