"""`asymswap show`: what was done to a converted model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asymswap.cli import options as o

if TYPE_CHECKING:
    from asymswap.checkpoint import Header


def show(
    checkpoint: Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)],
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan of the last conversion as JSON.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write the report of the last conversion to this .html, .json or .md file.")
    ] = None,
    force: o.Force = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Tell what was done to a converted model, from which source, with which result.

    Example: asymswap show resnet18.asym.pt --report resnet18.html
    """
    from asymswap.cli import screen
    from asymswap.errors import CheckpointError
    from asymswap.output import check_output
    from asymswap.reporting import files

    if report is not None:
        check_output(report, force)
        files.check_suffix(report)
    with screen.progress(quiet=json or plan):
        from asymswap.checkpoint import header_to_json, read_checkpoint

        header = read_checkpoint(checkpoint).header
    if plan and not header.plans:
        raise CheckpointError(f"{checkpoint} has no plan: all that was swapped has been fused back")
    if report is not None:
        _write_report(header, checkpoint, report)
    if plan:
        from asymswap.planning.plan import plan_text

        typer.echo(plan_text(header.plans[-1]), nl=False)
    elif json:
        screen.print_json(header_to_json(header))
    else:
        from asymswap.reporting.show import show_view

        console = screen.console()
        screen.show(show_view(str(checkpoint), header_to_json(header)), console)


def _write_report(header: Header, checkpoint: Path, path: Path) -> None:
    from dataclasses import replace

    from asymswap.errors import CheckpointError
    from asymswap.output import write_text
    from asymswap.reporting import files
    from asymswap.reporting.making import read_making, read_report
    from asymswap.reporting.report import FileRow

    told = read_report(header.provenance, str(checkpoint))
    told = replace(told, files=(*told.files, FileRow(str(checkpoint), checkpoint.stat().st_size)))
    making = read_making(header.provenance, str(checkpoint))
    try:
        text = files.report_text(told, making, path)
    except (ArithmeticError, ValueError) as error:
        # The numbers are the file's, and nobody has vouched for them.
        raise CheckpointError(f"{checkpoint} has a damaged report: {error}") from None
    write_text(path, text)
