"""Which architecture a bare state dict belongs to: by the table of fingerprints, under every prefix that may be off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asymswap.errors import SourceError
from asymswap.fileformats.state_dict import State, compare
from asymswap.models import builders, fingerprints, torchvision_models
from asymswap.models.key_prefixes import View, views
from asymswap.types import Progress

# Known networks of others that have the very keys and shapes of one here, and another function.
_TWINS = {"torchvision:resnet50": ", as timm's resnetblur50 has"}


YOUR_OWN = "a network of your own, or one with another head: --arch net.py:build --trust-code"


@dataclass(frozen=True)
class Identified:
    """The known network that a state dict is of, and the state dict as that network has it."""

    reference: str
    arguments: Mapping[str, Any]
    view: View

    def notes(self) -> tuple[str, ...]:
        """What was concluded and that it may be wrong, for the report."""
        note = (
            f"architecture taken from keys and shapes: {self.reference} (--arch names another); a variant that "
            f"computes differently can have the same{_TWINS.get(self.reference, '')}"
        )
        return (*self.view.notes(), note)


def identify(state: State, label: str, progress: Progress) -> Identified:
    """The one known architecture that a state dict fits; raises SourceError where there is none or more than one."""
    for view in views(torchvision_models.with_current_keys(state)):
        found = fingerprints.matches(fingerprints.shapes_of(view.state)) if view.whole else []
        if len(found) > 1:
            names = ", ".join(match.reference.removeprefix("torchvision:") for match in found)
            raise SourceError(f"{label} holds a state_dict that fits {names}; choose with --arch")
        if found:
            return Identified(found[0].reference, found[0].arguments, view)
    raise SourceError(
        f"{label} holds a state_dict of an unknown architecture; name it with --arch ({YOUR_OWN}); "
        f"{_told(state, progress)}"
    )


def nearest(state: State, progress: Progress) -> tuple[float, str, View]:
    """The known network that shares most with a state dict, how much that is (0 to 1), and under which prefix."""
    ranked = []
    for number, view in enumerate(views(torchvision_models.with_current_keys(state))):
        likeness, reference = builders.nearest(
            view.state, lambda done, total: progress("looking for the architecture", done, total)
        )[0]
        ranked.append((likeness, -number, reference, view))
    likeness, _, reference, view = max(ranked, key=lambda item: item[:2])
    return likeness, reference, view


def _told(state: State, progress: Progress) -> str:
    likeness, reference, view = nearest(state, progress)
    prefix = f" under {view.prefix!r}" if view.prefix else ""
    difference = compare(builders.family_of(reference).on_meta(reference, {}), view.state)
    return f"nearest known: {reference} ({likeness:.0%} of keys and shapes{prefix}; {difference})"
