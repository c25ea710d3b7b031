"""`asymswap recipes`: the recipes that come with asymswap, one of them, or a check of one's own."""

from __future__ import annotations

from typing import Annotated

import typer

from asymswap.cli import options as o


def recipes(
    recipe: Annotated[
        str | None, typer.Argument(help="A name to show, or a .toml file to check.", show_default=False)
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List the recipes that come with asymswap, show one, or check a file.

    Example: asymswap recipes 3x3-only > mine.toml
    """
    from asymswap.cli import screen
    from asymswap.planning import recipe as r
    from asymswap.reporting.terminal import table

    if schema:
        screen.print_json(r.json_schema())
    elif recipe is not None:
        text, where = r.read_recipe_text(recipe)
        checked = r.parse_recipe(text, where)
        if json:
            screen.print_json(checked.model_dump(mode="json", exclude_none=True))
        elif recipe in r.shipped_names():
            typer.echo(text, nl=False)
        else:
            rules = f"{len(checked.rules)} rule" + ("s" if len(checked.rules) > 1 else "")
            budget = f", budget {checked.budget}" if checked.budget else ""
            typer.echo(f"{recipe} is a valid recipe: {rules}{budget}.")
    else:
        listed = {name: r.parse_recipe(*r.read_recipe_text(name)).summary for name in r.shipped_names()}
        if json:
            screen.print_json([{"name": name, "summary": summary} for name, summary in listed.items()])
        else:
            console = screen.console()
            screen.show(table([("Recipe", "left"), ("What it does", "fold")], listed.items()), console)
