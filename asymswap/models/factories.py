"""Models that the user's own code builds: the one place where code that does not come with asymswap is run.

| reference | what runs |
| --- | --- |
| `package.module:callable` | the module is imported, the working directory counting, and the callable called |
| `path/to/net.py:callable` | the file is run and the callable called, but only with `trust_code` |

A dotted name says by its form that code is imported, as with `python -m`: whoever writes it has asked for that. A path
looks like data. Python files come with downloaded weights, and nobody expects that naming one beside them runs it;
so that takes a word more.

A reference that stands in a file is never looked up here: only what the user names, now, is run.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PureWindowsPath
from types import ModuleType
from typing import Any

from torch import nn

from asymswap.errors import SourceError, near_names
from asymswap.fileformats.state_dict import State, compare
from asymswap.fileformats.torch_files import import_from_here
from asymswap.models.family import Arguments, Family, Fit
from asymswap.models.modules import describe_module
from asymswap.models.opened import OpenedModel
from asymswap.models.timm_models import PREFIX
from asymswap.types import Origin, Preprocessing
from asymswap.utils.tensors import deep_copy

_PREFIXES = ("cifar", "timm", "torchvision")

# What the origin of a whole module begins with: it is written into files, and names no module to import.
_ORIGINS = ("class", "skeleton")


@dataclass(frozen=True)
class _Code:
    """A reference taken apart: a module's name or a file's path, and what in it builds the model."""

    reference: str
    home: str
    attribute: str

    @property
    def is_file(self) -> bool:
        return _is_python_file(self.home)


def names_code(reference: str) -> bool:
    """Whether a reference names code that builds a model: `package.module:callable` or `path/to/net.py:callable`."""
    prefix, colon, _ = reference.partition(":")
    return names_python_file(reference) or (bool(colon) and prefix not in _PREFIXES + _ORIGINS)


def names_python_file(reference: str) -> bool:
    """Whether a reference names a Python file, with or without what in it builds the model."""
    return _parse(reference).is_file


def same_callable(one: str, other: str) -> bool:
    """Whether two references name the same callable, for all that can be seen: a file may have another path by now."""
    first, second = _parse(one), _parse(other)
    if not (first.is_file and second.is_file):
        return one == other
    # A checkpoint may come from a machine with the other sort of paths.
    names = [PureWindowsPath(code.home).name for code in (first, second)]
    return names[0] == names[1] and first.attribute == second.attribute


def how_built(reference: str) -> tuple[str, ...]:
    """What the report says of a model that a Python file has built; nothing for other references."""
    code = _parse(reference)
    return (f"built by running {code.home}, which --trust-code allowed",) if code.is_file else ()


class UserCode(Family):
    """`package.module:callable` and `path/to/net.py:callable`, whose code is run, for one model.

    What the code prints goes to stderr, for stdout is the report's.
    """

    private = False

    def __init__(self, trust_code: bool) -> None:
        self._trust_code = trust_code
        self._built: nn.Module | None = None

    def canonical(self, reference: str) -> str | None:
        """The reference itself, if it names code."""
        return reference if names_code(reference) else None

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        """Run the code and return the model that it builds; one that stands there ready is returned as it is.

        Raises SourceError where there is no such code, where it fails or returns something else, and for a Python file
        that is not trusted.
        """
        code = _parse(reference)
        with contextlib.redirect_stdout(sys.stderr):
            if not code.is_file:
                return _build(code, _import_module(code), arguments)
            path = _check_file(code, self._trust_code)
            with _importing_from(path.parent):
                return _build(code, _run_file(code, path), arguments)

    def weights(self, reference: str, name: str | None, arguments: Arguments) -> OpenedModel:
        """The model with the weights that the code gives it."""
        return self.describe(self.build(reference, arguments), reference, arguments, f"as {reference} made them")

    def preprocessing(self, reference: str, model: nn.Module, arguments: Arguments) -> Preprocessing:
        """What most networks of its class take."""
        return describe_module(model, "").preprocessing

    def describe(self, model: nn.Module, reference: str, arguments: Arguments, weights: str) -> OpenedModel:
        """The model as a module; what timm can build again needs the user's code no more."""
        opened = describe_module(model, weights)
        if not opened.origin.reference.startswith(PREFIX):
            opened = replace(opened, origin=Origin(reference, dict(arguments)))
        return replace(opened, notes=(*how_built(reference), *opened.notes))

    def fit(self, reference: str, arguments: Arguments, state: State) -> Fit:
        """How the state dict differs from the model, which is built once."""
        return Fit(dict(arguments), state, compare(self.build_unset(reference, arguments), state))

    def build_unset(self, reference: str, arguments: Arguments) -> nn.Module:
        """The model with the weights that the code gives it."""
        if self._built is None:
            self._built = self.build(reference, arguments)
        return self._built


class Given(UserCode):
    """A module that the user gives for its architecture; it is copied."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(trust_code=False)
        self._module = module

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        """A copy of the module."""
        return deep_copy(self._module)

    def describe(self, model: nn.Module, reference: str, arguments: Arguments, weights: str) -> OpenedModel:
        """The module by itself: no reference builds it."""
        return describe_module(model, weights)


def _parse(reference: str) -> _Code:
    if _is_python_file(reference):
        # The only colon there may be is a drive letter's.
        return _Code(reference, reference, "")
    home, _, attribute = reference.rpartition(":")
    return _Code(reference, home, attribute)


def _is_python_file(text: str) -> bool:
    return PurePath(text).suffix.lower() == ".py"


def _check_file(code: _Code, trust_code: bool) -> Path:
    """The file to run; raises SourceError where there is none, nothing in it is named, or it is not trusted."""
    path = Path(code.home)
    if not path.is_file():
        what = "is a folder, not a Python file" if path.is_dir() else "does not exist"
        raise SourceError(f"{code.home} of {code.reference!r} {what}; give PATH.py:NAME")
    if not code.attribute:
        names = _defined_in(path)
        known = f"; it defines {', '.join(names[:6])}" if names else ""
        raise SourceError(
            f"{code.home} is Python code: say what in it builds the model, "
            f"as {code.home}:{(names or ['NAME'])[0]}{known}"
        )
    if not trust_code:
        raise SourceError(
            f"{code.reference} is built by running {code.home}, which can then do whatever you can do on this machine; "
            f"read it, and if you trust it say --trust-code (trust_code=True in Python)"
        )
    return path.resolve()


def _defined_in(path: Path) -> list[str]:
    """Public classes and functions of a Python file, read without running it; classes first."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [name for name in classes + functions if not name.startswith("_")]


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let modules beside a file be imported, as when Python runs it; afterwards only where nothing else is found."""
    entry = str(folder)
    known = entry in sys.path
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)
        if not known:
            sys.path.append(entry)


def _run_file(code: _Code, path: Path) -> ModuleType:
    # With its dot the name can't stand in the way of any module's. The file is not imported: that would write its
    # compiled form beside it, and could take an old one for it.
    module = ModuleType(path.name)
    module.__file__ = str(path)
    module.__package__ = ""
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        if isinstance(error, ImportError) and "relative import" in str(error):
            raise SourceError(
                f"{code.home} imports from the package that it belongs to: name it as a module, "
                f"{path.parent.name}.{path.stem}:{code.attribute}, in the folder above"
            ) from None
        raise SourceError(f"cannot run {code.home} of {code.reference!r}: {_told(error)}") from error
    return module


def _import_module(code: _Code) -> ModuleType:
    import_from_here()
    try:
        return importlib.import_module(code.home)
    except (Exception, SystemExit) as error:
        cannot = f"cannot import {code.home!r} of {code.reference!r}"
        if isinstance(error, ModuleNotFoundError) and f"{code.home}.".startswith(f"{error.name}."):
            hint = near_names(code.home, _PREFIXES)
            raise SourceError(f"{cannot}: no module named {error.name!r}{hint}") from None
        raise SourceError(f"{cannot}: {_told(error)}") from error


def _build(code: _Code, module: ModuleType, arguments: Mapping[str, Any]) -> nn.Module:
    """What the callable that a reference names builds; `Class.method` is looked up part by part."""
    try:
        factory = functools.reduce(getattr, code.attribute.split("."), module)
    except AttributeError:
        factory = None
    if not callable(factory):
        hint = near_names(code.attribute, [key for key, value in vars(module).items() if callable(value)])
        raise SourceError(f"{code.home} has no callable {code.attribute!r}{hint}")
    if isinstance(factory, nn.Module):
        if arguments:
            raise SourceError(f"{code.reference} is a module already, so --arg {next(iter(arguments))} changes nothing")
        return factory
    _check_arguments(code, factory, arguments)
    try:
        model = factory(**arguments)
    except (Exception, SystemExit) as error:
        raise SourceError(f"{code.reference} failed: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{code.reference} returned a {type(model).__name__}, not an nn.Module")
    return model


def _check_arguments(code: _Code, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raise SourceError where the arguments are not what a callable takes, as far as it tells what that is."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = {
            p.name: p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        missing = [name for name, p in takes.items() if p.default is p.empty and name not in arguments]
        unknown = [name for name in arguments if name not in takes]
        if unknown:
            hint = near_names(unknown[0], takes) or f"; it takes {', '.join(takes) or 'none'}"
        else:
            hint = f"; give {' '.join(f'--arg {name}=…' for name in missing)}" if missing else ""
        raise SourceError(f"{code.reference} cannot be called with {dict(arguments)}: {error}{hint}") from None


def _told(error: BaseException) -> str:
    """What the user's own code raised, for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} (--debug shows where)"
