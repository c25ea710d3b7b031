"""Images in a tensor file: .npy, .npz or .pt."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from asymswap.errors import SourceError
from asymswap.sources.files import sniff
from asymswap.sources.torch_files import load_object
from asymswap.training.pictures import InMemory

SUFFIXES = (".npy", ".npz", ".pt", ".pth")

_IMAGES = ("images", "x", "data")
_LABELS = ("labels", "y", "targets")
_MOST_CLASSES = 1_000_000
_HOW = "give an .npz or .pt file with 'images' (N x C x H x W, bytes or floats from 0 to 1) and 'labels' (N)"


def read_arrays(path: Path, part: Literal["train", "test"], channels: int) -> tuple[InMemory, tuple[str, ...]]:
    """The pictures in a file and the names of their classes; where it has no labels, all are -1 and there is no class.

    A file may hold both parts: `images_train`, `labels_train`, `images_test` … (or `x_train`, as others name them).
    Raises SourceError where they are no images.
    """
    entries = _read(path)
    images, labels = (_entry(entries, names, part) for names in (_IMAGES, _LABELS))
    if images is None:
        raise SourceError(f"data {path} holds no images (its entries: {', '.join(entries) or 'none'}); {_HOW}")
    tensor = _as_images(_tensor(images, path), path)
    if labels is None:
        return InMemory(tensor, [-1] * len(tensor), channels), ()
    numbers = _as_labels(_tensor(labels, path), len(tensor), path)
    classes = entries.get("classes")
    names = tuple(map(str, range(max(numbers) + 1) if classes is None else np.asarray(classes).tolist()))
    if max(numbers) >= len(names):
        raise SourceError(f"data {path} has a label {max(numbers)}, but names only {len(names)} classes")
    return InMemory(tensor, numbers, channels), names


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".npy":
            return {"images": np.load(path, allow_pickle=False)}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        value = load_object(path, sniff(path), False, "it", "store tensors alone")
    except SourceError as error:
        raise SourceError(f"data {path} cannot be read ({error}); {_HOW}") from None
    except (OSError, ValueError, EOFError, RuntimeError, KeyError, BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:160]
        raise SourceError(f"data {path} cannot be read ({reason}); {_HOW}") from None
    if isinstance(value, Tensor):
        return {"images": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"images": value[0], "labels": value[1]}
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    raise SourceError(f"data {path} holds a {type(value).__name__}; {_HOW}")


def _entry(entries: Mapping[str, Any], names: tuple[str, ...], part: str) -> Any:
    wanted = [f"{name}_{part}" for name in names] + [f"{part}_{name}" for name in names] + list(names)
    return next((entries[name] for name in wanted if name in entries), None)


def _tensor(value: Any, path: Path) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SourceError(f"data {path} holds what is no tensor ({error}); {_HOW}") from None


def _as_images(images: Tensor, path: Path) -> Tensor:
    """N x C x H x W of images that may come without channels, or with them last."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise SourceError(f"data {path} holds a tensor of shape {tuple(images.shape)}, which is no images; {_HOW}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise SourceError(f"data {path} holds images of {images.dtype}; {_HOW}")
    low, high = (float(bound) for bound in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise SourceError(f"data {path} holds floats from {low:.3g} to {high:.3g}, not from 0 to 1; {_HOW}")
    return images


def _as_labels(labels: Tensor, count: int, path: Path) -> list[int]:
    labels = labels.reshape(-1) if labels.numel() == count else labels
    if not (labels.is_floating_point() or labels.is_complex()):
        # Of the larger unsigned ones torch knows no minimum.
        labels = labels.to(torch.int64)
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex() or int(labels.min()) < 0:
        raise SourceError(
            f"data {path} has labels of shape {tuple(labels.shape)} and {labels.dtype} for {count} images; "
            "give one whole number from 0 on for each"
        )
    if int(labels.max()) >= _MOST_CLASSES:
        raise SourceError(f"data {path} has a label {int(labels.max())}, which is no number of a class; {_HOW}")
    numbers: list[int] = labels.tolist()
    return numbers
