"""`asymswap fuse`: replacements back into ordinary convs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from asymswap.cli import options as o


@o.takes_preprocessing
def fuse(
    checkpoint: Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The file to write.", show_default="<stem>.fused.pt", rich_help_panel=o.RESULT
        ),
    ] = None,
    separable: Annotated[
        bool, typer.Option("--separable", help="Fuse pairs and crosses too, whose one conv costs more.")
    ] = False,
    max_offset: Annotated[
        float | None,
        typer.Option(help="Leave out predicted offsets that stay below so many pixels; the difference is told."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images on which offsets and outputs are compared.", show_default="random ones")
    ] = None,
    as_original: Annotated[
        bool,
        typer.Option(
            "--as-original",
            help="Write a plain state_dict that fits the unconverted model.",
            rich_help_panel=o.RESULT,
        ),
    ] = False,
    preprocessing: Any = None,
    arch: o.Arch = None,
    arguments: o.Arguments = None,
    trust_code: o.TrustCode = False,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Turn acb and offset kinds back into ordinary convs that compute the same.

    Example: asymswap fuse model.asym.pt --as-original -o model.pt
    """
    from asymswap.cli import screen
    from asymswap.utils.files import check_distinct, check_output

    target = output or o.default_output(str(checkpoint), "fused")
    check_output(target, force)
    check_distinct({"the checkpoint": o.model_file(checkpoint), "-o": target})
    with screen.progress(quiet) as step:
        import asymswap
        from asymswap.checkpoint import check_suffix
        from asymswap.models.preprocessing import check_needed

        check_suffix(target)
        check_needed(preprocessing, data)
        fusion = asymswap.fuse(
            o.open_model(
                checkpoint,
                step,
                arch=arch,
                arguments=arguments,
                trust_code=trust_code,
                preprocessing=preprocessing,
            ),
            separable=separable,
            max_offset=max_offset,
            data=data,
            progress=step,
        )
        report = asymswap.save_fused(fusion, target, as_original=as_original, force=force)
    if json:
        from asymswap.results.records import to_json

        screen.print_json(to_json(report))
    elif not quiet:
        from asymswap.reporting.screens import fusion_view

        screen.show(fusion_view(report), screen.console())
