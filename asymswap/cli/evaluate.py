"""`asymswap evaluate`: how good models are, and how sure that is."""

from typing import Any

import asymswap
from asymswap.cli import options as o
from asymswap.cli.commands import Group
from asymswap.training.config import Training
from asymswap.utils.options import option

_AS_TRAINED: Any = Group(Training, only=("validation", "strict"))


def evaluate(
    models: o.Models,
    data: str | None = option(None, f"Measure on {o.EVALUATION_FORMS}", o.IMAGES, shown=False),
    measured: Any = o.COMPARED,
    unlabelled: Any = o.UNLABELLED,
    part: str = option("test", "test, validation (what finetune holds back) or train.", o.IMAGES),
    as_trained: Any = _AS_TRAINED,
    batch_size: int = option(256, "Batch size."),
    workers: int = option(0, "Number of processes that read images.", o.IMAGES),
    confusions: int = option(10, "Number of confused pairs of classes to report."),
    seed: int = option(0, "Seed of the validation split.", o.IMAGES),
    download: bool = o.DOWNLOAD,
    common: o.Common = o.COMMON,
) -> None:
    """Example: asymswap evaluate model.pt model.asym.pt --data photos/"""
    with common.bars() as step:
        by, how = o.compared_by(data, measured, unlabelled, common.task, needed=True)
        report = asymswap.evaluate(
            common.open_models(models, step),
            by,
            part=part,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            confusions=confusions,
            download=download,
            progress=step,
            **as_trained,
            **how,
        )
    common.show(report)
