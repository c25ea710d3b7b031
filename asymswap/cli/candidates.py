"""`asymswap candidates`: what could be gained, before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from asymswap.cli import options as o
from asymswap.cli.fields import opt


@o.takes_common(preprocessing=False)
def candidates(
    model: o.Model,
    recipe: Annotated[
        str | None, opt("Candidates are what this recipe would swap.", autocompletion=o.complete_recipe)
    ] = None,
    plot: Annotated[Path | None, opt("Draw each conv's share of MACs and parameters (.svg or .png).", o.RESULT)] = None,
    force: o.Force = False,
    *,
    common: o.Common,
) -> None:
    """List every Conv2d: what a pair of convs would save there, or why it is no candidate.

    Convs of 1x1 would become two 1x1 convs (low-rank), larger ones a column and a row (separable).

    Example: asymswap candidates resnet18 --weights none
    """
    from asymswap.utils.files import write_file

    if plot is not None:
        o.check_picture("--plot", plot, force)
    with common.progress() as step:
        import asymswap
        from asymswap.reporting.candidates import draw

        o.check_recipe(recipe)
        found = asymswap.candidates(common.open_model(model, step), recipe=recipe, progress=step)
    if plot is not None:
        write_file(plot, draw(found, plot.suffix[1:]))
    common.show(found)
