"""`asymswap compare`: models beside each other."""

from __future__ import annotations

from typing import Annotated, Any

from asymswap.cli import options as o
from asymswap.cli.fields import opt
from asymswap.cli.metric import EVALUATION_FORMS, agreement_on, measured_by, takes_against, takes_metric
from asymswap.measure.timing import Timing

_OUTPUTS = "Outputs and scores"


@o.takes_common()
@takes_metric
@takes_against
@o.takes_timing
def compare(
    models: o.Models,
    data: Annotated[
        str | None, opt(f"Compare outputs and scores on {EVALUATION_FORMS}", _OUTPUTS, shown="outputs on random images")
    ] = None,
    measured: Any = None,
    against: Any = None,
    images: Annotated[int | None, opt("Number of labelled images.", _OUTPUTS, shown="all")] = None,
    seed: Annotated[int, opt("Seed for choosing images.", _OUTPUTS)] = 0,
    latency: Annotated[bool, opt("Time all models in turn.", "Time", "--latency/--no-latency")] = True,
    timing: Any = None,
    markdown: o.Markdown = False,
    *,
    common: o.Common,
) -> None:
    """Compare models: parameters, MACs, size, latency, outputs, scores.

    Example: asymswap compare digits-resnet digits-resnet.asym.pt --data digits
    """
    common.check_form(markdown)
    with common.progress() as step:
        from asymswap.api.compare import compare as beside
        from asymswap.models.preprocessing import check_needed

        check_needed(common.opening["preprocessing"], data)
        unlabelled = agreement_on(data, against, common.task)
        by: Any = {"by": unlabelled, "crop_border": 0}
        if unlabelled is None:
            by = measured_by("--data", data, measured, common.task)
        found = beside(
            common.open_models(models, step),
            data=by["by"],
            against_original=unlabelled is not None,
            crop_border=by["crop_border"],
            images=images,
            timing=(timing or Timing()) if latency else None,
            seed=seed,
            progress=step,
        )
    common.show(found, markdown=markdown)
