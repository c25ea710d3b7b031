"""`asymswap benchmark`: latency and throughput."""

from enum import StrEnum
from functools import partial
from typing import Literal

import asymswap
from asymswap.cli import options as o
from asymswap.reporting.benchmark import benchmark_view
from asymswap.results.benchmark import TITLES
from asymswap.utils.options import option

_TIME = "Time"
_SETTINGS = "Settings (all combinations are timed)"
_RUNTIMES = f"{', '.join(TITLES)}; can be repeated."
_COUNTS = "no list of whole numbers from 1, such as 1,8"
# Typer takes no list of literals.
MemoryFormat = StrEnum("MemoryFormat", {"channels_last": "channels-last", "contiguous": "contiguous"})


def benchmark(
    models: o.Models,
    runtimes: list[str] | None = option(
        None, _RUNTIMES, _SETTINGS, shown="torch", metavar="NAME", flags=("--runtime",)
    ),
    batches: str = option("1", "Batch sizes, as 1,8.", _SETTINGS, flags=("--batch",)),
    threads: str | None = option(None, "Threads of a forward pass, as 1,2.", _SETTINGS, shown="torch's own number"),
    memory_formats: list[MemoryFormat] | None = option(
        None, "Memory format; can be given twice.", _SETTINGS, shown="both", flags=("--memory-format",)
    ),
    precision: Literal["fp32", "bf16", "fp16"] | None = option(
        None, "Precision of weights and inputs.", _SETTINGS, shown="the model's own"
    ),
    rounds: int = option(20, "Maximum number of rounds, in which all take turns.", _TIME, min=1),
    seconds: float = option(60.0, "Time limit in seconds; at least five rounds are run.", _TIME, min=0.1),
    layers: int = option(5, "Number of layers to show, those that differ most; 0: time none.", _TIME, min=0),
    common: o.Common = o.BESIDE_WITHOUT_IMAGES,
) -> None:
    """Example: asymswap benchmark digits-resnet digits-resnet.asym.pt --runtime torch --runtime openvino --batch 1,8"""
    numbers = o.parse_numbers("--batch", batches, _COUNTS, int)
    counts = o.parse_numbers("--threads", threads, _COUNTS, int)
    with common.bars() as step:
        found = asymswap.benchmark(
            common.open_models(models, step),
            runtimes=runtimes or ["torch"],
            batches=numbers,
            threads=counts,
            memory_formats=[one.value for one in memory_formats or MemoryFormat],
            precision=precision,
            rounds=rounds,
            seconds=seconds,
            layers=layers > 0,
            progress=step,
        )
    common.show(found, partial(benchmark_view, layers=layers))
