"""The networks that can be built from a reference alone, without running the user's code, of all families."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from asymswap.fileformats.state_dict import State
from asymswap.models import fingerprints, timm_models, torchvision_models
from asymswap.models.family import Family
from asymswap.models.own_networks import OwnNetworks
from asymswap.types import Origin

TORCHVISION, TIMM, OWN = torchvision_models.Torchvision(), timm_models.Timm(), OwnNetworks()
FAMILIES: tuple[Family, ...] = (TIMM, OWN, TORCHVISION)


def known_references() -> list[str]:
    """Every reference that names a network which needs no further package, in its full form."""
    return OWN.names() + TORCHVISION.names()


def canonical(reference: str) -> str | None:
    """The full form of a reference to a known network (`resnet18` is `torchvision:resnet18`), or None for others.

    What follows `timm:` is taken as it is: whether it names a model is for timm to say, which takes seconds to load.
    """
    found = (family.canonical(reference) for family in FAMILIES)
    return next((full for full in found if full is not None), None)


def family_of(reference: str) -> Family:
    """The family of a known network."""
    return next(family for family in FAMILIES if family.canonical(reference) is not None)


def build(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network of a full reference, with random weights; raises SourceError for arguments that it does not take."""
    return family_of(reference).build(reference, arguments)


def near(reference: str) -> str:
    """Which known references come close to one that is none, as a user writes them, for a message."""
    written = [text.removeprefix("torchvision:") for text in known_references()]
    name = reference.removeprefix("torchvision:")
    # Without a prefix, our own networks are found too; of two by one name, torchvision's comes last and counts.
    names = {text if ":" in name else text.removeprefix("cifar:"): text for text in written}
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(names[text] for text in close)}?" if close else ""


def nearest(state: State, progress: Callable[[int, int], None]) -> list[tuple[float, str]]:
    """Every known classifier by how much of the state dict it shares, from 1 (all keys and shapes) down, best first.

    Likeness is the number of common (key, shape) pairs over that of all. The networks are built without weights.
    """
    own = set(fingerprints.shapes_of(state).items())
    references = [*OWN.names(), *(f"torchvision:{name}" for name in torchvision_models.classifiers())]
    found = []
    for done, reference in enumerate(references, start=1):
        pairs = _shapes(reference)
        found.append((len(own & pairs) / max(len(own | pairs), 1), reference))
        progress(done, len(references))
    return sorted(found, key=lambda item: (-item[0], item[1]))


@functools.cache
def _shapes(reference: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    model = family_of(reference).on_meta(reference, {})
    return frozenset(fingerprints.shapes_of(model.state_dict()).items())


def versions(origin: Origin) -> dict[str, str]:
    """The versions of further packages that are needed to build a network again."""
    return {"timm": timm_models.version()} if TIMM.canonical(origin.reference) is not None else {}
