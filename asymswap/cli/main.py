"""The command `asymswap`: its subcommands, and how an error becomes one line and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from asymswap.cli import candidates, convert, recipes, show

app = typer.Typer(
    name="asymswap",
    help="Surgery on trained CNNs: Conv2d layers become asymmetric convolutions initialised from their own weights.",
    epilog="Try: asymswap convert digits-resnet --recipe 3x3-only --evaluate digits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert.convert)
app.command()(candidates.candidates)
app.command()(recipes.recipes)
app.command()(show.show)


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


def main() -> NoReturn:
    """Run the command line: exit code 0 when done, 1 for what cannot be done, 2 for wrong usage, 130 for Ctrl-C."""
    debug = "--debug" in sys.argv
    try:
        app(standalone_mode=True)
    except SystemExit as stop:
        sys.exit(stop.code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone: nothing is wrong.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        _fail(_line(error), 1)
    raise AssertionError("unreachable")


def _line(error: Exception) -> str:
    from asymswap.errors import AsymswapError

    text = " ".join(str(error).split())
    if isinstance(error, AsymswapError):
        return text
    if isinstance(error, MemoryError):
        return "not enough memory; use a smaller model or --input"
    return f"unexpected {type(error).__name__}: {text[:300]}; this is a bug: run it again with --debug and report it"


def _fail(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {text}\n")
    sys.exit(code)
