"""`asymswap compare`: models beside each other."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from asymswap.cli import options as o

_LATENCY = "Latency"
_OUTPUTS = "Outputs and accuracy"


@o.takes_preprocessing
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Names, pkg.mod:factory, or files of any kind; the others are compared with the first.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help=f"Compare outputs and accuracy on {o.DATA_FORMS}",
            rich_help_panel=_OUTPUTS,
            show_default="outputs on random images",
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="On so many of them.", rich_help_panel=_OUTPUTS, show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the images' choice.", rich_help_panel=_OUTPUTS)] = 0,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Time all models in turn.", rich_help_panel=_LATENCY)
    ] = True,
    memory_format: Annotated[
        o.MemoryFormat,
        typer.Option(
            help="Order of the numbers in memory: channels-last or contiguous.",
            metavar="ORDER",
            rich_help_panel=_LATENCY,
        ),
    ] = o.MemoryFormat.channels_last,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.", rich_help_panel=_LATENCY)] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, at most.", rich_help_panel=_LATENCY)] = 20,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of a forward pass.", rich_help_panel=_LATENCY, show_default="torch's own"),
    ] = None,
    weights: o.Weights = None,
    arch: o.Arch = None,
    arguments: o.Arguments = None,
    key: o.Key = None,
    input_size: o.InputSize = None,
    preprocessing: Any = None,
    trust_pickle: o.TrustPickle = False,
    trust_code: o.TrustCode = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Compare models: parameters, MACs, size, latency, outputs, accuracy.

    Example: asymswap compare digits-resnet digits-resnet.asym.pt --data digits
    """
    from asymswap.cli import screen
    from asymswap.errors import AsymswapError

    if json and markdown:
        raise AsymswapError("--json and --markdown are two forms of the same; give one of them")
    with screen.progress(quiet) as step:
        import torch

        from asymswap.api.compare import compare as beside
        from asymswap.models.preprocessing import check_needed
        from asymswap.planning.latency_budget import Timing
        from asymswap.reporting import compare as views
        from asymswap.results.records import to_json

        if threads is not None:
            torch.set_num_threads(threads)
        check_needed(preprocessing, data)
        found = beside(
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
            data=data,
            images=images,
            timing=Timing(memory_format.value, batch, rounds) if latency else None,
            seed=seed,
            progress=step,
        )
    if json:
        screen.print_json(to_json(found))
    elif markdown:
        typer.echo(views.comparison_to_markdown(found), nl=False)
    elif not quiet:
        console = screen.console()
        screen.show(views.comparison_view(found, console.width), console)
