"""The command line as a report repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

_WITH_VALUE = ("-o", "--output", "--report", "--write-plan")
_JOINED = ("--output=", "--report=", "--write-plan=")
_ALONE = ("--force", "--json", "--quiet", "-q", "--debug", "--dry-run")


def repeatable(arguments: Sequence[str]) -> str:
    """The command of these arguments (those of `sys.argv`), without what says only where its results go.

    Two runs that differ in nothing else, nor in the number of threads, shall write equal files.
    """
    kept = ["asymswap"]
    words = iter(arguments[1:])
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif not (word in _ALONE or word.startswith(_JOINED) or _is_short_output(word)):
            kept.append(word)
    return shlex.join(kept)


def _is_short_output(word: str) -> bool:
    """Whether the word is -oFILE."""
    return word.startswith("-o") and not word.startswith("--")
