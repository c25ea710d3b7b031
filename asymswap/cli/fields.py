"""Command line options made from the fields of a dataclass, so that each is declared once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer


def options(config: type, given_only: bool = False) -> dict[str, inspect.Parameter]:
    """Return a parameter for Typer for each field that `asymswap.utils.options.option` made, by its name.

    With `given_only` every option is None where the user does not give it; the help still shows the field's default.
    """
    found = {}
    for field in dataclasses.fields(config):
        about = field.metadata
        if "help" not in about:
            continue
        kind: Any = str | None if about.get("text") else field.type
        default, shown = field.default, about.get("shown")
        if given_only:
            kind, default = kind | None, None
            if shown is None and field.default is not None:
                shown = f"{field.default:g}"
        flag = about.get("name", "--" + field.name.replace("_", "-"))
        if kind in (bool, bool | None) and default is not False:
            flag += f"/--no-{flag.removeprefix('--')}"
        made = typer.Option(
            flag,
            help=about["help"],
            metavar=about.get("metavar"),
            show_default=True if shown is None else shown,
            rich_help_panel=about["panel"],
        )
        found[field.name] = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made]
        )
    return found


def takes_fields(
    parameter: str, config: type, given_only: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a dataclass in place of one parameter, which gets their values by field name.

    A parameter of the command that is named like a field only says where the help shows that option.
    """

    def change(command: Callable[..., None]) -> Callable[..., None]:
        made = options(config, given_only)
        signature = inspect.signature(command, eval_str=True)
        block = [one for name, one in made.items() if name not in signature.parameters]
        parameters: list[inspect.Parameter] = []
        for name, own in signature.parameters.items():
            if name == parameter:
                parameters += block
            else:
                parameters.append(made.get(name, own))

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            placed = dict.fromkeys(made.keys() & signature.parameters.keys())
            fields = {name: values.pop(name) for name in made}
            command(**values, **placed, **{parameter: fields})

        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {one.name: one.annotation for one in parameters}
        return with_options

    return change
