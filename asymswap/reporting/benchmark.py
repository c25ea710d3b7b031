"""Latency and throughput of models in several settings: numbers and text, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.terminal import WIDE, table, written
from asymswap.results.benchmark import TITLES, Benchmark, Gain, LayerRow, Layers, Result, Setting

_BUSY = 0.2
"""Cores that others may keep busy without a word."""

_SPREAD = 0.1
"""Of one model alone no ratio tells that the machine is busy; its own rounds do."""


def benchmark_view(benchmark: Benchmark, width: int, layers: int = 5) -> RenderableType:
    """A table for each setting, or one of all settings where there is a single model, layers and the fine print."""
    wide = width >= WIDE
    parts: list[RenderableType] = [written(fmt.sentence(line), style="yellow") for line in benchmark.warnings]
    parts += [Text("")] * bool(parts)
    if len(benchmark.models) == 1:
        title = written(", ".join([benchmark.models[0].model, *_same(benchmark)]), style="bold")
        parts += [title, _table(benchmark, benchmark.results, "Setting", wide), Text("")]
    else:
        for number, setting in enumerate(benchmark.settings):
            results = [result for result in benchmark.results if result.setting == number]
            if all(result.seconds is None for result in results):
                continue
            title = written(", ".join(_words(setting)), style="bold")
            parts += [title, _table(benchmark, results, "Model", wide), Text("")]
    for lines, style in ((_warnings(benchmark), "yellow"), (list(_advice(benchmark)), "")):
        parts += [written(line, style=style) for line in lines] + [Text("")] * bool(lines)
    for one in benchmark.layers if layers else ():
        parts += [written(_layers_title(benchmark, one), style="bold"), _layers_table(one, layers), Text("")]
    parts += [written(line, style="dim") for line in _fine_print(benchmark)]
    return Group(*parts)


def benchmark_to_markdown(benchmark: Benchmark, layers: int = 5) -> str:
    """One table of everything, the layers and the fine print, to be pasted into a pull request."""
    shown = [result for result in benchmark.results if result.seconds is not None]
    columns = _columns(shown, wide=True)
    titles = ["Model", "Runtime", "Batch", "Threads", "Memory format", *(title for title in columns)]
    lines = [titles, [*["---"] * 5, *["---:"] * len(columns)]]
    for result in shown:
        setting, cells = benchmark.settings[result.setting], _cells(benchmark, result)
        about = [
            fmt.markdown_code(benchmark.models[result.model].model),
            TITLES[setting.runtime],
            f"{setting.batch}",
        ]
        about += [f"{setting.threads}", setting.memory_format or "-"]
        lines.append([*about, *(cells.get(title, "-") for title in columns)])
    text = [f"**{fmt.markdown_text(fmt.sentence(line))}**\n" for line in benchmark.warnings]
    text += [*fmt.markdown_table(lines), ""]
    text += [f"**{fmt.markdown_text(line)}**\n" for line in _warnings(benchmark)]
    text += [f"{fmt.markdown_text(line)}\n" for line in _advice(benchmark)]
    for one in benchmark.layers if layers else ():
        heads = [[*_LAYER_TITLES], ["---", *["---:"] * (len(_LAYER_TITLES) - 1)]]
        rows = [
            [fmt.markdown_code(cells[0]) if known else cells[0], *cells[1:]]
            for cells, known in _layer_cells(one, layers)
        ]
        text += [
            f"{fmt.markdown_text(_layers_title(benchmark, one))}:",
            "",
            *fmt.markdown_table([*heads, *rows]),
            "",
        ]
    return "\n".join([*text, *(f"- {fmt.markdown_text(line)}" for line in _fine_print(benchmark)), ""])


def _words(setting: Setting) -> list[str]:
    threads = f"{setting.threads} thread" + "s" * (setting.threads != 1)
    format_ = [] if setting.memory_format is None else [setting.memory_format]
    return [TITLES[setting.runtime], f"batch {setting.batch}", threads, *format_]


def _same(benchmark: Benchmark) -> list[str]:
    """What all settings share."""
    every = [_words(setting) for setting in benchmark.settings]
    return [word for word in every[0] if all(word in other for other in every)]


def _label(benchmark: Benchmark, result: Result, by: str) -> str:
    if by == "Model":
        return benchmark.models[result.model].model
    return _where(benchmark, result).strip(" ()") or "all"


def _table(benchmark: Benchmark, results: Sequence[Result], by: str, wide: bool) -> RenderableType:
    titles = _columns(results, wide)
    lines: list[list[str]] = []
    for result in results:
        cells = {} if result.seconds is None else _cells(benchmark, result)
        lines.append([_label(benchmark, result, by), *(cells.get(title, "-") for title in titles)])
    return table([(by, "fold"), *((title, "right") for title in titles)], lines)


def _columns(results: Sequence[Result], wide: bool) -> list[str]:
    titles = ["ms", "Median", "Spread", "Images/s"]
    if any(result.model for result in results):
        sure = next((fmt.confidence(result.ratio) for result in results if result.ratio is not None), "95 %")
        titles += ["of 1st", *[sure] * wide, "MACs"]
    return titles + ["Ready s"] * any(result.ready is not None for result in results)


def _cells(benchmark: Benchmark, result: Result) -> dict[str, str]:
    """What each column says of one result."""
    seconds, ratio = result.seconds, result.ratio
    assert seconds is not None
    macs = [benchmark.models[number].cost.macs for number in (result.model, 0)]
    rate = result.images_per_second or 0.0
    return {
        "ms": fmt.milliseconds(seconds.minimum),
        "Median": fmt.milliseconds(seconds.median),
        "Spread": fmt.percent(seconds.spread),
        "Images/s": f"{rate:,.0f}" if rate >= 100 else f"{rate:#.3g}",
        "of 1st": fmt.percent(1) if result.model == 0 else fmt.time_share(ratio),
        **({} if ratio is None else {fmt.confidence(ratio): f"{100 * ratio.low:.1f} to {100 * ratio.high:.1f}"}),
        "MACs": fmt.share(*macs),
        "Ready s": "-" if result.ready is None else f"{result.ready:.1f}",
    }


def _failures(benchmark: Benchmark) -> dict[str, str]:
    """Why what has no figures has none, and what that is."""
    found: dict[str, list[Result]] = {}
    for result in benchmark.results:
        if result.failure is not None:
            found.setdefault(result.failure, []).append(result)
    return {reason: _who(benchmark, results) for reason, results in found.items()}


def _who(benchmark: Benchmark, results: Sequence[Result]) -> str:
    names = dict.fromkeys(benchmark.models[result.model].model for result in results)
    settings = list(dict.fromkeys(result.setting for result in results))
    runtimes = dict.fromkeys(TITLES[benchmark.settings[number].runtime] for number in settings)
    every = [number for number, one in enumerate(benchmark.settings) if TITLES[one.runtime] in runtimes]
    said = [", ".join(_words(benchmark.settings[number])) for number in settings] if settings != every else runtimes
    return f"{'; '.join(said)}, {', '.join(names)}" if len(benchmark.models) > 1 else "; ".join(said)


def _warnings(benchmark: Benchmark) -> list[str]:
    """What has no figures and why, and what the figures do not tell, because the machine was not quiet."""
    doubts = fmt.doubts(
        benchmark.models[0].model,
        ((f"{benchmark.models[one.model].model}{_where(benchmark, one)}", one.ratio) for one in benchmark.results),
    )
    if len(benchmark.models) == 1:
        spreads = [(one, one.seconds.spread) for one in benchmark.results if one.seconds is not None]
        doubts += [
            f"The machine was busy: the middle half of the rounds spreads over {fmt.percent(spread)}"
            f"{_where(benchmark, one)}."
            for one, spread in spreads
            if spread > _SPREAD
        ]
    if doubts and benchmark.others is not None and benchmark.others >= _BUSY:
        doubts.append(f"Other programs kept {benchmark.others:.1f} of {benchmark.cores} cores busy meanwhile.")
    return [*(f"{where}: {reason}." for reason, where in _failures(benchmark).items()), *doubts]


def _where(benchmark: Benchmark, result: Result) -> str:
    """What is special about a result's setting, in brackets."""
    shared = _same(benchmark)
    own = [word for word in _words(benchmark.settings[result.setting]) if word not in shared]
    return f" ({', '.join(own)})" if own else ""


_HOW = {
    "channels-last": "model.to(memory_format=torch.channels_last), and --memory-format channels-last",
    "contiguous": "PyTorch's default, and --memory-format contiguous",
}


def _advice(benchmark: Benchmark) -> Iterator[str]:
    """In which memory format models are faster, where that could be told."""
    for number, model in enumerate(benchmark.models):
        gains = [gain for gain in benchmark.gains if gain.model == number]
        by_format: dict[str, list[Gain]] = {}
        for gain in gains:
            by_format.setdefault(benchmark.settings[gain.setting].memory_format or "", []).append(gain)
        for faster, those in by_format.items():
            times = sorted(gain.times for gain in those)
            much = f"{times[0]:.2f}" if len(times) == 1 else f"{times[0]:.2f} to {times[-1]:.2f}"
            where = ""
            if len(by_format) > 1:
                settings = (benchmark.settings[gain.setting] for gain in those)
                where = " (" + "; ".join(", ".join(_words(setting)[:-1]) for setting in settings) + ")"
            yield f"{model.model}: {faster} is {much} x as fast here{where}: {_HOW[faster]}."


_LAYER_TITLES = ("Layer", "1st ms", "ms", "of 1st", "MACs", "Above MACs")


def _layers_title(benchmark: Benchmark, layers: Layers) -> str:
    setting = ", ".join(_words(benchmark.settings[layers.setting]))
    title = f"Layers of {benchmark.models[layers.model].model} whose time differs most from what their MACs promise"
    return f"{title} ({setting})"


def _layers_table(layers: Layers, most: int) -> RenderableType:
    columns = [(title, "right" if number else "fold") for number, title in enumerate(_LAYER_TITLES)]
    return table(columns, [cells for cells, _ in _layer_cells(layers, most)])


def _layer_cells(layers: Layers, most: int) -> Iterator[tuple[list[str], bool]]:
    """The rows of the table, each with whether it is a layer: the greatest, the others together, the rest, the sum."""
    shown, others = layers.rows[:most], layers.rows[most:]
    for row in shown:
        yield _layer_row(row), True
    if others:
        yield _layer_row(_sum(f"{len(others)} others", others), sum(row.excess for row in others)), False
    yield _layer_row(layers.rest), False
    every = (*layers.rows, layers.rest)
    yield _layer_row(_sum("together", every), sum(row.excess for row in every)), False


def _sum(name: str, rows: Sequence[LayerRow]) -> LayerRow:
    first, own = sum(row.first for row in rows), sum(row.own for row in rows)
    return LayerRow(name, first, own, sum(row.first_macs for row in rows), sum(row.macs for row in rows))


def _layer_row(row: LayerRow, excess: float | None = None) -> list[str]:
    above = row.excess if excess is None else excess
    return [
        row.layer,
        f"{1e3 * row.first:.3f}",
        f"{1e3 * row.own:.3f}",
        fmt.share(row.own, row.first),
        fmt.share(row.macs, row.first_macs),
        f"{1e3 * above:+.3f}",
    ]


def _fine_print(benchmark: Benchmark) -> list[str]:
    cores = "" if benchmark.cores is None else f", {benchmark.cores} cores"
    lines = [
        f"Random inputs of {_inputs(benchmark)}, {benchmark.dtype}; all in turn, {benchmark.rounds} rounds, on "
        f"{benchmark.machine}{cores}; {', '.join(benchmark.versions)}.",
        "ms: the fastest pass. Spread: between the quartiles of the rounds. Images/s: at the median.",
    ]
    if len(benchmark.models) > 1:
        lines.append(
            "Of 1st: the median of the rounds' ratios to the first model in the same setting (?: not told from 100 %); "
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
    named = [f"{model.model}: {note}." for model in benchmark.models for note in model.notes]
    return lines + list(dict.fromkeys(named))


def _inputs(benchmark: Benchmark) -> str:
    sizes = dict.fromkeys(model.input for model in benchmark.models)
    if len(sizes) == 1:
        return next(iter(sizes))
    return ", ".join(f"{model.input} ({model.model})" for model in benchmark.models)
