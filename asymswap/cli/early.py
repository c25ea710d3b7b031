"""Mistakes that can be told without torch, which takes seconds to load; the verbs, which know more, check again."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asymswap.data.references import check_reference
from asymswap.errors import AsymswapError, SourceError
from asymswap.fileformats.detect import exists, is_file_name, sniff
from asymswap.models.fingerprints import near, stored_networks
from asymswap.planning.shipped import read_recipe_text


def check(given: Mapping[str, Any]) -> None:
    """Raise AsymswapError for values of a command's options, by their names in it, that cannot be right."""
    for name in ("macs", "params"):
        value = given.get(name)
        if isinstance(value, float) and not 0 < value <= 1:
            raise AsymswapError(f"`{name}={value:g}` is not above 0 and at most 1: a fraction, 0.5 keeps half")
    recipes = given.get("recipe") or ()
    for recipe in [recipes] if isinstance(recipes, str) else recipes:
        read_recipe_text(recipe)
    for model in (given.get("model"), given.get("checkpoint"), *given.get("models", ())):
        if model is not None:
            _check_model(str(model), given)
    for name in ("data", "evaluate"):
        if isinstance(given.get(name), str):
            check_reference(given[name])


def _check_model(reference: str, given: Mapping[str, Any]) -> None:
    name = reference.partition("@")[0]
    networks = stored_networks()
    channels = networks.get(name) or networks.get(f"torchvision:{name}")
    if channels is None and re.match(r"\w[\w.-]+:", reference):  # a family's, or code: they know their own
        return
    if channels is None and is_file_name(reference) and not re.search(r"\.py\b", reference):
        if not exists(Path(reference)):
            sniff(Path(reference))  # which says what to do
        return
    if channels is None and re.fullmatch(r"[\w-]+(@[\w.-]+)?", reference) and not _is_defined(name):
        raise SourceError(f"no model {reference!r}, and no such file{near(name)}")
    wanted = re.fullmatch(r"(\d+)(?:x\d+){2,3}", str(given.get("input_size") or ""))
    if wanted and channels and int(wanted[1]) != channels and not given.get("arguments"):
        right = f"{channels}{wanted[0].removeprefix(wanted[1])}"
        takes = f"{channels} channel" + "s" * (channels > 1)
        raise AsymswapError(
            f"`input_size={wanted[0]}` does not suit {name}: the first conv takes {takes}; "
            f"give {right}, or build it for others by `arguments=in_channels={wanted[1]}`"
        )


def _is_defined(name: str) -> bool:
    """True for a function of the installed torchvision or timm, whose builders may be newer than the stored list."""
    homes = [importlib.util.find_spec(package) for package in ("torchvision", "timm")]
    folders = [Path(home.origin).parent / "models" for home in homes if home is not None and home.origin is not None]
    wanted = (f"def {name}(", f'name="{name}"')
    texts = (path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    return any(part in text for text in texts for part in wanted)
