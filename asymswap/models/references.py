"""Model references: text that names a model, made into a module with weights; docs/guide/models.md lists the forms."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from asymswap.checkpoint import Stored, stored_in
from asymswap.errors import AsymswapError, SourceError, listed
from asymswap.fileformats import extra_state
from asymswap.fileformats.detect import exists, resolve
from asymswap.fileformats.model_file import files_of, fingerprint, read_raw, states_of_modules
from asymswap.fileformats.pickle_reader import MalformedError
from asymswap.fileformats.state_dict import Difference, Found, check_numbers, find_weights, load_state_
from asymswap.fileformats.torch_files import RawFile, from_structure, refusal
from asymswap.models import builders, timm_models, torchvision_models
from asymswap.models.builders import TWINS, YOUR_OWN, identify, nearest, views
from asymswap.models.factories import Given, UserCode, describe_module, names_code, names_python_file
from asymswap.models.family import Family
from asymswap.models.opened import OpenedModel
from asymswap.types import Origin, Progress, silent
from asymswap.utils.files import fail_if_modified

FILE_SUFFIXES = (
    ".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors", ".tar", ".pkl", ".pickle", ".pt2", ".torch", ".json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user said about the model beside its reference; see `open_model`."""

    arch: str | nn.Module | None = None
    weights: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trust_pickle: bool = False
    key: str | None = None


def is_file_reference(reference: str) -> bool:
    """True for a reference to a file: it exists and names no known network, or it looks like a path."""
    if builders.canonical(reference.partition("@")[0]) is not None or names_python_file(reference):
        return False
    return _is_file(reference) or "\\" in reference


def _is_file(text: str) -> bool:
    path = Path(text)
    return exists(path) or path.suffix in FILE_SUFFIXES or "/" in text


def open_reference(reference: str, request: Request) -> OpenedModel:
    """Return the model that a reference other than a file names, with weights; raise SourceError."""
    if request.arch is not None:
        raise SourceError(f"`arch=…` goes with a file, and {reference!r} names a network itself")
    if request.key is not None and not _is_file(str(request.weights)):
        raise SourceError(f'`key=…` goes with a file, and {reference!r} names a network; give `weights="FILE"` with it')
    name, weights = reference, request.weights
    if not names_python_file(reference):
        name, _, weights_name = reference.partition("@")
        if weights_name and weights:
            raise SourceError(f'{reference!r} names weights and `weights="{weights}"` others; give one of them')
        weights = weights_name or weights
    found = _find(name)
    if found is None:
        hint = _like(name) or "; known are torchvision's names, timm:…, cifar:…, digits-resnet, module:factory"
        raise SourceError(f"no model {reference!r}, and no such file{hint}")
    family, full = found
    own_code = isinstance(family, UserCode)
    if weights not in (None, "none") and (own_code or _is_file(str(weights))):
        return open_file(Path(str(weights)), replace(request, arch=full, weights=weights))
    if weights == "none" and not own_code:
        return family.describe(family.build(full, request.arguments), full, request.arguments, "random")
    return family.weights(full, weights, request.arguments)


def _find(reference: str) -> tuple[Family, str] | None:
    """Return the family of a reference and its full form; None where it names neither a known network nor code."""
    full = builders.canonical(reference)
    if full is not None:
        return builders.family_of(full), full
    return (UserCode(), reference) if names_code(reference) else None


def find_architecture(arch: str | nn.Module) -> tuple[Family, str]:
    """Return the family of an `arch` and its full form; raise SourceError where it names nothing known."""
    if isinstance(arch, nn.Module):
        return Given(arch), type(arch).__name__
    found = _find(arch)
    if found is None:
        hint = _like(arch) or "; try resnet18 or cifar:resnet20"
        raise SourceError(f'`arch="{arch}"` names no known architecture{hint}')
    return found


def _like(name: str) -> str:
    """Name, for a message, timm's model of that very name, or known references that come close to it."""
    architecture = name.partition(".")[0]
    # To a mistyped name timm, which takes seconds to load, has nothing to say unless it is there.
    if architecture and importlib.util.find_spec("timm") and timm_models.timm().is_model(architecture):
        return f"; timm has one: {timm_models.PREFIX}{name}"
    return builders.near(name)


def open_file(
    path: Path,
    request: Request,
    progress: Progress = silent,
    open_converted: Callable[[Path, Stored, Request], OpenedModel] | None = None,
) -> OpenedModel:
    """Read a file and return the model in it; `open_converted` is for asymswap checkpoints. Raises SourceError."""
    path = resolve(path)
    with fail_if_modified(*files_of(path)):
        raw = read_raw(path, request.trust_pickle)
        notes: tuple[str, ...] = ()
        if raw.executed:
            notes = (f"code in {path.name} was executed to read it (`trust_pickle=True`)",)
        elif request.trust_pickle:
            notes = (f"`trust_pickle=True` was not needed: nothing in {path.name} was executed",)
        try:
            stored = stored_in(raw, str(path)) if open_converted else None
            if stored and open_converted:
                opened = open_converted(path, stored, request)
            else:
                opened = open_loaded(path, raw, request, progress)
        except AsymswapError as error:
            if not raw.executed:
                raise
            # Code ran, whatever the result.
            raise SourceError(f"{error}; {notes[0]}") from error
    return replace(opened, notes=notes + opened.notes)


def weights_in(path: Path, raw: RawFile, key: str | None, arch_known: bool) -> Found:
    """Return the state dict or module in a file: the likeliest, or the one under `key`."""
    value, notes = raw.value, raw.notes
    if raw.unread:
        notes += (f"left unread, being outside of the allowlist: {listed(raw.unread, 3)}",)
        try:
            # Where the architecture is known, the state dict of a module that cannot be loaded will do.
            value, modules = states_of_modules(value) if arch_known else (value, ())
        except MalformedError as error:
            raise SourceError(f"{path} is cut off or damaged: {error}") from None
        notes += tuple(f"weights taken out of a {name}, whose code was not executed" for name in modules)
    try:
        found = find_weights(value, str(path), key)
    except SourceError as error:
        # Where nothing is there but what could not be loaded, the reason for that is the better message.
        raise (refusal(raw.unread, str(path)) if raw.unread else error) from None
    return replace(found, notes=notes + found.notes)


def open_loaded(path: Path, raw: RawFile, request: Request, progress: Progress) -> OpenedModel:
    """Return the model of a file that has been read: a module as it is, or a state dict put into its architecture."""
    found = weights_in(path, raw, request.key, arch_known=request.arch is not None)
    notes: tuple[str, ...] = (f"weights taken from {found.key!r} in {path.name}",) if found.key else ()
    notes += found.notes
    digest = fingerprint(path)
    if isinstance(found.value, nn.Module):
        if request.weights is not None:
            raise SourceError(f"{path} holds a whole module; give it as the model instead of as `weights=…`")
        try:
            check_numbers(found.value)
            opened = replace(describe_module(found.value, ""), private=not request.trust_pickle)
        except SourceError as error:
            raise SourceError(f"{path} cannot be used: {error}") from None
        except (AttributeError, TypeError) as error:
            # Unpickling sets attributes, and builds nothing: what the file lacks is missing from the module.
            raise SourceError(f"{path} is damaged: its {type(found.value).__name__} lacks parts ({error})") from error
        if request.arch is not None:
            arch = request.arch if isinstance(request.arch, str) else type(request.arch).__name__
            notes += (f'`arch="{arch}"` was not needed: {path.name} holds the whole module',)
    else:
        opened = _open_state(path, found, digest, request, progress)
    return replace(opened, notes=notes + opened.notes, file=path, sha256=digest, weights=f"file {path.name}")


def _open_state(path: Path, found: Found, digest: str, request: Request, progress: Progress) -> OpenedModel:
    """Load a state dict strictly into its network; class count and input channels follow the state."""
    assert not isinstance(found.value, nn.Module)
    state, arguments = found.value, request.arguments
    notes: tuple[str, ...] = ()
    published = torchvision_models.published(digest)
    if request.arch is not None:
        family, reference = find_architecture(request.arch)
    elif published is not None:
        family, reference = builders.family_of(published.reference), published.reference
    else:
        match, view = identify(state, str(path), progress)
        family, reference, state = builders.family_of(match.reference), match.reference, view.state
        note = (
            f"architecture taken from keys and shapes: {reference} (`arch=…` names another); a variant that "
            f"computes differently can have the same{TWINS.get(reference, '')}"
        )
        notes = (*view.notes(), note)
        # What the builder takes is left to the user, where they have said it.
        arguments = {**match.arguments, **arguments}
    if published is not None and published.reference == reference:
        arguments = {**published.arguments, **arguments}
    else:
        published = None
    most, closest = -1, Difference((), (), ())
    for view in views(state):
        fit = family.fit(reference, arguments, view.state)
        if not fit.difference:
            break
        alike = len(fit.state) - len(fit.difference.unexpected) - len(fit.difference.shapes)
        if alike > most:
            most, closest = alike, fit.difference
    else:
        likeness, best, _ = nearest(state, progress)
        hint = f"; nearest known architecture: {best} ({likeness:.0%} of keys and shapes)"
        if likeness == 0 or best == reference:
            hint = f"; give {YOUR_OWN}" if not isinstance(family, UserCode) else ""
        raise SourceError(f"{path} does not fit {reference}: {closest}{hint}")
    model = family.build_unset(reference, fit.arguments)
    # The user's own code may keep what it has built or read, and views of it.
    private = not isinstance(family, UserCode) and not request.trust_pickle
    own, extra = extra_state.owners(model), {key.removeprefix(view.prefix): v for key, v in found.extra.items()}
    try:
        load_state_(model, fit.state, take=private)
        extra_state.load_(model, {key: value for key, value in extra.items() if key in own})
    except SourceError as error:
        raise SourceError(f"{path} cannot be used: {error}") from None
    notes += view.notes()
    if extra.keys() - own.keys():
        left_out = ", ".join(key for key in extra if key not in own)
        notes += (f"extra state that no module takes was left out: {left_out}",)
    if own.keys() - extra.keys():
        lacking = ", ".join(key for key in own if key not in extra)
        notes += (f"extra state that the file lacks stays as it was built: {lacking}",)
    opened = family.describe(model, reference, fit.arguments, str(path))
    if published is not None:
        opened = torchvision_models.as_published(opened, published)
    return replace(opened, notes=notes + opened.notes, private=private)


def rebuild(origin: Origin, skeleton: bytes | None) -> nn.Module:
    """Build the unconverted model of an origin, with unset weights; raise SourceError if that takes the user's code."""
    if skeleton is not None:
        return from_structure(skeleton)
    full = builders.canonical(origin.reference)
    if full is None:
        raise SourceError(f"it was built by {origin.reference}, which is code of yours")
    return builders.family_of(full).build_unset(full, origin.arguments)
