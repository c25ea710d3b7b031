"""`asymswap export`: a converted model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from asymswap.cli import options as o
from asymswap.cli.fields import opt


@o.takes_common(("arch", "arguments"), preprocessing=False)
def export(
    checkpoint: o.Checkpoint,
    to: Annotated[
        Literal["onnx", "pt2", "state-dict"] | None,
        opt("onnx, pt2 or state-dict.", o.RESULT, shown="by the file's ending, or onnx", metavar="FORM"),
    ] = None,
    output: Annotated[
        Path | None, opt("The file to write.", o.RESULT, "-o", "--output", shown="<stem>.onnx or .pt2")
    ] = None,
    fuse: Annotated[bool, opt("First fuse replacements that fuse exactly.", None, "--fuse/--no-fuse")] = True,
    dynamic_size: Annotated[
        bool, opt("Accept inputs of any height and width, not only any batch size.", None, "--dynamic-size")
    ] = False,
    force: o.Force = False,
    *,
    common: o.Common,
) -> None:
    """Write a converted model as ONNX, torch.export's .pt2 or a state dict, and check it against PyTorch.

    Example: asymswap export model.asym.pt --to onnx -o model.onnx
    """
    from asymswap.utils.files import check_distinct, check_output

    target = output or o.default_output(str(checkpoint), "exported")
    if output is None and to != "state-dict":
        target = target.with_name(f"{checkpoint.stem}.{to or 'onnx'}")
    check_output(target, force)
    check_distinct({"the checkpoint": o.model_file(checkpoint), "-o": target})
    with common.progress() as step:
        from asymswap.api.export import export as run

        report = run(
            common.open_model(checkpoint, step),
            target,
            form=to,
            fuse=fuse,
            dynamic_size=dynamic_size,
            force=force,
            progress=step,
        )
    common.show(report)
