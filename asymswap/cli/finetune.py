"""`asymswap finetune`: train a converted model, also under torchrun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from asymswap.cli import options as o
from asymswap.cli.fields import opt, takes_fields
from asymswap.training.config import Training


@o.takes_common(("arch", "arguments", "input_size"))
@takes_fields("training", Training)
def finetune(
    checkpoint: o.Checkpoint,
    data: Annotated[
        str | None, opt(f"{o.DATA_FORMS} With --distill also a folder of images without labels.", o.IMAGES, shown=False)
    ] = None,
    training: Any = None,
    download: o.Download = False,
    output: Annotated[
        Path | None, opt("The checkpoint to write.", o.RESULT, "-o", "--output", shown="<stem>.tuned.pt")
    ] = None,
    run: Annotated[
        Path | None,
        opt("Folder of the run: state, best and last checkpoint, metrics.", o.RESULT, shown="beside the output, .run"),
    ] = None,
    resume: Annotated[bool, opt("Resume an interrupted run.", o.RESULT, "--resume")] = False,
    save_every: Any = None,  # a setting of the training; the help shows its option here
    force: o.Force = False,
    *,
    common: o.Common,
) -> None:
    """Train a converted model and keep the best epoch's weights; the same command works under torchrun.

    A classifier learns labels; any other network what the task's loss says, or with --distill the original's outputs.

    Example: asymswap finetune model.asym.pt --data photos/ --epochs 5 --distill
    """
    from asymswap.api.progress import training as shown_training
    from asymswap.cli.failures import in_flags
    from asymswap.errors import AsymswapError
    from asymswap.utils.distributed import joined
    from asymswap.utils.files import check_distinct, check_output

    task = common.task
    own = None if task is None else task.training
    if (data is None) == (own is None):
        raise AsymswapError("give --data, or a --task with training(); one of them, not both")
    target = output or o.default_output(str(checkpoint), "tuned")
    # A process that torchrun has restarted resumes the run.
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume = resume or again
    if not resume:
        check_output(target, force)
    check_distinct({"the checkpoint": o.model_file(checkpoint), "-o": target})
    with (
        joined(gpus=not training["cpu"]) as team,
        shown_training(common.quiet or common.json or not team.leads, in_flags) as shown,
    ):
        import asymswap
        from asymswap.data.batches import parse_presets
        from asymswap.data.metrics import Metric
        from asymswap.reporting.screens import training_view
        from asymswap.types import silent

        if training["augment"] is not None:
            training["augment"] = parse_presets(training["augment"])
        tuned = asymswap.finetune(
            common.open_model(checkpoint, silent),
            own if data is None else data,
            Training(**training),
            inputs=None if task is None else task.inputs,
            loss=None if task is None else task.loss,
            evaluate=Metric(task.evaluate, task.lower_is_better) if task is not None and task.evaluate else None,
            output=target,
            run=run,
            resume=resume,
            force=force,
            download=download,
            team=team,
            callback=shown,
        )
    if team.leads:
        common.show(tuned.report, lambda report, _: training_view(report))
