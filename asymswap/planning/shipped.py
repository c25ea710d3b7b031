"""The shipped recipes and the text of any, without checking it: that takes libraries that are slow to load."""

import os
from importlib import resources
from pathlib import Path

from asymswap.errors import RecipeError, near_names


def shipped_folder() -> Path:
    """Return the folder of shipped recipes: beside the package in a checkout, inside it in a wheel."""
    inside = Path(str(resources.files("asymswap"))) / "recipes"
    return inside if inside.is_dir() else inside.parents[1] / "recipes"


def shipped_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in shipped_folder().glob("*.toml"))


def read_recipe_text(reference: str) -> tuple[str, str]:
    """Return the TOML text of a recipe's name or file, and its name for messages; raises RecipeError for none."""
    if reference in shipped_names():
        return (shipped_folder() / f"{reference}.toml").read_text(encoding="utf-8"), f"recipe {reference!r}"
    path = Path(reference)
    if path.suffix != ".toml" and not os.path.isfile(reference):  # noqa: PTH113 - it is False for names too long
        hint = near_names(reference, shipped_names()) or f"; known: {', '.join(shipped_names())}, or a .toml file"
        raise RecipeError(f"no recipe {reference[:80]!r}{hint}")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError:
        raise RecipeError(f"no recipe file {path}; shipped recipes: {', '.join(shipped_names())}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not a text file; a recipe is TOML in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from None
