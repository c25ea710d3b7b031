"""Data references: text that names labelled images, and how it becomes datasets of network inputs.

| reference | what |
| --- | --- |
| `digits` | 1,797 images of 8x8 in this package: UCI's Optical Recognition of Handwritten Digits, CC BY 4.0 |
| a folder | one folder of images a class, or folders `train`, `val` and `test` of such |
| a folder of images | where labels are not needed |
| `cifar10:PATH`, `cifar100:PATH`, `fashion-mnist:PATH`, `mnist:PATH` | as torchvision keeps them below PATH |
| a `.npy`, `.npz` or `.pt` file | tensors; see `asymswap.data.arrays` |
| `pairs:INPUTS,TARGETS`, `masks:IMAGES,MASKS` | their inputs, without labels; see `asymswap.data.metrics` |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import Image as TensorImage

from asymswap.data import arrays
from asymswap.data.references import COLLECTIONS, PAIRED, TENSORS, check_reference
from asymswap.errors import SourceError, call, check_choice, reason_of
from asymswap.types import Patches, Preprocessing
from asymswap.utils.tensors import generator_for

Part = Literal["train", "test", "val"]
PIL_MODES = {1: "L", 3: "RGB"}

_COLLECTIONS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashion-mnist": FashionMNIST, "mnist": MNIST}


@dataclass(frozen=True)
class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Pictures by number; as a Dataset the network inputs (float C x H x W) made of them, with their class numbers."""

    labels: Sequence[int]  # class numbers, -1 without labels
    picture: Callable[[int], Any]  # a PIL image, or a float C x H x W tensor from 0 to 1; SourceError if unreadable
    classes: tuple[str, ...]  # their names
    description: str
    preprocessing: Preprocessing
    ready: bool = True  # in memory, so that no workers are needed
    as_they_are: bool = False  # numbers of the user's own, which are normalised only if the user says how
    has_val: bool = False  # the data has a part for validation too

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self.picture(index)), self.labels[index]

    @cached_property
    def _transform(self) -> v2.Transform:
        return image_transform(self.preprocessing)

    def some(self, chosen: Sequence[int], description: str) -> LabelledImages:
        """Return some of these images, in a given order."""
        labels = [self.labels[index] for index in chosen]
        return replace(self, labels=labels, picture=partial(_nth, self.picture, chosen), description=description)


def _nth(make: Callable[[Any], Any], items: Any, index: int) -> Any:
    """Return what is made of an item: unlike a closure, a `partial` of this can be sent to another process."""
    return make(items[index])


def from_memory(images: Tensor, channels: int) -> Callable[[int], TensorImage]:
    """Return pictures N x C x H x W, of bytes or floats, by number, made grey or coloured as needed, or SourceError."""
    if images.shape[1] != channels and not {images.shape[1], channels} <= {1, 3}:
        raise SourceError(f"the model takes {channels} channels, the data has {images.shape[1]}; give other data")
    return partial(_nth, partial(_from_memory, channels), images)


def _from_memory(channels: int, image: Tensor) -> TensorImage:
    image = image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image.to(torch.float32)
    if image.shape[0] < channels:
        image = image.expand(channels, -1, -1)
    elif image.shape[0] > channels:
        image = v2.functional.rgb_to_grayscale(image)
    return TensorImage(image)


def read_picture(path: str | Path, mode: str | None) -> Image.Image:
    """Read an image file as grey (L), in colour (RGB), or as it is; raise SourceError if it cannot be read."""
    try:
        with Image.open(path) as image:
            if mode is None:
                return image.copy()
            if image.mode.startswith("I;16"):
                # Pillow itself would cut off all that is brighter than 255 of 65,535.
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits, of which nobody knows what is white")
            return image.convert(mode)
    # Besides its own OSErrors, Pillow passes decoders' errors on, and refuses decompression bombs.
    # ImportError: a package that has put itself before Pillow, as ultralytics does, may lack one of its own.
    except (OSError, SyntaxError, ValueError, ImportError, Image.DecompressionBombError) as error:
        raise SourceError(f"image '{path}' cannot be read ({error}); remove or replace it") from error


def open_data(
    reference: str, preprocessing: Preprocessing, part: Part, *, download: bool = False, unlabelled: bool = False
) -> LabelledImages:
    """Open a part of the data that `reference` names; `val` is for folders that have it.

    A folder of `train` and `test` (or `val`) folders of class folders is split by them; any other is the same for all
    parts, and so is a file of tensors that names no parts. `download` fetches what torchvision can; `unlabelled`:
    labels are not needed. Raises SourceError if there is no such data, or it cannot be preprocessed like this.
    """
    known = preprocessing
    if known.form != "images" and not (unlabelled and known.form == "image-list"):
        takes = {"image-list": "lists of images", "image-pair": "pairs of images", "clips": "clips"}[known.form]
        raise SourceError(f"this network takes {takes}; data can be given to networks that take single images")
    place, channels, means, stds = Path(reference).expanduser(), known.channels, len(known.mean), len(known.std)
    tensors = place.suffix in TENSORS and place.is_file()
    if channels not in PIL_MODES and not tensors:
        what = f"the model takes {channels} channels, images have 1 or 3"
        raise SourceError(f"{what}; give `input_size=…`, or a file of tensors")
    if not channels == means == stds:
        raise SourceError(f"preprocessing has {means} means and {stds} stds for {channels} channels; give one for each")
    check_choice("`interpolation=…`", known.interpolation, [mode.value for mode in InterpolationMode])
    name, colon, path = reference.partition(":")
    if reference == "digits":
        with np.load(Path(__file__).with_name("digits.npz")) as stored:
            chosen = stored["train" if part == "train" else "test"]
            pixels = torch.from_numpy(stored["images"][chosen]).to(torch.float32)[:, None] / 16  # they count to 16
            labels = stored["labels"][chosen].tolist()
        description = f"digits (scikit-learn): {len(chosen)} {part} images of 10 classes"
        # These pictures fill their frame, so that a crop would cut them: they are always resized as a whole.
        whole = replace(known, resize=None)
        return LabelledImages(labels, from_memory(pixels, channels), tuple("0123456789"), description, whole)
    if colon and name in COLLECTIONS:
        return _open_collection(name, Path(path).expanduser(), known, part, download)
    if colon and name in PAIRED:
        if not unlabelled:
            raise SourceError(f"data {reference!r} has no classes; give images with labels")
        samples = [(path, -1) for path, _ in paired_files(reference)]
        return _of_files(samples[0][0].parent, samples, known)
    if download:
        raise SourceError(f"`download=True` is for {', '.join(COLLECTIONS)}; {reference!r} cannot be downloaded")
    if place.is_dir():
        return _open_folder(place, known, part, unlabelled)
    check_reference(reference)
    images, labels, classes = arrays.read_arrays(place, part)
    if not classes and not unlabelled:
        raise SourceError(f"data {place} holds images without labels; give an .npz or .pt file with both")
    about = f"file {place}: {len(labels)} images of {len(classes)} classes"
    own = images.dtype != torch.uint8
    return LabelledImages(labels, from_memory(images, channels), classes, about, known, as_they_are=own)


def patches_from(data: LabelledImages, patches: Patches, count: int, seed: int) -> LabelledImages:
    """Return so many square patches of the images in turn, drawn by number and seed, with noise."""
    picture, description = partial(_patch, data, patches, seed), f"{data.description}{patches}"
    return replace(data, labels=[-1] * count, picture=picture, classes=(), description=description)


def _patch(data: LabelledImages, patches: Patches, seed: int, index: int) -> TensorImage:
    image = v2.functional.to_image(data.picture(index % len(data)))
    image = v2.functional.to_dtype(image, torch.float32, scale=True)
    draw, size = generator_for(seed, "patch", index), patches.size
    if size is not None:
        height, width = image.shape[-2:]
        if min(height, width) < size:
            raise SourceError(f"an image of {height}x{width} is smaller than a patch; give a smaller `patch={size}`")
        counts = height - size + 1, width - size + 1, 2
        top, left, turned = (int(torch.randint(0, count, (1,), generator=draw)) for count in counts)
        image = image[..., top : top + size, left : left + size]
        image = image.flip(-1) if turned else image
    if patches.noise:
        image = image + patches.noise * torch.randn(image.shape, generator=draw)
    return TensorImage(image)


def _open_collection(name: str, folder: Path, known: Preprocessing, part: Part, download: bool) -> LabelledImages:
    make: Any = _COLLECTIONS[name]
    holds = getattr(make, "base_folder", make.__name__)  # as torchvision calls what it unpacks
    # The folder above, or the unpacked folder itself.
    root = folder.parent if folder.name == holds else folder
    if not download and not (root / holds).is_dir():
        raise SourceError(f"data {name}:{folder} has no folder {holds}; give the folder above it, or `download=True`")
    try:
        found = make(str(root), train=part == "train", download=download)
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError, HTTPException) as error:
        advice = "" if download else "; `download=True` fetches it again"
        raise SourceError(f"data {name}:{folder} cannot be read ({reason_of(error)}){advice}") from None
    labels, classes = [int(label) for label in found.targets], tuple(found.classes)
    picture = partial(_nth, partial(_from_collection, PIL_MODES[known.channels]), found.data)
    description = f"{name} in {folder}: {len(labels)} {part} images of {len(classes)} classes"
    return LabelledImages(labels, picture, classes, description, replace(known, resize=None))


def _from_collection(mode: str, image: Any) -> Image.Image:
    # Both NumPy arrays and tensors give their pixels as an array.
    return Image.fromarray(image.__array__()).convert(mode)


def _open_folder(folder: Path, preprocessing: Preprocessing, part: Part, unlabelled: bool) -> LabelledImages:
    parts = {name: _class_names(folder / name) for name in ("train", "test", "val")}
    present = [name for name, classes in parts.items() if classes]
    root, classes = folder, _class_names(folder)
    if present:
        suitable = ("test", "val") if part == "test" else (part,)
        name = next((name for name in suitable if name in present), None)
        if name is None:
            what = f"holds {' and '.join(present)}, but no folder {' or '.join(suitable)} that holds class folders"
            raise SourceError(f"data folder '{folder}' {what}; add it, or give the folder that is meant")
        root, classes = folder / name, parts[name]
        # Labels are positions among the names: with other classes they would shift unnoticed.
        if parts["train"] and parts["train"] != classes:
            odd = ", ".join(sorted(set(parts["train"]) ^ set(classes)))
            what = f"has other classes in train than in {name} (only in one: {odd})"
            raise SourceError(f"data folder '{folder}' {what}; give both the same class folders")
    if not classes:
        if not unlabelled:
            raise SourceError(f"folder '{root}' holds no class folders; put each class's images into its own folder")
        return _of_files(root, [(path, -1) for path in image_files(root)], preprocessing)
    # As torchvision's ImageFolder, but without hidden files, which editors and archives leave (`._x.jpg`).
    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(str(root), numbers, is_valid_file=_is_image, allow_empty=True)
    if not samples:
        raise SourceError(f"the class folders of '{root}' hold no images; known are {', '.join(IMG_EXTENSIONS)}")
    return replace(_of_files(root, samples, preprocessing, tuple(classes)), has_val=bool(parts["val"]))


def _of_files(
    place: Path, samples: Sequence[tuple[str | Path, int]], preprocessing: Preprocessing, classes: tuple[str, ...] = ()
) -> LabelledImages:
    paths, labels = zip(*samples, strict=True)
    picture = partial(_nth, partial(read_picture, mode=PIL_MODES[preprocessing.channels]), paths)
    description = f"folder {place}: {len(paths)} images" + (f" of {len(classes)} classes" if classes else "")
    return LabelledImages(labels, picture, classes, description, preprocessing, ready=False)


def paired_files(reference: str) -> list[tuple[Path, Path]]:
    """Return the files of `pairs:INPUTS,TARGETS`, two images or folders of images of the same stems; or SourceError."""
    name, _, text = reference.partition(":")
    places = text.split(",")
    if len(places) != 2 or not all(places):
        raise SourceError(f"data {reference!r}: give {name}:{PAIRED[name]}, two folders or two files")
    first, second = (Path(place).expanduser() for place in places)
    if first.is_file() and second.is_file():
        return [(first, second)]
    stems: tuple[dict[str, Path], dict[str, Path]] = {}, {}
    for folder, found in zip((first, second), stems, strict=True):
        for path in image_files(folder):
            if found.setdefault(path.stem, path) != path:
                raise SourceError(f"'{found[path.stem]}' and '{path}' have one stem, by which images are paired")
    alone = [path for one, other in (stems, stems[::-1]) for stem, path in one.items() if stem not in other]
    if alone:
        others = f" (and so have {len(alone) - 1} more)" if len(alone) > 1 else ""
        raise SourceError(f"'{alone[0]}' has no partner of the same stem in the other folder{others}")
    return [(path, stems[1][stem]) for stem, path in stems[0].items()]


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder, sorted by name; raise SourceError if there is none."""
    found = sorted(path for path in folder.iterdir() if _is_image(path) and path.is_file()) if folder.is_dir() else []
    if not found:
        raise SourceError(f"data folder '{folder}' holds no images, and no folders of images; put some into it")
    return found


def _is_image(path: str | Path) -> bool:
    return Path(path).suffix.lower() in IMG_EXTENSIONS and not Path(path).name.startswith(".")


def _class_names(folder: Path) -> list[str]:
    """Return the names of the visible folders in a folder, sorted; none if it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


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
    reverse = [v2.Lambda(partial(torch.flip, dims=(-3,)))] if preprocessing.bgr else []
    normalize = v2.Normalize(list(preprocessing.mean), list(preprocessing.std))
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), *reverse, normalize, v2.ToPureTensor()]


def own_samples(data: Any, preprocessing: Preprocessing) -> LabelledImages:
    """Return the samples of the user's dataset, or of a tensor, as if they were images without labels."""
    about = f"{len(data)} samples of a {type(data).__name__}"
    return LabelledImages([-1] * len(data), partial(call, "`data=…`", data.__getitem__), (), about, preprocessing)


def open_parts(
    reference: str | LabelledImages,
    preprocessing: Preprocessing,
    validation: str | None,
    seed: int,
    *,
    download: bool = False,
    unlabelled: bool = False,
) -> tuple[LabelledImages, LabelledImages | None]:
    """Return images to train on, and others to validate on, if any.

    `validation` is the fraction of each class's training images to hold back; `none`; `test` for the test part; or
    another data reference. By default it is the folder `val` if there is one, else a tenth: the test part stays unseen.
    `unlabelled`: labels are not needed. Raises SourceError for data that cannot be trained on.
    """
    opened = partial(open_data, preprocessing=preprocessing, unlabelled=unlabelled)
    train = reference if isinstance(reference, LabelledImages) else opened(reference, part="train", download=download)
    seen = set(train.labels)
    empty = [name for label, name in enumerate(train.classes) if label not in seen]
    if empty and not unlabelled:
        what = f"there is no image of class {', '.join(map(repr, empty[:3]))} to train on in {train.description}"
        raise SourceError(f"{what}; add some, or remove it")
    if validation is None and train.has_val:
        other = opened(str(reference), part="val")
    elif validation == "test" and isinstance(reference, str):
        other = opened(reference, part="test", download=download)
    else:
        text = "0.1" if validation is None else "0" if validation == "none" else validation
        try:
            fraction = float(text)
        except ValueError:
            if not isinstance(reference, str):
                raise SourceError(f"`validation={text}` goes with a data reference; give 0.1 or none") from None
            other = opened(text, part="test")
        else:
            if fraction == 0:
                return train, None
            if not 0 < fraction < 1:
                raise SourceError(f"`validation={fraction}` is no fraction of the images; give 0.1, none, test or data")
            kept, held = split(train.labels, fraction, seed)
            about = f"of {train.description} (seed {seed})"
            if not held:
                raise SourceError(f"a validation part of {fraction:g} {about} would be empty; give a larger one")
            return train.some(kept, f"{len(kept)} {about}"), train.some(held, f"{len(held)} {about}")
    if other.classes != train.classes and not unlabelled:
        theirs, own = (f"({', '.join(data.classes[:5])} …)" for data in (other, train))
        what = f"the classes to validate on {theirs} are not those to train on {own}"
        raise SourceError(f"{what}; give data of the same classes")
    return train, other


def split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers, in order, of images that stay, at least one of each class, and of the fraction held back."""
    order = torch.randperm(len(labels), generator=generator_for(seed, "validation")).tolist()
    left = {label: min(round(fraction * count), count - 1) for label, count in Counter(labels).items()}
    held = set()
    for index in order:
        if left[labels[index]] > 0:
            left[labels[index]] -= 1
            held.add(index)
    return [index for index in range(len(labels)) if index not in held], sorted(held)
