"""The verb `candidates`: every Conv2d of a model, what could be saved at it, or why not."""

from pathlib import Path
from typing import Any

from asymswap.api.progress import Shows, shows_progress
from asymswap.api.session import Session
from asymswap.models.opened import input_warnings
from asymswap.models.opening import Model, open_for_verb
from asymswap.planning.plan import find_candidates
from asymswap.planning.recipe import parse_recipe
from asymswap.planning.shipped import read_recipe_text
from asymswap.results.candidates import Candidates
from asymswap.utils.inputs import sizes


@shows_progress
def candidates(
    model: Model,
    *,
    recipe: str | Path | None = None,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    progress: Shows = True,
) -> Candidates:
    """List every Conv2d with what `separable` or, if it is 1x1, `low-rank` would save, or why it is no candidate."""
    parsed = None if recipe is None else parse_recipe(*read_recipe_text(str(recipe)))
    opened = open_for_verb(model, progress, input_size, example_inputs)
    session = Session(opened)
    traced, costs = session.traced, session.costs
    return Candidates(
        reference=opened.reference,
        traced_by=traced.by,
        input=f"an input of {sizes(opened.example())}",
        rows=tuple(find_candidates(opened.model, traced.sites, parsed)),
        total=costs.total,
        notes=opened.notes + traced.notes + costs.notes(),
        warnings=input_warnings(opened),
    )
