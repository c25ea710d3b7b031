"""The command `asymswap` and its subcommands."""

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from asymswap import __version__
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
        typer.echo(f"asymswap {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    pass


def _measures_time(arguments: Sequence[str]) -> bool:
    """Return True if a command measures time: always, by an option or a setting, or by the budget of a recipe file."""
    texts = list(arguments)
    for argument in arguments:
        # The command reports what cannot be read.
        with contextlib.suppress(OSError, ValueError):
            if argument.endswith(".toml"):
                texts.append(Path(argument.removeprefix("--recipe=")).read_text(encoding="utf-8"))
    timed = any(re.search(r"^--(latency|time)|\blatency\s*=", text) for text in texts)
    return timed or arguments[:1] in (["compare"], ["benchmark"])


def fill_in(arguments: list[str]) -> list[str]:
    """Return the arguments with the value `original` for a --distill whose value was left out."""
    result = []
    for argument, following in itertools.pairwise([*arguments, "-"]):
        result.append(argument)
        if argument == "--distill" and following.startswith("-"):
            result.append("original")
    return result


def main() -> None:
    """Run the command line: exit code 0 when done, 1 for what cannot be done, 2 for wrong usage, 130 for Ctrl-C."""
    # Otherwise torch's threads busy-wait: if another program keeps one core busy, converting a ResNet-50 takes twice
    # as long, a DenseNet-121 thirty times. Latency is measured with busy-waiting, as networks run: small layers are
    # then twice as fast.
    if not _measures_time(sys.argv[1:]):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("NO_COLOR"):
        # Typer's help would keep bold and dim.
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    for stream in (sys.stdout, sys.stderr):
        # What the terminal's encoding lacks becomes a question mark; it must not end the command.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    sys.argv[1:] = fill_in(sys.argv[1:])
    try:
        app()
    except SystemExit as done:
        if in_team():
            end_process(done.code)
        raise
