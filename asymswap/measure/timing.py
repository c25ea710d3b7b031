"""How time is measured: the options that every verb which measures it shares. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from asymswap.errors import AsymswapError, check_choice
from asymswap.results.benchmark import TITLES
from asymswap.utils.options import option

MemoryFormat = Literal["channels-last", "contiguous"]
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The names of torch's dtypes."""
_PANEL = "Time"
_TENSOR_CORES = 8  # numbers that they take at once in half precision


# No `from __future__ import annotations` here: the command line needs the types of the fields.
@dataclass(frozen=True)
class Timing:
    """How time is measured, by default on torch's own number of threads.

    `cache` is the folder of the tables of `latency` budgets; None stands for the user's own cache folder.
    """

    runtime: str = option("torch", f"What runs the network: {', '.join(TITLES)}.", _PANEL, shown="torch")
    memory_format: MemoryFormat = option(
        "channels-last", "Memory format in PyTorch: channels-last or contiguous.", _PANEL, shown="channels-last",
        metavar="ORDER",
    )  # fmt: skip
    batch: int = option(1, "Batch size.", _PANEL)
    rounds: int = option(20, "Maximum number of rounds, in which all take turns.", _PANEL)
    threads: int | None = option(None, "Threads of a forward pass.", _PANEL, shown="torch's own number")
    precision: Precision | None = option(
        None, "Precision of weights and inputs: fp32, bf16 or fp16.", _PANEL, shown="the model's own", metavar="NAME"
    )
    cache: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_choice("the runtime", self.runtime, TITLES)
        check_choice("the memory format", self.memory_format, get_args(MemoryFormat))
        if self.precision is not None:
            check_choice("the precision", self.precision, get_args(Precision))
        if min(self.batch, self.rounds, 1 if self.threads is None else self.threads) < 1:
            threads = "" if self.threads is None else f" on {self.threads} threads"
            raise AsymswapError(
                f"batches of {self.batch} in {self.rounds} rounds{threads} measure nothing; give 1 or more"
            )

    @property
    def multiple(self) -> int | None:
        """What ranks should be multiples of; None where the kind of conv decides alone."""
        return _TENSOR_CORES if self.device.startswith("cuda") and self.precision in ("bf16", "fp16") else None
