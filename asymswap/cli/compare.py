"""`asymswap compare`: models beside each other."""

from functools import partial
from pathlib import Path
from typing import Any

import asymswap
from asymswap.cli import options as o
from asymswap.cli.failures import in_flags
from asymswap.measure.timing import Timing
from asymswap.reporting import tables
from asymswap.utils.files import write_file
from asymswap.utils.options import option

_TIME = "Time"
_SCORES = "Outputs and scores"


def compare(
    models: o.Models,
    data: str | None = option(
        None, f"Compare outputs and scores on {o.EVALUATION_FORMS}", _SCORES, shown="outputs on random images"
    ),
    measured: Any = o.COMPARED,
    unlabelled: Any = o.UNLABELLED,
    images: int | None = option(None, "Number of labelled images.", _SCORES, shown="all"),
    seed: int = option(0, "Seed for choosing images.", _SCORES),
    latency: bool = option(True, "Time all models in turn.", _TIME),
    timing: Any = o.TIMING,
    report: Path | None = option(None, "Write the comparison to this .html, .json or .md file.", o.RESULT),
    force: bool = o.FORCE,
    common: o.Common = o.BESIDE,
) -> None:
    """Example: asymswap compare digits-resnet digits-resnet.asym.pt --data digits"""
    o.check_report(report, force)
    with common.bars() as step:
        common.check_images(data)
        by, how = o.compared_by(data, measured, unlabelled, common.task)
        timing = (timing or Timing()) if latency else None
        opened = common.open_models(models, step)
        found = asymswap.compare(opened, data=by, images=images, timing=timing, seed=seed, progress=step, **how)
    if report is not None:
        title = f"{' and '.join(map(str, models))} compared"
        write_file(report, tables.to_file(in_flags(found), report, partial(tables.to_page, title=title)))
    common.show(found)
