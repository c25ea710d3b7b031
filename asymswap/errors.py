"""The errors that a user can cause, each with one line that says what, which, the value and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

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


def validation_text(error: ValidationError, known: Sequence[str] = ()) -> str:
    """Pydantic's complaints as one line: where, what, the value, and near names for unknown keys."""
    lines = []
    for item in error.errors(include_url=False):
        where = _place(item["loc"])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            key = str(item["loc"][-1])
            hint = near_names(key, known) or (f"; known: {', '.join(known)}" if known else "")
            owner = where.removesuffix(key).rstrip(". ")
            lines.append(f"unknown key {key!r}{' in ' + owner if owner else ''}{hint}")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            told = item["type"] != "missing" and not isinstance(item["input"], dict)
            value = f" (got {_shortened(item['input'])})" if told else ""
            lines.append(f"{where}: {message}{value}" if where else message)
    return "; ".join(lines)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… of {len(text):,} characters"


def _place(loc: Sequence[int | str]) -> str:
    """Where in a recipe or plan a mistake stands, counted from one: `rule 2 match.kernel`."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            # Several values may stand where one does: only a list's own name tells which item is meant.
            text = text.removesuffix("s") + f" {part + 1} " if text in ("rules", "swaps", "keeps") else text
        elif part not in ("range", "any of"):
            text += part if not text or text.endswith(" ") else f".{part}"
    return text.strip()
