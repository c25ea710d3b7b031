"""`asymswap candidates`: what could be gained, before anything is done."""

from __future__ import annotations

from typing import Annotated

import typer

from asymswap.cli import options as o


def candidates(
    model: o.Model,
    recipe: Annotated[str | None, typer.Option(help="Candidates are what this recipe would swap.")] = None,
    weights: o.Weights = None,
    arch: o.Arch = None,
    arguments: o.Arguments = None,
    input_size: o.InputSize = None,
    trust_pickle: o.TrustPickle = False,
    trust_code: o.TrustCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List every Conv2d: what a separable pair would save there, or why it is no candidate.

    Example: asymswap candidates resnet18 --weights none
    """
    from asymswap.cli import screen

    with screen.progress(quiet=json) as step:
        from asymswap import api
        from asymswap.reporting import terminal
        from asymswap.reporting.candidates import to_json

        found = api.candidates(
            model,
            recipe=recipe,
            weights=weights,
            arch=arch,
            arguments=o.parse_pairs("--arg", arguments),
            trust_pickle=trust_pickle,
            trust_code=trust_code,
            input_size=o.parse_input_size(input_size),
            progress=step,
        )
    if json:
        screen.print_json(to_json(found.reference, found.rows, found.total, found.traced_by, found.input, found.notes))
        return
    console = screen.console()
    view = terminal.candidates_view(
        found.reference, found.rows, found.total, found.held, found.traced_by, found.input, found.notes, console.width
    )
    screen.show(view, console)
