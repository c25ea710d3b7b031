"""`asymswap finetune`: train a converted model, also under torchrun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from asymswap.cli import options as o

_LENGTH = "How long, and how"
_TEACHER = "Distillation"


@o.takes_preprocessing
def finetune(
    checkpoint: Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)],
    data: o.Data,
    epochs: Annotated[
        int | None, typer.Option(help="So many epochs.", show_default="10", rich_help_panel=_LENGTH)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Or so many steps.", rich_help_panel=_LENGTH)] = None,
    batch_size: Annotated[
        int, typer.Option(help="Images in one forward pass of each process.", rich_help_panel=_LENGTH)
    ] = 128,
    accumulate: Annotated[int, typer.Option(help="Forward passes that make one step.", rich_help_panel=_LENGTH)] = 1,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.", rich_help_panel=_LENGTH)] = "adamw",
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="The highest learning rate.",
            show_default="0.001 (adamw), 0.02 (sgd)",
            rich_help_panel=_LENGTH,
        ),
    ] = None,
    momentum: Annotated[float, typer.Option(help="Of sgd.", rich_help_panel=_LENGTH)] = 0.9,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="Not on batch norms, biases and offsets.",
            show_default="0.01 (adamw), 0.0005 (sgd)",
            rich_help_panel=_LENGTH,
        ),
    ] = None,
    offset_lr_scale: Annotated[
        float, typer.Option(help="The learning rate of offsets is so much of the others'.", rich_help_panel=_LENGTH)
    ] = 0.1,
    schedule: Annotated[str, typer.Option(help="cosine or constant.", rich_help_panel=_LENGTH)] = "cosine",
    warmup: Annotated[
        float, typer.Option(help="The part of all steps in which the learning rate rises.", rich_help_panel=_LENGTH)
    ] = 0.05,
    clip: Annotated[
        float | None, typer.Option(help="Cut the gradient's norm to this.", rich_help_panel=_LENGTH)
    ] = None,
    label_smoothing: Annotated[float, typer.Option(help="0.1 is usual.", rich_help_panel=_LENGTH)] = 0.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.", rich_help_panel=_LENGTH)] = "fp32",
    ema: Annotated[
        float | None,
        typer.Option(help="Keep a moving average of the weights with this decay.", rich_help_panel=_LENGTH),
    ] = None,
    train: Annotated[
        str, typer.Option(help="all, new (the replaced layers) or bn (the batch norms).", rich_help_panel=_LENGTH)
    ] = "all",
    freeze_bn: Annotated[
        bool,
        typer.Option("--freeze-bn", help="Batch norms keep and use their statistics.", rich_help_panel=_LENGTH),
    ] = False,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better one.", rich_help_panel=_LENGTH)
    ] = None,
    sync_bn: Annotated[
        bool,
        typer.Option(
            "--sync-bn/--no-sync-bn",
            help="Let several processes share the statistics of batch norms.",
            rich_help_panel=_LENGTH,
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of all that is random.", rich_help_panel=_LENGTH)] = 0,
    augment: Annotated[
        str | None,
        typer.Option(
            help="none, flip, crop, flip-crop or randaugment; with ,mixup or ,cutmix for whole batches.",
            show_default="what suits the data",
            rich_help_panel=o.IMAGES,
        ),
    ] = None,
    validation: o.Validation = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read images.", show_default="by the cores", rich_help_panel=o.IMAGES),
    ] = None,
    strict: o.Strict = False,
    download: o.Download = False,
    distill: Annotated[
        str | None,
        typer.Option(
            help="Learn from another model too: a reference, or nothing for the original that was converted.",
            metavar="[REF]",
            rich_help_panel=_TEACHER,
        ),
    ] = None,
    distill_weight: Annotated[
        float, typer.Option(help="The teacher's part of the loss.", rich_help_panel=_TEACHER)
    ] = 0.9,
    distill_loss: Annotated[
        str,
        typer.Option(
            help="kl, of class probabilities, or mse, of the scores before the softmax.", rich_help_panel=_TEACHER
        ),
    ] = "kl",
    temperature: Annotated[
        float, typer.Option(help="Class scores are divided by this.", rich_help_panel=_TEACHER)
    ] = 4.0,
    distill_features: Annotated[
        float,
        typer.Option(
            help="Add so much times the error of the outputs of blocks with swapped layers.", rich_help_panel=_TEACHER
        ),
    ] = 0.0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The checkpoint to write.",
            show_default="<stem>.tuned.pt",
            rich_help_panel=o.RESULT,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run: state, best and last checkpoint, metrics.",
            show_default="beside the output, .run",
            rich_help_panel=o.RESULT,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run was interrupted.", rich_help_panel=o.RESULT)
    ] = False,
    save_every: Annotated[
        int | None, typer.Option(help="Save after so many steps, not only epochs.", rich_help_panel=o.RESULT)
    ] = None,
    force: o.Force = False,
    cpu: o.Cpu = False,
    arch: o.Arch = None,
    arguments: o.Arguments = None,
    trust_code: o.TrustCode = False,
    input_size: o.InputSize = None,
    preprocessing: Any = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Train a converted model and keep the best epoch's weights; the same command works under torchrun.

    Example: asymswap finetune model.asym.pt --data photos/ --epochs 5 --distill
    """
    from asymswap.cli import screen
    from asymswap.utils.distributed import joined
    from asymswap.utils.files import check_distinct, check_output

    target = output or o.default_output(str(checkpoint), "tuned")
    # Under torchrun, whoever was started again has a run to go on with.
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume = resume or again
    if not resume:
        check_output(target, force)
    check_distinct({"the checkpoint": o.model_file(checkpoint), "-o": target})
    with joined(gpus=not cpu) as team, screen.training(quiet or json or not team.leads) as watcher:
        import asymswap
        from asymswap.data.augmentation import parse_presets
        from asymswap.types import silent

        settings = asymswap.Training(
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            optimizer=optimizer,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            offset_lr_scale=offset_lr_scale,
            schedule=schedule,
            warmup=warmup,
            clip=clip,
            label_smoothing=label_smoothing,
            precision=precision,
            ema=ema,
            train=train,
            freeze_bn=freeze_bn,
            augment=None if augment is None else parse_presets(augment),
            distill=distill,
            distill_weight=distill_weight,
            distill_loss=distill_loss,
            temperature=temperature,
            distill_features=distill_features,
            validation=validation,
            patience=patience,
            sync_bn=sync_bn,
            seed=seed,
            strict=strict,
            cpu=cpu,
            workers=workers,
            save_every=save_every,
        )
        tuned = asymswap.finetune(
            o.open_model(
                checkpoint,
                silent,
                arch=arch,
                arguments=arguments,
                trust_code=trust_code,
                input_size=input_size,
                preprocessing=preprocessing,
            ),
            data,
            settings,
            output=target,
            run=run,
            resume=resume,
            force=force,
            download=download,
            team=team,
            watcher=watcher,
        )
    if team.leads:
        _print(tuned.report, json, quiet)


def _print(report: Any, json: bool, quiet: bool) -> None:
    from asymswap.cli import screen
    from asymswap.reporting.finetune import training_view
    from asymswap.results.records import to_json

    if json:
        screen.print_json(to_json(report))
    elif not quiet:
        screen.show(training_view(report), screen.console())
