"""Records as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from asymswap.types import Cost

SCHEMA = 1


def to_json(report: Any, **more: Any) -> dict[str, Any]:
    """What a command has to say as plain data, with the number of its form; `more` is what follows from it."""
    return {"schema": SCHEMA, **plain(report), **more}


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as plain data; a cost carries its FLOPs beside its MACs.

    A number that is infinite or undefined, such as a change relative to an output of zeros, is None: JSON has no word
    for it, and writes null.
    """
    if isinstance(value, Cost):
        return {"macs": value.macs, "flops": value.flops, "params": value.params}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
