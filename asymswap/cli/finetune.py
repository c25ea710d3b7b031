"""`asymswap finetune`: train a converted model, also under torchrun."""

import os
from pathlib import Path
from typing import Any

import asymswap
from asymswap.api import progress
from asymswap.cli import options as o
from asymswap.cli.commands import Group
from asymswap.cli.failures import in_flags
from asymswap.errors import AsymswapError
from asymswap.training.config import Training
from asymswap.types import silent
from asymswap.utils.distributed import joined
from asymswap.utils.options import option

_TRAINING: Any = Group(Training)


def finetune(
    checkpoint: o.Checkpoint,
    data: str | None = option(
        None, f"{o.LABELLED} With --distill also a folder of images without labels.", o.IMAGES, shown=False
    ),
    training: Any = _TRAINING,
    download: bool = o.DOWNLOAD,
    output: Path | None = option(None, "The checkpoint to write.", o.RESULT, flags=o.OUTPUT, shown="<stem>.tuned.pt"),
    run: Path | None = option(
        None, "Folder of the run: state, best and last checkpoint, metrics.", o.RESULT, shown="beside the output, .run"
    ),
    resume: bool = option(False, "Resume an interrupted run.", o.RESULT),
    save_every: Any = None,  # a setting of the training; the help shows its option here
    force: bool = o.FORCE,
    common: o.Common = o.TRAINED,
) -> None:
    """A classifier learns labels, any other network by the task's loss, or with --distill the original's outputs.

    Example: asymswap finetune model.asym.pt --data photos/ --epochs 5 --distill
    """
    Training(**{**training, "augment": None})  # what is out of range is told before torch is loaded
    task = common.task
    if (data is None) == (task.training is None):
        raise AsymswapError("give --data, or a --task with training(); one of them, not both")
    # A process that torchrun has restarted resumes the run.
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    target = o.target_of(checkpoint, output or o.default_output(str(checkpoint), "tuned"), force or resume)
    with (
        joined(gpus=common.device != "cpu") as team,
        progress.training(common.quiet or common.json or not team.leads, in_flags) as shown,
    ):
        from asymswap.data.batches import parse_presets

        if training["augment"] is not None:
            training["augment"] = parse_presets(training["augment"])
        tuned = asymswap.finetune(
            common.model(checkpoint, silent),
            task.training if data is None else data,
            Training(**training),
            inputs=task.inputs,
            loss=task.loss,
            evaluate=asymswap.Metric(task.evaluate, task.lower_is_better) if task.evaluate else None,
            output=target,
            run=run,
            resume=resume,
            force=force,
            download=download,
            team=team,
            callback=shown,
        )
    if team.leads:
        common.show(tuned.report)
