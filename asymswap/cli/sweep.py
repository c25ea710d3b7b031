"""`asymswap sweep`: what each budget costs in accuracy."""

from __future__ import annotations

import json as jsonlib
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

import typer

from asymswap.cli import options as o
from asymswap.cli.calibration import calibration_of, takes_calibration
from asymswap.errors import AsymswapError

_BUDGET, _DATA = "Budgets", "Data"
_REPORTS = (".html", ".md", *o.PICTURES)


@o.takes_preprocessing
@takes_calibration
def sweep(
    model: o.Model,
    recipe: Annotated[
        list[str], typer.Option(help="A recipe's name or file; several are compared.", autocompletion=o.complete_recipe)
    ],
    evaluate: Annotated[
        str, typer.Option(help="Labelled images on which accuracy is measured.", rich_help_panel=_DATA)
    ],
    macs: Annotated[
        str | None,
        typer.Option(
            help="Fractions of the MACs, as 0.9:0.3:0.1 or 0.6,0.5.",
            rich_help_panel=_BUDGET,
            show_default="0.9:0.3:0.1",
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(help="Fractions of the parameters instead.", rich_help_panel=_BUDGET),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Points of accuracy that the advice may lose.", rich_help_panel=_BUDGET)
    ] = 1.0,
    calibration: Any = None,
    seed: Annotated[int, typer.Option(help="Seed of the images' choice.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="JSON to write after each point, and to go on with.",
            show_default="<stem>.sweep.json",
            rich_help_panel=o.RESULT,
        ),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(help="Also write .html, .md, .svg or .png; may be given several times.", rich_help_panel=o.RESULT),
    ] = None,
    weights: o.Weights = None,
    arch: o.Arch = None,
    arguments: o.Arguments = None,
    key: o.Key = None,
    input_size: o.InputSize = None,
    preprocessing: Any = None,
    trust_pickle: o.TrustPickle = False,
    trust_code: o.TrustCode = False,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Convert a model to several budgets and draw accuracy over cost; interrupted, it goes on where it stopped.

    Example: asymswap sweep digits-resnet --recipe half-macs --calibrate digits --evaluate digits
    """
    from asymswap.cli import screen
    from asymswap.utils.distributed import ALONE
    from asymswap.utils.files import check_distinct, check_output

    target = output or o.default_output(model, "sweep").with_suffix(".json")
    measure, budgets = _budgets(macs, params)
    for path in report or []:
        _check_report(path, force)
    check_output(target, force=True)
    # A file that is named twice is written twice, with the same in it.
    check_distinct(
        {"the model": o.model_file(model), "-o": target, **{f"--report {path}": path for path in set(report or [])}}
    )
    known = None if force else _read(target)
    with screen.progress(quiet) as step:
        from asymswap.api.sweep import BUDGETS
        from asymswap.api.sweep import sweep as run
        from asymswap.reporting import sweep as shown
        from asymswap.results.sweep import Tradeoff, to_json
        from asymswap.utils.files import write_text

        def write(result: Tradeoff) -> None:
            write_text(target, jsonlib.dumps(to_json(result), indent=2, allow_nan=False) + "\n")

        for one in recipe:
            o.check_recipe(one, {f"budget.{measure}": (budgets or BUDGETS)[0]})
        result = run(
            o.open_model(
                model,
                step,
                weights=weights,
                arch=arch,
                arguments=arguments,
                key=key,
                input_size=input_size,
                trust_pickle=trust_pickle,
                trust_code=trust_code,
                preprocessing=preprocessing,
            ),
            recipe,
            evaluate,
            budgets=budgets or BUDGETS,
            measure=measure,
            calibration=calibration_of(calibration, seed, ALONE),
            tolerance=tolerance / 100,
            known=known,
            on_point=write,
            progress=step,
        )
        write(result)
        for path in report or []:
            _write_report(path, result)
    if json:
        screen.print_json(to_json(result))
    elif not quiet:
        screen.show(shown.sweep_view(result), screen.console())


def _budgets(macs: str | None, params: str | None) -> tuple[Any, list[float] | None]:
    if macs is not None and params is not None:
        raise AsymswapError("budgets are of --macs or of --params; give one of them")
    option, text = ("--params", params) if params is not None else ("--macs", macs)
    return option.removeprefix("--"), None if text is None else parse_fractions(option, text)


def parse_fractions(option: str, text: str) -> list[float]:
    """Read `0.9:0.3:0.1` (both ends belong to it) or `0.6,0.5`, falling; raises AsymswapError for anything else."""
    try:
        if ":" in text:
            start, stop, step = (Decimal(part) for part in text.split(":"))
            low, high = min(start, stop), max(start, stop)
            if not step > 0 or not (high - low) / step <= 100:
                raise AsymswapError(f"{option} {text!r}: the step must be above zero and make at most 100 budgets")
            found = [high - step * number for number in range(int((high - low) / step) + 1)]
        else:
            found = [Decimal(part) for part in text.split(",")]
        wrong = [value for value in found if not 0 < value < 1]
    except (InvalidOperation, ValueError):
        raise AsymswapError(f"{option} {text!r} is neither from:to:step, such as 0.9:0.3:0.1, nor 0.6,0.5") from None
    if wrong:
        raise AsymswapError(f"{option} {text!r}: {wrong[0]} is no fraction between 0 and 1")
    return sorted({float(value) for value in found}, reverse=True)


def _read(path: Path) -> Any:
    """The sweep in a file to go on with, if there is one."""
    from asymswap.results.sweep import from_json

    if not path.exists():
        return None
    try:
        return from_json(jsonlib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AsymswapError(
            f"{path} is no sweep to go on with ({' '.join(str(error).split())[:80]}); give another name with -o, or "
            f"--force to replace it"
        ) from None


def _check_report(path: Path, force: bool) -> None:
    from asymswap.utils.files import check_output

    if path.suffix not in _REPORTS:
        raise AsymswapError(f"--report {path}: the file must end in {', '.join(_REPORTS[:-1])} or {_REPORTS[-1]}")
    if path.suffix != ".md":
        o.check_matplotlib("--report", path)
    check_output(path, force, "--report")


def _write_report(path: Path, result: Any) -> None:
    from asymswap.reporting.sweep import draw, to_html, to_markdown
    from asymswap.utils.files import write_bytes, write_text

    if path.suffix in (".md", ".html"):
        write_text(path, to_markdown(result) if path.suffix == ".md" else to_html(result))
    else:
        write_bytes(path, draw(result, path.suffix[1:]))
