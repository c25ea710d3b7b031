"""`asymswap export`: a converted model for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from asymswap.cli import options as o


class Form(StrEnum):
    """What can be written."""

    onnx = "onnx"
    pt2 = "pt2"
    state_dict = "state-dict"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)],
    to: Annotated[
        Form | None,
        typer.Option(
            help="What to write: onnx, pt2 or state-dict.",
            metavar="FORM",
            show_default="by the file's ending, or onnx",
            rich_help_panel=o.RESULT,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The file to write.", show_default="<stem>.onnx or .pt2", rich_help_panel=o.RESULT
        ),
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="Fuse before what becomes an ordinary conv exactly.")
    ] = True,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Inputs of any height and width, not only any batch.")
    ] = False,
    arch: o.Arch = None,
    arguments: o.Arguments = None,
    trust_code: o.TrustCode = False,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a converted model as ONNX, as torch.export's .pt2 or as a state dict, and run it beside PyTorch.

    Example: asymswap export model.asym.pt --to onnx -o model.onnx
    """
    from asymswap.cli import screen
    from asymswap.utils.files import check_distinct, check_output

    target = output or _default(checkpoint, to or Form.onnx)
    check_output(target, force)
    check_distinct({"the checkpoint": o.model_file(checkpoint), "-o": target})
    with screen.progress(quiet) as step:
        from asymswap.api.export import export as run

        report = run(
            o.open_model(checkpoint, step, arch=arch, arguments=arguments, trust_code=trust_code),
            target,
            form=None if to is None else to.value,
            fuse=fuse,
            dynamic_size=dynamic_size,
            force=force,
            progress=step,
        )
    if json:
        from asymswap.results.records import to_json

        screen.print_json(to_json(report))
    elif not quiet:
        from asymswap.reporting.screens import export_view

        screen.show(export_view(report), screen.console())


def _default(checkpoint: Path, form: Form) -> Path:
    stem = o.default_output(str(checkpoint), "exported")
    return stem if form is Form.state_dict else stem.with_name(f"{checkpoint.stem}.{form.value}")
