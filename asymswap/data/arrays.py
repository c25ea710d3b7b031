"""Tensors in a file: .npy, .npz, .pt or .safetensors; images with labels, or inputs by name."""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asymswap.errors import SourceError, reason_of
from asymswap.fileformats.detect import sniff
from asymswap.fileformats.torch_files import load_object

_IMAGES = ("images", "x", "data")
IMAGES = frozenset(f"{name}{part}" for name in _IMAGES for part in ("", "_train", "_test", "_val"))
"""Entries of a file that are images with or without labels."""

_MOST_CLASSES = 1_000_000
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBERS = (torch.uint8, torch.int16, torch.int32, torch.int64, *_FLOATS)
_UNPACKED, _UNPACKED_RATIO = 256 * 2**20, 8  # an .npz may unpack to so many bytes, or so many times its own size
# numpy parses a header as Python, hence the TokenError; the RuntimeErrors include zipfile's NotImplementedError.
_DAMAGED = (SafetensorError, OSError, ValueError, EOFError, RuntimeError, KeyError, BadZipFile, zlib.error, TokenError)
_HOW = "give an .npz or .pt file with 'images' (N x C x H x W, bytes, or floats as they are) and 'labels' (N)"


class _UnfitError(Exception):
    def __init__(self, reason: str, advice: str = _HOW) -> None:
        super().__init__(f"{reason}; {advice}")


def read_arrays(path: Path, part: str) -> tuple[Tensor, list[int], tuple[str, ...]]:
    """Return the images in a file (N x C x H x W), their labels (-1 without), and the names of the classes.

    A file may hold both parts: `images_train`, `labels_train`, `x_test` … Raises SourceError if it holds no images.
    """
    try:
        entries = _read(path)
        stored, labels = _entry(entries, part, *_IMAGES), _entry(entries, part, "labels", "y", "targets")
        if stored is None:
            raise _UnfitError(f"holds no images (its entries: {', '.join(entries) or 'none'})")
        images = _as_images(_tensor(stored))
        if labels is None:
            return images, [-1] * len(images), ()
        given = _tensor(labels)
        numbers = given.flatten().tolist() if given.numel() == len(images) else []
        if not numbers or not all(isinstance(one, int) and 0 <= one < _MOST_CLASSES for one in numbers):
            what = f"has labels of shape {tuple(given.shape)} and {given.dtype} for {len(images)} images"
            raise _UnfitError(what, f"give a whole number from 0 to {_MOST_CLASSES - 1:,} for each")
        classes: Any = range(max(numbers) + 1) if entries.get("classes") is None else entries["classes"]
        if (isinstance(classes, np.ndarray) or _is_strided(classes)) and classes.ndim == 1:
            classes = classes.tolist()
        if not isinstance(classes, list | tuple | range) or not all(isinstance(c, str | int | float) for c in classes):
            raise _UnfitError("has 'classes' that are no list of names", "give one text for each class")
        if max(numbers) >= len(classes):
            raise _UnfitError(f"has a label {max(numbers)}, but names only {len(classes)} classes")
        return images, [int(one) for one in numbers], tuple(map(str, classes))
    except _UnfitError as error:
        raise SourceError(f"data {path} {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor in a file by its name (`images` for one without); raise SourceError for anything else."""
    try:
        return {name: _tensor(value) for name, value in _read(path).items() if name not in ("classes", "labels")}
    except _UnfitError as error:
        raise SourceError(f"data {path} {error}") from None


def _entry(entries: Mapping[str, Any], part: str, *names: str) -> Any:
    known = [f"{name}_{part}" for name in names] + [f"{part}_{name}" for name in names] + [*names]
    return next((entries[name] for name in known if name in entries), None)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return {"images": _read_npy(file, path.stat().st_size)}
        if path.suffix == ".npz":
            with ZipFile(path) as archive:
                entries, size = archive.infolist(), path.stat().st_size
                unpacked = sum(entry.file_size for entry in entries)
                if unpacked > max(size * _UNPACKED_RATIO, _UNPACKED):
                    raise ValueError(f"it has {size:,} bytes and would unpack to {unpacked:,}; use numpy.savez")
                found = {}
                for entry in entries:
                    with archive.open(entry) as file:
                        found[entry.filename.removesuffix(".npy")] = _read_npy(file, entry.file_size)
                return found
        if path.suffix == ".safetensors":
            return dict(load_file(path, backend="pread"))
        value = load_object(path, sniff(path), False, "it", "store tensors alone")
    except (SourceError, *_DAMAGED) as error:
        raise _UnfitError(f"cannot be read ({reason_of(error, 300)})") from None
    if isinstance(value, Tensor):
        return {"images": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"images": value[0], "labels": value[1]}
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    raise _UnfitError(f"holds a {type(value).__name__}")


def _read_npy(file: IO[bytes], size: int) -> Any:
    """Read an array from an .npy file of `size` bytes; no size in its header is trusted."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject or dtype.kind not in "biufcSU":
        raise ValueError(f"it holds an array of {dtype}, not of numbers")
    count = math.prod(int(n) for n in shape)
    claimed = count * dtype.itemsize
    if claimed > size or (count and not dtype.itemsize):
        raise ValueError(f"it claims {claimed:,} bytes for an array of {'x'.join(map(str, shape))}, and has {size:,}")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _tensor(value: Any) -> Tensor:
    """Return tensors, numpy's own arrays and lists of plain numbers as a tensor; refuse everything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="), copy=False)))
    if isinstance(value, list | tuple) and value and all(type(item) in (bool, int, float) for item in value):
        if any(type(item) is int and abs(item) >= 2**63 for item in value):
            raise _UnfitError("holds a number beyond 64 bits")
        return torch.tensor(value)
    if isinstance(value, list | tuple) and value and all(map(_is_strided, value)):
        if len({(item.shape, item.dtype) for item in value}) > 1:
            raise _UnfitError("holds a list of tensors of several shapes")
        return torch.stack([item.detach() for item in value])
    if not _is_strided(value):
        what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise _UnfitError(f"holds {what}, which is no plain tensor")
    tensor: Tensor = value.detach().resolve_conj().resolve_neg()
    return tensor


def _is_strided(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)


def _as_images(images: Tensor) -> Tensor:
    """Return images, maybe without channels or with them last, as N x C x H x W: bytes, or numbers as they are."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or not images.numel():
        raise _UnfitError(f"holds a tensor of shape {tuple(images.shape)}, which is no images")
    if images.dtype not in _NUMBERS:
        raise _UnfitError(f"holds images of {images.dtype}")
    if not bool(torch.isfinite(images).all()):
        raise _UnfitError("holds NaN or infinite numbers")
    return images if images.dtype == torch.uint8 else images.to(torch.float32)
