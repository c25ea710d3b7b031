"""`asymswap fuse`: replacements back into ordinary convs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from asymswap.cli import options as o
from asymswap.cli.fields import opt


@o.takes_common(("arch", "arguments"))
def fuse(
    checkpoint: o.Checkpoint,
    output: Annotated[
        Path | None, opt("The file to write.", o.RESULT, "-o", "--output", shown="<stem>.fused.pt")
    ] = None,
    separable: Annotated[
        bool, opt("Fuse pairs and crosses too, although one conv costs more.", None, "--separable")
    ] = False,
    max_offset: Annotated[
        float | None, opt("Drop predicted offsets that stay below this many pixels; reports the difference.")
    ] = None,
    data: Annotated[str | None, opt("Images to compare offsets and outputs on.", shown="random ones")] = None,
    as_original: Annotated[
        bool, opt("Write a plain state_dict that fits the unconverted model.", o.RESULT, "--as-original")
    ] = False,
    force: o.Force = False,
    *,
    common: o.Common,
) -> None:
    """Turn acb and offset kinds back into ordinary convs that compute the same.

    Example: asymswap fuse model.asym.pt --as-original -o model.pt
    """
    from asymswap.utils.files import check_distinct, check_output

    target = output or o.default_output(str(checkpoint), "fused")
    check_output(target, force)
    check_distinct({"the checkpoint": o.model_file(checkpoint), "-o": target})
    with common.progress() as step:
        import asymswap
        from asymswap.checkpoint import check_suffix
        from asymswap.models.preprocessing import check_needed

        check_suffix(target)
        check_needed(common.opening["preprocessing"], data)
        fusion = asymswap.fuse(
            common.open_model(checkpoint, step), separable=separable, max_offset=max_offset, data=data, progress=step
        )
        report = asymswap.save_fused(fusion, target, as_original=as_original, force=force)
    common.show(report)
