"""`asymswap benchmark`: latency and throughput."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated, Literal

from asymswap.cli import options as o
from asymswap.cli.fields import opt
from asymswap.results.benchmark import TITLES

_SETTINGS = "Settings (all combinations are timed)"
_TIME = "Time"


# Typer takes no list of literals.
MemoryFormat = StrEnum("MemoryFormat", {"channels_last": "channels-last", "contiguous": "contiguous"})


@o.takes_common(preprocessing=False)
def benchmark(
    models: o.Models,
    runtime: Annotated[
        list[str] | None, opt(f"{', '.join(TITLES)}; can be repeated.", _SETTINGS, shown="torch", metavar="NAME")
    ] = None,
    batch: Annotated[str, opt("Batch sizes, as 1,8.", _SETTINGS)] = "1",
    threads: Annotated[
        str | None, opt("Threads of a forward pass, as 1,2.", _SETTINGS, shown="torch's own number")
    ] = None,
    memory_format: Annotated[
        list[MemoryFormat] | None, opt("Memory format; can be given twice.", _SETTINGS, shown="both")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        opt("Dtype of weights and inputs.", _SETTINGS, shown="the model's own"),
    ] = None,
    rounds: Annotated[int, opt("Maximum number of rounds, in which all take turns.", _TIME, min=1)] = 20,
    seconds: Annotated[float, opt("Time limit in seconds; at least five rounds are run.", _TIME, min=0.1)] = 60.0,
    layers: Annotated[int, opt("Number of layers to show, those that differ most; 0: time none.", _TIME, min=0)] = 5,
    markdown: o.Markdown = False,
    *,
    common: o.Common,
) -> None:
    """Time models in turn in PyTorch, ONNX Runtime, OpenVINO or torch.compile, and compare time with MACs.

    Example: asymswap benchmark digits-resnet digits-resnet.asym.pt --runtime torch --runtime onnxruntime --batch 1,8
    """
    common.check_form(markdown)
    batches = o.parse_counts("--batch", batch)
    counts = None if threads is None else o.parse_counts("--threads", threads)
    with common.progress() as step:
        from asymswap.api.benchmark import benchmark as run
        from asymswap.reporting.benchmark import benchmark_view

        found = run(
            common.open_models(models, step),
            runtimes=runtime or ["torch"],
            batches=batches,
            threads=counts,
            memory_formats=[one.value for one in memory_format or MemoryFormat],
            dtype=dtype,
            rounds=rounds,
            seconds=seconds,
            layers=layers > 0,
            progress=step,
        )
    common.show(found, partial(benchmark_view, layers=layers), markdown)
