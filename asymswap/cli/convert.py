"""`asymswap convert`: the main job."""

import shlex
import sys
import time as time_module
from dataclasses import replace
from pathlib import Path
from typing import Any

import asymswap
from asymswap.cli import STARTED
from asymswap.cli import options as o
from asymswap.cli.failures import in_flags
from asymswap.errors import OutputError
from asymswap.utils.distributed import joined
from asymswap.utils.files import check_distinct, check_output, write_file
from asymswap.utils.options import option

_TIME = "Time"
_CHANGE = "What to do"
_OUTPUTS = ("-o", "--output", "--report", "--write-plan")
_JOINED = ("-o", "--output=", "--report=", "--write-plan=")
_NO_VALUE = ("--force", "--json", "--quiet", "-q", "--debug", "--dry-run")


def convert(
    model: o.Model,
    recipe: str | None = option(
        None, "Name of a shipped recipe, or a .toml file.", _CHANGE, autocompletion=o.complete_recipe
    ),
    plan: Path | None = option(None, "Replay a plan (JSON) instead of a recipe.", _CHANGE),
    macs: float | None = option(None, "Keep at most this fraction of the model's MACs.", _CHANGE),
    params: float | None = option(None, "Keep at most this fraction of its parameters.", _CHANGE),
    latency: str | None = option(
        None, "Keep at most this fraction of its latency on this machine, or a time: 0.6, 5ms.", _CHANGE
    ),
    max_drop: str | None = option(
        None, "Lose at most 0.5 (points), 0.1dB, or 2% of the outputs, when measured.", _CHANGE
    ),
    overrides: list[str] | None = option(
        None, "key=value: change a setting of the recipe, such as rank=8.", _CHANGE, flags=("--set",)
    ),
    output: Path | None = option(None, "The file to write.", o.RESULT, flags=o.OUTPUT, shown="<stem>.asym.pt"),
    force: bool = o.FORCE,
    dry_run: bool = option(False, "Plan, measure and report, but write no model.", o.RESULT),
    write_plan: Path | None = option(None, "Write the plan to this JSON file.", o.RESULT),
    report: Path | None = option(None, "Write the report to this .html, .json or .md file.", o.RESULT),
    allow_drift: bool = option(
        False, "Write the model even if a kind has not preserved the function as promised.", o.RESULT
    ),
    evaluate: str | None = option(None, f"Measure before and after on {o.EVALUATION_FORMS}", o.RESULT),
    measured: Any = o.MEASURED,
    time: bool = option(False, "Time before and after in the installed runtimes, as --latency does.", _TIME),
    timing: Any = o.TIMING,
    calibration: Any = o.CALIBRATION,
    seed: int = option(0, "Seed for choosing images and for the probe batch."),
    common: o.Common = o.COMMON,
) -> None:
    """Example: asymswap convert model.pt --arch resnet18 --recipe 3x3-only"""
    target = output or o.default_output(model)
    written = {"-o": None if dry_run else target, "--report": report, "--write-plan": write_plan}
    for path in filter(None, written.values()):
        check_output(path, force)
    o.check_report(report, force)
    check_distinct({"the model": o.model_file(model), **written, "--calibration-cache": calibration.get("cache")})
    with joined() as team, common.bars(team.leads) as step:
        from asymswap.checkpoint import check_suffix

        if not dry_run:
            check_suffix(target)
        by, how = o.measured_by("--evaluate", evaluate, measured, common.task)
        loading = time_module.perf_counter() - STARTED
        conversion = asymswap.convert(
            common.model(model, step),
            recipe,
            plan=plan,
            macs=macs,
            params=params,
            latency=latency,
            max_drop=max_drop,
            overrides=o.parse_pairs("--set", overrides),
            calibration=o.calibration_of(calibration, seed, team, common.task),
            evaluate=by,
            time=time or None,
            timing=timing,
            allow_drift=allow_drift,
            seed=seed,
            progress=step,
            **how,
        )
        provenance = {**conversion.header.provenance, "command": repeatable(sys.argv[1:])}
        conversion.header = replace(conversion.header, provenance=provenance)
        seconds = {"start": round(loading, 3), **conversion.report.seconds}
        conversion.report = replace(conversion.report, seconds=seconds)
        if not dry_run and team.leads:
            step("writing", 0, 1)
            asymswap.save(conversion, target, force=force)
    if not team.leads:
        return
    conversion.report = in_flags(conversion.report)
    try:
        if write_plan is not None:
            from asymswap.planning.plan import plan_text

            write_file(write_plan, plan_text(conversion.plan))
        if report is not None:
            asymswap.write_report(conversion, report, force=force)
    except OutputError as error:
        raise error if dry_run else OutputError(f"{error}; but the model was written to {target}") from None
    common.show(conversion.report)


def repeatable(arguments: list[str]) -> str:
    """Return the command line without what only says where results go: runs that are else alike write equal files."""
    kept, words = ["asymswap"], iter(arguments)
    for word in words:
        if word in _OUTPUTS:
            next(words, None)
        elif word not in _NO_VALUE and not word.startswith(_JOINED):
            kept.append(word)
    return shlex.join(kept)
