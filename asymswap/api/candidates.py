"""The verb `candidates`: every Conv2d of a model, what could be saved at it, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asymswap.graph.trace import check_runs, trace
from asymswap.models.opening import Model, costs_of, open_model, sizes_assumed
from asymswap.models.references import Request
from asymswap.planning.candidates import find_candidates
from asymswap.planning.recipe import parse_recipe, read_recipe_text
from asymswap.results.candidates import Candidates
from asymswap.types import Progress, silent
from asymswap.utils.inputs import describe


def candidates(
    model: Model,
    *,
    recipe: str | Path | None = None,
    weights: str | None = None,
    arch: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    key: str | None = None,
    trust_pickle: bool = False,
    trust_code: bool = False,
    input_size: tuple[int, ...] | None = None,
    progress: Progress = silent,
) -> Candidates:
    """List every Conv2d with what `separable` would save there, or why it is no candidate."""
    parsed = None if recipe is None else parse_recipe(*read_recipe_text(str(recipe)))
    opened = open_model(
        model,
        Request(
            arch=arch,
            weights=weights,
            arguments=arguments or {},
            trust_pickle=trust_pickle,
            key=key,
            trust_code=trust_code,
        ),
        input_size,
        progress,
    )
    traced = trace(opened.model, opened.example())
    check_runs(traced, opened.model, opened.example())
    costs = costs_of(opened)
    return Candidates(
        reference=opened.reference,
        traced_by=traced.by,
        input=describe(opened.example()),
        rows=tuple(find_candidates(opened.model, traced.sites, parsed)),
        total=costs.total,
        notes=opened.source.notes + traced.notes + costs.notes(),
        warnings=sizes_assumed([opened]),
    )
