"""Latency of models and their convs on this machine: run in turn, the minimum and the median of several rounds.

Other programs can only make a run longer, so the minimum is the best estimate of the work itself; and as the models run
in turn, a slow spell of the machine hardly changes their ratio within a round. Convs are timed inside the running
model: with an input that was just computed, and weights that other layers have pushed out of the caches; both matter.
"""

from __future__ import annotations

import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asymswap.measure.statistics import median_interval
from asymswap.measure.timing import MemoryFormat
from asymswap.types import Progress, Ratio, Seconds, silent
from asymswap.utils.inputs import Inputs, repeated
from asymswap.utils.tensors import deep_copy, device_of, hooked, map_tensors, on_threads

FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}

_WARM_UPS, _FEWEST = 3, 5  # rounds
MOST_SECONDS = 30.0
_TURN = 0.02  # seconds that one turn lasts at least: of small models it holds many passes
_STAT = Path("/proc/stat")
Passes = Sequence[Sequence[float]]  # seconds, round by round


@dataclass(frozen=True)
class Turn:
    """A model's turn: one forward pass, which measures itself."""

    measure: Callable[[], Any]
    threads: int | None = None
    pool: str = "torch"  # the library that computes: its threads stay awake for a while, and slow down another's
    read: Callable[[Any], Any] | None = None  # the measurement of what `measure` returned, once all turns are over
    version: str = ""  # of what it runs in
    ready: float | None = None  # seconds that it took to make


def take_turns(
    turns: Mapping[Any, Turn], *, rounds: int, seconds: float = MOST_SECONDS, progress: Progress = silent
) -> dict[Any, list[list[Any]]]:
    """Run all in turn, in an order that changes, and return the measurements of each, round by round.

    There are `rounds` of them, or as many as `seconds` allow, five at least; warm-up rounds do not count.
    """
    found: dict[Any, list[list[Any]]] = {key: [] for key in turns}
    # After another library's threads, or another number of them, a pass must wake up its own.
    waking = len({(turn.threads, turn.pool) for turn in turns.values()}) > 1
    order, shuffle = list(turns), random.Random(0).shuffle
    start = time.perf_counter()
    with on_threads(torch.get_num_threads()), torch.inference_mode():
        for number in range(-_WARM_UPS, rounds):
            shuffle(order)
            for key in order:
                turn, passes = turns[key], list[Any]()
                if turn.threads is not None and turn.threads != torch.get_num_threads():
                    torch.set_num_threads(turn.threads)
                if waking:
                    turn.measure()
                begun = time.perf_counter()
                while not passes or time.perf_counter() - begun < _TURN:
                    passes.append(turn.measure())
                if number >= 0:
                    found[key].append(passes)
            spent = time.perf_counter() - start
            done = number + _WARM_UPS + 1
            within = max(_WARM_UPS + _FEWEST, math.ceil(seconds * done / spent)) if spent else done
            progress("timing", done, max(done, min(rounds + _WARM_UPS, within)))
            if number + 1 >= _FEWEST and spent > seconds:
                break
    read = {key: turn.read for key, turn in turns.items() if turn.read is not None}
    return found | {key: [list(map(one, passes)) for passes in found[key]] for key, one in read.items()}


def stopwatch(run: Callable[[], Any], device: str = "cpu") -> Callable[[], float]:
    """Return a function that calls `run` and returns the seconds that it took, on a GPU by its own events."""

    def measure() -> float:
        start = now(device)
        run()
        return now(device) - start

    def measure_by_events() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return 1e-3 * float(first.elapsed_time(last))

    return measure_by_events if device.startswith("cuda") else measure


def now(device: str) -> float:
    """Return the time at which all that a device was given to do is done."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds_of(rounds: Passes) -> Seconds:
    """Return minimum, median and spread of all rounds of one model."""
    every = [seconds for passes in rounds for seconds in passes]
    best = [min(passes) for passes in rounds]
    quartiles = statistics.quantiles(best, method="inclusive") if len(best) > 1 else [best[0]] * 3
    middle = statistics.median(best)
    return Seconds(min(every), statistics.median(every), (quartiles[2] - quartiles[0]) / middle if middle else 0.0)


def ratio_of(rounds: Passes, first: Passes) -> Ratio:
    """Return one model's time relative to the `first` one's in the same rounds."""
    ratios = [min(own) / min(other) for own, other in zip(rounds, first, strict=True)]
    low, high, confidence = median_interval(ratios)
    return Ratio(statistics.median(ratios), low, high, confidence)


Parts = dict[str, float]
"""Seconds of one forward pass: of named modules, each with all its runs in the pass together, and of the `REST`."""
REST = ""


def parts_of(whole: float, modules: Mapping[str, float]) -> Parts:
    """Return the parts of a pass that took so long as a whole."""
    return {**modules, REST: whole - sum(modules.values())}


def best_of(rounds: Sequence[Sequence[Parts]]) -> Parts:
    """Return the best of every part: if the machine is never quiet for a whole pass, they add up to less than one."""
    passes = [parts for one_round in rounds for parts in one_round]
    return {name: min(parts[name] for parts in passes) for name in passes[0]}


def time_once(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> Parts:
    """Time one pass of a model, and all runs of the named modules in it."""
    read = partial(now, str(device_of(model)))
    with metered(model, names, read) as seconds:
        start = read()
        model(*inputs)
        whole = read() - start
    return parts_of(whole, seconds)


@contextmanager
def metered(model: nn.Module, names: Sequence[str], read: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Yield by how much a reading grows in all runs of each named module, while the block lasts."""
    sums: dict[str, Any] = dict.fromkeys(names, 0)

    def enter(name: str, *_: Any) -> None:
        sums[name] -= read()

    def leave(name: str, *_: Any) -> None:
        sums[name] += read()

    with hooked(model, names, before=enter, after=leave):
        yield sums


def in_format(model: nn.Module, memory_format: MemoryFormat) -> nn.Module:
    """Return a copy of the model with its weights in a memory format."""
    return deep_copy(model).to(memory_format=FORMATS[memory_format])


def inputs_like(example: Inputs, memory_format: MemoryFormat, batch: int = 1) -> Inputs:
    """Return a batch of random inputs of the example's sizes and dtypes; a user's own example is repeated as it is."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            tensor = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return tensor.contiguous(memory_format=FORMATS[memory_format]) if tensor.dim() == 4 else tensor

    return tuple(map_tensors(one, fill) for one in repeated(example, batch))


def machine() -> dict[str, Any]:
    """Return what measured times depend on besides the work."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    named = re.search(r"^model name[^:]*:(.*)$", text, re.MULTILINE)
    return {
        "processor": named[1].strip() if named else platform.processor() or platform.machine(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": os.environ.get("OMP_WAIT_POLICY", "ACTIVE"),
        "torch": torch.__version__,
        "system": platform.system(),
    }


class Bystanders:
    """Counts the cores that other programs keep busy from now on."""

    def __init__(self) -> None:
        self._busy, self._start = self._now(), time.perf_counter()

    def cores(self) -> float | None:
        """Return their average until now; None if the system does not report it."""
        average = (self._now() - self._busy) / max(time.perf_counter() - self._start, 1e-9)
        return None if math.isnan(average) else max(0.0, average)

    def _now(self) -> float:
        """Return the seconds that other processes have kept all cores busy; NaN if unknown."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
        except (OSError, ValueError):
            return math.nan
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()
