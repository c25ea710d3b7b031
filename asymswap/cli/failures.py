"""How an error becomes one line on stderr and an exit code, and a warning one line."""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn, ParamSpec

P = ParamSpec("P")
_LONGEST = 2000
"""Of an error's text: enough for the mistakes of a recipe; a file may hold names of any length."""


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """The command, ending in one line and exit code 1 for what cannot be done, in 130 for Ctrl-C.

    What libraries warn of is one line each, too; with --debug as they have it, with the place in the code.

    This stands inside of Typer, which would give Ctrl-C no word, and end with 1 where the reader of a pipe has gone.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with warnings.catch_warnings():
                if not kwargs.get("debug"):
                    warnings.showwarning = _show_warning
                command(*args, **kwargs)
            # What is still to be printed shows here, not at the interpreter's exit, whether it can be.
            sys.stdout.flush()
        except KeyboardInterrupt:
            _fail("interrupted; no half-written file is left", 130)
        except BrokenPipeError:
            # The reader (head, less) has seen enough: nothing is wrong, and nothing more can be said to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if kwargs.get("debug"):
                raise
            _fail(_in_one_line(_text(error)), 1)

    return run


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """In place of `warnings.showwarning`."""
    # Where in torch's source that is helps nobody here.
    text = re.sub(r"\s*\(Triggered internally at [^)]*\)", "", str(message))
    sys.stderr.write(f"warning: {_in_one_line(text)}\n")


def _in_one_line(text: str) -> str:
    from asymswap.errors import visible

    # Names out of a file may hold what a terminal would obey, and line ends.
    text = visible(" ".join(text.split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _text(error: Exception) -> str:
    from asymswap.errors import AsymswapError

    text = str(error)
    if isinstance(error, AsymswapError):
        return text
    # torch has no error of its own for this.
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "not enough memory; use a smaller model or --input"
    if isinstance(error, OSError):
        return f"the system refused: {error.strerror or text}" + (f": {error.filename}" if error.filename else "")
    return f"unexpected {type(error).__name__}: {text[:300]}; this is a bug: run it again with --debug and report it"


def _fail(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {text}\n")
    sys.exit(code)
