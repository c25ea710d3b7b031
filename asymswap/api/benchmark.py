"""Models timed in several settings: runtimes, batch sizes, threads and memory formats, all of them in turn."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

import asymswap
from asymswap.errors import AsymswapError, check_choice
from asymswap.measure.latency import (
    MemoryFormat,
    Passes,
    Turn,
    forward,
    in_format,
    inputs_like,
    ratio_of,
    seconds_of,
    stopwatch,
    take_turns,
    time_models,
)
from asymswap.measure.machine import Bystanders, machine
from asymswap.measure.macs import count_costs
from asymswap.measure.runtimes import RUNTIMES, Runtime, check_same, compiled, session_on, write_for_runtime
from asymswap.models.opened import OpenedModel, costs_of, sizes_assumed
from asymswap.models.opening import Model, open_for_verb
from asymswap.results.benchmark import Benchmark, BenchmarkedModel, Gain, LayerRow, Layers, Result, Setting
from asymswap.types import Progress, silent
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import map_tensors

Dtype = Literal["float32", "bfloat16", "float16"]
FORMATS: tuple[MemoryFormat, ...] = ("channels-last", "contiguous")


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
    progress: Progress = silent,
) -> Benchmark:
    """Time models in every combination of runtimes, batch sizes, threads and memory formats; none of them is changed.

    All combinations run in turn, in `rounds` rounds, or as many of them as `seconds` allow, five at least; times are
    ratios to the first model's in the same setting as well. `threads` is torch's own number where it is not given,
    `dtype` the model's own. With `layers`, the layers that models share by name with the first one are timed too, in
    the first setting of eager PyTorch. A combination that cannot be run is told with its reason in its row.

    Raises AsymswapError where a model cannot be opened, and where nothing at all can be run.
    """
    if dtype is not None:
        check_choice("the dtype", dtype, get_args(Dtype))
    settings = _settings(runtimes, batches, threads or (torch.get_num_threads(),), memory_formats)
    if not models:
        raise AsymswapError("benchmark takes one model or more")
    if rounds < 1 or not seconds > 0:
        raise AsymswapError(f"{rounds} rounds in {seconds:g} s measure nothing; give 1 or more, and some seconds")
    opened = [open_for_verb(model, progress) for model in models]
    rows = tuple(_row(one) for one in opened)
    with tempfile.TemporaryDirectory(prefix="asymswap-") as folder:
        lineup = _Lineup(opened, dtype, Path(folder))
        lineup.make_ready(settings, progress)
        watched = Bystanders()
        timed = take_turns(lineup.turns, rounds=rounds, seconds=seconds, progress=progress)
        others = watched.cores()
        measured = _layers(lineup, settings, rounds, seconds, progress) if layers else ()
    about = machine()
    return Benchmark(
        asymswap=asymswap.__version__,
        models=rows,
        settings=settings,
        results=tuple(
            _result(number, place, settings[place], timed, lineup)
            for place in range(len(settings))
            for number in range(len(models))
        ),
        layers=measured,
        gains=tuple(_gains(settings, timed)),
        dtype=dtype or ", ".join(dict.fromkeys(str(one.dtype()).removeprefix("torch.") for one in opened)),
        machine=about["processor"],
        cores=about["cores"],
        rounds=len(next(iter(timed.values()))),
        others=others,
        versions=_versions(runtimes),
        warnings=sizes_assumed(opened),
    )


_Key = tuple[int, int]
"""Places of a model and of a setting."""


def _settings(
    runtimes: Sequence[Runtime], batches: Sequence[int], threads: Sequence[int], formats: Sequence[MemoryFormat]
) -> tuple[Setting, ...]:
    """All combinations; ONNX Runtime has a memory format of its own."""
    for what, given, known in (("the runtime", runtimes, RUNTIMES), ("the memory format", formats, FORMATS)):
        for one in given:
            check_choice(what, one, known)
    wrong = [number for number in (*batches, *threads) if number < 1]
    if wrong or not (runtimes and batches and formats):
        raise AsymswapError(f"batches {list(batches)} on threads {list(threads)} are nothing to time; give 1 or more")
    return tuple(
        dict.fromkeys(
            Setting(runtime, batch, count, None if runtime == "onnx" else form)
            for runtime, batch, count, form in itertools.product(runtimes, batches, threads, formats)
        )
    )


def _row(opened: OpenedModel) -> BenchmarkedModel:
    costs = costs_of(opened)
    return BenchmarkedModel(
        model=opened.reference,
        origin=opened.origin.reference,
        weights=opened.weights,
        input=opened.preprocessing.describe(),
        cost=costs.total,
        notes=opened.notes + costs.notes(),
    )


class _Lineup:
    """All that is timed: the turns of models in settings, and why those that have none have none."""

    def __init__(self, opened: Sequence[OpenedModel], dtype: Dtype | None, folder: Path) -> None:
        self.turns: dict[_Key, Turn[float]] = {}
        self.failures: dict[_Key, str] = {}
        self.ready: dict[_Key, float] = {}
        self.opened = opened
        self._dtype = None if dtype is None else getattr(torch, dtype)
        self._folder = folder
        self._copies: dict[tuple[int, MemoryFormat], nn.Module] = {}
        self._exports: dict[int, float | AsymswapError] = {}

    def make_ready(self, settings: Sequence[Setting], progress: Progress) -> None:
        """Compile and export all; raises AsymswapError where nothing can be run."""
        before, total = torch.get_num_threads(), len(settings) * len(self.opened)
        try:
            for place, setting in enumerate(settings):
                for number in range(len(self.opened)):
                    progress("making ready", place * len(self.opened) + number, total)
                    torch.set_num_threads(setting.threads)
                    try:
                        self._make_ready((number, place), setting)
                    except Exception as error:
                        # Whatever the model does in there is its own.
                        self.failures[number, place] = _reason(error)
        finally:
            torch.set_num_threads(before)
        if not self.turns:
            raise AsymswapError("; ".join(dict.fromkeys(self.failures.values())))

    def _make_ready(self, key: _Key, setting: Setting) -> None:
        number = key[0]
        memory_format: MemoryFormat = "channels-last" if setting.memory_format == "channels-last" else "contiguous"
        model, inputs = self.model(number, memory_format), self.inputs(number, memory_format, setting.batch)
        with torch.inference_mode():
            wanted = model(*inputs)
        if setting.runtime == "eager":
            self.turns[key] = Turn(forward(model, inputs).measure, setting.threads)
            return
        start = time.perf_counter()
        if setting.runtime == "compile":
            with torch.inference_mode():
                run = compiled(model, inputs)
            seconds, pool = time.perf_counter() - start, "torch"
        else:
            path, exporting = self._onnx_file(number)
            start = time.perf_counter()
            run = session_on(path, inputs, setting.threads)
            seconds, pool = exporting + time.perf_counter() - start, "onnx"
        if self.opened[number].preprocessing.form != "image-list":
            # Which boxes a detector keeps jumps where scores are close.
            with torch.inference_mode():
                check_same(run(), wanted, "compile" if setting.runtime == "compile" else "onnx")
        self.ready[key] = seconds
        self.turns[key] = Turn(stopwatch(run), setting.threads, pool)

    def model(self, number: int, memory_format: MemoryFormat) -> nn.Module:
        """A copy of the model, in eval mode, on the processor; the same one every time."""
        if (number, memory_format) not in self._copies:
            copied = in_format(self.opened[number].model, memory_format).eval().to("cpu", self._dtype)
            self._copies[number, memory_format] = copied
        return self._copies[number, memory_format]

    def inputs(self, number: int, memory_format: MemoryFormat, batch: int) -> Inputs:
        """Random inputs, always the same."""
        example = self.opened[number].example()
        cast: Inputs = map_tensors(example, lambda tensor: tensor.to(self._dtype or tensor.dtype))
        return inputs_like(cast, memory_format, batch)

    def _onnx_file(self, number: int) -> tuple[Path, float]:
        """The model's file, written once, and the seconds that it took."""
        path = self._folder / f"{number}.onnx"
        if number not in self._exports:
            start = time.perf_counter()
            try:
                # With a single image, the batch would count as a number that never varies.
                write_for_runtime(self.model(number, "contiguous"), self.inputs(number, "contiguous", 2), path)
                self._exports[number] = time.perf_counter() - start
            except AsymswapError as error:
                self._exports[number] = error
        outcome = self._exports[number]
        if isinstance(outcome, AsymswapError):
            raise outcome
        return path, outcome


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AsymswapError):
        return text
    # torch has no error of its own for this.
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "there is not enough memory"
    return f"the model fails with {type(error).__name__}: {text[:200]}"


def _result(number: int, place: int, setting: Setting, timed: Mapping[_Key, Passes], lineup: _Lineup) -> Result:
    rounds, first = timed.get((number, place)), timed.get((0, place))
    if rounds is None:
        return Result(number, place, failure=lineup.failures[number, place])
    seconds = seconds_of(rounds)
    return Result(
        model=number,
        setting=place,
        seconds=seconds,
        images_per_second=setting.batch / seconds.median if seconds.median else None,
        ratio=ratio_of(rounds, first) if number and first is not None else None,
        ready=lineup.ready.get((number, place)),
        rounds=tuple(min(passes) for passes in rounds),
    )


def _gains(settings: Sequence[Setting], timed: Mapping[_Key, Passes]) -> list[Gain]:
    """Where one memory format is told to be faster than the other."""
    gains = []
    for number, place in timed:
        setting = settings[place]
        other = Setting(setting.runtime, setting.batch, setting.threads, "contiguous")
        if setting.memory_format != "channels-last" or other not in settings:
            continue
        key = number, settings.index(other)
        if key in timed:
            ratio = ratio_of(timed[number, place], timed[key])
            if ratio.told and ratio.value < 1:
                gains.append(Gain(number, place, 1 / ratio.value))
            elif ratio.told:
                gains.append(Gain(number, key[1], ratio.value))
    return gains


def _layers(
    lineup: _Lineup, settings: Sequence[Setting], rounds: int, seconds: float, progress: Progress
) -> tuple[Layers, ...]:
    """What each model's layers take beside the first's, in the first setting of eager PyTorch in which both run."""
    found = []
    for number in range(1, len(lineup.opened)):
        places = [
            place
            for place, setting in enumerate(settings)
            if setting.runtime == "eager" and {(0, place), (number, place)} <= lineup.turns.keys()
        ]
        if places:
            found.append(_layers_of(lineup, number, places[0], settings[places[0]], rounds, seconds, progress))
    return tuple(found)


def _layers_of(
    lineup: _Lineup, number: int, place: int, setting: Setting, rounds: int, seconds: float, progress: Progress
) -> Layers:
    memory_format: MemoryFormat = "channels-last" if setting.memory_format == "channels-last" else "contiguous"
    models = {"first": lineup.model(0, memory_format), "own": lineup.model(number, memory_format)}
    names = shared_layers(models["first"], models["own"])
    inputs = {
        "first": lineup.inputs(0, memory_format, setting.batch),
        "own": lineup.inputs(number, memory_format, setting.batch),
    }
    costs = [count_costs(one.model, one.example(), names) for one in (lineup.opened[0], lineup.opened[number])]

    def step(_: str, done: int, total: int) -> None:
        progress("timing layers", done, total)

    before = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        timed = time_models(models, inputs, names, rounds=rounds, seconds=seconds, progress=step)
    finally:
        torch.set_num_threads(before)
    first, own = timed["first"], timed["own"]
    # MACs are those of a whole batch, as the times are.
    macs = [{name: setting.batch * cost.by_name[name].macs for name in names} for cost in costs]
    left = [setting.batch * cost.total.macs - sum(named.values()) for cost, named in zip(costs, macs, strict=True)]
    rows = [LayerRow(name, first.modules[name], own.modules[name], macs[0][name], macs[1][name]) for name in names]
    rows = [row for row in rows if row.first or row.own]
    rest = LayerRow("outside of them", first.rest, own.rest, *left)
    return Layers(number, place, tuple(sorted(rows, key=lambda row: -abs(row.excess))), rest)


def shared_layers(first: nn.Module, other: nn.Module) -> list[str]:
    """The names of the smallest modules that both have, of which none lies within another."""
    known = {name for name, _ in other.named_modules()}
    shared = [name for name, _ in first.named_modules() if name and name in known]
    above = {name[:end] for name in shared for end, letter in enumerate(name) if letter == "."}
    return [name for name in shared if name not in above]


def _versions(runtimes: Sequence[Runtime]) -> tuple[str, ...]:
    versions = [f"torch {torch.__version__}"]
    if "onnx" in runtimes:
        try:
            import onnxruntime
        except ImportError:
            return tuple(versions)
        versions.append(f"onnxruntime {onnxruntime.__version__}")
    return tuple(versions)
