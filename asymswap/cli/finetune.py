"""`asymswap finetune`: train a converted model, also under torchrun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from asymswap.cli import options as o
from asymswap.cli.fields import takes_fields
from asymswap.training.config import Training


@o.takes_preprocessing
@takes_fields("training", Training)
def finetune(
    checkpoint: Annotated[Path, typer.Argument(help="A file that `asymswap convert` wrote.", show_default=False)],
    data: o.Data,
    training: Any = None,
    download: o.Download = False,
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
    save_every: Any = None,  # a setting of the training; its option is shown here
    force: o.Force = False,
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
    with joined(gpus=not training["cpu"]) as team, screen.training(quiet or json or not team.leads) as shown:
        import asymswap
        from asymswap.data.augmentation import parse_presets
        from asymswap.types import silent

        if training["augment"] is not None:
            training["augment"] = parse_presets(training["augment"])
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
            Training(**training),
            output=target,
            run=run,
            resume=resume,
            force=force,
            download=download,
            team=team,
            callback=shown,
        )
    if team.leads:
        _print(tuned.report, json, quiet)


def _print(report: Any, json: bool, quiet: bool) -> None:
    from asymswap.cli import screen
    from asymswap.reporting.screens import training_view
    from asymswap.results.records import to_json

    if json:
        screen.print_json(to_json(report))
    elif not quiet:
        screen.show(training_view(report), screen.console())
