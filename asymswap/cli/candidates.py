"""`asymswap candidates`: what could be gained, before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asymswap.cli import options as o

if TYPE_CHECKING:
    from asymswap.api import Candidates


def candidates(
    model: o.Model,
    recipe: Annotated[
        str | None, typer.Option(help="Candidates are what this recipe would swap.", autocompletion=o.complete_recipe)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw each conv's share of MACs and parameters (.svg).", rich_help_panel=o.RESULT),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(
            help="Draw the graph around the candidates (.svg, by graphviz; or .dot).", rich_help_panel=o.RESULT
        ),
    ] = None,
    force: o.Force = False,
    weights: o.Weights = None,
    arch: o.Arch = None,
    key: o.Key = None,
    arguments: o.Arguments = None,
    input_size: o.InputSize = None,
    trust_pickle: o.TrustPickle = False,
    trust_code: o.TrustCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """List every Conv2d: what a separable pair would save there, or why it is no candidate.

    Example: asymswap candidates resnet18 --weights none
    """
    from asymswap.cli import screen

    _check_pictures(plot, graph, force)
    with screen.progress(quiet) as step:
        from asymswap import api
        from asymswap.reporting import terminal
        from asymswap.reporting.candidates import to_json

        found = api.candidates(
            model,
            recipe=recipe,
            weights=weights,
            arch=arch,
            key=key,
            arguments=o.parse_pairs("--arg", arguments),
            trust_pickle=trust_pickle,
            trust_code=trust_code,
            input_size=o.parse_input_size(input_size),
            with_flow=graph is not None,
            progress=step,
        )
    _write_pictures(found, plot, graph)
    if json:
        about = (found.reference, found.rows, found.total, found.traced_by, found.input, found.notes, found.warnings)
        screen.print_json(to_json(*about))
        return
    if quiet:
        return
    console = screen.console()
    view = terminal.candidates_view(
        found.reference,
        found.rows,
        found.total,
        found.held,
        found.traced_by,
        found.input,
        console.width,
        found.notes,
        found.warnings,
    )
    screen.show(view, console)


def _check_pictures(plot: Path | None, graph: Path | None, force: bool) -> None:
    """Refuse what cannot be drawn or written, before any work is done."""
    from asymswap.output import check_distinct, check_output
    from asymswap.reporting.candidates import check_plot_file
    from asymswap.reporting.graph import check_graph_file

    check_distinct({"--plot": plot, "--graph": graph})
    for option, path, check in (("--plot", plot, check_plot_file), ("--graph", graph, check_graph_file)):
        if path is not None:
            check_output(path, force, option)
            check(path)


def _write_pictures(found: Candidates, plot: Path | None, graph: Path | None) -> None:
    from asymswap.output import write_text
    from asymswap.reporting.candidates import to_picture
    from asymswap.reporting.graph import graph_text

    # Both are drawn before either is written, so that a failure leaves nothing behind.
    texts = {}
    if graph is not None and found.flow is not None:
        texts[graph] = graph_text(graph, found.flow, found.rows, found.total)
    if plot is not None:
        texts[plot] = to_picture(found.reference, found.rows, found.total)
    for path, text in texts.items():
        write_text(path, text)
