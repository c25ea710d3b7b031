"""The networks that need no further package, by their names and by the keys and shapes of their state dicts.

`fingerprints.tsv` (made by benchmarks/make_fingerprints.py) has a line for each network that torchvision and asymswap
can build, and for each of its forms that has other keys. The sizes that follow an argument, such as the number of
classes, are left out of its hashes, and read off the state dict instead. All of this without torch.
"""

import difflib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

Free = tuple[str, int, str, int, int]
"""A size that follows an argument: which argument, its default, which key, which axis, how many times the argument.

The positions of a vision transformer follow `image_size`, where the last number is the side of a patch.
"""


@dataclass(frozen=True)
class Fingerprint:
    """One form of a known network: how it is built, and hashes of what its state dict looks like."""

    reference: str
    arguments: Mapping[str, Any]
    keys: str
    shapes: str
    free: Sequence[Free]


@functools.cache
def table() -> Sequence[Fingerprint]:
    """Return the shipped fingerprints."""
    text = resources.files(__package__).joinpath("fingerprints.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return [
        Fingerprint(name, json.loads(given), keys, shapes, json.loads(free)) for name, given, keys, shapes, free in rows
    ]


def stored_networks() -> dict[str, int]:
    """Return the channels of the input of each network in the table, 0 where they vary, by full reference."""
    channels = {entry.reference: free[1] for entry in table() for free in entry.free if free[0] == "in_channels"}
    return {entry.reference: channels.get(entry.reference, 0) for entry in table()}


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


def shapes_hash(shapes: Shapes, free: Iterable[Free]) -> str:
    """Hash the shapes but for the sizes that follow arguments."""
    left_open = {(key, axis) for _, _, key, axis, _ in free}
    lines = []
    for key, shape in shapes.items():
        sizes = ["*" if (key, axis) in left_open else str(size) for axis, size in enumerate(shape)]
        lines.append(f"{key} {'x'.join(sizes)}")
    return digest(lines)


def matches(shapes: Shapes) -> list[Fingerprint]:
    """Return every known network that these shapes fit, with the arguments that make it fit; none is built."""
    found, keys = [], digest(shapes)
    for entry in table():
        fits = entry.keys == keys and entry.shapes == shapes_hash(shapes, entry.free)
        arguments = _read_off(entry.free, shapes) if fits else None
        if arguments is not None:
            found.append(replace(entry, arguments={**entry.arguments, **arguments}))
    return found


def _read_off(free: Iterable[Free], shapes: Shapes) -> dict[str, int] | None:
    """Return the arguments that sizes show, where they differ from the defaults; None if the sizes disagree."""
    arguments = dict[str, int]()
    for argument, _, key, axis, times in free:
        size = shapes[key][axis]
        # Of an image, one position is the class token's; the others are its patches, in a square.
        side = math.isqrt(max(size - 1, 0))
        value, rest = (side * times, size - 1 - side * side) if argument == "image_size" else divmod(size, times)
        if rest or not value or arguments.setdefault(argument, value) != value:
            return None
    return {argument: arguments[argument] for argument, default, *_ in free if arguments[argument] != default}
