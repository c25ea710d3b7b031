"""Write asymswap/models/fingerprints.tsv: hashes of the state dicts of the known networks.

Every network is built without weights, and built again with another number of classes (of input channels, of pixels):
the sizes that change are those that follow the argument. `--check` compares instead of writing.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchvision

from asymswap.errors import SourceError
from asymswap.models import builders, fingerprints
from asymswap.models.fingerprints import Fingerprint, Free, Shapes, digest, shapes_hash

OUT = Path(__file__).parents[1] / "asymswap" / "models" / "fingerprints.tsv"

# Numbers that no network has by default and that share no divisor with each other.
CLASSES, CHANNELS = (11, 13), 5


def references() -> list[str]:
    """All known networks but the quantisable ones, which compute what their namesakes do and have the same keys."""
    names = builders.OWN.names() + builders.TORCHVISION.names()
    return [name for name in names if not name.startswith("torchvision:quantized_")]


def forms(reference: str) -> list[dict[str, Any]]:
    """The arguments that change which keys a network has: auxiliary heads, there or not."""
    base = shapes_of(reference, {})
    found: list[dict[str, Any]] = [{}]
    for arguments in ({"aux_logits": False}, {"aux_loss": True}):
        shapes = shapes_or_none(reference, arguments)
        if shapes is not None and shapes.keys() != base.keys():
            found.append(arguments)
    return found


def shapes_of(reference: str, arguments: Mapping[str, Any]) -> Shapes:
    """The keys and shapes of a network's state dict."""
    return fingerprints.shapes_of(builders.family_of(reference).on_meta(reference, arguments).state_dict())


def shapes_or_none(reference: str, arguments: Mapping[str, Any]) -> Shapes | None:
    """The shapes of a network, or None where it does not take the arguments."""
    try:
        return shapes_of(reference, arguments)
    except SourceError:
        return None


def fingerprint(reference: str, arguments: dict[str, Any]) -> Fingerprint:
    """What one form of a network looks like."""
    base = shapes_of(reference, arguments)
    free: list[Free] = []
    some, others = (shapes_or_none(reference, {**arguments, "num_classes": n}) for n in CLASSES)
    if some is not None and others is not None and some.keys() == others.keys() == base.keys():
        changed = [
            (key, axis, (b - a) // (CLASSES[1] - CLASSES[0]))
            for key in base
            for axis, (a, b) in enumerate(zip(some[key], others[key], strict=True))
            if a != b
        ]
        if all(some[key][axis] == times * CLASSES[0] for key, axis, times in changed):
            free += [("num_classes", base[key][axis] // times, key, axis, times) for key, axis, times in changed]
    wider = shapes_or_none(reference, {**arguments, "in_channels": CHANNELS})
    stems = [key for key in base if wider is not None and wider[key] != base[key]]
    if len(stems) == 1:
        free.append(("in_channels", base[stems[0]][1], stems[0], 1, 1))
    if reference.startswith("torchvision:vit_"):
        position, patch = "encoder.pos_embedding", base["conv_proj.weight"][2]
        free.append(("image_size", patch * math.isqrt(base[position][1] - 1), position, 1, patch))
    return Fingerprint(reference, arguments, digest(base), shapes_hash(base, free), free)


def to_line(entry: Fingerprint) -> str:
    """A fingerprint as a line of the table."""
    arguments, free = (json.dumps(part, separators=(",", ":")) for part in (dict(entry.arguments), entry.free))
    return "\t".join([entry.reference, arguments, entry.keys, entry.shapes, free])


def text() -> str:
    """The whole table."""
    lines = [to_line(fingerprint(reference, arguments)) for reference in references() for arguments in forms(reference)]
    head = f"# made by benchmarks/make_fingerprints.py with torchvision {torchvision.__version__.partition('+')[0]}"
    columns = "# reference, arguments, keys, shapes, sizes that follow an argument: it, its default, key, axis, times"
    return "\n".join([head, columns, *lines]) + "\n"


def main() -> int:
    """Write the table, or say whether it is current."""
    warnings.simplefilter("ignore")
    made = text()
    if "--check" in sys.argv[1:]:
        current = OUT.exists() and OUT.read_text(encoding="utf-8") == made
        print(f"{OUT} is {'current' if current else 'out of date'}")
        return 0 if current else 1
    OUT.write_text(made, encoding="utf-8")
    print(f"{len(made.splitlines()) - 2} fingerprints of {len(references())} networks -> {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
