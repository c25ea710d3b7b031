"""The commands by name. Each is imported when it is called; listing them needs only `SUMMARIES`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from asymswap.cli.failures import begin, reporting_errors
from asymswap.cli.fields import with_options

SUMMARIES = {
    "convert": "Turn convs of a model into asymmetric ones, initialised from its weights, and report what changed.",
    "candidates": "List every Conv2d: what a pair of convs would save there, or why it is no candidate.",
    "recipes": "List the recipes that come with asymswap, show one, or check a file.",
    "show": "Show how a converted model was made, from which source, with which result.",
    "compare": "Compare models: parameters, MACs, size, latency, outputs, scores.",
    "sweep": "Convert a model to several budgets and plot scores over cost; an interrupted run resumes.",
    "finetune": "Train a converted model and keep the best epoch's weights; the same command works under torchrun.",
    "evaluate": "Measure models on data or by a metric; classifiers also per class, with tests of their differences.",
    "fuse": "Turn acb and offset kinds back into ordinary convs that compute the same.",
    "export": "Write a converted model as ONNX, torch.export's .pt2 or a state dict, and check it against PyTorch.",
    "benchmark": "Time models in turn in PyTorch, ONNX Runtime, OpenVINO or torch.compile, and compare time with MACs.",
    "task": "Print a commented Python file for --task: your own data, inputs, metric and loss.",
}
"""The files of this folder that are commands, and what each does; its docstring says more."""


def function(name: str) -> Callable[..., None]:
    """Return the function of a command, from whose signature Typer makes the options."""
    found = with_options(getattr(importlib.import_module(f"asymswap.cli.{name}"), name))
    found.__doc__ = f"{SUMMARIES[name]}\n\n{inspect.cleandoc(found.__doc__ or '')}"
    return found


def command(name: str) -> Any:
    """Return the command as Typer makes it, with all of its options."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name)(reporting_errors(function(name)))
    return typer.main.get_command(alone)


def begin_as(name: str) -> Any:
    """Return a command, whose options `in_flags` names from now on."""
    made = command(name)
    begin({parameter.name: parameter for parameter in made.params if parameter.param_type_name == "option"})
    return made


class _Listed(TyperCommand):
    """A command in the list of all, which is only made when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        return begin_as(self.name).make_context(info_name, args, parent=parent, **extra)


class Commands(TyperGroup):
    """All commands."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        for name, summary in SUMMARIES.items():
            self.add_command(_Listed(name, help=summary))
