"""`asymswap candidates`: what could be gained, before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asymswap.cli import options as o


def candidates(
    model: o.Model,
    recipe: Annotated[
        str | None, typer.Option(help="Candidates are what this recipe would swap.", autocompletion=o.complete_recipe)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw each conv's share of MACs and parameters (.svg or .png).", rich_help_panel=o.RESULT),
    ] = None,
    force: o.Force = False,
    weights: o.Weights = None,
    arch: o.Arch = None,
    key: o.Key = None,
    arguments: o.Arguments = None,
    input_size: o.InputSize = None,
    trust_pickle: o.TrustPickle = False,
    trust_code: o.TrustCode = False,
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
        from asymswap.results.candidates import to_json

        o.check_recipe(recipe)

        found = asymswap.candidates(
            o.open_model(
                model,
                step,
                weights=weights,
                arch=arch,
                arguments=arguments,
                key=key,
                input_size=input_size,
                trust_pickle=trust_pickle,
                trust_code=trust_code,
            ),
            recipe=recipe,
            progress=step,
        )
    if plot is not None:
        write_bytes(plot, draw(found, plot.suffix[1:]))
    if json:
        screen.print_json(to_json(found))
    elif not quiet:
        console = screen.console()
        screen.show(candidates_view(found, console.width), console)
