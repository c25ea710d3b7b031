"""Modules of the user's own: given ones, and those that code builds which does not come with asymswap.

Such code is run here alone: `package.module:callable` is imported, as `python -m` does, the file of
`path/to/net.py:callable` is run. What the user names, now, is run, which is the consent; never what a file names.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath, PureWindowsPath
from types import ModuleType
from typing import Any

from torch import nn

from asymswap.errors import SourceError, near_names
from asymswap.fileformats.state_dict import State, compare
from asymswap.fileformats.torch_files import import_from_here, to_structure
from asymswap.models import timm_models, ultralytics_models
from asymswap.models.family import Arguments, Family, Fit, input_channels, near_keyword
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import with_channels
from asymswap.models.torchvision_models import assumed_preprocessing
from asymswap.types import Origin
from asymswap.utils.tensors import deep_copy

_PREFIXES = ("cifar", "timm", "torchvision", "transformers", "ultralytics")


def _parse(reference: str) -> tuple[str, str]:
    """Split a reference into a module's name or a file's path, and what in it builds the model."""
    whole = PurePath(reference).suffix.lower() == ".py"  # the only colon there may be is a drive letter's
    home, _, attribute = (reference, "", "") if whole else reference.rpartition(":")
    return home, attribute


def names_python_file(reference: str) -> bool:
    """True for a reference to a Python file, with or without what in it builds the model."""
    return PurePath(_parse(reference)[0]).suffix.lower() == ".py"


def names_code(reference: str) -> bool:
    """True for a reference to code that builds a model: `package.module:callable` or `path/to/net.py:callable`."""
    prefix, colon, _ = reference.partition(":")
    # The origins of whole modules, as files hold them, begin with words that are no modules to import.
    return names_python_file(reference) or (bool(colon) and prefix not in (*_PREFIXES, "class", "skeleton"))


def same_callable(one: str, other: str) -> bool:
    """True where two references name the same callable, as far as one can see: a file may have moved."""
    if not (names_python_file(one) and names_python_file(other)):
        return one == other
    # A checkpoint may come from a machine with the other sort of paths.
    first, second = ((PureWindowsPath(home).name, attribute) for home, attribute in (_parse(one), _parse(other)))
    return first == second


def how_built(reference: str) -> tuple[str, ...]:
    """Say, for the report, that a Python file has built a model; nothing for other references."""
    return (f"built by running {_parse(reference)[0]}",) if names_python_file(reference) else ()


def how_to_build(origin: Origin) -> str:
    """Say how a model of this origin, which a file tells, is built again; nothing of it is run here."""
    named = re.fullmatch(r"class:(?!__main__\.)([\w.]+?)\.([A-Z]\w*(?:\.\w+)*|\w+)", origin.reference[:300])
    arch = ":".join(named.groups()) if named else origin.reference
    # What is no plain name is not offered for copying.
    if not names_code(arch) or not re.fullmatch(r"[\w./\\: @-]{1,150}:[\w.]+", arch):
        return "load it with asymswap.load(path, model=…) or give `arch=…`"
    given = ", ".join(f"{name}={value!r}" for name, value in origin.arguments.items())
    return f'load it with asymswap.load(path, model={_parse(arch)[1]}({given:.150})) or give `arch="{arch}"`'


def describe_module(model: nn.Module, weights: str) -> OpenedModel:
    """Describe a module that exists already: its structure is stored where the allowlist can read it back."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    # Mostly 224 x 224 and ImageNet's statistics, as most networks take; it says what of it is a guess.
    preprocessing = with_channels(assumed_preprocessing(model), input_channels(model))
    skeleton = to_structure(model)
    if skeleton is not None:
        return OpenedModel(model, Origin(f"skeleton:{name}"), preprocessing, weights, skeleton=skeleton)
    timm, ultralytics = timm_models.Timm(), ultralytics_models.Ultralytics()
    for family in (timm, ultralytics):
        origin = family.origin_of(model)
        if origin is not None:
            own = family.preprocessing(origin.reference, model, origin.arguments)
            return OpenedModel(model, origin, own, weights)
    if timm_models.made_by_timm(model) is not None:
        preprocessing = timm.preprocessing("", model, {})
    note = f"load the result with asymswap.load(path, model=…), for {name} is not made of allowlisted classes alone"
    return OpenedModel(model, Origin(f"class:{name}"), preprocessing, weights, (note,))


class UserCode(Family):
    """One model: of code that is run (`package.module:callable`, `path/net.py:callable`), or a copy of a given one."""

    private = False

    def __init__(self, given: nn.Module | None = None) -> None:
        self._given = given
        self._built: nn.Module | None = None

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        """Run the code and return the model that it builds, or the module that it names; raise SourceError."""
        if self._given is not None:
            return deep_copy(self._given)
        with found_callable(reference) as factory:
            if isinstance(factory, nn.Module):
                for name in arguments:
                    raise SourceError(f"{reference} is a module already, so the argument {name} changes nothing")
                return factory
            _check_signature(reference, factory, arguments)
            try:
                model = factory(**arguments)
            except (Exception, SystemExit) as error:
                raise SourceError(f"{reference} failed: {_raised(error)}{near_keyword(error, arguments)}") from error
        if not isinstance(model, nn.Module):
            raise SourceError(f"{reference} returned a {type(model).__name__}, not an nn.Module")
        return model

    def weights(self, reference: str, name: str | None, arguments: Arguments) -> OpenedModel:
        return self.describe(self.build(reference, arguments), reference, arguments, f"as {reference} made them")

    def describe(self, model: nn.Module, reference: str, arguments: Arguments, weights: str) -> OpenedModel:
        """Describe the model as a module; for what timm can build again, the user's code is not needed any more."""
        opened = describe_module(model, weights)
        if self._given is not None:
            return opened
        notes = opened.notes
        if not opened.origin.reference.startswith(timm_models.PREFIX):
            kept = {}
            for name, value in arguments.items():
                with contextlib.suppress(TypeError, ValueError):
                    json.dumps(value)
                    kept[name] = value
            lost = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if name not in kept)
            if lost:
                notes = (f"a file cannot hold the arguments {lost}: give them again with `arch=…`", *notes)
            opened = replace(opened, origin=Origin(reference, kept))
        return replace(opened, notes=(*how_built(reference), *notes))

    def fit(self, reference: str, arguments: Arguments, state: State) -> Fit:
        return Fit(dict(arguments), state, compare(self.build_unset(reference, arguments), state))

    def build_unset(self, reference: str, arguments: Arguments) -> nn.Module:
        if self._built is None:
            self._built = self.build(reference, arguments)
        return self._built


@contextlib.contextmanager
def found_callable(reference: str) -> Iterator[Callable[..., Any]]:
    """Run the code that a reference names and give the callable in it, to be called in the block; raise SourceError."""
    home, attribute = _parse(reference)
    with contextlib.ExitStack() as stack:
        if names_python_file(reference):
            if not attribute and Path(home).is_file():
                names = []  # of what a reference may name, by the text alone; classes first
                with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                    body = ast.parse(Path(home).read_bytes()).body
                    for kind in (ast.ClassDef, ast.FunctionDef):
                        names += [node.name for node in body if isinstance(node, kind) and node.name[0] != "_"]
                some = f"{names[0]}; it defines {', '.join(names[:6])}" if names else "NAME"
                raise SourceError(f"{home} is Python code: say what in it builds the model, as {home}:{some}")
            module = stack.enter_context(running(home, reference))
        else:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            import_from_here()
            try:
                module = importlib.import_module(home)
            except (Exception, SystemExit) as error:
                why = _raised(error)
                if isinstance(error, ModuleNotFoundError) and f"{home}.".startswith(f"{error.name}."):
                    why = f"no module named {error.name!r}{near_names(home, _PREFIXES)}"
                raise SourceError(f"cannot import {home!r} of {reference!r}: {why}") from error
        found = None
        with contextlib.suppress(AttributeError):
            found = functools.reduce(getattr, attribute.split("."), module)
        if not callable(found):
            hint = near_names(attribute, [key for key, value in vars(module).items() if callable(value)])
            raise SourceError(f"{home} has no callable {attribute!r}{hint}")
        yield found


@contextlib.contextmanager
def running(home: str, reference: str) -> Iterator[ModuleType]:
    """Run a Python file, which a reference names, and give its module, whose functions are called in the block.

    Modules beside the file are found; afterwards only where nothing else is. Prints go to stderr, off the report.
    """
    path, about = Path(home), home if home == reference else f"{home} of {reference!r}"
    if not path.is_file():
        what = "is a folder, not a Python file" if path.is_dir() else "does not exist"
        raise SourceError(f"{about} {what}; give PATH.py" + ":NAME" * (home != reference))
    path = path.resolve()
    # With its dot the name can't stand in the way of any module's. The file is not imported: that would write its
    # compiled form beside it, and could take an old one for it.
    module = ModuleType(path.name)
    module.__file__ = str(path)
    module.__package__ = ""
    sys.modules[module.__name__] = module
    folder, known = str(path.parent), str(path.parent) in sys.path
    sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            try:
                exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
            except (Exception, SystemExit) as error:
                del sys.modules[module.__name__]
                if isinstance(error, ImportError) and "relative import" in str(error) and home != reference:
                    name = f"{path.parent.name}.{path.stem}:{_parse(reference)[1]}"
                    what = f"name it as a module, {name}, in the folder above"
                    raise SourceError(f"{home} imports from the package that it belongs to: {what}") from None
                raise SourceError(f"cannot run {about}: {_raised(error)}") from error
            yield module
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        if not known:
            sys.path.append(folder)


def _check_signature(reference: str, factory: Callable[..., Any], arguments: Arguments) -> None:
    """Raise SourceError for arguments that a callable does not take, as far as its signature shows."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        kinds = {p.kind for p in signature.parameters.values()}
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        takes = {name: p for name, p in signature.parameters.items() if p.kind in named}
        missing = [name for name, p in takes.items() if p.default is p.empty and name not in arguments]
        unknown = [name for name in arguments if name not in takes and inspect.Parameter.VAR_KEYWORD not in kinds]
        hint = f"; give the arguments {', '.join(f'{name}=…' for name in missing)}" if missing else ""
        if unknown:
            hint = near_names(unknown[0], takes) or f"; it takes {', '.join(takes) or 'none'}"
        raise SourceError(f"{reference} cannot be called with {dict(arguments)}: {error}{hint}") from None


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} (`debug=True` shows where)"
