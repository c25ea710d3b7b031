"""Our own small networks: those of CIFAR size, and the trained one that ships with asymswap."""

from __future__ import annotations

from dataclasses import replace

from safetensors.torch import load_file
from torch import nn

from asymswap.errors import SourceError
from asymswap.fileformats.state_dict import load_state_
from asymswap.models import networks
from asymswap.models.family import Arguments, Family, input_channels
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import with_channels
from asymswap.types import Preprocessing

DIGITS = "digits-resnet"
_PREFIX = "cifar:"


class OwnNetworks(Family):
    """`cifar:NAME` and `digits-resnet`."""

    def names(self) -> list[str]:
        """The full references of all networks."""
        return [DIGITS, *(f"{_PREFIX}{name}" for name in networks.BUILDERS)]

    def canonical(self, reference: str) -> str | None:
        """The reference itself, which has no shorter form."""
        return reference if reference in self.names() else None

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        """The network with random weights."""
        builder = networks.digits_resnet if reference == DIGITS else networks.BUILDERS[reference.removeprefix(_PREFIX)]
        unknown = sorted(set(arguments) - {"num_classes", "in_channels"})
        if unknown:
            raise SourceError(f"{reference} does not take {unknown[0]!r}; it takes num_classes and in_channels")
        return builder(**arguments)

    def weights(self, reference: str, name: str | None, arguments: Arguments) -> OpenedModel:
        """The weights of the demo's network, which are shipped."""
        if reference != DIGITS:
            return super().weights(reference, name, arguments)
        if name not in (None, "DEFAULT") or arguments:
            raise SourceError(f"{DIGITS} has one set of weights; use --weights none to change its arguments")
        model = self.build_unset(DIGITS, {})
        load_state_(model, load_file(networks.DIGITS_WEIGHTS, backend="pread"), take=True)
        opened = self.describe(model, DIGITS, {}, "shipped, trained on scikit-learn's digits")
        known = replace(opened.preprocessing, normalization_from="weights", size_from="weights")
        return replace(opened, preprocessing=known)

    def preprocessing(self, reference: str, model: nn.Module, arguments: Arguments) -> Preprocessing:
        """What the published checkpoints of these networks were trained with."""
        own = networks.DIGITS_PREPROCESSING if reference == DIGITS else networks.CIFAR_PREPROCESSING
        return with_channels(own, input_channels(model))
