"""`asymswap compare`: models beside each other."""

from pathlib import Path
from typing import Any

from asymswap.cli import data as d
from asymswap.cli import options as o
from asymswap.cli.failures import in_flags
from asymswap.measure.timing import Timing
from asymswap.reporting import tables
from asymswap.reporting.convert import check_suffix
from asymswap.utils.files import check_output, write_file
from asymswap.utils.options import option

_OUTPUTS = "Outputs and scores"


def compare(
    models: o.Models,
    data: str | None = option(
        None, f"Compare outputs and scores on {d.EVALUATION_FORMS}", _OUTPUTS, shown="outputs on random images"
    ),
    measured: Any = d.COMPARED,
    unlabelled: Any = d.UNLABELLED,
    images: int | None = option(None, "Number of labelled images.", _OUTPUTS, shown="all"),
    seed: int = option(0, "Seed for choosing images.", _OUTPUTS),
    latency: bool = option(True, "Time all models in turn.", "Time"),
    timing: Any = o.TIMING,
    report: Path | None = option(None, "Write the comparison to this .html, .json or .md file.", o.RESULT),
    force: bool = o.FORCE,
    common: o.Common = o.BESIDE,
) -> None:
    """Example: asymswap compare digits-resnet digits-resnet.asym.pt --data digits"""
    if report is not None:
        check_output(report, force)
        check_suffix(report)
    with common.progress() as step:
        from asymswap.api.compare import compare as beside

        common.check_images(data)
        by, how = d.compared_by(data, measured, unlabelled, common.task)
        timing = (timing or Timing()) if latency else None
        opened = common.open_models(models, step)
        found = beside(opened, data=by, images=images, timing=timing, seed=seed, progress=step, **how)
    if report is not None:
        write_file(report, tables.to_file(in_flags(found), report, f"{' and '.join(map(str, models))} compared"))
    common.show(found)
