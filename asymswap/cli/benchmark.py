"""`asymswap benchmark`: latency and throughput."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from asymswap.cli import options as o

_SETTINGS = "Settings (all combinations are timed)"
_TIME = "Time"


class Runtime(StrEnum):
    """What runs the models."""

    eager = "eager"
    compile = "compile"
    onnx = "onnx"


class Dtype(StrEnum):
    """What weights and inputs are turned into."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Names, pkg.mod:factory, or files of any kind; the others are compared with the first.",
            show_default=False,
        ),
    ],
    runtime: Annotated[
        list[Runtime] | None,
        typer.Option(
            help="PyTorch as it is, torch.compile, ONNX Runtime; may be given several times.",
            rich_help_panel=_SETTINGS,
            show_default="eager",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Images at a time, as 1,8.", rich_help_panel=_SETTINGS)] = "1",
    threads: Annotated[
        str | None,
        typer.Option(
            help="Threads of a forward pass, as 1,2.", rich_help_panel=_SETTINGS, show_default="torch's own number"
        ),
    ] = None,
    memory_format: Annotated[
        list[o.MemoryFormat] | None,
        typer.Option(
            help="Order of the numbers in memory; may be given twice.", rich_help_panel=_SETTINGS, show_default="both"
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of weights and inputs.", rich_help_panel=_SETTINGS, show_default="the model's own"),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds, at most, in which all take turns.", rich_help_panel=_TIME)
    ] = 20,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="No more rounds after so many, beyond the fifth.", rich_help_panel=_TIME)
    ] = 60.0,
    layers: Annotated[
        int, typer.Option(min=0, help="Show so many layers that differ most; 0: time none.", rich_help_panel=_TIME)
    ] = 5,
    weights: o.Weights = None,
    arch: o.Arch = None,
    arguments: o.Arguments = None,
    key: o.Key = None,
    input_size: o.InputSize = None,
    trust_pickle: o.TrustPickle = False,
    trust_code: o.TrustCode = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Time models in PyTorch, torch.compile and ONNX Runtime, all in turn, and set time beside MACs.

    Example: asymswap benchmark digits-resnet digits-resnet.asym.pt --runtime eager --runtime onnx --batch 1,8
    """
    from asymswap.cli import screen
    from asymswap.errors import AsymswapError

    if json and markdown:
        raise AsymswapError("--json and --markdown are two forms of the same; give one of them")
    batches = o.parse_counts("--batch", batch)
    counts = None if threads is None else o.parse_counts("--threads", threads)
    with screen.progress(quiet) as step:
        from asymswap.api.benchmark import FORMATS
        from asymswap.api.benchmark import benchmark as run
        from asymswap.reporting import benchmark as views
        from asymswap.results.records import to_json

        found = run(
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
            ),
            runtimes=[one.value for one in runtime or [Runtime.eager]],
            batches=batches,
            threads=counts,
            memory_formats=[one.value for one in memory_format] if memory_format else FORMATS,
            dtype=None if dtype is None else dtype.value,
            rounds=rounds,
            seconds=seconds,
            layers=layers > 0,
            progress=step,
        )
    if json:
        screen.print_json(to_json(found))
    elif markdown:
        typer.echo(views.benchmark_to_markdown(found, layers), nl=False)
    elif not quiet:
        console = screen.console()
        screen.show(views.benchmark_view(found, console.width, layers), console)
