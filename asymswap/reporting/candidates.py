"""The list of candidates as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from asymswap.reporting.report import SCHEMA, plain
from asymswap.spec import Candidate, Cost, RankCost


def to_json(
    reference: str, rows: Sequence[Candidate], total: Cost, traced_by: str, about: str, notes: Sequence[str]
) -> dict[str, Any]:
    """Everything that is known of each conv, and the sums over the candidates."""
    held = sum((row.site.cost for row in rows if row.reason is None), start=Cost(0, 0))
    return {
        "schema": SCHEMA,
        "model": reference,
        "traced_by": traced_by,
        "input": about,
        "notes": list(notes),
        "total": plain(total),
        "candidates": {
            "convs": sum(row.reason is None for row in rows),
            **plain(held),
            "macs_share": held.macs / total.macs if total.macs else 0.0,
            "params_share": held.params / total.params if total.params else 0.0,
        },
        "sites": [_row(row) for row in rows],
    }


def _row(row: Candidate) -> dict[str, Any]:
    site = plain(row.site)
    return {
        **site,
        "cost": plain(row.site.cost),
        "candidate": row.reason is None,
        "reason": row.reason,
        "break_even": _at(row.break_even),
        "half": _at(row.half),
        "kind": row.kind,
        "becomes": None if row.becomes is None else plain(row.becomes),
    }


def _at(value: RankCost | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {**{f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
