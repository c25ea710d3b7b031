"""How an error becomes one line on stderr and an exit code, a warning one line, and an argument's name an option's."""

import ast
import dataclasses
import functools
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from asymswap.errors import AsymswapError, visible

T = TypeVar("T")
_LONGEST = 2000
"""Limit for an error's text: enough for the mistakes of a recipe; a file may hold names of any length."""


def reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that ends in one line and exit code 1 for what cannot be done, in 130 for Ctrl-C.

    A library's warnings are one line each, too; with --debug they keep their form, with the place in the code. This
    wraps the command inside of Typer, which would print nothing for Ctrl-C, and exit with 1 for a closed pipe.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                if not kwargs.get("debug"):
                    warnings.showwarning = lambda message, *_, **__: _say("warning", str(message))
                command(*args, **kwargs)
            # What is still to be printed shows here, not at the interpreter's exit, whether it can be.
            sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stderr.write("error: interrupted; no half-written file is left\n")
            sys.exit(130)
        except BrokenPipeError:
            # The reader (head, less) has seen enough: nothing is wrong, and nothing more can be said to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if kwargs.get("debug"):
                raise
            _say("error", _text(error))
            sys.exit(1)

    return run


def _say(what: str, text: str) -> None:
    # Where in torch's source a warning arises helps nobody here.
    text = re.sub(r"\s*\(Triggered internally at [^)]*\)", "", text)
    # Names out of a file may hold what a terminal would obey, and line ends.
    text = visible(" ".join(in_flags(text).split()))
    sys.stderr.write(f"{what}: {text if len(text) <= _LONGEST else f'{text[:_LONGEST]}…'}\n")


def _text(error: Exception) -> str:
    text = str(error)
    if isinstance(error, AsymswapError):
        return text
    # torch has no error of its own for this.
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "not enough memory; use a smaller model or --input"
    if isinstance(error, OSError):
        return f"the system refused: {error.strerror or text}" + (f": {error.filename}" if error.filename else "")
    return f"unexpected {type(error).__name__}: {text[:300]}; this is a bug: run it again with --debug and report it"


_ARGUMENT = re.compile(r"`(?P<of>[A-Z]\w*\()?(?P<name>[a-z]\w*)=(?P<value>[^`]{0,200}?)(?(of)\))`")
_OTHER_NAMES = {
    "calibration": "data",
    "inputs": "task_file",
    "loss": "task_file",
    "path": "output",
    "polish_minutes": "polish_steps",
    "timing": "runtime",
}
"""Arguments in Python that have another name among the parameters of commands."""

options: dict[str, Any] = {}
"""The options of the running command, which sets them, as click has them, by parameter name."""


def in_flags(value: T) -> T:
    """Return a text or a record with each argument that it names between backquotes as the running command's option.

    `` `weights="none"` `` becomes --weights none and `` `PreprocessingOptions(normalize=…)` `` --normalize; what is no
    option of the command stays as it is. Records are dataclasses, dicts, lists and tuples; they are copied.
    """
    changed: Any = value
    if isinstance(value, str):
        changed = _ARGUMENT.sub(_as_option, value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: in_flags(getattr(value, one.name)) for one in dataclasses.fields(value) if one.init}
        changed = dataclasses.replace(value, **fields)
    elif isinstance(value, dict):
        changed = {key: in_flags(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        changed = type(value)(map(in_flags, value))
    return changed  # type: ignore[no-any-return]


def _as_option(found: re.Match[str]) -> str:
    name, text = found["name"], found["value"]
    option = options.get(name) or options.get(_OTHER_NAMES.get(name, ""))
    if option is None:
        return found[0]
    flag: str = max(option.opts, key=len)
    if text in ("", "…", "True"):
        return flag
    try:
        value = ast.literal_eval(text.replace("…", "..."))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return f"{flag} {text}"
    if value is False and option.secondary_opts:
        return str(max(option.secondary_opts, key=len))
    if value is None or value is False:
        return f"no {flag}"
    if isinstance(value, dict):
        return " ".join(f"{flag} {key}={_word(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        if option.multiple:
            return " ".join(f"{flag} {_word(item)}" for item in value)
        return f"{flag} {('x' if name in ('size', 'input_size') else ',').join(map(str, value))}"
    return f"{flag} {_word(value)}" + ("min" if name == "polish_minutes" else "")


def _word(value: object) -> str:
    """Return a value as the command line takes it, which reads booleans as TOML does."""
    if isinstance(value, bool):
        return str(value).lower()
    return "…" if value is ... else shlex.quote(str(value))
