"""How long models and their convs take on this machine: interleaved, the minimum of several rounds.

Other programs can only make a run longer, so that the minimum is the best estimate of what the work itself takes; and
as the models run in turn, a slow spell of the machine falls upon all of them alike. Convs are timed where they stand,
inside of the running model: with the input that was just computed, and with weights that other layers have pushed out
of the caches, both of which make a difference.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from asymswap.inputs import Inputs
from asymswap.spec import Progress, silent
from asymswap.tensors import eval_mode, map_tensors

MemoryFormat = Literal["channels-last", "contiguous"]
_FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}

_WARM_UPS = 3
_FEWEST = 5
_MOST_SECONDS = 30.0


@dataclass(frozen=True)
class Timed:
    """Seconds of one forward pass, of the named modules in it, all their runs in the pass together, and of the rest.

    Each is a minimum of its own: where the machine is never quiet for a whole pass, `sum_of_parts` is below `whole`.
    `median` is that of the whole pass over all rounds.
    """

    whole: float
    modules: Mapping[str, float]
    rest: float
    median: float = math.nan

    @property
    def sum_of_parts(self) -> float:
        """The modules and the rest."""
        return self.rest + sum(self.modules.values())


def time_models(
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    names: Sequence[str] = (),
    *,
    rounds: int = 20,
    progress: Progress = silent,
) -> dict[str, Timed]:
    """Time all models on the same inputs, in turn, in eval mode; the minimum of `rounds`, or of 30 s of rounds.

    `names` are modules that all models have. Weights and inputs are taken as they are: see `in_format`.
    """
    best = {key: _Rounds() for key in models}
    start = time.perf_counter()
    with eval_mode(*models.values()), torch.inference_mode():
        for number in range(-_WARM_UPS, rounds):
            for key, model in models.items():
                timed = _time_once(model, inputs, names)
                if number >= 0:
                    best[key].take(timed)
            progress("timing", number + _WARM_UPS + 1, rounds + _WARM_UPS)
            if number >= _FEWEST and time.perf_counter() - start > _MOST_SECONDS:
                break
    return {key: rounds.timed() for key, rounds in best.items()}


@dataclass
class _Rounds:
    wholes: list[float] = field(default_factory=list)
    rest: float = float("inf")
    modules: dict[str, float] = field(default_factory=dict)

    def timed(self) -> Timed:
        return Timed(min(self.wholes), self.modules, self.rest, statistics.median(self.wholes))

    def take(self, timed: Timed) -> None:
        self.wholes.append(timed.whole)
        self.rest = min(self.rest, timed.rest)
        for name, seconds in timed.modules.items():
            self.modules[name] = min(seconds, self.modules.get(name, seconds))


def _time_once(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> Timed:
    seconds = dict.fromkeys(names, 0.0)
    with _stopwatches(model, seconds):
        start = time.perf_counter()
        model(*inputs)
        whole = time.perf_counter() - start
    return Timed(whole, seconds, whole - sum(seconds.values()))


@contextmanager
def _stopwatches(model: nn.Module, seconds: dict[str, float]) -> Iterator[None]:
    """While open, the time that each named module runs is added to `seconds`."""
    handles = []
    for name in seconds:
        module = model.get_submodule(name)

        def enter(*_: Any, name: str = name) -> None:
            seconds[name] -= time.perf_counter()

        def leave(*_: Any, name: str = name) -> None:
            seconds[name] += time.perf_counter()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_format(model: nn.Module, memory_format: MemoryFormat) -> nn.Module:
    """A copy of the model with its weights in that memory format."""
    return copy.deepcopy(model).to(memory_format=_FORMATS[memory_format])


def inputs_like(example: Inputs, memory_format: MemoryFormat, batch: int = 1) -> Inputs:
    """Random inputs of the example's sizes and dtypes in that memory format; `batch` of them where they are images."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        shape = (batch, *tensor.shape[1:]) if tensor.dim() == 4 else tensor.shape
        made = torch.randn(shape, generator=generator).to(tensor.dtype)
        return made.contiguous(memory_format=_FORMATS[memory_format]) if made.dim() == 4 else made

    made: Inputs = map_tensors(example, fill)
    return made
