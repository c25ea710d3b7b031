"""`asymswap recipes`: the recipes that come with asymswap, one of them, or a check of one's own."""

from typing import Annotated, Any

import typer
from rich.text import Text

from asymswap.cli import options as o
from asymswap.planning import shipped
from asymswap.reporting.tables import Screen, facts
from asymswap.utils.options import option

_FUNCTION = {"exactly": "kept", "approximately": "approximated", "nothing": "not kept"}
_RECIPE = typer.Argument(
    help="A name to show, or a .toml file to check.", show_default=False, autocompletion=o.complete_recipe
)


def recipes(
    recipe: Annotated[str | None, _RECIPE] = None,
    schema: bool = option(False, "Print the JSON Schema of recipes, for editors."),
    common: o.Common = o.PRINTING,
) -> None:
    """Example: asymswap recipes 3x3-only > mine.toml"""
    from asymswap.planning import recipe as r

    if schema:
        o.print_json(r.json_schema())
    elif recipe is not None:
        text, where = shipped.read_recipe_text(recipe)
        checked = r.parse_recipe(text, where)
        if common.json:
            o.print_json(checked.model_dump(mode="json", exclude_none=True))
        elif recipe in shipped.shipped_names():
            typer.echo(text, nl=False)
        elif not common.quiet:
            rules = f"{len(checked.rules)} rule" + ("s" if len(checked.rules) > 1 else "")
            budget = f", budget {checked.budget}" if checked.budget else ""
            typer.echo(f"{recipe} is a valid recipe: {rules}{budget}.")
    else:
        listed = {name: r.read_about(name) for name in shipped.shipped_names()}
        if common.json:
            o.print_json([{"name": name, **about.model_dump(mode="json")} for name, about in listed.items()])
        elif not common.quiet:
            # Of the same widths in all groups.
            form = f"{{:<{max(map(len, listed))}}}  {{:<{max(map(len, _FUNCTION.values()))}}}".format
            blocks: list[list[Any]] = [[Text(form("Recipe", "Function") + "  What it does", "bold")]]
            for group in r.GROUPS:
                of = [(name, about) for name, about in listed.items() if about.group == group]
                rows = [(form(name, _FUNCTION[about.preserves or "nothing"]), about.summary) for name, about in of]
                blocks.append([Text(group, "bold"), facts(rows)])
            note = "Function: whether the network, before it is trained again, computes what it did."
            o.console().print(Screen("", (), blocks, [note]), highlight=False, markup=False)
