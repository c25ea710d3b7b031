"""`asymswap export`: a converted model for other programs."""

from pathlib import Path
from typing import Any, Literal

import asymswap
from asymswap.cli import options as o
from asymswap.utils.distributed import ALONE
from asymswap.utils.options import option

_FORMS = "onnx, pt2, state-dict, ultralytics or transformers."


def export(
    checkpoint: o.Checkpoint,
    form: Literal["onnx", "pt2", "state-dict", "ultralytics", "transformers"] | None = option(
        None, _FORMS, o.RESULT, shown="by the file's ending, or onnx", metavar="FORM", flags=("--to",)
    ),
    output: Path | None = option(None, "The file to write.", o.RESULT, flags=o.OUTPUT, shown="<stem>.onnx or .pt2"),
    fuse: bool = option(True, "First fuse replacements that fuse exactly."),
    dynamic_size: bool = option(False, "Accept inputs of any height and width, not only any batch size."),
    quantize: Literal["int8"] | None = option(
        None, "int8: measure ranges on --calibrate, then compute in int8.", "int8", shown=False, metavar="int8"
    ),
    calibration: Any = o.INPUTS,
    force: bool = o.FORCE,
    common: o.Common = o.EXPORTED,
) -> None:
    """Example: asymswap export model.asym.pt --to onnx -o model.onnx"""
    target = o.default_output(str(checkpoint), "exported")
    if form == "transformers":
        target = target.with_suffix("")
    elif form not in ("state-dict", "ultralytics"):
        target = target.with_name(f"{checkpoint.stem}.{form or 'onnx'}")
    target = o.target_of(checkpoint, output or target, force)
    with common.bars() as step:
        report = asymswap.export(
            common.model(checkpoint, step),
            target,
            form=form,
            fuse=fuse,
            dynamic_size=dynamic_size,
            quantize=quantize,
            calibration=o.calibration_of(calibration, 0, ALONE, common.task) if quantize or calibration else None,
            force=force,
            progress=step,
        )
    common.show(report)
