"""Options of commands: one line each, and groups that a command takes as one parameter."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

Command = Callable[..., None]


def opt(help: str, panel: str | None = None, *flags: str, shown: str | bool = True, **more: Any) -> Any:
    """Return Typer's option; `panel` is its group in the help, `shown` the default as the help shows it."""
    return typer.Option(*flags, help=help, rich_help_panel=panel, show_default=shown, **more)


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function by name, with their annotations evaluated."""
    return dict(inspect.signature(function, eval_str=True).parameters)


def options_of(
    config: type, given_only: bool = False, names: Mapping[str, str] | None = None
) -> dict[str, inspect.Parameter]:
    """Return a parameter for Typer for each field that `asymswap.utils.options.option` made, by its name.

    With `given_only` every option is None where the user does not give it; the help still shows the field's default.
    `names` are flags that differ from the field's name.
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
        flag = (names or {}).get(field.name, "--" + field.name.replace("_", "-"))
        if kind in (bool, bool | None) and default is not False:
            flag += f"/--no-{flag.removeprefix('--')}"
        shown = True if shown is None else shown
        made = opt(about["help"], about["panel"], flag, shown=shown, metavar=about.get("metavar"))
        found[field.name] = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made]
        )
    return found


def takes_fields(
    placeholder: str, config: type, given_only: bool = False, names: Mapping[str, str] | None = None
) -> Callable[[Command], Command]:
    """Give a command the options of a dataclass in place of one parameter, which gets their values by field name."""
    return takes(placeholder, options_of(config, given_only, names))


def takes(
    placeholder: str, made: Mapping[str, inspect.Parameter], build: Callable[[dict[str, Any]], Any] = dict
) -> Callable[[Command], Command]:
    """Give a command these options in place of one parameter, which gets what `build` makes of their values by name.

    A parameter of the command that is named like an option only says where the help shows that option.
    """

    def change(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        placed = dict.fromkeys(made.keys() & signature.parameters.keys())
        parameters: list[inspect.Parameter] = []
        for name, own in signature.parameters.items():
            if name == placeholder:
                parameters += [one for name, one in made.items() if name not in placed]
            else:
                parameters.append(made.get(name, own))
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            built = build({name: values.pop(name) for name in made})
            command(**values, **placed, **{placeholder: built})

        with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {one.name: one.annotation for one in parameters}
        return with_options

    return change
