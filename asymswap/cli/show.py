"""`asymswap show`: what was done to a converted model."""

from dataclasses import replace
from pathlib import Path

import typer
from rich.errors import ConsoleError

import asymswap
from asymswap.cli import options as o
from asymswap.cli.commands import begin_as
from asymswap.cli.failures import in_flags
from asymswap.errors import AsymswapError, CheckpointError
from asymswap.reporting.offsets import draw as draw_offsets
from asymswap.reporting.screens import show_view
from asymswap.utils.files import write_file
from asymswap.utils.options import option

_OFFSETS = "Offsets"


def show(
    checkpoint: o.Checkpoint,
    plan: bool = option(False, "Print the plan of the last conversion as JSON."),
    offsets: bool = option(False, "Show where taps have moved, layer by layer.", _OFFSETS),
    draw: Path | None = option(None, "Draw the offsets into this .svg or .png file.", _OFFSETS),
    data: str | None = option(None, "Images to predict offsets on.", _OFFSETS, shown="random ones"),
    report: Path | None = option(
        None, "Write the report of the last conversion to this .html, .json or .md file.", o.RESULT
    ),
    force: bool = o.FORCE,
    common: o.Common = o.OF_CHECKPOINT,
) -> None:
    """Example: asymswap show resnet18.asym.pt --report resnet18.html"""
    if draw is not None or data is not None or offsets or common.preprocessing is not None:
        if report is not None or plan:
            other = "--plan" if report is None else "--report"
            raise AsymswapError(f"{other} is about the conversion, --offsets, --draw and --data about taps; run twice")
        o.check_picture("--draw", draw, force)
        with common.bars() as step:
            common.check_images(data)
            moved = asymswap.offsets(common.model(checkpoint, step), data=data)
        if draw is not None:
            write_file(draw, draw_offsets(moved, draw.suffix[1:]))
        common.show(moved)
        return
    o.check_report(report, force)
    with common.bars():
        from asymswap.checkpoint import header_to_json, read_checkpoint
        from asymswap.planning.plan import plan_text

        header = read_checkpoint(checkpoint).header
        begin_as("convert")  # whose report it is
        try:
            header = replace(header, provenance=in_flags(header.provenance))
        except RecursionError:
            raise CheckpointError(f"{checkpoint} has a damaged provenance: it is nested too deeply") from None
    if plan and not header.plans:
        raise CheckpointError(f"{checkpoint} has no plan: all that was swapped has been fused back")
    if report is not None:
        from asymswap.api.convert import stored_report_text

        write_file(report, stored_report_text(header, checkpoint, report))
    if plan:
        typer.echo(plan_text(header.plans[-1]), nl=False)
    elif common.json:
        o.print_json(header_to_json(header))
    elif not common.quiet:
        try:
            o.console().print(show_view(str(checkpoint), header), highlight=False, markup=False)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; --json prints it") from None
        except (ArithmeticError, ValueError, ConsoleError) as error:
            # The file's numbers can be anything.
            raise CheckpointError(f"{checkpoint} has a damaged provenance ({error!r}); --json prints it") from None
