"""`asymswap fuse`: replacements back into ordinary convs."""

from pathlib import Path

import asymswap
from asymswap.cli import options as o
from asymswap.utils.options import option


def fuse(
    checkpoint: o.Checkpoint,
    output: Path | None = option(None, "The file to write.", o.RESULT, flags=o.OUTPUT, shown="<stem>.fused.pt"),
    separable: bool = option(False, "Fuse pairs and crosses too, although one conv costs more."),
    max_offset: float | None = option(
        None, "Drop predicted offsets that stay below this many pixels; reports the difference."
    ),
    data: str | None = option(None, "Images to compare offsets and outputs on.", shown="random ones"),
    as_original: bool = option(False, "Write a plain state_dict that fits the unconverted model.", o.RESULT),
    force: bool = o.FORCE,
    common: o.Common = o.OF_CHECKPOINT,
) -> None:
    """Example: asymswap fuse model.asym.pt --as-original -o model.pt"""
    target = o.target_of(checkpoint, output or o.default_output(str(checkpoint), "fused"), force)
    with common.bars() as step:
        from asymswap.checkpoint import check_suffix

        check_suffix(target)
        common.check_images(data)
        fusion = asymswap.fuse(
            common.model(checkpoint, step), separable=separable, max_offset=max_offset, data=data, progress=step
        )
        report = asymswap.save_fused(fusion, target, as_original=as_original, force=force)
    common.show(report)
