"""The user's own data, inputs, metric and loss: functions of a Python file, which is run because the user names it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from asymswap.errors import SourceError, near_names, reason_of
from asymswap.models.factories import running

# The functions of a task file, and what they get.
FUNCTIONS = {"calibration": "", "inputs": "batch", "evaluate": "model", "training": "", "loss": "outputs, batch"}
_LOWER = "LOWER_IS_BETTER"


@dataclass(frozen=True)
class Task:
    """The functions of a task file, None for those that it lacks.

    - `calibration()`: an iterable of batches, without labels or with; `inputs(batch)`: the forward's arguments;
    - `evaluate(model)`: a number, or numbers by name; higher is better, except for names in `lower_is_better`;
    - `training()`: an iterable of batches; `loss(outputs, batch)`: a scalar tensor.
    """

    path: str = ""
    calibration: Callable[[], Any] | None = None
    inputs: Callable[[Any], Any] | None = None
    evaluate: Callable[[Any], Any] | None = None
    training: Callable[[], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    lower_is_better: Any = ()  # as a `Metric` takes it


def read_task(path: str | Path) -> Task:
    """Run a task file and return its functions; raise SourceError for none, or one that cannot be called or is near."""
    home = str(path)
    with running(home, home) as module:
        names = vars(module)
    for name, value in names.items():
        # What was imported, and what begins with _, is a helper.
        own = name.isupper() or (isinstance(value, FunctionType) and value.__module__ == module.__name__)
        lacking = [] if name.startswith("_") or not own else [one for one in (*FUNCTIONS, _LOWER) if one not in names]
        # So near are `train` and `training`, but not `my_loss` and `loss`.
        hint = "" if name in FUNCTIONS else near_names(name, lacking, cutoff=0.75)
        if hint:
            raise SourceError(f"{home} has {name!r}, which no command asks for{hint} A helper's name begins with _")
    found = {name: names[name] for name in FUNCTIONS if name in names}
    if not found:
        raise SourceError(f"{home} has none of the functions of a task: {', '.join(FUNCTIONS)}")
    for name, function in found.items():
        try:
            inspect.signature(function).bind(*FUNCTIONS[name].split())
        except TypeError as error:
            raise SourceError(f"{home}: {name} is called as {name}({FUNCTIONS[name]}): {reason_of(error)}") from None
        except ValueError:
            pass  # a builtin has no signature
    return Task(home, **found, lower_is_better=names.get(_LOWER, ()))
