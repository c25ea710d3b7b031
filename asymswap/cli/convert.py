"""`asymswap convert`: the main job."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from asymswap.cli import options as o
from asymswap.cli.calibration import calibration_of, takes_calibration
from asymswap.cli.commandline import repeatable

_CHANGE = "What to do"


@o.takes_preprocessing
@takes_calibration
def convert(
    model: o.Model,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a shipped recipe, or a .toml file.", rich_help_panel=_CHANGE, autocompletion=o.complete_recipe
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Replay a plan (JSON) instead of a recipe.", rich_help_panel=_CHANGE)
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Keep at most this fraction of the model's MACs.", rich_help_panel=_CHANGE)
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Keep at most this fraction of its parameters.", rich_help_panel=_CHANGE)
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(help="Keep at most this fraction of its latency on this machine.", rich_help_panel=_CHANGE),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Save what can be saved at this predicted error of all layers.", rich_help_panel=_CHANGE),
    ] = None,
    memory_format: Annotated[
        o.MemoryFormat | None,
        typer.Option(
            help="In which a budget of latency is measured: channels-last or contiguous.",
            metavar="ORDER",
            rich_help_panel=_CHANGE,
            show_default="channels-last",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="key=value: change a setting of the recipe, such as rank=8.", rich_help_panel=_CHANGE
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The file to write.", rich_help_panel=o.RESULT, show_default="<stem>.asym.pt"
        ),
    ] = None,
    force: o.Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan, measure and report, but write no model.", rich_help_panel=o.RESULT)
    ] = False,
    write_plan: Annotated[
        Path | None, typer.Option(help="Write the plan to this JSON file.", rich_help_panel=o.RESULT)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the report to this .html, .json or .md file.", rich_help_panel=o.RESULT)
    ] = None,
    allow_drift: Annotated[
        bool,
        typer.Option(
            "--allow-drift",
            help="Write the model even where a kind has not preserved what it promises to.",
            rich_help_panel=o.RESULT,
        ),
    ] = False,
    evaluate: Annotated[
        str | None,
        typer.Option(help=f"Measure accuracy on {o.DATA_FORMS}", rich_help_panel=o.RESULT),
    ] = None,
    calibration: Any = None,
    seed: Annotated[int, typer.Option(help="Seed of the images' choice and of the probe batch.")] = 0,
    weights: o.Weights = None,
    arch: o.Arch = None,
    key: o.Key = None,
    arguments: o.Arguments = None,
    input_size: o.InputSize = None,
    preprocessing: Any = None,
    trust_pickle: o.TrustPickle = False,
    trust_code: o.TrustCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Turn convs of a model into asymmetric ones, initialised from its weights, and report what changed.

    Example: asymswap convert model.pt --arch resnet18 --recipe 3x3-only
    """
    from asymswap.cli import screen
    from asymswap.errors import AsymswapError, OutputError
    from asymswap.reporting.convert import check_suffix
    from asymswap.utils.distributed import joined
    from asymswap.utils.files import check_distinct, check_output, write_text

    target = output or o.default_output(model)
    if recipe is not None and plan is not None:
        raise AsymswapError("give either --recipe or --plan, not both")
    if recipe is None and plan is None:
        raise AsymswapError("give --recipe or --plan; `asymswap recipes` lists the recipes that come with asymswap")
    if not dry_run:
        check_output(target, force)
    for option, path in (("--report", report), ("--write-plan", write_plan)):
        if path is not None:
            check_output(path, force, option)
    if report is not None:
        check_suffix(report)
    written = {"-o": None if dry_run else target, "--report": report, "--write-plan": write_plan}
    check_distinct({"the model": o.model_file(model), **written, "--calibration-cache": calibration["cache"]})
    budgets = {"macs": macs, "params": params, "latency": latency, "max_error": max_error}
    given = {f"budget.{name}": value for name, value in budgets.items() if value is not None}
    if len(given) > 1:
        raise AsymswapError("a budget is one of --macs, --params, --latency and --max-error; give one of them")
    overrides = o.parse_pairs("--set", settings) | given
    if plan is not None and overrides:
        raise AsymswapError("a plan is settled: --set and budgets go with --recipe; edit the plan instead")

    with joined() as team, screen.progress(quiet or not team.leads) as step:
        import asymswap
        from asymswap.checkpoint import check_suffix

        if not dry_run:
            check_suffix(target)
        # Mistakes in what is small are told before a large model is read.
        o.check_recipe(recipe, overrides)
        replayed = None if plan is None else _read_plan(plan)
        conversion = asymswap.convert(
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
            plan=replayed,
            overrides=overrides,
            calibration=calibration_of(calibration, seed, team),
            evaluate=evaluate,
            timing=None if memory_format is None else asymswap.Timing(memory_format.value),
            allow_drift=allow_drift,
            seed=seed,
            progress=step,
        )
        conversion.header = _with_command(conversion.header)
        if not dry_run and team.leads:
            step("writing", 0, 1)
            asymswap.save(conversion, target, force=force)
    if not team.leads:
        return
    result = conversion.report
    from asymswap.api.report_files import write_report

    try:
        if write_plan is not None:
            from asymswap.planning.plan import plan_text

            write_text(write_plan, plan_text(conversion.plan))
        if report is not None:
            write_report(conversion, report, force=force)
    except OutputError as error:
        raise error if dry_run else OutputError(f"{error}; but the model was written to {target}") from None
    _print(result, json, quiet)


def _with_command(header: Any) -> Any:
    """The header, telling by which command line the checkpoint came to be."""
    provenance = {**header.provenance, "command": repeatable(sys.argv)}
    return replace(header, provenance=provenance)


def _read_plan(path: Path) -> Any:
    from asymswap.errors import PlanError
    from asymswap.planning.plan import plan_from_json

    try:
        return plan_from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plan {path}: {getattr(error, 'strerror', None) or error}") from None


def _print(result: Any, json: bool, quiet: bool) -> None:
    from asymswap.cli import screen
    from asymswap.reporting.convert import report_view
    from asymswap.results.records import to_json

    if json:
        screen.print_json(to_json(result))
    elif not quiet:
        console = screen.console()
        screen.show(report_view(result, console.width), console)
