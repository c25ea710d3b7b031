"""The networks that can be built from a reference alone, of all families, and which of them a state dict belongs to."""

import functools
from dataclasses import dataclass

from safetensors.torch import load_file
from torch import nn

from asymswap.errors import SourceError, listed
from asymswap.fileformats.state_dict import State, compare, load_state_, strip_prefixes
from asymswap.models import networks
from asymswap.models.family import Arguments, Family, from_weights, input_channels
from asymswap.models.fingerprints import Fingerprint, matches, shapes_of
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import with_channels
from asymswap.models.timm_models import Timm
from asymswap.models.torchvision_models import Torchvision, classifiers, with_current_keys
from asymswap.models.transformers_models import Transformers
from asymswap.models.ultralytics_models import PREFIX, Ultralytics
from asymswap.types import Preprocessing, Progress

DIGITS = "digits-resnet"
# A network and its moving average side by side, a teacher and a student: more than four are not looked at.
_MOST_SIDE_BY_SIDE = 4
# Known networks of others that have the very keys and shapes of one here, and another function.
TWINS = {"torchvision:resnet50": ", as timm's resnetblur50 has"}
YOUR_OWN = 'a network of your own, or one with another head: `arch="net.py:build"`'


class OwnNetworks(Family):
    """`cifar:NAME` and `digits-resnet`, the trained network that ships with asymswap."""

    builders = {DIGITS: networks.digits_resnet} | {f"cifar:{name}": one for name, one in networks.BUILDERS.items()}

    def names(self) -> list[str]:
        return [*self.builders]

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        builder = self.builders[reference]  # by a name, for `near_keyword`
        return builder(**arguments)

    def weights(self, reference: str, name: str | None, arguments: Arguments) -> OpenedModel:
        if reference != DIGITS:
            return super().weights(reference, name, arguments)
        if name not in (None, "DEFAULT") or arguments:
            raise SourceError(f'{DIGITS} has one set of weights; use `weights="none"` to change its arguments')
        model = self.build_unset(DIGITS, {})
        load_state_(model, load_file(networks.DIGITS_WEIGHTS, backend="pread"), take=True)
        return from_weights(self.describe(model, DIGITS, {}, "shipped, trained on scikit-learn's digits"))

    def preprocessing(self, reference: str, model: nn.Module, arguments: Arguments) -> Preprocessing:
        own = networks.DIGITS_PREPROCESSING if reference == DIGITS else networks.CIFAR_PREPROCESSING
        return with_channels(own, input_channels(model))


OWN, TORCHVISION = OwnNetworks(), Torchvision()
FAMILIES: tuple[Family, ...] = (Timm(), Transformers(), Ultralytics(), OWN, TORCHVISION)


def canonical(reference: str, stored: Arguments | None = None) -> str | None:
    """Return the full form (`torchvision:resnet18` of `resnet18`) of a known network, else None.

    None too where building what a checkpoint holds, with its `stored` arguments, would read another file.
    """
    full = next(filter(None, (family.canonical(reference) for family in FAMILIES)), None)
    return full if stored is None or stored.get("yaml") or not str(full).startswith(PREFIX) else None


def family_of(reference: str) -> Family:
    """Return the family of a known network."""
    return next(family for family in FAMILIES if family.canonical(reference) is not None)


@functools.cache
def shapes(reference: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Return the keys and shapes of a known network's state dict."""
    return frozenset(shapes_of(family_of(reference).on_meta(reference, {}).state_dict()).items())


@dataclass(frozen=True)
class View:
    """A state dict without a prefix of its keys, and without the keys that lack it."""

    state: State
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    whole: bool = True  # nothing that computes was left out: a loss's weights, a metric's state, copies of the network

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
    if {key.partition(".")[0] for key in state} == {"backbone", "head"}:  # the two parts of mmpretrain's classifiers
        bare = {key.partition(".")[2]: tensor for key, tensor in state.items()}
        if len(bare) == len(state):
            found.append(View(bare, "backbone.' and 'head."))
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
        unlike = [tensor for group in others.values() if group.keys() != part.keys() for tensor in group.values()]
        whole = view.whole and all(tensor.ndim < 2 for tensor in unlike)
        found.append(View(strip_prefixes(part), view.prefix + prefix, view.left_out + left_out, whole))
    return found


def identify(state: State, label: str, progress: Progress) -> tuple[Fingerprint, View]:
    """Return the one known network that a state dict fits, and the view; raise SourceError for none or several."""
    for view in views(with_current_keys(state)):
        fitting = matches(shapes_of(view.state)) if view.whole else []
        fewest = min((len(match.arguments) for match in fitting), default=0)
        found = [match for match in fitting if len(match.arguments) == fewest]
        if len(found) > 1:
            names = ", ".join(match.reference.removeprefix("torchvision:") for match in found)
            raise SourceError(f"{label} holds a state_dict that fits {names}; choose with `arch=…`")
        if found:
            return found[0], view
    likeness, reference, view = nearest(state, progress)
    prefix = f" under {view.prefix!r}" if view.prefix else ""
    difference = compare(family_of(reference).on_meta(reference, {}), view.state)
    raise SourceError(
        f"{label} holds a state_dict of an unknown architecture; name it with `arch=…` ({YOUR_OWN}); nearest known: "
        f"{reference} ({likeness:.0%} of keys and shapes{prefix}; {difference})"
    )


def nearest(state: State, progress: Progress) -> tuple[float, str, View]:
    """Return the share of common (key, shape) pairs, 0 to 1, with the likest known network, its name and the view."""
    references = sorted([*OWN.names(), *(f"torchvision:{name}" for name in classifiers())])
    best: tuple[float, str, View] = (-1.0, "", View(state))
    for view in views(with_current_keys(state)):
        own = set(shapes_of(view.state).items())
        for done, reference in enumerate(references, start=1):
            pairs = shapes(reference)
            best = max(best, (len(own & pairs) / len(own | pairs), reference, view), key=lambda found: found[0])
            progress("looking for the architecture", done, len(references))
    return best
