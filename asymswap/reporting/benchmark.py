"""How a benchmark is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.tables import WIDE, Column, Screen, Table, bold, document, paragraphs, screen, written
from asymswap.results.benchmark import TITLES, Benchmark, Gain, LayerRow, Layers, Result, Setting
from asymswap.types import Ratio

# Cores that other programs may keep busy without a warning.
_BUSY = 0.2
# Relative spread of the rounds from which on the machine counts as busy, if a single model gives no ratio.
_SPREAD = 0.1
# How to use the faster memory format.
_HOW = {
    "channels-last": "model.to(memory_format=torch.channels_last)",
    "contiguous": "PyTorch's default",
}


def benchmark_view(benchmark: Benchmark, width: int, layers: int = 5) -> Screen:
    """Return a table for each setting, or one of all settings for a single model, layers and fine print."""
    blocks: list[Sequence[Text | Table]] = []
    if len(benchmark.models) == 1:
        title = ", ".join([benchmark.models[0].model, *_shared_words(benchmark)])
        setting = Column("Setting", lambda row: _where(benchmark, row).strip(" ()") or "all", side="fold")
        table = Table([setting, *_figures(benchmark, benchmark.results)], benchmark.results)
        blocks.append([written(title, "bold"), table])
    else:
        for number, one in enumerate(benchmark.settings):
            results = [result for result in benchmark.results if result.setting == number]
            if any(result.seconds is not None for result in results):
                table = Table([_model_column(benchmark), *_figures(benchmark, results)], results)
                blocks.append([written(", ".join(_words(one)), "bold"), table])
    blocks += [paragraphs(_warnings(benchmark), "yellow"), paragraphs(_advice(benchmark))]
    for found in benchmark.layers if layers else ():
        blocks.append([written(_layers_title(benchmark, found), "bold"), _layers_table(found, layers)])
    return screen("", benchmark.warnings, *blocks, fine_print=_fine_print(benchmark), width=width)


def benchmark_to_markdown(benchmark: Benchmark, layers: int = 5) -> str:
    """Return one table of everything, the layers and the fine print, to be pasted into a pull request."""
    settings = benchmark.settings
    shown = [result for result in benchmark.results if result.seconds is not None]
    columns = [
        _model_column(benchmark),
        Column("Runtime", lambda row: TITLES[settings[row.setting].runtime], side="left"),
        Column("Batch", lambda row: settings[row.setting].batch, side="left"),
        Column("Threads", lambda row: settings[row.setting].threads, side="left"),
        Column("Memory format", lambda row: settings[row.setting].memory_format, side="left"),
        *_figures(benchmark, shown),
    ]
    by_layer: list[str | Table] = []
    for found in benchmark.layers if layers else ():
        by_layer += [f"{fmt.markdown_text(_layers_title(benchmark, found))}:", _layers_table(found, layers)]
    return document(
        *bold(map(fmt.sentence, benchmark.warnings)),
        Table(columns, shown),
        *bold(_warnings(benchmark)),
        *map(fmt.markdown_text, _advice(benchmark)),
        *by_layer,
        _fine_print(benchmark),
    )


def _model_column(benchmark: Benchmark) -> Column:
    return Column("Model", lambda row: benchmark.models[row.model].model, side="fold", code=True)


def _figures(benchmark: Benchmark, results: Sequence[Result]) -> list[Column]:
    """Return the columns of figures, which are empty for what could not be run."""

    def macs_of_first(row: Result) -> str | None:
        macs, first = (benchmark.models[number].cost.macs for number in (row.model, 0))
        return None if row.seconds is None else fmt.share(macs, first)

    def time_of_first(row: Result) -> str | None:
        if row.model == 0:
            return None if row.seconds is None else fmt.percent(1)
        return None if row.ratio is None else fmt.time_share(row.ratio)

    def interval(ratio: Ratio) -> str:
        return f"{100 * ratio.low:.1f} to {100 * ratio.high:.1f}"

    def rate(images: float) -> str:
        return f"{images:,.0f}" if images >= 100 else f"{images:#.3g}"

    columns = [
        Column("ms", lambda row: row.seconds and row.seconds.minimum, fmt.milliseconds),
        Column("Median", lambda row: row.seconds and row.seconds.median, fmt.milliseconds),
        Column("Spread", lambda row: row.seconds and row.seconds.spread, fmt.percent),
        Column("Images/s", attrgetter("images_per_second"), rate),
    ]
    if any(result.model for result in results):
        confidence = next((fmt.confidence(result.ratio) for result in results if result.ratio is not None), "95 %")
        columns.append(Column("of 1st", time_of_first))
        columns.append(Column(confidence, attrgetter("ratio"), interval, least=WIDE))
        columns.append(Column("MACs", macs_of_first))
    if any(result.ready is not None for result in results):
        columns.append(Column("Ready s", attrgetter("ready"), "{:.1f}".format))
    return columns


def _words(setting: Setting) -> list[str]:
    words = [TITLES[setting.runtime], f"batch {setting.batch}", fmt.plural(setting.threads, "thread")]
    return words if setting.memory_format is None else [*words, setting.memory_format]


def _shared_words(benchmark: Benchmark) -> list[str]:
    every = [_words(setting) for setting in benchmark.settings]
    return [word for word in every[0] if all(word in other for other in every)]


def _where(benchmark: Benchmark, result: Result) -> str:
    """Return what distinguishes a result's setting, in brackets."""
    shared = _shared_words(benchmark)
    own = [word for word in _words(benchmark.settings[result.setting]) if word not in shared]
    return f" ({', '.join(own)})" if own else ""


def _warnings(benchmark: Benchmark) -> list[str]:
    """Return what could not be run and why, and which figures are not reliable because the machine was busy."""
    failed: dict[str, list[Result]] = {}
    for result in benchmark.results:
        if result.failure is not None:
            failed.setdefault(result.failure, []).append(result)
    failures = [f"{_models_and_settings(benchmark, results)}: {reason}." for reason, results in failed.items()]
    names = [f"{benchmark.models[result.model].model}{_where(benchmark, result)}" for result in benchmark.results]
    ratios = (result.ratio for result in benchmark.results)
    doubts = fmt.doubts(benchmark.models[0].model, zip(names, ratios, strict=True))
    if len(benchmark.models) == 1:
        for result in benchmark.results:
            if result.seconds is not None and result.seconds.spread > _SPREAD:
                spread = f"{fmt.percent(result.seconds.spread)}{_where(benchmark, result)}"
                doubts.append(f"The machine was busy: the middle half of the rounds spreads over {spread}.")
    if doubts and benchmark.others is not None and benchmark.others >= _BUSY:
        doubts.append(f"Other programs kept {benchmark.others:.1f} of {benchmark.cores} cores busy meanwhile.")
    return failures + doubts


def _models_and_settings(benchmark: Benchmark, results: Sequence[Result]) -> str:
    """Name the settings of results, by their runtime alone where all settings of it are among them, and the models."""
    names = dict.fromkeys(benchmark.models[result.model].model for result in results)
    numbers = list(dict.fromkeys(result.setting for result in results))
    runtimes = list(dict.fromkeys(TITLES[benchmark.settings[number].runtime] for number in numbers))
    every = [number for number, one in enumerate(benchmark.settings) if TITLES[one.runtime] in runtimes]
    settings = runtimes if numbers == every else [", ".join(_words(benchmark.settings[number])) for number in numbers]
    models = f", {', '.join(names)}" if len(benchmark.models) > 1 else ""
    return "; ".join(settings) + models


def _advice(benchmark: Benchmark) -> Iterator[str]:
    """Yield in which memory format each model is faster, if the difference is significant."""
    for number, model in enumerate(benchmark.models):
        by_format: dict[str, list[Gain]] = {}
        for gain in benchmark.gains:
            if gain.model == number:
                by_format.setdefault(benchmark.settings[gain.setting].memory_format or "", []).append(gain)
        for faster, gains in by_format.items():
            times = sorted(gain.times for gain in gains)
            factor = f"{times[0]:.2f}" if len(times) == 1 else f"{times[0]:.2f} to {times[-1]:.2f}"
            where = ""
            if len(by_format) > 1:
                settings = (benchmark.settings[gain.setting] for gain in gains)
                where = " (" + "; ".join(", ".join(_words(setting)[:-1]) for setting in settings) + ")"
            yield f"{model.model}: {faster} is {factor} x as fast here{where}: {_HOW[faster]}."


def _layers_title(benchmark: Benchmark, layers: Layers) -> str:
    model, setting = benchmark.models[layers.model].model, ", ".join(_words(benchmark.settings[layers.setting]))
    return f"Layers of {model} whose time differs most from what their MACs promise ({setting})"


def _layers_table(layers: Layers, most: int) -> Table:
    """Return the layers of the greatest excess, the others, the rest and the sum: rows of a name and its layers."""

    def total(name: str) -> Callable[[tuple[str, Sequence[LayerRow]]], Any]:
        return lambda row: sum(getattr(layer, name) for layer in row[1])

    def of_first(own: str, first: str) -> Callable[[tuple[str, Sequence[LayerRow]]], str]:
        return lambda row: fmt.share(total(own)(row), total(first)(row))

    columns = (
        Column("Layer", itemgetter(0), side="fold", code=True),
        Column("1st ms", total("first"), lambda seconds: f"{1e3 * seconds:.3f}"),
        Column("ms", total("own"), lambda seconds: f"{1e3 * seconds:.3f}"),
        Column("of 1st", of_first("own", "first")),
        Column("MACs", of_first("macs", "first_macs")),
        Column("Above MACs", total("excess"), lambda seconds: f"{1e3 * seconds:+.3f}"),
    )
    others = layers.rows[most:]
    sums = [(f"{len(others)} others", others)] if others else []
    sums += [(layers.rest.layer, (layers.rest,)), ("together", (*layers.rows, layers.rest))]
    return Table(columns, [(row.layer, [row]) for row in layers.rows[:most]], sums)


def _fine_print(benchmark: Benchmark) -> list[str]:
    inputs = list(dict.fromkeys(model.input for model in benchmark.models))
    if len(inputs) > 1:
        inputs = [f"{model.input} ({model.model})" for model in benchmark.models]
    cores = "" if benchmark.cores is None else f", {benchmark.cores} cores"
    how = f"{benchmark.dtype}; all in turn, {benchmark.rounds} rounds, on {benchmark.machine}{cores}"
    lines = [
        f"Random inputs of {', '.join(inputs)}, {how}; {', '.join(benchmark.versions)}.",
        "ms: the fastest pass. Spread: between the quartiles of the rounds. Images/s: at the median.",
    ]
    if len(benchmark.models) > 1:
        lines.append(
            "Of 1st: the median of the rounds' ratios to the first model in the same setting (?: not significant); "
            "MACs: the same of its MACs."
        )
    if any(result.ready is not None for result in benchmark.results):
        lines.append(
            "Ready: compiling, or exporting and loading, once; torch.compile keeps what it has made in a cache of its "
            "own, and is faster the next time."
        )
    if benchmark.layers:
        lines.append(
            "Above MACs: milliseconds more than the first's time times the ratio of MACs; of several layers, the sum. "
            "The hooks that time layers take some microseconds each."
        )
    return lines + list(dict.fromkeys(f"{model.model}: {note}." for model in benchmark.models for note in model.notes))
