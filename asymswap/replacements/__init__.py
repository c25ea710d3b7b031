"""The kinds of replacement for a convolution: one `Replacement` each, found by its file name.

The kind `my-kind` is the one subclass of `Replacement` in the file `my_kind.py` of this folder; nothing is registered.
"""

import importlib
import pkgutil
from typing import Any

from pydantic import ValidationError

from asymswap.errors import PlanError, RecipeError, near_names, validation_text
from asymswap.replacements.base import SIZE_SCHEMA, KindSettings, Original, Replacement, as_size
from asymswap.types import Swap

__all__ = ["SIZE_SCHEMA", "KindSettings", "Original", "Replacement", "as_size"]  # and what is defined here


def names() -> list[str]:
    """Return the names of all kinds, sorted."""
    files = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in files if name != "base" and not name.startswith("_"))


def load(name: str) -> Replacement:
    """Return the kind of that name; raises RecipeError, with near names, where there is none."""
    known = names()
    if name not in known:
        raise RecipeError(f"unknown kind {name!r}{near_names(name, known) or '; known: ' + ', '.join(known)}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    classes = [part for part in vars(module).values() if isinstance(part, type) and issubclass(part, Replacement)]
    found: list[type[Replacement]] = [part for part in classes if part.__module__ == module.__name__]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define one subclass of Replacement; it defines {len(found)}")
    return found[0]()


def parse_settings(name: str, settings: Any) -> KindSettings:
    """Check settings that came from outside against the kind's own; raises RecipeError with every mistake in it."""
    own = load(name).settings
    try:
        return own.model_validate(dict(settings))
    except ValidationError as error:
        raise RecipeError(f"kind {name!r}: {validation_text(error, list(own.model_fields))}") from None


def load_swap(swap: Swap) -> tuple[Replacement, KindSettings]:
    """Return the kind of a plan's swap and its settled settings.

    Raises RecipeError as `load` and `parse_settings` do, and PlanError for settings that are valid but not settled.
    """
    kind, settings = load(swap.kind), parse_settings(swap.kind, swap.settings)
    if kind.settled is None:
        return kind, settings
    try:
        return kind, kind.settled.model_validate(dict(swap.settings))
    except ValidationError:
        needed = " and ".join(name for name, field in kind.settled.model_fields.items() if field.is_required())
        raise PlanError(f"kind {swap.kind!r} needs a settled {needed}, not {dict(swap.settings)}") from None
