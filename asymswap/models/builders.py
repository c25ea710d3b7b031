"""The networks that can be built from a reference alone, without running the user's code, of all families."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file
from torch import nn

from asymswap.errors import SourceError
from asymswap.fileformats.state_dict import load_state_
from asymswap.models import fingerprints, networks, timm_models, torchvision_models
from asymswap.models.family import Arguments, Family, from_weights, input_channels
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import with_channels
from asymswap.types import Origin, Preprocessing

DIGITS = "digits-resnet"


class OwnNetworks(Family):
    """`cifar:NAME` and `digits-resnet`, the trained network that ships with asymswap."""

    def names(self) -> list[str]:
        """Return the full references of all networks."""
        return [DIGITS, *(f"cifar:{name}" for name in networks.BUILDERS)]

    def canonical(self, reference: str) -> str | None:
        return reference if reference in self.names() else None

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        builder = networks.digits_resnet if reference == DIGITS else networks.BUILDERS[reference.removeprefix("cifar:")]
        unknown = sorted(set(arguments) - {"num_classes", "in_channels"})
        if unknown:
            raise SourceError(f"{reference} does not take {unknown[0]!r}; it takes num_classes and in_channels")
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
        """Return what the published checkpoints of these networks were trained with."""
        own = networks.DIGITS_PREPROCESSING if reference == DIGITS else networks.CIFAR_PREPROCESSING
        return with_channels(own, input_channels(model))


TORCHVISION, TIMM, OWN = torchvision_models.Torchvision(), timm_models.Timm(), OwnNetworks()
FAMILIES: tuple[Family, ...] = (TIMM, OWN, TORCHVISION)


def known_references() -> list[str]:
    """Return every reference that names a network which needs no further package, in its full form."""
    return OWN.names() + TORCHVISION.names()


def canonical(reference: str) -> str | None:
    """Return the full form of a reference to a known network (`torchvision:resnet18` for `resnet18`), else None."""
    found = (family.canonical(reference) for family in FAMILIES)
    return next((full for full in found if full is not None), None)


def family_of(reference: str) -> Family:
    """Return the family of a known network."""
    return next(family for family in FAMILIES if family.canonical(reference) is not None)


def build(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the network of a full reference with random weights; raise SourceError for arguments it does not take."""
    return family_of(reference).build(reference, arguments)


def near(reference: str) -> str:
    """Say, for a message, which known references come close to one that is none, as a user writes them."""
    written = [text.removeprefix("torchvision:") for text in known_references()]
    name = reference.removeprefix("torchvision:")
    # Without a prefix, our own networks are found too; of two by one name, torchvision's comes last and counts.
    names = {text if ":" in name else text.removeprefix("cifar:"): text for text in written}
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(names[text] for text in close)}?" if close else ""


@functools.cache
def shapes(reference: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Return the keys and shapes of a known network's state dict."""
    return frozenset(fingerprints.shapes_of(family_of(reference).on_meta(reference, {}).state_dict()).items())


def versions(origin: Origin) -> dict[str, str]:
    """Return the versions of further packages that are needed to build a network again."""
    return {"timm": timm_models.version()} if TIMM.canonical(origin.reference) is not None else {}
