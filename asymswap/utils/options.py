"""Options declared once: a dataclass field that carries its help text, from which the command line makes an option."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

_T = TypeVar("_T")


def option(default: _T, help: str, panel: str | None, **about: Any) -> _T:
    """Return a dataclass field that `asymswap.cli.fields` turns into a command line option.

    `about` may have `name` (`--lr`; by default the field's own), `shown` (the default as the help shows it), `metavar`,
    and `text=True` where the command line takes text that it parses itself.
    """
    made: _T = dataclasses.field(default=default, metadata={"help": help, "panel": panel, **about})
    return made
