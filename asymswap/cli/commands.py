"""The commands by name. Each is imported when it is called: the list of all of them needs no more than their lines."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from asymswap.cli.failures import begin, reporting_errors

SUMMARIES = {
    "convert": "Turn convs of a model into asymmetric ones, initialised from its weights, and report what changed.",
    "candidates": "List every Conv2d: what a separable pair would save there, or why it is no candidate.",
    "recipes": "List the recipes that come with asymswap, show one, or check a file.",
    "show": "Show what was done to a converted model, from which source, with which result.",
    "compare": "Compare models: parameters, MACs, size, latency, outputs, accuracy.",
    "sweep": "Convert a model to several budgets and draw accuracy over cost; "
    "interrupted, it goes on where it stopped.",
    "finetune": "Train a converted model and keep the best epoch's weights; the same command works under torchrun.",
    "evaluate": "Measure accuracy, per class too, and tell whether models really differ.",
    "fuse": "Turn acb and offset kinds back into ordinary convs that compute the same.",
    "export": "Write a converted model as ONNX, as torch.export's .pt2 or as a state dict, and run it beside PyTorch.",
    "benchmark": "Time models in PyTorch, torch.compile and ONNX Runtime, all in turn, and set time beside MACs.",
}
"""The files of this folder that are commands, each with a function of its name, and the first line of its docstring."""


def function(name: str) -> Callable[..., None]:
    """The function that is the command, from whose signature Typer makes its options."""
    found: Callable[..., None] = getattr(importlib.import_module(f"asymswap.cli.{name}"), name)
    return found


def command(name: str) -> Any:
    """The command as Typer makes it, with all of its options (of click's class, or of Typer's own copy of it)."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name)(reporting_errors(function(name)))
    return typer.main.get_command(alone)


class _Listed(TyperCommand):
    """Stands for a command in the list of all, and hands over to it when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        made = command(self.name)
        begin({parameter.name: parameter for parameter in made.params if parameter.param_type_name == "option"})
        return made.make_context(info_name, args, parent=parent, **extra)


class Commands(TyperGroup):
    """All commands."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        for name, summary in SUMMARIES.items():
            self.add_command(_Listed(name, help=summary))
