"""How a benchmark is shown."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.tables import WIDE, Column, Screen, Table, written
from asymswap.results.benchmark import Benchmark, Gain, LayerRow, Layers, Result

_BUSY = 0.2  # cores that other programs may keep busy without a warning
_SPREAD = 0.1  # of the rounds, from which on the machine counts as busy, if a single model gives no ratio
_USED_BY = {"channels-last": "model.to(memory_format=torch.channels_last)", "contiguous": "PyTorch's default"}


def benchmark_view(benchmark: Benchmark, width: int | None, layers: int = 5) -> Screen:
    """Return a table for each setting, or one of all for a single model or without a width, layers and fine print."""
    names, settings = [one.model for one in benchmark.models], [*map(fmt.setting, benchmark.settings)]
    measured = [result for result in benchmark.results if result.seconds is not None]
    model = Column("Model", lambda row: names[row.model], side="fold", code=True)
    setting = Column("Setting", lambda row: settings[row.setting], side="fold")
    tables = [("", [model, setting], measured)]
    if len(names) == 1:
        tables = [(names[0], [setting], measured)]
    elif width is not None:
        tables = [(title, [model], [one for one in measured if one.setting == n]) for n, title in enumerate(settings)]
    blocks: list[Sequence[str | Text | Table]] = []
    for title, first, results in tables:
        if results:
            blocks.append([written(title, "bold"), Table([*first, *_figures(benchmark, results)], results)])
    blocks.append([written(line, "yellow") for line in _warnings(benchmark, names, settings)])
    blocks.append(list(_advice(benchmark)))
    for found in benchmark.layers if layers else ():
        where = f"{names[found.model]} whose time differs most from what their MACs promise"
        title = f"Layers of {where} ({settings[found.setting]})"
        blocks.append([written(title, "bold"), _layers_table(found, layers)])
    return Screen("", benchmark.warnings, blocks, _fine_print(benchmark), width)


def _figures(benchmark: Benchmark, results: Sequence[Result]) -> list[Column]:
    models = benchmark.models
    columns = [
        Column("ms", "seconds.minimum", fmt.milliseconds),
        Column("Median", "seconds.median", fmt.milliseconds),
        Column("Spread", "seconds.spread", fmt.percent),
        Column("Images/s", "images_per_second", lambda n: f"{n:,.0f}" if n >= 100 else f"{n:#.3g}"),
    ]
    if len(models) > 1:
        surety = next((result.ratio.confidence for result in results if result.ratio is not None), 0.95)
        ends = lambda ratio: f"{100 * ratio.low:.1f} to {100 * ratio.high:.1f}"  # noqa: E731
        columns += [
            Column("of 1st", lambda row: fmt.time_share(row.ratio, row.model == 0)),
            Column(fmt.score(surety, "%", 0), "ratio", ends, least=WIDE),
            Column("MACs", lambda row: fmt.share(models[row.model].cost.macs, models[0].cost.macs)),
        ]
    if any(result.ready is not None for result in results):
        columns.append(Column("Ready s", "ready", "{:.1f}".format))
    return columns


def _warnings(benchmark: Benchmark, names: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Return what could not be run and why, and which figures are not reliable because the machine was busy."""
    failed: dict[tuple[str, str], dict[str, None]] = {}
    for result in benchmark.results:
        if result.failure is not None:
            runtime = fmt.runtime(benchmark.settings[result.setting].runtime)
            failed.setdefault((runtime, result.failure), {})[names[result.model]] = None
    lines = [f"{', '.join([runtime, *which])}: {reason}." for (runtime, reason), which in failed.items()]
    named = ((f"{names[one.model]} ({settings[one.setting]})", one.ratio) for one in benchmark.results)
    doubts = fmt.doubts(names[0], named)
    for result in benchmark.results if len(names) == 1 else ():
        if result.seconds is not None and result.seconds.spread > _SPREAD:
            spread = f"{fmt.percent(result.seconds.spread)} ({settings[result.setting]})"
            doubts.append(f"The machine was busy: the middle half of the rounds spreads over {spread}.")
    if doubts and benchmark.others is not None and benchmark.others >= _BUSY:
        doubts.append(f"Other programs kept {benchmark.others:.1f} of {benchmark.cores} cores busy meanwhile.")
    return lines + doubts


def _advice(benchmark: Benchmark) -> Iterator[str]:
    """Yield in which memory format each model is faster, if the difference is significant."""
    for number, model in enumerate(benchmark.models):
        by_format: dict[str, list[Gain]] = {}
        for gain in [one for one in benchmark.gains if one.model == number]:
            by_format.setdefault(benchmark.settings[gain.setting].memory_format or "", []).append(gain)
        for faster, gains in by_format.items():
            times = sorted(gain.times for gain in gains)
            factor = f"{times[0]:.2f}" if len(times) == 1 else f"{times[0]:.2f} to {times[-1]:.2f}"
            settings = (fmt.setting(replace(benchmark.settings[gain.setting], memory_format=None)) for gain in gains)
            where = f" ({'; '.join(settings)})" if len(by_format) > 1 else ""
            yield f"{model.model}: {faster} is {factor} x as fast here{where}: {_USED_BY[faster]}."


def _layers_table(layers: Layers, most: int) -> Table:
    """Return the layers of the greatest excess, the others, the rest and the sum; a row is a name and its layers."""

    def total(name: str) -> Callable[[tuple[str, Sequence[LayerRow]]], float]:
        return lambda row: sum(getattr(layer, name) for layer in row[1])

    first, own, first_macs, macs = map(total, ("first", "own", "first_macs", "macs"))
    columns = (
        Column("Layer", itemgetter(0), side="fold", code=True),
        Column("1st ms", first, lambda seconds: f"{1e3 * seconds:.3f}"),
        Column("ms", own, lambda seconds: f"{1e3 * seconds:.3f}"),
        Column("of 1st", lambda row: fmt.share(own(row), first(row))),
        Column("MACs", lambda row: fmt.share(macs(row), first_macs(row))),
        Column("Above MACs", total("excess"), lambda seconds: f"{1e3 * seconds:+.3f}"),
    )
    others = layers.rows[most:]
    sums = [(f"{len(others)} others", others)] if others else []
    sums += [(layers.rest.layer, (layers.rest,)), ("together", (*layers.rows, layers.rest))]
    return Table(columns, [(row.layer, (row,)) for row in layers.rows[:most]], sums)


def _fine_print(benchmark: Benchmark) -> list[str]:
    models = benchmark.models
    inputs = list(dict.fromkeys(model.input for model in models))
    if len(inputs) > 1:
        inputs = [f"{model.input} ({model.model})" for model in models]
    cores = "" if benchmark.cores is None else f", {benchmark.cores} cores"
    how = f"{benchmark.dtype}; all in turn, {benchmark.rounds} rounds, on {benchmark.machine}{cores}"
    several = (
        "Of 1st: the median of the rounds' ratios to the first model in the same setting (?: not significant); MACs: "
        "the same of its MACs."
    )
    ready = (
        "Ready: compiling, or exporting and loading, once; torch.compile keeps what it has made in a cache of its own, "
        "and is faster the next time."
    )
    above = (
        "Above MACs: milliseconds more than the first's time times the ratio of MACs; of several layers, the sum. The "
        "hooks that time layers take some microseconds each."
    )
    return [
        f"Random inputs of {', '.join(inputs)}, {how}; {', '.join(benchmark.versions)}.",
        "ms: the fastest pass. Spread: between the quartiles of the rounds. Images/s: at the median.",
        *([several] if len(models) > 1 else []),
        *([ready] if any(result.ready is not None for result in benchmark.results) else []),
        *([above] if benchmark.layers else []),
        *dict.fromkeys(f"{model.model}: {note}." for model in models for note in model.notes),
    ]
