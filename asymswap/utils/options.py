"""Options declared once: dataclass fields with help texts, from which the command line makes its options."""

import dataclasses
from typing import Any, TypeVar

_T = TypeVar("_T")


def option(default: _T, help: str, panel: str | None = None, **about: Any) -> _T:
    """Return a dataclass field that `asymswap.cli.commands` turns into a command line option.

    `about` may have `shown` (the default as the help shows it), `flags`, `text=True` (the command line parses the text)
    and what else Typer's options take, such as `metavar`. Commands declare their own options by it, too.
    """
    made: _T = dataclasses.field(default=default, metadata={"help": help, "panel": panel, **about})
    return made
