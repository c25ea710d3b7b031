"""`asymswap show`: what was done to a converted model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asymswap.cli import options as o


def show(
    checkpoint: Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)],
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan of the last conversion as JSON.")] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Tell what was done to a converted model, from which source, with which result.

    Example: asymswap show resnet18.asym.pt
    """
    from asymswap.checkpoint import header_to_json, read_checkpoint
    from asymswap.cli import screen
    from asymswap.errors import CheckpointError
    from asymswap.planning.plan import plan_text
    from asymswap.reporting.show import show_view

    with screen.progress(quiet=json or plan):
        header = read_checkpoint(checkpoint).header
    if plan and not header.plans:
        raise CheckpointError(f"{checkpoint} has no plan: all that was swapped has been fused back")
    if plan:
        typer.echo(plan_text(header.plans[-1]), nl=False)
    elif json:
        screen.print_json(header_to_json(header))
    else:
        try:
            view = show_view(str(checkpoint), header_to_json(header))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            # What a checkpoint tells of how it came to be is free text to all but this command.
            raise CheckpointError(f"{checkpoint} has a damaged provenance ({error!r}); --json prints it") from None
        screen.show(view, screen.console())
