"""`asymswap evaluate`: how good models are, and how sure that is."""

from typing import Any

from asymswap.cli import data as d
from asymswap.cli import options as o
from asymswap.utils.options import option


def evaluate(
    models: o.Models,
    data: str | None = option(None, f"Measure on {d.EVALUATION_FORMS}", o.IMAGES, shown=False),
    measured: Any = d.COMPARED,
    unlabelled: Any = d.UNLABELLED,
    part: str = option("test", "test, validation (what finetune holds back) or train.", o.IMAGES),
    validation: str | None = option(
        None,
        "Validation images: a fraction of the training images (0.1), test, none, or other data.",
        o.IMAGES,
        shown="the folder val, else 0.1",
    ),
    batch_size: int = option(256, "Batch size."),
    workers: int = option(0, "Number of processes that read images.", o.IMAGES),
    confusions: int = option(10, "Number of confused pairs of classes to report."),
    seed: int = option(0, "Seed of the validation split.", o.IMAGES),
    strict: bool = option(False, "Fail on an image that cannot be read instead of skipping it.", o.IMAGES),
    download: bool = o.DOWNLOAD,
    common: o.Common = o.COMMON,
) -> None:
    """Example: asymswap evaluate model.pt model.asym.pt --data photos/"""
    with common.progress() as step:
        import asymswap

        by, how = d.compared_by(data, measured, unlabelled, common.task, needed=True)
        report = asymswap.evaluate(
            common.open_models(models, step),
            by,
            part=part,
            validation=validation,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            confusions=confusions,
            strict=strict,
            download=download,
            progress=step,
            **how,
        )
    common.show(report)
