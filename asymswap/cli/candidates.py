"""`asymswap candidates`: what could be gained, before anything is done."""

from pathlib import Path

import asymswap
from asymswap.cli import options as o
from asymswap.reporting.candidates import draw as draw_candidates
from asymswap.utils.files import write_file
from asymswap.utils.options import option


def candidates(
    model: o.Model,
    recipe: str | None = option(None, "Candidates are what this recipe would swap.", autocompletion=o.complete_recipe),
    plot: Path | None = option(None, "Draw each conv's share of MACs and parameters (.svg or .png).", o.RESULT),
    force: bool = o.FORCE,
    common: o.Common = o.WITHOUT_IMAGES,
) -> None:
    """Convs of 1x1 would become two 1x1 convs (low-rank), larger ones a column and a row (separable).

    Example: asymswap candidates resnet18 --weights none
    """
    o.check_picture("--plot", plot, force)
    with common.bars() as step:
        found = asymswap.candidates(common.model(model, step), recipe=recipe, progress=step)
    if plot is not None:
        write_file(plot, draw_candidates(found, plot.suffix[1:]))
    common.show(found)
