"""The verb `benchmark`: what models cost, and how long they take, all of them in turn."""

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import asymswap
from asymswap.api.progress import Shows, shows_progress
from asymswap.errors import AsymswapError
from asymswap.measure.latency import MOST_SECONDS, REST, Bystanders, best_of, machine, ratio_of, seconds_of, take_turns
from asymswap.measure.macs import count_costs
from asymswap.measure.runtimes import RUNTIMES, Key, Network, installed, prepare_all
from asymswap.measure.timing import DTYPES, MemoryFormat, Precision, Timing
from asymswap.models.opened import OpenedModel, costs_of, input_warnings
from asymswap.models.opening import Model, open_for_verb
from asymswap.results.benchmark import TITLES, Benchmark, BenchmarkedModel, Gain, LayerRow, Layers, Result, Setting
from asymswap.results.convert import LatencyRow, TimeRow
from asymswap.types import Progress


@shows_progress
def benchmark(
    models: Model | Sequence[Model],
    *,
    runtimes: Sequence[str] = ("torch",),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    memory_formats: Sequence[MemoryFormat] = ("channels-last", "contiguous"),
    precision: Precision | None = None,
    rounds: int = 20,
    seconds: float = 60.0,
    layers: bool = True,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    progress: Shows = True,
) -> Benchmark:
    """Time one or more models in every combination of runtimes, batch sizes, threads and memory formats.

    None is changed. All combinations run in turn, in `rounds` rounds, or fewer if they take longer than `seconds`, but
    at least five. `threads` defaults to torch's own number, `precision` (fp32, bf16, fp16) to the model's. They run on
    the CPU, unless the first model was opened for another device. Batch norms are folded into the convs before them, as
    for deployment. With `layers`, the layers that models share by name with the first one are timed too, in the first
    setting of eager PyTorch. A combination that cannot be run has the reason in its row. Raises AsymswapError where a
    model cannot be opened, and where nothing can be run.
    """
    several = list(models) if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    threads = threads or (torch.get_num_threads(),)
    timings = [
        Timing(runtime, form, batch, rounds, count, precision)
        for runtime, batch, count, form in itertools.product(runtimes, batches, threads, memory_formats)
    ]
    if not (several and timings and seconds > 0):
        what = f"{len(several)} models in {len(timings)} settings and {seconds:g} s"
        raise AsymswapError(f"{what} measure nothing; give one model and setting or more, and some seconds")
    opened = [open_for_verb(model, progress, input_size, example_inputs) for model in several]
    # Each once, for some runtimes have a memory format of their own.
    every = (RUNTIMES[one.runtime].setting(replace(one, device=str(opened[0].device or "cpu"))) for one in timings)
    settings = tuple(dict.fromkeys(every))
    costs = tuple(cost_row(one) for one in opened)
    found, networks, others = _measure(opened, settings, timings[0], progress, seconds)
    results = tuple(found.values())
    if not any(result.rounds for result in results):
        raise AsymswapError("; ".join(dict.fromkeys(result.failure or "" for result in results)))
    measured = []
    for number in range(1, len(opened)) if layers else ():
        # In the first setting of eager PyTorch in which both run.
        eager = (place for place, setting in enumerate(settings) if setting.runtime == "torch")
        place = next((place for place in eager if found[0, place].rounds and found[number, place].rounds), None)
        if place is not None:
            both = (opened[0], networks[0]), (opened[number], networks[number])
            measured.append(Layers(number, place, *_time_layers(both, settings[place], rounds, seconds, progress)))
    about = machine()
    return Benchmark(
        asymswap=asymswap.__version__,
        models=costs,
        settings=settings,
        results=results,
        layers=tuple(measured),
        gains=tuple(_gains(settings, found)),
        dtype=DTYPES[precision]
        if precision
        else ", ".join(dict.fromkeys(str(one.dtype()).removeprefix("torch.") for one in opened)),
        machine=about["processor"],
        cores=about["cores"],
        rounds=max(len(result.rounds) for result in results),
        others=others,
        versions=tuple(dict.fromkeys((RUNTIMES["torch"].version(), *(one.version for one in results if one.version)))),
        warnings=input_warnings(*opened),
    )


def cost_row(opened: OpenedModel) -> BenchmarkedModel:
    """Return what a model is and what it costs."""
    costs, origin = costs_of(opened), opened.origin.reference
    notes = opened.notes + costs.notes()
    return BenchmarkedModel(opened.reference, origin, opened.weights, opened.takes(), costs.total, notes)


def _measure(
    opened: Sequence[OpenedModel], settings: Sequence[Setting], timing: Timing, progress: Progress, seconds: float
) -> tuple[dict[Key, Result], list[Network], float | None]:
    """Time models in settings, all in turn; return results, setting by setting, the networks, and cores kept busy."""
    dtype = timing.precision and getattr(torch, DTYPES[timing.precision])
    with tempfile.TemporaryDirectory(prefix="asymswap-") as folder:
        networks = [Network(one.model, one.example(), Path(folder), dtype) for one in opened]
        turns, failures = prepare_all(networks, settings, progress)
        watched = Bystanders()
        timed = take_turns(turns, rounds=timing.rounds, seconds=seconds, progress=progress) if turns else {}
    others = watched.cores()
    results: dict[Key, Result] = {}
    for place, number in itertools.product(range(len(settings)), range(len(opened))):
        key, first = (number, place), timed.get((0, place))
        results[key] = Result(number, place, failure=failures.get(key))
        if key in timed:
            figures = seconds_of(timed[key])
            results[key] = Result(
                number,
                place,
                figures,
                images_per_second=settings[place].batch / figures.median if figures.median else None,
                ratio=ratio_of(timed[key], first) if number and first is not None else None,
                ready=turns[key].ready,
                rounds=tuple(min(passes) for passes in timed[key]),
                version=turns[key].version,
            )
    return results, networks, others


def time_in_turn(opened: Sequence[OpenedModel], timing: Timing, progress: Progress) -> list[Result]:
    """Time models in one setting; raise AsymswapError, with the reason, where one of them cannot be run."""
    setting = RUNTIMES[timing.runtime].setting(timing)
    results = list(_measure(opened, [setting], timing, progress, MOST_SECONDS)[0].values())
    for one, result in zip(opened, results, strict=True):
        if result.failure is not None:
            raise AsymswapError(f"{one.reference} in {TITLES[timing.runtime]}: {result.failure}")
    return results


_OTHERS = ("torch", "onnxruntime", "openvino")
"""The runtimes in which a conversion is timed where they are installed; compiling takes minutes."""


def time_conversion(
    opened: OpenedModel, converted: nn.Module, timing: Timing, known: LatencyRow | None, progress: Progress
) -> LatencyRow:
    """Time a model before and after, in the runtime of `timing` and in others that are installed, all in turn.

    `known` is what the planning under a budget of latency has measured already.
    """
    done = [] if known is None else [row.runtime for row in known.times]
    names = installed([name for name in dict.fromkeys((timing.runtime, *_OTHERS)) if name not in done])
    both, settings = [opened, replace(opened, model=converted)], [RUNTIMES[name].setting(timing) for name in names]
    found = _measure(both, settings, timing, progress, MOST_SECONDS)[0]
    pairs = ((name, found[0, place], found[1, place]) for place, name in enumerate(names))
    rows = [
        TimeRow(name, after.version, before.seconds, after.seconds, after.ratio, after.failure or before.failure)
        for name, before, after in pairs
    ]
    if known is not None:
        return replace(known, times=(*known.times, *rows))
    setting = RUNTIMES["torch"].setting(timing)
    how = setting.memory_format, setting.batch, setting.threads, machine()["processor"]
    return LatencyRow(tuple(rows), *how, device=timing.device)


def _time_layers(
    both: Sequence[tuple[OpenedModel, Network]], setting: Setting, rounds: int, seconds: float, progress: Progress
) -> tuple[tuple[LayerRow, ...], LayerRow]:
    """Time a model's layers beside the first's in eager PyTorch; return what both have, and the rest."""
    names = shared_layers(*(network.placed(setting)[0] for _, network in both))
    turns = {place: RUNTIMES["torch"].probe(network, setting, names) for place, (_, network) in enumerate(both)}
    step = lambda _, done, total: progress("timing layers", done, total)  # noqa: E731
    first, own = map(best_of, take_turns(turns, rounds=rounds, seconds=seconds, progress=step).values())
    # MACs of a whole batch, as the times.
    costs = [count_costs(one.model, one.example(), names) for one, _ in both]
    macs = [{name: setting.batch * cost.by_name[name].macs for name in names} for cost in costs]
    left = [setting.batch * cost.total.macs - sum(named.values()) for cost, named in zip(costs, macs, strict=True)]
    rows = [LayerRow(name, first[name], own[name], macs[0][name], macs[1][name]) for name in names]
    rows = sorted((row for row in rows if row.first or row.own), key=lambda row: -abs(row.excess))
    return tuple(rows), LayerRow("outside of them", first[REST], own[REST], *left)


def _gains(settings: Sequence[Setting], found: Mapping[Key, Result]) -> Iterator[Gain]:
    """Yield where one memory format is significantly faster than the other."""
    for (number, place), result in found.items():
        other = replace(settings[place], memory_format="contiguous")
        if settings[place].memory_format != "channels-last" or other not in settings:
            continue
        beside = found[number, settings.index(other)]
        if result.rounds and beside.rounds:
            ratio = ratio_of(*([[best] for best in one.rounds] for one in (result, beside)))
            if ratio.is_significant:
                faster = ratio.value < 1
                yield Gain(number, (result if faster else beside).setting, 1 / ratio.value if faster else ratio.value)


def shared_layers(first: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of the smallest modules that both have, none of which is inside another."""
    known = {name for name, _ in other.named_modules()}
    shared = [name for name, _ in first.named_modules() if name and name in known]
    above = {name[:end] for name in shared for end, letter in enumerate(name) if letter == "."}
    return [name for name in shared if name not in above]
