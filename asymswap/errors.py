"""The errors that a user can cause, each with one line that says what, which, the value and what to do."""

from __future__ import annotations

import difflib
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import ValidationError

CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Characters that a terminal obeys instead of showing them, for a regular expression; not line ends and tabs."""
BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that reorder how the text beside them is read."""

CONTROL = re.compile(f"[{CONTROLS}]")
_OBEYED = re.compile(f"[{CONTROLS}\t\n\u2028\u2029\ud800-\udfff{BIDIRECTIONAL}]")
_PASSED = ("out of memory", "allocate memory", "more than 1 value per channel", "gloo", "NCCL", "Connection")
"""In errors of torch for which a caller has better words."""

T = TypeVar("T")


class AsymswapError(Exception):
    """Something that the user asked for cannot be done; the text is one complete sentence for them.

    An option is out of its range, two options contradict each other, data does not fit the network, or a metric or loss
    of yours gave no number. Change what the sentence names. It is also the base of the errors below: catch this one.
    """


class SourceError(AsymswapError):
    """A model reference, a model file or a data reference cannot be used.

    There is no such name or file, the file is damaged or holds something else, needs classes that are not read as data,
    or its weights do not fit the architecture. Near names are given where there are some; `arch=…` names an
    architecture, `key=…` which weights of a file.
    """


class TraceError(AsymswapError):
    """The model cannot be run at the given input size, or holds nothing to look at.

    Give the size that it takes, `input_size=…`, or, where it takes several inputs or other things than images,
    `example_inputs=…` or a task with `inputs(batch)`. A wrapper around the network is not enough: give what computes.
    """


class RecipeError(AsymswapError):
    """A recipe is not valid, or does not fit the model that it is applied to.

    A key or value is unknown, a rule matches no conv, nothing would be swapped, or the budget cannot be reached: then
    the least that can be is told. `asymswap candidates` lists the convs and why each is none.
    """


class PlanError(AsymswapError):
    """A plan is not valid, or does not fit the model that it is applied to.

    It was made for another network, or edited so that it asks for what cannot be built. Make it again for this one.
    """


class CheckpointError(AsymswapError):
    """An asymswap checkpoint cannot be read, or does not fit the model that it is loaded into.

    The file is damaged, of a newer version, or of a class that only your code builds: the message then has the call
    that loads it, `asymswap.load(path, model=Net())`.
    """


class OutputError(AsymswapError):
    """A file cannot be written where the user asked for it.

    It exists (`force=True` replaces it), its folder does not, its ending says no known form, or the disk is full. What
    was there before is left as it was.
    """


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Raise AsymswapError if a value is not one of those known."""
    names = list(known)
    if value not in names:
        hint = near_names(str(value), names) or f"; choose {', '.join(names)}"
        raise AsymswapError(f"{what} {value!r} is unknown{hint}")


def visible(text: str) -> str:
    """Return the text with line ends and every other character that a terminal obeys as its escape, such as `\\x1b`.

    Names in a file come from anybody, and could colour, move or hide the lines beside them. Surrogates, which stand for
    bytes of a file name that are no text, cannot be printed at all.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def near_names(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return which of `known` are close to `name`, as `"; did you mean a, b?"`; empty if none is."""
    # A text of more than 200 characters is no typing mistake, and slow to compare.
    near = [other for other in known if max(len(name), len(other)) <= 200]
    close = difflib.get_close_matches(name, near, n=3, cutoff=cutoff)
    return f"; did you mean {', '.join(close)}?" if close else ""


def validation_text(error: ValidationError, known: Sequence[str] = ()) -> str:
    """Return pydantic's complaints as one line: where, what, the value, and near names for unknown keys."""
    lines = []
    for item in error.errors(include_url=False):
        where = ""  # in a recipe or plan, counted from one: `rule 2 match.kernel`
        for part in item["loc"]:
            if isinstance(part, int):
                # Where several types are allowed, pydantic numbers those too; only these names belong to lists.
                where = where.removesuffix("s") + f" {part + 1} " if where in ("rules", "swaps", "keeps") else where
            elif part not in ("range", "any of"):
                where += part if not where or where.endswith(" ") else f".{part}"
        where = where.strip()
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            key = str(item["loc"][-1])
            hint = near_names(key, known) or (f"; known: {', '.join(known)}" if known else "")
            owner = where.removesuffix(key).rstrip(". ")
            lines.append(f"unknown key {key!r}{' in ' + owner if owner else ''}{hint}")
            continue
        message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if item["type"] != "missing" and not isinstance(item["input"], dict):
            value = repr(item["input"])
            message += f" (got {value if len(value) <= 80 else f'{value[:60]}… of {len(value):,} characters'})"
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)


def reason_of(error: object, most: int = 160) -> str:
    """Return an error's text on one line, or the name of its class where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def listed(names: Sequence[str], most: int) -> str:
    """Return the first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def call(what: str, function: Callable[..., T], *arguments: Any, hint: str = "") -> T:
    """Return what the user's `function` returns; where it fails, raise SourceError with its reason and its line.

    `what` names the function in the message. Errors of memory, and of other processes, pass.
    """
    try:
        return function(*arguments)
    except (AsymswapError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        if any(word in str(error) for word in _PASSED):
            raise
        # A DataLoader's worker sends its whole traceback, of which the last line says what went wrong.
        reason = f"{type(error).__name__}: {reason_of(error, 300)}"
        text = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else reason
        installed = (str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<")
        frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(installed)]
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        raise SourceError(f"{what} raised {text}{place}{hint}") from error
