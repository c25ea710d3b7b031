"""The networks that need no further package, by their names and by the keys and shapes of their state dicts.

`fingerprints.tsv` (made by benchmarks/make_fingerprints.py) has a line for each network that torchvision and asymswap
can build, and for each of its forms that has other keys. The sizes that follow the number of classes or of input
channels are left out of its hashes, and read off the state dict instead. All of this without torch.
"""

import difflib
import functools
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

Free = tuple[str, int, int]
"""A size that follows the number of classes: which key, which axis, and how many times the number it is."""


@dataclass(frozen=True)
class Fingerprint:
    """One form of a known network: how it is built, and what its state dict looks like.

    `stem` is the first conv's weight, whose axis 1 counts the input's channels; `position` is the position embedding
    of a vision transformer, whose axis 1 follows the image's size.
    """

    reference: str
    arguments: Mapping[str, Any]
    keys: str
    shapes: str
    classes: tuple[Free, ...] = ()
    stem: str = ""
    position: str = ""
    default_classes: int = 0
    default_channels: int = 0
    default_positions: int = 0


@functools.cache
def table() -> Mapping[str, Sequence[Fingerprint]]:
    """Return the shipped fingerprints by the hash of their keys."""
    text = resources.files(__package__).joinpath("fingerprints.tsv").read_text(encoding="utf-8")
    found: dict[str, list[Fingerprint]] = defaultdict(list)
    for line in text.splitlines():
        if not line.startswith("#"):
            reference, arguments, keys, shapes, classes, count, stem, channels, position, positions = line.split("\t")
            parts = (part.rsplit(":", 2) for part in classes.split())
            free = tuple((key, int(axis), int(times)) for key, axis, times in parts)
            counts = [int(number or 0) for number in (count, channels, positions)]
            entry = Fingerprint(reference, json.loads(arguments or "{}"), keys, shapes, free, stem, position, *counts)
            found[keys].append(entry)
    return found


def stored_networks() -> dict[str, int]:
    """Return the channels of the input of each network in the table, 0 where they vary, by full reference."""
    return {entry.reference: entry.default_channels for entries in table().values() for entry in entries}


def near(reference: str) -> str:
    """Say, for a message, which networks come close to a name that is none, as a user writes them."""
    name = reference.removeprefix("torchvision:")
    written = [text.removeprefix("torchvision:") for text in stored_networks()]
    # Without a prefix, our own networks are found too; of two by one name, torchvision's comes last and counts.
    names = {text if ":" in name else text.removeprefix("cifar:"): text for text in written}
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    known = "; known are torchvision's names, timm:…, cifar:…, digits-resnet, module:factory"
    return f"; did you mean {', '.join(names[text] for text in close)}?" if close else known


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a state dict, without the counters of batches, which old files lack."""
    return {key: tuple(t.shape) for key, t in state.items() if not key.endswith("num_batches_tracked")}


def digest(lines: Iterable[str]) -> str:
    """Hash lines of text, in any order: the keys, or the keys with their shapes."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def shapes_hash(shapes: Shapes, entry: Fingerprint) -> str:
    """Hash the shapes but for the sizes that a fingerprint leaves open."""
    free = {(key, axis) for key, axis, _ in entry.classes} | {(entry.stem, 1), (entry.position, 1)}
    lines = []
    for key, shape in shapes.items():
        sizes = ["*" if (key, axis) in free else str(size) for axis, size in enumerate(shape)]
        lines.append(f"{key} {'x'.join(sizes)}")
    return digest(lines)


def matches(shapes: Shapes) -> list[Fingerprint]:
    """Return every known network that these shapes fit, with the arguments that make it fit; none is built."""
    found = []
    for entry in table().get(digest(shapes), ()):
        arguments = _read_off(entry, shapes) if shapes_hash(shapes, entry) == entry.shapes else None
        if arguments is not None:
            found.append(replace(entry, arguments={**entry.arguments, **arguments}))
    return found


def _read_off(entry: Fingerprint, shapes: Shapes) -> dict[str, Any] | None:
    """Return the arguments that the free sizes show, where they differ from the defaults; None if they disagree."""
    arguments: dict[str, Any] = {}
    counts = {divmod(shapes[key][axis], times) for key, axis, times in entry.classes}
    if len(counts) > 1 or any(rest or not count for count, rest in counts):
        return None
    for count, _ in counts:
        if count != entry.default_classes:
            arguments["num_classes"] = count
    if entry.stem and shapes[entry.stem][1] != entry.default_channels:
        arguments["in_channels"] = shapes[entry.stem][1]
    if entry.position and shapes[entry.position][1] != entry.default_positions:
        # One position is the class token's; the others are the image's patches, in a square.
        side = math.isqrt(max(shapes[entry.position][1] - 1, 0))
        if side * side != shapes[entry.position][1] - 1:
            return None
        arguments["image_size"] = side * shapes[entry.stem][2]
    return arguments
