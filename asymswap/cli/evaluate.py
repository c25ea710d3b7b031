"""`asymswap evaluate`: how good classifiers are, and how sure that is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from asymswap.cli import options as o


@o.takes_preprocessing
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Names, pkg.mod:factory, or files; others are compared with the first.")
    ],
    data: o.Data,
    part: Annotated[
        str, typer.Option(help="test, validation (what finetune holds back) or train.", rich_help_panel=o.IMAGES)
    ] = "test",
    validation: o.Validation = None,
    batch_size: Annotated[int, typer.Option(help="Images in one forward pass.")] = 256,
    workers: Annotated[int, typer.Option(help="Processes that read images.", rich_help_panel=o.IMAGES)] = 0,
    confusions: Annotated[int, typer.Option(help="How many confused pairs of classes are told.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the validation part.", rich_help_panel=o.IMAGES)] = 0,
    cpu: o.Cpu = False,
    strict: o.Strict = False,
    download: o.Download = False,
    weights: o.Weights = None,
    arch: o.Arch = None,
    arguments: o.Arguments = None,
    preprocessing: Any = None,
    input_size: o.InputSize = None,
    key: o.Key = None,
    trust_pickle: o.TrustPickle = False,
    trust_code: o.TrustCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure accuracy, per class too, and tell whether models really differ.

    Example: asymswap evaluate model.pt model.asym.pt --data photos/
    """
    from asymswap.cli import screen

    with screen.progress(quiet) as step:
        import asymswap
        from asymswap.reporting.screens import evaluation_view
        from asymswap.results.records import to_json

        report = asymswap.evaluate(
            o.open_models(
                models,
                step,
                weights=weights,
                arch=arch,
                arguments=arguments,
                key=key,
                input_size=input_size,
                trust_pickle=trust_pickle,
                trust_code=trust_code,
                preprocessing=preprocessing,
            ),
            data,
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
    if json:
        screen.print_json(to_json(report))
        return
    if quiet:
        return
    console = screen.console()
    screen.show(evaluation_view(report, console.width), console)
