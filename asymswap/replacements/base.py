"""The base class of all kinds of replacement, and of their settings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from asymswap.types import ConvSpec, Cost, Option, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from asymswap.factorize.statistics import SiteStatistics


_SIZES = [{"type": "string", "pattern": "^[0-9]+x[0-9]+$"}, {"type": "integer"}]
SIZE_SCHEMA = WithJsonSchema({"title": "Size", "anyOf": _SIZES})  # of a size in a recipe: "3x5", or 3 for both sides


def as_size(value: Any) -> Any:
    """Return (3, 5) for "3x5" and (3, 3) for 3; any other value as it is."""
    if isinstance(value, str):
        parts = value.lower().split("x")
        return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else value
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def loss(error: float, nats: float | None = None) -> float:
    """Return what a layer's relative squared error costs the network: by this a budget compares layers, sizes, kinds.

    The error counts as minus the logarithm of the energy that is kept. Summed over layers that is the product of what
    each keeps (Zhang, Zou, He and Sun, 2015, section 3.4): small errors count as they are, and no layer is ruined to
    save cost. With the divergence of the prediction, in nats (K-FAC's: half the error as `SiteStatistics.output_weight`
    weights it), it is the geometric mean of both, which ranks layers better (docs/results/calibration-experiments.md).
    """
    lost = -math.log1p(-min(error, 1 - 1e-12))
    return lost if nats is None else math.sqrt(lost * nats)


class KindSettings(BaseModel):
    """What the settings of all kinds share: unknown keys are errors, numbers are not guessed from text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
    allow_growth: bool = Field(False, description="Swap even where the replacement has more MACs or parameters.")


class GrowingSettings(KindSettings):
    """The settings of kinds whose replacements cost more by their nature."""

    allow_growth: bool = Field(True, description="Swap although the replacement has more MACs or parameters.")


@dataclass(frozen=True)
class Original:
    """The conv to be replaced, its calibration statistics, and the batch norm that the replacement takes over."""

    conv: nn.Conv2d
    statistics: SiteStatistics | None = None
    norm: nn.BatchNorm2d | None = None


class Replacement(ABC):
    """One kind of replacement for a conv.

    `resolve`, `options` and `init_` run for several convs at once, in threads (`asymswap.utils.tensors.side_by_side`).
    """

    # What a recipe may ask for; the fields are the keys of `swap = { kind = …, … }`.
    settings: ClassVar[type[KindSettings]]
    # What a plan stores, where that is another type than `settings`: a rank, not a ratio.
    settled: ClassVar[type[KindSettings] | None] = None
    # The settings that fix the size of the replacement, at most one of them given; without one a budget chooses.
    SIZES: ClassVar[tuple[str, ...]] = ()
    # What stays the same at conversion, in a few words for a person.
    PRESERVES: ClassVar[str]

    @property
    def name(self) -> str:
        """The name of the kind, which is that of its file."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def unsupported(self, conv: ConvSpec) -> str | None:
        """Return the reason why this kind cannot replace such a conv, or None where it can."""
        if conv.dtype not in ("float64", "float32", "float16", "bfloat16"):
            return f"{conv.dtype} weights are not real floating-point numbers"
        return None

    def preserves(self, conv: ConvSpec, settings: Any) -> bool:
        """Return True if the replacement of these settled settings is promised to compute the conv's own function."""
        return True

    @abstractmethod
    def cost(self, site: Site, settings: Any) -> Cost:
        """Return MACs over all calls and parameters of the replacement of these settled settings, by formula alone."""

    def options(self, site: Site, original: Original, settings: Any) -> Sequence[Option]:
        """Return all sizes that a budget may choose from, within the settings."""
        return [self.resolve(site, original, settings)]

    def resolve(self, site: Site, original: Original, settings: Any) -> Option:
        """Turn settings of a recipe (energy = 0.9) into settled ones (rank = 17); by default they are the same.

        Raises RecipeError where this conv cannot have them.
        """
        return self.option(site, type(settings)(**settings.model_dump(exclude={"allow_growth"})))

    def option(self, site: Site, settled: KindSettings, error: float = 0.0, nats: float | None = None) -> Option:
        """Return the option of settled settings, with its error and divergence; a plan stores those that are set."""
        stored = settled.model_dump(mode="json", exclude_unset=True)
        return Option(self.name, stored, self.cost(site, settled), error, loss(error, nats))

    @abstractmethod
    def build(self, conv: ConvSpec, settings: Any) -> nn.Module:
        """Return the structure for settled settings; its weights need not be set, and no random numbers are drawn.

        Its forward calls its argument `input`, as `nn.Conv2d` does: a model may pass it by that name.
        """

    def init_(self, module: nn.Module, original: Original, settings: Any) -> None:
        """Set the weights of `build`'s result, in place, so that it computes what the conv does as well as it can.

        With statistics, as well as it can on the data, with their target in place of the kernel; a kind that always
        preserves the function keeps the conv's weights. By default these go to the module's own `weight` and `bias`.
        """
        from asymswap.replacements._convs import copy_  # loads torch, which the names of kinds do not need

        copy_(module, original.conv.weight, original.conv.bias)

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Any) -> nn.Conv2d | None:
        """Return the one conv that computes the same as the replacement, or None where there is none."""
        return None

    def fold_norm(self, settings: Any, norm: nn.Module) -> KindSettings | None:
        """Return the settings with the constants of the batch norm that alone follows the conv; None to leave it."""
        return None

    def added(self, module: nn.Module) -> Sequence[str]:
        """Return the parts of a replacement that are new beside what was there, by default all of it."""
        return ("",)

    def tap_offsets(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Return how far each tap is from its place, (S, T, 2), or None where taps do not move.

        S samples, one where the input x (N, C, H, W) does not matter; T taps row by row; pixels (down, right).
        """
        return None

    def without_offsets(self, module: nn.Module, conv: ConvSpec) -> nn.Conv2d | None:
        """Return the conv that the replacement is while no tap moves; None where offsets do not depend on the input."""
        return None
