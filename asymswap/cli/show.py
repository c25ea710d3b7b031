"""`asymswap show`: what was done to a converted model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from asymswap.cli import options as o
from asymswap.errors import AsymswapError

_OFFSETS = "Offsets"


@o.takes_preprocessing
def show(
    checkpoint: Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)],
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan of the last conversion as JSON.")] = False,
    offsets: Annotated[
        bool,
        typer.Option(
            "--offsets", help="Tell where the taps of offset kinds have gone, layer by layer.", rich_help_panel=_OFFSETS
        ),
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(help="Draw them into this .svg or .png file.", rich_help_panel=_OFFSETS),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Images to predict them on.", show_default="random ones", rich_help_panel=_OFFSETS),
    ] = None,
    preprocessing: Any = None,
    arch: o.Arch = None,
    arguments: o.Arguments = None,
    trust_code: o.TrustCode = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write the report of the last conversion to this .html, .json or .md file.", rich_help_panel=o.RESULT
        ),
    ] = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Tell what was done to a converted model, from which source, with which result.

    Example: asymswap show resnet18.asym.pt --report resnet18.html
    """
    from asymswap.cli import screen
    from asymswap.errors import CheckpointError
    from asymswap.reporting.convert import check_suffix
    from asymswap.utils.files import check_output, write_bytes, write_text

    if draw is not None or data is not None or offsets or preprocessing is not None:
        _check_alone(report, plan)
        if draw is not None:
            o.check_picture("--draw", draw, force)
        with screen.progress(quiet) as step:
            from asymswap.api.offsets import offsets as find_offsets
            from asymswap.models.preprocessing import check_needed
            from asymswap.reporting.offsets import draw as draw_offsets
            from asymswap.reporting.offsets import offsets_view
            from asymswap.results.offsets import to_json

            check_needed(preprocessing, data)
            opened = o.open_model(
                checkpoint,
                step,
                arch=arch,
                arguments=arguments,
                trust_code=trust_code,
                preprocessing=preprocessing,
            )
            moved = find_offsets(opened, data=data)
        if draw is not None:
            write_bytes(draw, draw_offsets(moved, draw.suffix[1:]))
        if json:
            screen.print_json(to_json(moved))
        elif not quiet:
            screen.show(offsets_view(moved), screen.console())
        return
    if report is not None:
        check_output(report, force, "--report")
        check_suffix(report)
    with screen.progress(quiet):
        from asymswap.checkpoint import header_to_json, read_checkpoint

        header = read_checkpoint(checkpoint).header
    if plan and not header.plans:
        raise CheckpointError(f"{checkpoint} has no plan: all that was swapped has been fused back")
    if report is not None:
        from asymswap.api.report_files import stored_report_text

        write_text(report, stored_report_text(header, checkpoint, report))
    if plan:
        from asymswap.planning.plan import plan_text

        typer.echo(plan_text(header.plans[-1]), nl=False)
    elif json:
        screen.print_json(header_to_json(header))
    elif not quiet:
        from rich.errors import ConsoleError

        from asymswap.reporting.screens import show_view

        try:
            view = show_view(str(checkpoint), header_to_json(header))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, ConsoleError) as error:
            # What a checkpoint tells of how it came to be is free text to all but this command.
            raise CheckpointError(f"{checkpoint} has a damaged provenance ({error!r}); --json prints it") from None
        screen.show(view, screen.console())


def _check_alone(report: Path | None, plan: bool) -> None:
    """Raise AsymswapError for what tells of a conversion beside what tells of offsets."""
    other = "--report" if report is not None else "--plan" if plan else None
    if other is not None:
        raise AsymswapError(
            f"{other} tells of the conversion, --offsets, --draw and --data of where taps are; ask twice"
        )
