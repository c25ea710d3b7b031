"""`asymswap recipes`: the recipes that come with asymswap, one of them, or a check of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from asymswap.cli import options as o
from asymswap.utils.options import option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from asymswap.planning.recipe import About


def recipes(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A name to show, or a .toml file to check.", show_default=False, autocompletion=o.complete_recipe
        ),
    ] = None,
    schema: bool = option(False, "Print the JSON Schema of recipes, for editors."),
    common: o.Common = o.PRINTING,
) -> None:
    """Example: asymswap recipes 3x3-only > mine.toml"""
    from asymswap.planning import recipe as r

    if schema:
        o.print_json(r.json_schema())
    elif recipe is not None:
        text, where = r.read_recipe_text(recipe)
        checked = r.parse_recipe(text, where)
        if common.json:
            o.print_json(checked.model_dump(mode="json", exclude_none=True))
        elif recipe in r.shipped_names():
            typer.echo(text, nl=False)
        elif not common.quiet:
            rules = f"{len(checked.rules)} rule" + ("s" if len(checked.rules) > 1 else "")
            budget = f", budget {checked.budget}" if checked.budget else ""
            typer.echo(f"{recipe} is a valid recipe: {rules}{budget}.")
    else:
        listed = {name: r.read_about(name) for name in r.shipped_names()}
        if common.json:
            o.print_json([{"name": name, **about.model_dump(mode="json")} for name, about in listed.items()])
        elif not common.quiet:
            o.console().print(_listing(listed), highlight=False, markup=False)


_FUNCTION = {"exactly": "kept", "approximately": "approximated", "nothing": "not kept"}


def _listing(recipes: Mapping[str, About]) -> RenderableType:
    """The recipes group by group, in columns that run through all groups."""
    from rich.console import Group
    from rich.text import Text

    from asymswap.planning.recipe import GROUPS
    from asymswap.reporting.tables import Column, Table

    name_width, function_width = max(map(len, recipes)), max(map(len, _FUNCTION.values()))

    def columns(name: str, function: str, summary: str) -> list[Column]:
        return [
            Column(name, lambda row: row[0].ljust(name_width), side="left"),
            Column(function, lambda row: _FUNCTION[row[1].preserves or "nothing"].ljust(function_width), side="left"),
            Column(summary, lambda row: row[1].summary, side="fold"),
        ]

    titles = columns("Recipe".ljust(name_width), "Function".ljust(function_width), "What it does")
    parts: list[RenderableType] = [Table(titles, []).terminal()]
    for group in GROUPS:
        rows = [(name, about) for name, about in recipes.items() if about.group == group]
        parts += [Text(f"\n{group}", style="bold"), Table(columns("", "", ""), rows).terminal()]
    note = "Function: whether the network, before it is trained again, computes what it did."
    return Group(*parts, Text(f"\n{note}", style="dim"))
