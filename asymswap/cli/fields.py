"""Options of commands for Typer, made of what `asymswap.utils.options.option` declares: a line each, or in groups."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

import typer

Command = Callable[..., None]


@dataclass(frozen=True)
class Group:
    """The options that a dataclass declares; a command takes them as one parameter, whose default this is.

    The command gets what `build` makes of their values by name. `only` are the fields to take, `flags` those that
    differ from the field's name. With `given_only` every value is None where the user does not give it; the help still
    shows the field's default.
    """

    config: type
    build: Callable[[dict[str, Any]], Any] = dict
    given_only: bool = False
    flags: Mapping[str, str] = field(default_factory=dict)
    only: Collection[str] | None = None

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Typer's parameters by the names of the fields."""
        found, hints = {}, get_type_hints(self.config)
        for one in dataclasses.fields(self.config):
            if "help" in one.metadata and (self.only is None or one.name in self.only):
                flags = (self.flags[one.name],) if one.name in self.flags else ()
                found[one.name] = _parameter(one.name, hints[one.name], one, self.given_only, flags)
        return found


def _parameter(
    name: str, kind: Any, declared: dataclasses.Field[Any], given_only: bool = False, flags: tuple[str, ...] = ()
) -> inspect.Parameter:
    """Return a parameter for Typer of what `option` has declared."""
    about = dict(declared.metadata)
    help, panel, shown = about.pop("help"), about.pop("panel"), about.pop("shown", None)
    flags = about.pop("flags", flags) or (f"--{name.replace('_', '-')}",)
    kind, default = str | None if about.pop("text", False) else kind, declared.default
    if given_only:
        if shown is None and default is not None:
            shown = f"{default:g}"
        kind, default = kind | None, None
    if kind in (bool, bool | None) and default is not False:
        flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}",)
    made = typer.Option(
        *flags, help=help, rich_help_panel=panel, show_default=True if shown is None else shown, **about
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made])


def with_options(command: Command) -> Command:
    """Return a command with Typer's options in place of the parameters whose default is an `option` or a `Group`.

    A parameter that is named like an option of a group only says where the help shows that option.
    """
    own = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Group] = {name: one.default for name, one in own.items() if isinstance(one.default, Group)}
    grouped = {name: option for group in groups.values() for name, option in group.parameters.items()}
    parameters: list[inspect.Parameter] = []
    for name, one in own.items():
        if name in groups:
            parameters += [option for other, option in groups[name].parameters.items() if other not in own]
        elif name in grouped:
            parameters.append(grouped[name])
        elif isinstance(one.default, dataclasses.Field):
            parameters.append(_parameter(name, one.annotation, one.default))
        else:
            parameters.append(one.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {name: group.build({one: values.pop(one) for one in group.parameters}) for name, group in groups.items()}
        command(**values, **dict.fromkeys(grouped.keys() & own.keys()), **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return run
