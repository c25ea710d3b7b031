"""The verb `benchmark`: what models cost, and how long they take, all of them in turn."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

import asymswap
from asymswap.api.progress import shows_progress
from asymswap.errors import AsymswapError, check_choice
from asymswap.measure.latency import (
    Bystanders,
    MemoryFormat,
    Passes,
    Turn,
    forward,
    in_format,
    inputs_like,
    machine,
    ratio_of,
    seconds_of,
    stopwatch,
    take_turns,
    time_models,
)
from asymswap.measure.macs import count_costs
from asymswap.measure.runtimes import RUNTIMES, Runtime, check_same, compiled, session_on, write_for_runtime
from asymswap.models.opened import OpenedModel, costs_of, sizes_assumed
from asymswap.models.opening import Model, open_for_verb
from asymswap.planning.latency_budget import Timing
from asymswap.results.benchmark import Benchmark, BenchmarkedModel, Gain, LayerRow, Layers, Result, Setting
from asymswap.types import Progress, Ratio, Seconds, silent
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import map_tensors

Dtype = Literal["float32", "bfloat16", "float16"]
FORMATS: tuple[MemoryFormat, ...] = ("channels-last", "contiguous")


@shows_progress
def benchmark(
    models: Sequence[Model],
    *,
    runtimes: Sequence[Runtime] = ("eager",),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    memory_formats: Sequence[MemoryFormat] = FORMATS,
    dtype: Dtype | None = None,
    rounds: int = 20,
    seconds: float = 60.0,
    layers: bool = True,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    progress: Progress | bool = True,
) -> Benchmark:
    """Time models in every combination of runtimes, batch sizes, threads and memory formats; none is changed.

    All combinations run in turn, in `rounds` rounds, or fewer if they take longer than `seconds`, but at least five.
    `threads` defaults to torch's own number, `dtype` to the model's. With `layers`, the layers that models share by
    name with the first one are timed too, in the first setting of eager PyTorch. A combination that cannot be run has
    the reason in its row. Raises AsymswapError where a model cannot be opened, and where nothing can be run.
    """
    assert callable(progress)  # `shows_progress` makes it one
    if dtype is not None:
        check_choice("the dtype", dtype, get_args(Dtype))
    settings = _settings(runtimes, batches, threads or (torch.get_num_threads(),), memory_formats)
    if not models:
        raise AsymswapError("benchmark takes one model or more")
    if rounds < 1 or not seconds > 0:
        raise AsymswapError(f"{rounds} rounds in {seconds:g} s measure nothing; give 1 or more, and some seconds")
    opened = [open_for_verb(model, progress, input_size=input_size, example_inputs=example_inputs) for model in models]
    costs = tuple(cost_row(one) for one in opened)
    with tempfile.TemporaryDirectory(prefix="asymswap-") as folder:
        lineup = _Lineup(opened, settings, dtype, Path(folder))
        lineup.make_ready(progress)
        watched = Bystanders()
        timed = take_turns(lineup.turns, rounds=rounds, seconds=seconds, progress=progress)
        others = watched.cores()
        others_timed = range(1, len(opened)) if layers else ()
        measured = [lineup.time_layers(number, rounds, seconds, progress) for number in others_timed]
    results = [lineup.result(number, place, timed) for place in range(len(settings)) for number in range(len(models))]
    versions = [f"torch {torch.__version__}"]
    if "onnx" in runtimes:
        with contextlib.suppress(ImportError):
            import onnxruntime

            versions.append(f"onnxruntime {onnxruntime.__version__}")
    about = machine()
    return Benchmark(
        asymswap=asymswap.__version__,
        models=costs,
        settings=settings,
        results=tuple(results),
        layers=tuple(one for one in measured if one is not None),
        gains=tuple(_gains(settings, timed)),
        dtype=dtype or ", ".join(dict.fromkeys(str(one.dtype()).removeprefix("torch.") for one in opened)),
        machine=about["processor"],
        cores=about["cores"],
        rounds=len(next(iter(timed.values()))),
        others=others,
        versions=tuple(versions),
        warnings=sizes_assumed(opened),
    )


def cost_row(opened: OpenedModel) -> BenchmarkedModel:
    """Return what a model is and what it costs."""
    costs = costs_of(opened)
    origin, takes = opened.origin.reference, opened.takes()
    return BenchmarkedModel(
        opened.reference, origin, opened.weights, takes, costs.total, notes=opened.notes + costs.notes()
    )


def time_in_turn(
    opened: Sequence[OpenedModel], timing: Timing, progress: Progress = silent
) -> list[tuple[Seconds, Ratio | None]]:
    """Time models in eager PyTorch in one setting: the seconds of each, and the ratio to the first one's."""
    turns = {
        number: forward(
            in_format(one.model, timing.memory_format).eval(),
            inputs_like(one.example(), timing.memory_format, timing.batch),
        )
        for number, one in enumerate(opened)
    }
    found = take_turns(turns, rounds=timing.rounds, progress=progress)
    return [(seconds_of(own), ratio_of(own, found[0]) if number else None) for number, own in found.items()]


_Key = tuple[int, int]
"""Indices of a model and of a setting."""


def _settings(
    runtimes: Sequence[Runtime], batches: Sequence[int], threads: Sequence[int], formats: Sequence[MemoryFormat]
) -> tuple[Setting, ...]:
    """Return all combinations; ONNX Runtime has a memory format of its own."""
    for runtime in runtimes:
        check_choice("the runtime", runtime, RUNTIMES)
    for form in formats:
        check_choice("the memory format", form, FORMATS)
    if min(*batches, *threads, 1) < 1 or not (runtimes and batches and formats):
        raise AsymswapError(f"batches {list(batches)} on threads {list(threads)} are nothing to time; give 1 or more")
    combinations = itertools.product(runtimes, batches, threads, formats)
    settings = [
        Setting(runtime, batch, count, None if runtime == "onnx" else form)
        for runtime, batch, count, form in combinations
    ]
    return tuple(dict.fromkeys(settings))


class _Lineup:
    """The turns of models in settings, with the seconds that each took to make ready, or the reason for having none."""

    def __init__(
        self, opened: Sequence[OpenedModel], settings: Sequence[Setting], dtype: Dtype | None, folder: Path
    ) -> None:
        self.turns: dict[_Key, Turn] = {}
        self._failures: dict[_Key, str] = {}
        self._ready: dict[_Key, float] = {}
        self._opened, self._settings, self._folder = opened, settings, folder
        self._dtype = None if dtype is None else getattr(torch, dtype)
        self._copies: dict[tuple[int, MemoryFormat], nn.Module] = {}
        self._exports: dict[int, float | AsymswapError] = {}

    def make_ready(self, progress: Progress) -> None:
        """Compile and export all; raises AsymswapError where nothing can be run."""
        before, models = torch.get_num_threads(), range(len(self._opened))
        keys = [(number, place) for place in range(len(self._settings)) for number in models]
        try:
            for done, key in enumerate(keys):
                progress("making ready", done, len(keys))
                torch.set_num_threads(self._settings[key[1]].threads)
                try:
                    self._make_ready(key)
                except Exception as error:
                    # The model's code can raise anything.
                    self._failures[key] = _reason(error)
        finally:
            torch.set_num_threads(before)
        if not self.turns:
            raise AsymswapError("; ".join(dict.fromkeys(self._failures.values())))

    def _make_ready(self, key: _Key) -> None:
        number, setting = key[0], self._settings[key[1]]
        model, inputs = self._placed(number, setting)
        with torch.inference_mode():
            expected = model(*inputs)
        if setting.runtime == "eager":
            self.turns[key] = Turn(forward(model, inputs).measure, setting.threads)
            return
        exporting = self._export(number) if setting.runtime == "onnx" else 0.0
        start = time.perf_counter()
        if setting.runtime == "onnx":
            run = session_on(self._folder / f"{number}.onnx", inputs, setting.threads)
        else:
            with torch.inference_mode():
                run = compiled(model, inputs)
        seconds = exporting + time.perf_counter() - start
        if self._opened[number].preprocessing.form != "image-list":
            # Which boxes a detector keeps jumps where scores are close.
            with torch.inference_mode():
                check_same(run(), expected, "onnx" if setting.runtime == "onnx" else "compile")
        self._ready[key] = seconds
        self.turns[key] = Turn(stopwatch(run), setting.threads, "onnx" if setting.runtime == "onnx" else "torch")

    def _placed(self, number: int, setting: Setting) -> tuple[nn.Module, Inputs]:
        """Return a copy of the model in eval mode on the processor, and random inputs; the same ones every time."""
        memory_format: MemoryFormat = "channels-last" if setting.memory_format == "channels-last" else "contiguous"
        if (number, memory_format) not in self._copies:
            copied = in_format(self._opened[number].model, memory_format).eval().to("cpu", self._dtype)
            self._copies[number, memory_format] = copied
        example: Inputs = map_tensors(
            self._opened[number].example(),
            lambda one: one.to(self._dtype or one.dtype) if one.is_floating_point() else one,
        )
        return self._copies[number, memory_format], inputs_like(example, memory_format, setting.batch)

    def _export(self, number: int) -> float:
        """Write the model's ONNX file once; return the seconds that it took, or raise its AsymswapError each time."""
        if number not in self._exports:
            start = time.perf_counter()
            try:
                # With a single image, the batch would count as a number that never varies.
                model, inputs = self._placed(number, Setting("onnx", 2, 1, None))
                write_for_runtime(model, inputs, self._folder / f"{number}.onnx")
                self._exports[number] = time.perf_counter() - start
            except AsymswapError as error:
                self._exports[number] = error
        outcome = self._exports[number]
        if isinstance(outcome, AsymswapError):
            raise outcome
        return outcome

    def result(self, number: int, place: int, timed: Mapping[_Key, Passes]) -> Result:
        """Return what was measured of a model in a setting."""
        rounds, first = timed.get((number, place)), timed.get((0, place))
        if rounds is None:
            return Result(number, place, failure=self._failures[number, place])
        seconds = seconds_of(rounds)
        return Result(
            model=number,
            setting=place,
            seconds=seconds,
            images_per_second=self._settings[place].batch / seconds.median if seconds.median else None,
            ratio=ratio_of(rounds, first) if number and first is not None else None,
            ready=self._ready.get((number, place)),
            rounds=tuple(min(passes) for passes in rounds),
        )

    def time_layers(self, number: int, rounds: int, seconds: float, progress: Progress) -> Layers | None:
        """Time a model's layers beside the first's, in the first setting of eager PyTorch in which both run."""
        for place, setting in enumerate(self._settings):
            if setting.runtime == "eager" and {(0, place), (number, place)} <= self.turns.keys():
                break
        else:
            return None
        placed = {"first": self._placed(0, setting), "own": self._placed(number, setting)}
        models = {key: model for key, (model, _) in placed.items()}
        inputs = {key: given for key, (_, given) in placed.items()}
        names = shared_layers(models["first"], models["own"])
        before = torch.get_num_threads()
        torch.set_num_threads(setting.threads)
        try:
            timed = time_models(
                models,
                inputs,
                names,
                rounds=rounds,
                seconds=seconds,
                progress=lambda _, done, total: progress("timing layers", done, total),
            )
        finally:
            torch.set_num_threads(before)
        first, own = timed["first"], timed["own"]
        # MACs of a whole batch, as the times.
        costs = [count_costs(one.model, one.example(), names) for one in (self._opened[0], self._opened[number])]
        macs = [{name: setting.batch * cost.by_name[name].macs for name in names} for cost in costs]
        left = [setting.batch * cost.total.macs - sum(named.values()) for cost, named in zip(costs, macs, strict=True)]
        rows = [LayerRow(name, first.modules[name], own.modules[name], macs[0][name], macs[1][name]) for name in names]
        rows = sorted((row for row in rows if row.first or row.own), key=lambda row: -abs(row.excess))
        return Layers(number, place, tuple(rows), LayerRow("outside of them", first.rest, own.rest, *left))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AsymswapError):
        return text
    # torch has no error of its own for this.
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "there is not enough memory"
    return f"the model fails with {type(error).__name__}: {text[:200]}"


def _gains(settings: Sequence[Setting], timed: Mapping[_Key, Passes]) -> Iterator[Gain]:
    """Yield where one memory format is significantly faster than the other."""
    for number, place in timed:
        other = replace(settings[place], memory_format="contiguous")
        if settings[place].memory_format != "channels-last" or other not in settings:
            continue
        key = number, settings.index(other)
        if key in timed:
            ratio = ratio_of(timed[number, place], timed[key])
            if ratio.is_significant:
                faster = ratio.value < 1
                yield Gain(number, place if faster else key[1], 1 / ratio.value if faster else ratio.value)


def shared_layers(first: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of the smallest modules that both have, none of which is inside another."""
    known = {name for name, _ in other.named_modules()}
    shared = [name for name, _ in first.named_modules() if name and name in known]
    above = {name[:end] for name in shared for end, letter in enumerate(name) if letter == "."}
    return [name for name in shared if name not in above]
