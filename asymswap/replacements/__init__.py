"""The kinds of replacement for a convolution: one file each, found by its file name.

A kind named `my-kind` is the file `my_kind.py` in this folder. It holds the names of `Kind` below; nothing has to be
registered anywhere. Everything that takes settings takes an object of the kind's own `Settings`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError, WithJsonSchema

from asymswap.errors import RecipeError, near_names, validation_text
from asymswap.types import ConvSpec, Cost, Option, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from asymswap.factorize.statistics import SiteStatistics


SIZE_SCHEMA = WithJsonSchema(
    {"title": "Size", "anyOf": [{"type": "string", "pattern": "^[0-9]+x[0-9]+$"}, {"type": "integer"}]}
)
"""What the JSON Schema of recipes says of a size: "3x5", or 3 for both sides."""


class KindSettings(BaseModel):
    """What the settings of all kinds share: unknown keys are errors, numbers are not guessed from text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    allow_growth: bool = False
    """Swap even where the replacement has more MACs or parameters than the original conv."""


class Kind(Protocol):
    """What a kind's file must hold; `Absorbing`, `Moving` and `Sampling` say what it may hold beyond that.

    `options`, `settle` and `init_` run for several convs at once (`asymswap.utils.tensors.side_by_side`).
    """

    Settings: type[KindSettings]
    """The settings; the fields are the keys of `swap = { kind = …, … }` in a recipe."""

    SIZES: tuple[str, ...]
    """The settings of which one at most says how large the replacement is; where none is given, a budget chooses."""

    PRESERVES: str
    """What stays the same at conversion, in a few words for a person."""

    def refuse(self, conv: ConvSpec) -> str | None:
        """The reason why this kind cannot replace such a conv, or None where it can."""

    def preserves(self, conv: ConvSpec, settings: Any) -> bool:
        """Whether the replacement of these settled settings is promised to compute the very function of the conv."""

    def cost(self, site: Site, settings: Any) -> Cost:
        """MACs over all calls and parameters of the replacement of these settled settings, by formula alone."""

    def options(
        self, site: Site, conv: nn.Conv2d, settings: Any, statistics: SiteStatistics | None = None
    ) -> Sequence[Option]:
        """All sizes that a budget may choose from, within the settings; costs are those of `build`'s result."""

    def settle(self, site: Site, conv: nn.Conv2d, settings: Any, statistics: SiteStatistics | None = None) -> Option:
        """Turn a wish (energy = 0.9) into settled settings (rank = 17), so that loading never has to work it out again.

        Raises RecipeError where the wish cannot be met by this conv.
        """

    def build(self, conv: ConvSpec, settings: Any) -> nn.Module:
        """The replacement's structure for settled settings, its weights unset, drawing no random numbers.

        Its forward calls its argument `input`, as that of `nn.Conv2d` does: a model may pass it by that name.
        """

    def init_(
        self, module: nn.Module, conv: nn.Conv2d, settings: Any, statistics: SiteStatistics | None = None
    ) -> None:
        """Set the weights of `build`'s result, in place, so that it does what `conv` does as well as it can.

        With statistics: as well as it can on the data, and with the target of the statistics in the place of `conv`'s
        kernel. Where the function is promised to be preserved, the target is that kernel itself, and kinds that always
        promise it keep the conv's own weights.
        """

    def fuse(self, module: nn.Module, conv: ConvSpec, settings: Any) -> nn.Conv2d | None:
        """The one conv that computes the same as the replacement, or None where there is none."""


@runtime_checkable
class Absorbing(Protocol):
    """What a kind holds as well whose replacement may take over a batch norm that follows the conv."""

    def absorbs(self, site: Site, settings: Any) -> str | None:
        """The name of the batch norm that it would take over at this site, or None."""

    def adopt(self, settings: Any, norm: nn.Module) -> KindSettings | None:
        """The settings with this batch norm's constants in them, or None where it cannot be taken over.

        `init_` then gets the batch norm as the argument `norm`.
        """


@runtime_checkable
class Moving(Protocol):
    """What a kind holds as well whose taps leave their places."""

    def tap_offsets(self, module: nn.Module, x: Tensor) -> Tensor:
        """How far each tap is from its place, (S, T, 2): S samples, one where the input x (N, C, H, W) does not matter.

        Taps row by row, offsets (down, right) in pixels of the input.
        """


@runtime_checkable
class Sampling(Protocol):
    """What a kind holds as well whose replacement computes from its input where its taps are."""

    def largest_offset(self, module: nn.Module, x: Tensor) -> float:
        """How many pixels a tap is moved by at most, on these inputs (N, C, H, W) of the replacement."""

    def without_offsets(self, module: nn.Module, conv: ConvSpec) -> nn.Conv2d:
        """The conv that the replacement is when no tap moves."""


def names() -> list[str]:
    """The names of all kinds, sorted."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def load(name: str) -> Kind:
    """The kind of that name; raises RecipeError, with near names, where there is none."""
    known = names()
    if name not in known:
        raise RecipeError(f"unknown kind {name!r}{near_names(name, known) or '; known: ' + ', '.join(known)}")
    return cast(Kind, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


def parse_settings(name: str, settings: Any) -> KindSettings:
    """Check settings that came from outside against the kind's own; raises RecipeError with every mistake in it."""
    kind = load(name)
    try:
        return kind.Settings.model_validate(dict(settings))
    except ValidationError as error:
        raise RecipeError(f"kind {name!r}: {validation_text(error, list(kind.Settings.model_fields))}") from None
