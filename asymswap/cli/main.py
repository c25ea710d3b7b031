"""The command `asymswap` and its subcommands."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import typer

from asymswap.cli import options
from asymswap.cli.commands import Commands
from asymswap.utils.distributed import end_process, in_team

app = typer.Typer(
    name="asymswap",
    cls=Commands,
    help="Surgery on trained CNNs: Conv2d layers become asymmetric convolutions initialised from their own weights.",
    epilog="Try: asymswap convert digits-resnet --recipe 3x3-only --evaluate digits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from asymswap import __version__

        typer.echo(f"asymswap {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    pass


def _budgets_latency(arguments: Sequence[str]) -> bool:
    """Return True if a command measures time: by an option, a setting, or a recipe file with a budget of latency."""
    import tomllib

    timed = ("--latency", "--time", "budget.latency", "--set=budget.latency")
    if any(argument.startswith(timed) for argument in arguments):
        return True
    recipes = [value for option, value in itertools.pairwise(arguments) if option == "--recipe"]
    recipes += [argument.removeprefix("--recipe=") for argument in arguments if argument.startswith("--recipe=")]
    for recipe in recipes:
        # A shipped recipe is no file here; the command reports what cannot be read.
        with contextlib.suppress(OSError, ValueError, RecursionError):
            budget = tomllib.loads(Path(recipe).read_text(encoding="utf-8")).get("budget")
            if isinstance(budget, dict) and "latency" in budget:
                return True
    return False


def main() -> NoReturn:
    """Run the command line: exit code 0 when done, 1 for what cannot be done, 2 for wrong usage, 130 for Ctrl-C."""
    # Otherwise torch's threads busy-wait: if another program keeps one core busy, converting a ResNet-50 takes twice
    # as long, a DenseNet-121 thirty times. Latency is measured with busy-waiting, as networks run: small layers are
    # then twice as fast.
    if sys.argv[1:2] not in (["compare"], ["benchmark"]) and not _budgets_latency(sys.argv[1:]):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("NO_COLOR"):
        # Typer's help would keep bold and dim.
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    for stream in (sys.stdout, sys.stderr):
        # What the terminal's encoding lacks becomes a question mark; it must not end the command.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    sys.argv[1:] = options.fill_in(sys.argv[1:])
    try:
        app()
    except SystemExit as done:
        if in_team():
            end_process(done.code)
        raise
    raise AssertionError("unreachable")
