"""The commands by name, imported when they are called, and their options for Typer, made of what `option` declares."""

import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from asymswap.cli import failures

Command = Callable[..., None]

SUMMARIES = {
    "convert": "Turn convs of a model into asymmetric ones, initialised from its weights, and report what changed.",
    "candidates": "List every Conv2d: what a pair of convs would save there, or why it is no candidate.",
    "recipes": "List the recipes that come with asymswap, show one, or check a file.",
    "show": "Show how a converted model was made, from which source, with which result.",
    "compare": "Compare models: parameters, MACs, size, latency, outputs, scores.",
    "sweep": "Convert a model to several budgets and plot scores over cost; an interrupted run resumes.",
    "finetune": "Train a converted model and keep the best epoch's weights; the same command works under torchrun.",
    "evaluate": "Measure models on data or by a metric; classifiers also per class, with tests of their differences.",
    "fuse": "Turn branches and offset kinds back into ordinary convs that compute the same.",
    "export": "Write a converted model as ONNX, torch.export's .pt2 or a state dict, and check it against PyTorch.",
    "benchmark": "Time models in turn in PyTorch, ONNX Runtime, OpenVINO or torch.compile, and compare time with MACs.",
    "doctor": "Print versions, devices, runtimes and folders, for a report of a fault.",
    "task": "Print a commented Python file for --task: your own data, inputs, metric and loss.",
}
"""The files of this folder that are commands, and what each does; its docstring says more."""

_MAIN = {
    "convert": "recipe macs max_drop latency data polish_steps evaluate task_file output report arch input_size",
    "sweep": "recipe macs data evaluate task_file output report arch weights input_size",
    "finetune": "data epochs lr distill train task_file output resume",
    "compare": "data against_original task_file report arch weights input_size",
    "evaluate": "data metric against_original task_file arch weights input_size",
    "benchmark": "runtimes batches threads arch weights input_size",
}
"""The options that most need, of the commands that have many; --help-all shows the others too."""
EVERYWHERE = "In all commands"
"""The panel of the help that comes last."""


def function(name: str) -> Command:
    """Return the function of a command, from whose signature Typer makes the options."""
    found = with_options(getattr(importlib.import_module(f"asymswap.cli.{name}"), name))
    found.__doc__ = f"{SUMMARIES[name]}\n\n{inspect.cleandoc(found.__doc__ or '')}"
    return found


def command(name: str) -> Any:
    """Return the command as Typer makes it, with all of its options."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name, cls=_Command)(failures.reporting_errors(function(name)))
    return typer.main.get_command(alone)


def begin_as(name: str) -> Any:
    """Return a command, whose options `in_flags` names from now on."""
    made = command(name)
    failures.options = {one.name: one for one in made.params if one.param_type_name == "option"}
    return made


class _Command(TyperCommand):
    """A command whose help shows the options that most need, and what all commands have last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        main = {*_MAIN.get(self.name or "", "").split(), "json", "quiet", "force", "help"}
        whole = len(main) == 4 or "--help-all" in args
        if not whole and {"-h", "--help"} & {*args}:
            for one in self.params:
                one.hidden = one.param_type_name == "option" and one.name not in main  # type: ignore[attr-defined]
            left = sum(one.hidden for one in self.params)  # type: ignore[attr-defined]
            self.epilog = f"{left} more options: asymswap {self.name} --help-all"
        return super().parse_args(ctx, ["--help" if one == "--help-all" else one for one in args])

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)
        for one in found:
            if one.name == "help":
                one.rich_help_panel, one.metavar = EVERYWHERE, ""
        return sorted(found, key=lambda one: getattr(one, "rich_help_panel", None) == EVERYWHERE)


class _Listed(TyperCommand):
    """A command in the list of all, which is only made when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        try:
            return begin_as(str(self.name)).make_context(info_name, args, parent=parent, **extra)
        except Exception as error:
            # Typer's own errors, which it keeps private: the options that hold the word, else the nearest.
            known: Any = error
            if hasattr(known, "possibilities") and known.ctx is not None:
                name, every = known.option_name, [one for param in known.ctx.command.params for one in param.opts]
                holding = [one for one in every if name.strip("-") in one.split("-") or one.startswith(name)]
                near = holding or difflib.get_close_matches(name, every, n=1)
                advice = f"did you mean {' or '.join(near)}?" if near else f"{self.name} --help-all lists all"
                known.message, known.possibilities = f"{known.message}; {advice}", None
            elif isinstance(error, typer.BadParameter):
                known.message = known.message.removeprefix("Value error, ")  # pydantic's words
            raise


class Commands(TyperGroup):
    """All commands."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        for name, summary in SUMMARIES.items():
            self.add_command(_Listed(name, help=summary))


@dataclass(frozen=True)
class Group:
    """The options that a dataclass declares; a command takes them as one parameter, whose default this is.

    The command gets what `build` makes of their values by name. `only` are the fields to take, `flags` those that are
    not the field's name. With `given_only` what the user does not give is left out; the help shows its default.
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
                found[one.name] = _parameter(one.name, hints[one.name], one, self.given_only, self.flags.get(one.name))
        return found


def _parameter(
    name: str, kind: Any, declared: dataclasses.Field[Any], given_only: bool = False, flag: str | None = None
) -> inspect.Parameter:
    about = dict(declared.metadata)
    help, panel, shown = about.pop("help"), about.pop("panel"), about.pop("shown", None)
    flags = about.pop("flags", None) or (flag or f"--{name.replace('_', '-')}",)
    kind, default = str | None if about.pop("text", False) else kind, declared.default
    if given_only:
        if shown is None and default is not None:
            shown = f"{default:g}"
        kind, default = kind | None, None
    if kind in (bool, bool | None) and default is not False:
        flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}",)
    if kind in (bool, bool | None):
        about.setdefault("metavar", "")
    made = typer.Option(
        *flags, help=help, rich_help_panel=panel, show_default=True if shown is None else shown, **about
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made])


def with_options(command: Command) -> Command:
    """Return a command with Typer's options in place of the parameters whose default is an `option` or a `Group`.

    One that is named like an option of a group only says where the help shows that option.
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
        importlib.import_module("asymswap.cli.early").check(values)  # only now: help needs nothing of it
        made = {}
        for name, group in groups.items():
            given = {one: values.pop(one) for one in group.parameters}
            known = {one: value for one, value in given.items() if value is not None or not group.given_only}
            made[name] = group.build(known)
        command(**values, **dict.fromkeys(grouped.keys() & own.keys()), **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return run
