"""`asymswap sweep`: what each budget costs in accuracy, or in another score."""

import json
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import asymswap
from asymswap.cli import options as o
from asymswap.cli.failures import in_flags
from asymswap.errors import AsymswapError
from asymswap.reporting import tables
from asymswap.reporting.sweep import draw as draw_sweep
from asymswap.reporting.sweep import to_html as sweep_page
from asymswap.results.records import to_json
from asymswap.results.sweep import Measure, Tradeoff, from_json
from asymswap.utils.distributed import ALONE
from asymswap.utils.files import check_distinct, check_output, write_file
from asymswap.utils.options import option

_DATA = "Data"
_BUDGET = "Budgets"
_TOLERANCE = "1 point; 0.1dB; a hundredth"
_RESUMED = "JSON file, written after each point and read to resume."


def sweep(
    model: o.Model,
    recipe: Annotated[
        list[str], typer.Option(help="A recipe's name or file; several are compared.", autocompletion=o.complete_recipe)
    ],
    evaluate: str | None = option(None, f"Measure on {o.EVALUATION_FORMS}", _DATA, shown=False),
    measured: Any = o.MEASURED,
    macs: str | None = option(None, "Fractions of the MACs, as 0.9:0.3:0.1 or 0.6,0.5.", _BUDGET, shown="0.9:0.3:0.1"),
    params: str | None = option(None, "Fractions of the parameters instead.", _BUDGET),
    latency: str | None = option(None, "Fractions of the latency on this machine instead.", _BUDGET),
    timing: Any = o.TIMING,
    tolerance: str | None = option(
        None, "How much of the first score the advice may lose, as for convert's --max-drop.", _BUDGET, shown=_TOLERANCE
    ),
    calibration: Any = o.CALIBRATION,
    seed: int = option(0, "Seed for choosing images."),
    output: Path | None = option(None, _RESUMED, o.RESULT, flags=o.OUTPUT, shown="<stem>.sweep.json"),
    report: list[Path] | None = option(None, "Also write .html, .md, .svg or .png; can be repeated.", o.RESULT),
    force: bool = o.FORCE,
    common: o.Common = o.COMMON,
) -> None:
    """Example: asymswap sweep digits-resnet --recipe half-macs --calibrate digits --evaluate digits"""
    every = {"macs": macs, "params": params, "latency": latency}
    given = {name: text for name, text in every.items() if text is not None}
    if len(given) > 1:
        raise AsymswapError("budgets are of --macs, of --params or of --latency; give one of them")
    measure = cast(Measure, next(iter(given), "macs"))
    budgets: dict[str, Any] = {"budgets": parse_fractions(f"--{measure}", given[measure])} if given else {}
    target = output or o.default_output(model, "sweep").with_suffix(".json")
    reports = list(dict.fromkeys(report or []))
    for path in reports:
        o.check_picture("--report", path, force, (".html", ".md", ".svg", ".png"))
    check_output(target, force=True)
    check_distinct({"the model": o.model_file(model), "-o": target, **{f"--report {path}": path for path in reports}})
    known = None
    if target.exists() and not force:
        try:
            known = from_json(json.loads(target.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AsymswapError(
                f"{target} is no sweep to resume ({' '.join(str(error).split())[:80]}); give another name with -o, or "
                f"--force to replace it"
            ) from None
    with common.bars() as step:

        def write(result: Tradeoff) -> None:
            write_file(target, json.dumps(to_json(in_flags(result)), indent=2, allow_nan=False) + "\n")

        by, how = o.measured_by("--evaluate", evaluate, measured, common.task)
        result = asymswap.sweep(
            common.model(model, step),
            recipe,
            by,
            measure=measure,
            timing=timing,
            calibration=o.calibration_of(calibration, seed, ALONE, common.task),
            tolerance=tolerance,
            known=known,
            on_point=write,
            progress=step,
            **budgets,
            **how,
        )
        write(result)
        for path in reports:
            if path.suffix in (".md", ".html"):
                write_file(path, tables.to_file(in_flags(result), path, sweep_page))
            else:
                write_file(path, draw_sweep(result, path.suffix[1:]))
    common.show(result)


def parse_fractions(option: str, text: str) -> list[float]:
    """Read `0.9:0.3:0.1` (both ends belong to it) or `0.6,0.5`, falling; raises AsymswapError for another form."""
    try:
        if ":" in text:
            start, stop, step = (Decimal(part) for part in text.split(":"))
            low, high = min(start, stop), max(start, stop)
            if not step > 0 or not (high - low) / step <= 100:
                raise AsymswapError(f"{option} {text!r}: the step must be above zero and make at most 100 budgets")
            found = [high - step * number for number in range(int((high - low) / step) + 1)]
        else:
            found = [Decimal(part) for part in text.split(",")]
    except (InvalidOperation, ValueError):
        raise AsymswapError(f"{option} {text!r} is neither from:to:step, such as 0.9:0.3:0.1, nor 0.6,0.5") from None
    return sorted({float(value) for value in found}, reverse=True)
