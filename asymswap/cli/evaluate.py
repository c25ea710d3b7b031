"""`asymswap evaluate`: how good models are, and how sure that is."""

from __future__ import annotations

from typing import Annotated, Any

from asymswap.cli import options as o
from asymswap.cli.fields import opt
from asymswap.cli.metric import EVALUATION_FORMS, agreement_on, measured_by, takes_against, takes_metric


@o.takes_common()
@takes_metric
@takes_against
def evaluate(
    models: o.Models,
    data: Annotated[str | None, opt(f"Measure on {EVALUATION_FORMS}", o.IMAGES, shown=False)] = None,
    measured: Any = None,
    against: Any = None,
    part: Annotated[str, opt("test, validation (what finetune holds back) or train.", o.IMAGES)] = "test",
    validation: Annotated[
        str | None,
        opt(
            "Validation images: a fraction of the training images (0.1), test, none, or other data.",
            o.IMAGES,
            shown="the folder val, else 0.1",
        ),
    ] = None,
    batch_size: Annotated[int, opt("Batch size.")] = 256,
    workers: Annotated[int, opt("Number of processes that read images.", o.IMAGES)] = 0,
    confusions: Annotated[int, opt("Number of confused pairs of classes to report.")] = 10,
    seed: Annotated[int, opt("Seed of the validation split.", o.IMAGES)] = 0,
    cpu: o.Cpu = False,
    strict: o.Strict = False,
    download: o.Download = False,
    *,
    common: o.Common,
) -> None:
    """Measure models on data or by a metric; classifiers also per class, with tests of their differences.

    Example: asymswap evaluate model.pt model.asym.pt --data photos/
    """

    with common.progress() as step:
        import asymswap
        from asymswap.reporting.screens import evaluation_view

        unlabelled = agreement_on(data, against, common.task)
        by: Any = {"by": unlabelled, "crop_border": 0}
        if unlabelled is None:
            by = measured_by("--data", data, measured, common.task, needed=True)
        report = asymswap.evaluate(
            common.open_models(models, step),
            by["by"],
            against_original=unlabelled is not None,
            crop_border=by["crop_border"],
            part=part,
            validation=validation,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            confusions=confusions,
            strict=strict,
            download=download,
            device="cpu" if cpu else None,
            progress=step,
        )
    common.show(report, evaluation_view)
