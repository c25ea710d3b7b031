"""The list of candidates as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asymswap.errors import OutputError
from asymswap.reporting import format as fmt
from asymswap.reporting.drawing import svg_file
from asymswap.reporting.layers import Bar, Column, Panel, draw_layers
from asymswap.results.records import plain
from asymswap.results.records import to_json as whole
from asymswap.types import Candidate, Cost


def to_json(
    reference: str,
    rows: Sequence[Candidate],
    total: Cost,
    traced_by: str,
    about: str,
    notes: Sequence[str],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that is known of each conv, and the sums over the candidates."""
    held = sum((row.site.cost for row in rows if row.reason is None), start=Cost(0, 0))
    found = {
        "convs": sum(row.reason is None for row in rows),
        **plain(held),
        "macs_share": held.macs / total.macs if total.macs else 0.0,
        "params_share": held.params / total.params if total.params else 0.0,
    }
    return whole(
        {
            "model": reference,
            "warnings": warnings,
            "traced_by": traced_by,
            "input": about,
            "notes": notes,
            "total": total,
            "candidates": found,
            "sites": [_row(row) for row in rows],
        }
    )


def _row(row: Candidate) -> dict[str, Any]:
    site = plain(row.site)
    return {
        **site,
        "cost": plain(row.site.cost),
        "candidate": row.reason is None,
        "reason": row.reason,
        "break_even": plain(row.break_even),
        "half": plain(row.half),
        "kind": row.kind,
        "becomes": plain(row.becomes),
    }


def check_plot_file(path: Path) -> None:
    """Raise OutputError for an ending other than .svg."""
    if path.suffix != ".svg":
        raise OutputError(f"--plot {path}: the file must end in .svg")


def to_picture(reference: str, rows: Sequence[Candidate], total: Cost) -> str:
    """Every conv's share of the model's MACs and parameters, in order, the candidates marked, as an SVG file."""
    kinds = list(dict.fromkeys(row.kind for row in rows if row.reason is None))
    columns = [
        Column(row.site.name, _lines(row, total), kinds.index(row.kind) if row.reason is None else None) for row in rows
    ]
    shares = [(_part(row.site.cost.macs, total.macs), _part(row.site.cost.params, total.params)) for row in rows]
    panels = [
        Panel(f"Share of the {what}", fmt.percent, tuple(Bar(front=share[number]) for share in shares))
        for number, what in enumerate(("MACs", "parameters"))
    ]
    held = sum((row.site.cost for row in rows if row.reason is None), start=Cost(0, 0))
    convs = sum((row.site.cost for row in rows), start=Cost(0, 0))
    rest = total - convs
    heading = [
        f"{reference}: {sum(row.reason is None for row in rows)} of {len(rows)} convs are candidates",
        f"They hold {fmt.share(held.macs, total.macs)} of the MACs and {fmt.share(held.params, total.params)} of "
        f"the parameters; what is no conv holds {fmt.share(rest.macs, total.macs)} and "
        f"{fmt.share(rest.params, total.params)}.",
    ]
    names = ["candidate" if kind == "separable" else f"candidate: {kind}" for kind in kinds]
    return svg_file(draw_layers(columns, panels, " ".join(heading), heading, [*names, "no candidate"]))


def _part(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _lines(row: Candidate, total: Cost) -> tuple[str, ...]:
    site = row.site
    size = "" if site.feature_map is None else f" at {site.feature_map[0]}x{site.feature_map[1]}"
    return (
        site.name,
        f"{site.conv.describe()}{size}",
        f"{fmt.share(site.cost.macs, total.macs)} of the MACs, {fmt.share(site.cost.params, total.params)} of the "
        "parameters",
        f"candidate: {row.kind}" if row.reason is None else f"no candidate: {row.reason}",
    )
