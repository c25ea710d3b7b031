"""The errors that a user can cause, each with one line that says what, which, the value and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Characters that a terminal obeys instead of showing them, for a regular expression; not line ends and tabs."""

CONTROL = re.compile(f"[{CONTROLS}]")

BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that reorder how the text beside them is read."""

_OBEYED = re.compile(f"[{CONTROLS}\t\n\u2028\u2029\ud800-\udfff{BIDIRECTIONAL}]")
_LONGEST_NAME = 200


class AsymswapError(Exception):
    """Something that the user asked for cannot be done; its text is one complete sentence for them."""


class SourceError(AsymswapError):
    """A model reference, a model file or a data reference cannot be used."""


class TraceError(AsymswapError):
    """The model cannot be run at the given input size, or holds nothing to look at."""


class RecipeError(AsymswapError):
    """A recipe is not valid, or does not fit the model that it is applied to."""


class PlanError(AsymswapError):
    """A plan is not valid, or does not fit the model that it is applied to."""


class CheckpointError(AsymswapError):
    """An asymswap checkpoint cannot be read, or does not fit the model that it is loaded into."""


class OutputError(AsymswapError):
    """A file cannot be written where the user asked for it."""


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Raise AsymswapError where a value is none of those that are known."""
    names = list(known)
    if value not in names:
        hint = near_names(str(value), names) or f"; choose {', '.join(names)}"
        raise AsymswapError(f"{what} {value!r} is unknown{hint}")


def visible(text: str) -> str:
    """The text with every character that a terminal obeys as its escape, such as `\\x1b`; line ends are among them.

    Names in a model file or a data set come from anybody: printed as they are, they could colour, move or hide the
    lines beside them. Halves of surrogate pairs, which stand for bytes of a file's name that are no text, cannot be
    printed at all.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def near_names(name: str, known: Iterable[str], most: int = 3) -> str:
    """Say which of `known` come close to `name`: `"; did you mean a, b?"`, or nothing where none does."""
    # What is much longer is no slip of the pen, and comparing it takes long.
    near = [other for other in known if len(other) <= _LONGEST_NAME]
    close = difflib.get_close_matches(name, near, n=most, cutoff=0.6) if len(name) <= _LONGEST_NAME else []
    return f"; did you mean {', '.join(close)}?" if close else ""
