"""`asymswap compare`: models beside each other."""

from typing import Any

from asymswap.cli import data as d
from asymswap.cli import options as o
from asymswap.measure.timing import Timing
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
    common: o.Common = o.BESIDE,
) -> None:
    """Example: asymswap compare digits-resnet digits-resnet.asym.pt --data digits"""
    with common.progress() as step:
        from asymswap.api.compare import compare as beside

        common.check_images(data)
        by, how = d.compared_by(data, measured, unlabelled, common.task)
        timing = (timing or Timing()) if latency else None
        opened = common.open_models(models, step)
        found = beside(opened, data=by, images=images, timing=timing, seed=seed, progress=step, **how)
    common.show(found)
