"""`asymswap candidates`: what could be gained, before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from asymswap.cli import options as o
from asymswap.cli.fields import opt


@o.takes_model(preprocessing=False)
def candidates(
    model: o.Model,
    recipe: Annotated[
        str | None, opt("Candidates are what this recipe would swap.", autocompletion=o.complete_recipe)
    ] = None,
    plot: Annotated[Path | None, opt("Draw each conv's share of MACs and parameters (.svg or .png).", o.RESULT)] = None,
    force: o.Force = False,
    how: Any = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """List every Conv2d: what a separable pair would save there, or why it is no candidate.

    Example: asymswap candidates resnet18 --weights none
    """
    from asymswap.cli import screen
    from asymswap.utils.files import write_bytes

    if plot is not None:
        o.check_picture("--plot", plot, force)
    with screen.progress(quiet) as step:
        import asymswap
        from asymswap.reporting.candidates import candidates_view, draw

        o.check_recipe(recipe)
        found = asymswap.candidates(o.open_model(model, step, how), recipe=recipe, progress=step)
    if plot is not None:
        write_bytes(plot, draw(found, plot.suffix[1:]))
    screen.show_result(found, candidates_view, json, quiet)
