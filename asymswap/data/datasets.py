"""Data references: text that names labelled images, and how it becomes a dataset of network inputs.

| reference | what |
| --- | --- |
| `digits` | scikit-learn's 1,797 images |
| a folder | one folder of images a class, or folders `train`, `val` and `test` of such |
| a folder of images | where labels are not needed |
| `cifar10:PATH`, `cifar100:PATH`, `fashion-mnist:PATH`, `mnist:PATH` | as torchvision keeps them below PATH |
| a `.npy`, `.npz` or `.pt` file | tensors; see `asymswap.data.arrays` |
"""

from __future__ import annotations

import urllib.error
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from asymswap.data import arrays
from asymswap.data.images import (
    PIL_MODES,
    ImageFiles,
    InMemory,
    Pictures,
    Preprocessed,
    Subset,
    class_names,
    image_files,
    read_class_folders,
)
from asymswap.errors import SourceError, near_names
from asymswap.types import Preprocessing

Part = Literal["train", "test"]

COLLECTIONS: dict[str, tuple[Any, str]] = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST"),
    "mnist": (datasets.MNIST, "MNIST"),
}
"""The name in references: torchvision's class, and the folder that it looks for."""

_HOW_TO_NAME = (
    "give digits, or a folder that holds one folder of images for each class, or "
    f"{', '.join(f'{name}:PATH' for name in COLLECTIONS)}, or a file of tensors ({', '.join(arrays.SUFFIXES)})"
)
_PART_FOLDERS: dict[Part, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}


@dataclass(frozen=True)
class LabelledImages:
    """Network inputs (float C x H x W) with their class numbers, the classes' names, and a description.

    `pictures` are the images before `preprocessing`, to be augmented; `has_val`: there is a part for validation too.
    """

    images: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]
    description: str
    pictures: Pictures | None = None
    preprocessing: Preprocessing | None = None
    has_val: bool = False

    def __len__(self) -> int:
        return len(cast(Sized, self.images))

    def some(self, chosen: Sequence[int], description: str) -> LabelledImages:
        """Return some of these images, in a given order."""
        assert self.pictures is not None
        assert self.preprocessing is not None
        return _preprocessed(Subset(self.pictures, chosen), self.classes, description, self.preprocessing)


def open_data(
    reference: str, preprocessing: Preprocessing, part: Part, *, download: bool = False, unlabelled: bool = False
) -> LabelledImages:
    """Open the part of the data that `reference` names.

    A folder that holds `train` and `test` (or `val`) folders of class folders is split by them; any other folder is
    the same for both parts, and so is a file of tensors that does not name parts itself. A folder that is itself called
    digits is named `./digits`. `download` fetches what torchvision can; `unlabelled` says that labels are not needed.

    Raises SourceError where there is no such data, it holds no images, or it cannot be preprocessed so.
    """
    _check(preprocessing)
    if reference == "digits":
        return _open_digits(preprocessing, part)
    name, colon, path = reference.partition(":")
    if colon and name in COLLECTIONS:
        return _open_collection(name, Path(path).expanduser(), preprocessing, part, download)
    if download:
        raise SourceError(f"--download is for {', '.join(COLLECTIONS)}; data {reference!r} cannot be downloaded")
    place = Path(reference).expanduser()
    if place.is_dir():
        return _open_folder(place, preprocessing, part, unlabelled)
    if place.is_file() and place.suffix in arrays.SUFFIXES:
        return _open_arrays(place, preprocessing, part, unlabelled)
    if place.exists():
        raise SourceError(f"data {reference!r} is a file; {_HOW_TO_NAME}")
    hint = near_names(name if colon else reference, ["digits", *COLLECTIONS]) or f"; {_HOW_TO_NAME}"
    raise SourceError(f"data {reference!r} is neither a known name nor an existing folder{hint}")


def open_part(reference: str, preprocessing: Preprocessing, name: Literal["val"]) -> LabelledImages:
    """Open the folder of that name in a folder of parts."""
    folder = Path(reference).expanduser()
    _check_same_classes(folder, name)
    return _read_folder(folder / name, preprocessing)


def _check(preprocessing: Preprocessing) -> None:
    if preprocessing.form != "images":
        takes = {"image-list": "lists of images", "image-pair": "pairs of images", "clips": "clips"}[preprocessing.form]
        raise SourceError(f"this network takes {takes}; data can be given to networks that take single images")
    channels, means, stds = preprocessing.channels, len(preprocessing.mean), len(preprocessing.std)
    if channels not in PIL_MODES:
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


def _preprocessed(
    pictures: Pictures, classes: tuple[str, ...], description: str, preprocessing: Preprocessing, has_val: bool = False
) -> LabelledImages:
    images = Preprocessed(pictures, image_transform(preprocessing))
    return LabelledImages(images, classes, description, pictures, preprocessing, has_val)


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
    images = torch.from_numpy(digits.images).to(torch.float32)[chosen, None] / 16
    pictures = InMemory(images, [labels[i] for i in chosen], preprocessing.channels)
    classes = tuple(str(name) for name in digits.target_names)
    description = f"digits (scikit-learn): {len(chosen)} {part} images of {len(classes)} classes"
    # These pictures fill their frame, so that a crop would cut them: they are always resized as a whole.
    return _preprocessed(pictures, classes, description, replace(preprocessing, resize=None))


class _Collection:
    """The pictures of one of torchvision's datasets that keep them in memory."""

    ready = True

    def __init__(self, images: Any, labels: Sequence[int], channels: int) -> None:
        self._images, self.labels, self._mode = images, labels, PIL_MODES[channels]

    def picture(self, index: int) -> Image.Image:
        """Return one picture; both NumPy arrays and tensors give their pixels as an array."""
        return Image.fromarray(self._images[index].__array__()).convert(self._mode)


def _open_collection(
    name: str, folder: Path, preprocessing: Preprocessing, part: Part, download: bool
) -> LabelledImages:
    """Open one of torchvision's data sets below a folder, or in the unpacked folder itself."""
    make, holds = COLLECTIONS[name]
    root = folder.parent if folder.name == holds else folder
    if not download and not (root / holds).is_dir():
        raise SourceError(f"data {name}:{folder} has no folder {holds}; give the folder that holds it, or --download")
    try:
        found = make(str(root), train=part == "train", download=download)
    except (urllib.error.URLError, HTTPException) as error:
        raise SourceError(f"data {name} cannot be downloaded ({getattr(error, 'reason', error)})") from None
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise SourceError(f"data {name}:{folder} cannot be read ({reason}); --download fetches it anew") from None
    pictures = _Collection(found.data, [int(label) for label in found.targets], preprocessing.channels)
    classes = tuple(found.classes)
    description = f"{name} in {folder}: {len(pictures.labels)} {part} images of {len(classes)} classes"
    return _preprocessed(pictures, classes, description, replace(preprocessing, resize=None))


def _open_arrays(path: Path, preprocessing: Preprocessing, part: Part, unlabelled: bool) -> LabelledImages:
    pictures, classes = arrays.read_arrays(path, part, preprocessing.channels)
    if not classes and not unlabelled:
        raise SourceError(f"data {path} holds images without labels; give an .npz or .pt file with both")
    description = f"file {path}: {len(pictures.labels)} images of {len(classes)} classes"
    return _preprocessed(pictures, classes, description, preprocessing)


def _open_folder(folder: Path, preprocessing: Preprocessing, part: Part, unlabelled: bool) -> LabelledImages:
    root = _part_folder(folder, part)
    if unlabelled and not class_names(root):
        files = image_files(root)
        if not files:
            raise SourceError(f"data folder '{root}' holds no images, and no folders of images; put some into it")
        pictures = ImageFiles(files, [-1] * len(files), preprocessing.channels)
        return _preprocessed(pictures, (), f"folder {root}: {len(files)} images", preprocessing)
    has_val = part == "train" and root != folder and bool(class_names(folder / "val"))
    return _read_folder(root, preprocessing, has_val)


def _read_folder(root: Path, preprocessing: Preprocessing, has_val: bool = False) -> LabelledImages:
    if not class_names(root):
        raise SourceError(f"data folder '{root}' holds no class folders; put each class's images into its own folder")
    pictures, classes = read_class_folders(root, preprocessing.channels)
    if not pictures.labels:
        raise SourceError(f"the class folders of '{root}' hold no images; known are {', '.join(IMG_EXTENSIONS)}")
    description = f"folder {root}: {len(pictures.labels)} images of {len(classes)} classes"
    return _preprocessed(pictures, tuple(classes), description, preprocessing, has_val)


def _part_folder(folder: Path, part: Part) -> Path:
    """Return the folder of the part where `folder` is split into parts, else `folder` itself."""
    parts = [name for name in ("train", "test", "val") if class_names(folder / name)]
    if not parts:
        return folder
    name = next((name for name in _PART_FOLDERS[part] if name in parts), None)
    if name is None:
        lacking = " or ".join(_PART_FOLDERS[part])
        raise SourceError(
            f"data folder '{folder}' holds {' and '.join(parts)}, but no folder {lacking} that holds class folders; "
            "add it, or give the folder that is meant"
        )
    _check_same_classes(folder, name)
    return folder / name


def _check_same_classes(folder: Path, name: str) -> None:
    """Check that parts have the same classes: labels are positions among the names, and would shift in silence."""
    train, other = class_names(folder / "train"), class_names(folder / name)
    if train and train != other:
        odd = sorted(set(train) ^ set(other))
        raise SourceError(
            f"data folder '{folder}' has other classes in train than in {name} (only in one: {', '.join(odd)}); "
            "give both the same class folders"
        )


def image_transform(preprocessing: Preprocessing) -> v2.Transform:
    """Return the transform from a picture to a network's input, a float C x H x W tensor."""
    return v2.Compose([*geometry(preprocessing), *to_input(preprocessing)])


def geometry(preprocessing: Preprocessing) -> list[v2.Transform]:
    """Return the transforms to the network's input size."""
    interpolation = InterpolationMode(preprocessing.interpolation)
    if preprocessing.resize is None:
        return [v2.Resize(list(preprocessing.size), interpolation)]
    return [v2.Resize(preprocessing.resize, interpolation), v2.CenterCrop(list(preprocessing.size))]


def to_input(preprocessing: Preprocessing) -> list[v2.Transform]:
    """Return the transforms from a picture of the right size to normalised numbers."""
    normalize = v2.Normalize(list(preprocessing.mean), list(preprocessing.std))
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize, v2.ToPureTensor()]
    if preprocessing.bgr:
        steps.insert(2, _reverse_channels)
    return steps


def _reverse_channels(image: Tensor) -> Tensor:
    return image.flip(-3)
