"""Parts of messages: a library's error on one line, a long list cut short."""

from __future__ import annotations

from collections.abc import Sequence


def reason_of(error: object, most: int = 160) -> str:
    """Return an error's text on one line, or the name of its class where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def listed(names: Sequence[str], most: int) -> str:
    """Return the first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
