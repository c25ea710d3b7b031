"""Which architecture a bare state dict belongs to: by the table of fingerprints, under every prefix that may be off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asymswap.errors import SourceError
from asymswap.fileformats.messages import listed
from asymswap.fileformats.state_dict import State, compare, strip_prefixes
from asymswap.models import builders, fingerprints, torchvision_models
from asymswap.types import Progress

# A network and its moving average side by side, a teacher and a student: more than four are not looked at.
_MOST_SIDE_BY_SIDE = 4
# Where mmpretrain keeps the two parts of a classifier.
_TWO_PARTS = ("backbone.", "head.")
# Known networks of others that have the very keys and shapes of one here, and another function.
_TWINS = {"torchvision:resnet50": ", as timm's resnetblur50 has"}

YOUR_OWN = 'a network of your own, or one with another head: `arch="net.py:build"` `trust_code=True`'


@dataclass(frozen=True)
class View:
    """A state dict without a prefix of its keys, and without the keys that lack it.

    `whole`: nothing that computes was left out, only a loss's weights, a metric's state, or copies of the very same
    network.
    """

    state: State
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    whole: bool = True

    def notes(self) -> tuple[str, ...]:
        """Say what was done to the keys, for the report."""
        left_out = f"; left out (`key=…` chooses): {listed(self.left_out, 3)}" if self.left_out else ""
        return (f"keys without their '{self.prefix}'{left_out}",) if self.prefix else ()


def views(state: State) -> list[View]:
    """Return the ways in which a state dict may be meant, the plainest first.

    Training frameworks put the network into a module of theirs: all keys, or all but those of a loss or a metric, then
    begin with the same part (`model.`, `net.`, `backbone.` …), which is taken off, twice at most.
    """
    found = [View(state)]
    if {key.partition(".")[0] for key in state} == {part.removesuffix(".") for part in _TWO_PARTS}:
        bare = {key.partition(".")[2]: tensor for key, tensor in state.items()}
        if len(bare) == len(state):
            found.append(View(bare, "' and '".join(_TWO_PARTS)))
    first = _below(View(state))
    return [*found, *first, *(further for view in first for further in _below(view))]


def _below(view: View) -> list[View]:
    """Return the views one prefix further, those of most keys first."""
    groups: dict[str, State] = {}
    for key, tensor in view.state.items():
        first, dot, rest = key.partition(".")
        groups.setdefault(first + dot, {})[rest] = tensor
    found = []
    for prefix, part in sorted(groups.items(), key=lambda item: -len(item[1]))[:_MOST_SIDE_BY_SIDE]:
        if not prefix.endswith(".") or len(part) * _MOST_SIDE_BY_SIDE < len(view.state):
            continue
        others = {name: group for name, group in groups.items() if name != prefix}
        left_out = tuple(f"{view.prefix}{name}{rest}" for name, group in others.items() for rest in group)
        counts = [t for group in others.values() if group.keys() != part.keys() for t in group.values() if t.ndim >= 2]
        whole = view.whole and not counts
        found.append(View(strip_prefixes(part), view.prefix + prefix, view.left_out + left_out, whole))
    return found


@dataclass(frozen=True)
class Identified:
    """The known network that a state dict is of, and the state dict as that network has it."""

    reference: str
    arguments: Mapping[str, Any]
    view: View

    def notes(self) -> tuple[str, ...]:
        """Say what was concluded and that it may be wrong, for the report."""
        note = (
            f"architecture taken from keys and shapes: {self.reference} (`arch=…` names another); a variant that "
            f"computes differently can have the same{_TWINS.get(self.reference, '')}"
        )
        return (*self.view.notes(), note)


def identify(state: State, label: str, progress: Progress) -> Identified:
    """Return the one known architecture that a state dict fits; raise SourceError for none and for several."""
    for view in views(torchvision_models.with_current_keys(state)):
        fitting = fingerprints.matches(fingerprints.shapes_of(view.state)) if view.whole else []
        fewest = min((len(match.arguments) for match in fitting), default=0)
        found = [match for match in fitting if len(match.arguments) == fewest]
        if len(found) > 1:
            names = ", ".join(match.reference.removeprefix("torchvision:") for match in found)
            raise SourceError(f"{label} holds a state_dict that fits {names}; choose with `arch=…`")
        if found:
            return Identified(found[0].reference, found[0].arguments, view)
    likeness, reference, view = nearest(state, progress)
    prefix = f" under {view.prefix!r}" if view.prefix else ""
    difference = compare(builders.family_of(reference).on_meta(reference, {}), view.state)
    raise SourceError(
        f"{label} holds a state_dict of an unknown architecture; name it with `arch=…` ({YOUR_OWN}); nearest known: "
        f"{reference} ({likeness:.0%} of keys and shapes{prefix}; {difference})"
    )


def nearest(state: State, progress: Progress) -> tuple[float, str, View]:
    """Return the known network that shares most with a state dict, how much that is (0 to 1), and under which prefix.

    Likeness is the number of common (key, shape) pairs over the number of all. The networks are built without weights.
    """
    references = [*builders.OWN.names(), *(f"torchvision:{name}" for name in torchvision_models.classifiers())]
    best: tuple[float, str, View] = (-1.0, "", View(state))
    for view in views(torchvision_models.with_current_keys(state)):
        own = set(fingerprints.shapes_of(view.state).items())
        for done, reference in enumerate(sorted(references), start=1):
            pairs = builders.shapes(reference)
            likeness = len(own & pairs) / max(len(own | pairs), 1)
            if likeness > best[0]:
                best = (likeness, reference, view)
            progress("looking for the architecture", done, len(references))
    return best
