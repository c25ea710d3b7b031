"""The user's own data, inputs, metric and loss: functions of a Python file, which is run because the user names it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from asymswap.errors import SourceError, near_names
from asymswap.models.factories import running

FUNCTIONS = {"calibration": 0, "inputs": 1, "evaluate": 1, "training": 0, "loss": 2}
"""The functions of a task file, with the number of their arguments."""

_LOWER = "LOWER_IS_BETTER"
_LEAST_LIKE = 0.75
"""How alike a misspelt name is: `train` and `training` are, `my_loss` and `loss` are not."""


@dataclass(frozen=True)
class Task:
    """The functions of a task file, None for those that it lacks.

    - `calibration()`: an iterable of batches, without labels or with; `inputs(batch)`: the forward's arguments;
    - `evaluate(model)`: a number, or numbers by name; higher is better, except for names in `lower_is_better`;
    - `training()`: an iterable of batches; `loss(outputs, batch)`: a scalar tensor.
    """

    path: str
    calibration: Callable[[], Any] | None = None
    inputs: Callable[[Any], Any] | None = None
    evaluate: Callable[[Any], Any] | None = None
    training: Callable[[], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    lower_is_better: tuple[str, ...] = ()


def read_task(path: str | Path) -> Task:
    """Run a task file and return its functions.

    Raises SourceError where the file cannot be run, has none of the functions, one that cannot be called as it is, or
    one whose name is close to theirs.
    """
    home = str(path)
    with running(home, home) as module:
        names = vars(module)
    found = {name: names[name] for name in FUNCTIONS if name in names}
    # Helpers have names of their own: what was imported, begins with _, or stands beside the function itself, is none.
    own = [
        name
        for name, value in names.items()
        if name.isupper() or (isinstance(value, FunctionType) and value.__module__ == module.__name__)
    ]
    lacking = [name for name in (*FUNCTIONS, _LOWER) if name not in names]
    for name in own:
        hint = near_names(name, lacking, _LEAST_LIKE)
        if name not in (*FUNCTIONS, _LOWER) and not name.startswith("_") and hint:
            raise SourceError(f"{home} has {name!r}, which no command asks for{hint} A helper's name begins with _")
    if not found:
        raise SourceError(f"{home} has none of the functions of a task: {', '.join(FUNCTIONS)}")
    for name, function in found.items():
        _check_callable(home, name, function)
    lower = names.get(_LOWER, ())
    lower = (lower,) if isinstance(lower, str) else lower
    if not isinstance(lower, list | tuple | set) or not all(isinstance(name, str) for name in lower):
        raise SourceError(f'{home}: {_LOWER} is {lower!r}; give names of your metric, such as ("loss",)')
    return Task(home, **found, lower_is_better=tuple(lower))


def _check_callable(home: str, name: str, function: object) -> None:
    given = {"inputs": "batch", "evaluate": "model", "loss": "outputs, batch"}.get(name, "")
    if not callable(function):
        raise SourceError(f"{home}: {name} is a {type(function).__name__}; write a function, def {name}({given})")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*[None] * FUNCTIONS[name])
    except TypeError as error:
        raise SourceError(f"{home}: {name}{signature} is called as {name}({given}): {error}") from None
