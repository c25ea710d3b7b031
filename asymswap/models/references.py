"""Model references: text that names a model, and how it becomes a module with weights.

| reference | what |
| --- | --- |
| `resnet18`, `torchvision:resnet18`, `torchvision:resnet18@IMAGENET1K_V1` | a torchvision builder, and its weights |
| `cifar:resnet20` | a network of CIFAR size from `asymswap.models.networks` |
| `digits-resnet` | the trained network that ships with asymswap |
| `timm:resnet50`, `timm:resnet50@a1_in1k` | a model of timm, where that is installed, and its weights |
| `package.module:factory` | a callable of the user's own that returns a module; it is imported and called |
| `path/to/net.py:Net` | the same in a Python file, which is run; see asymswap.models.factories |
| a file | a state dict, a training checkpoint, a pickled module, an archive that holds weights, an index of shards |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from asymswap.errors import SourceError
from asymswap.fileformats import extra_state
from asymswap.fileformats.archives import states_of_modules
from asymswap.fileformats.detect import FileKind, exists, resolve, sha256, sniff
from asymswap.fileformats.model_file import RawFile, read_raw
from asymswap.fileformats.module_structure import from_structure, to_structure
from asymswap.fileformats.pickle_parts import MalformedError
from asymswap.fileformats.shards import files_of, fingerprint
from asymswap.fileformats.state_dict import Difference, Found, State, check_numbers, compare, find_weights, load_state_
from asymswap.models import builders, factories, networks, timm_models, torchvision_models
from asymswap.models.builders import DIGITS
from asymswap.models.identify import YOUR_OWN, identify, nearest
from asymswap.models.key_prefixes import View, views
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import with_channels
from asymswap.models.torchvision_models import Published
from asymswap.types import Origin, Preprocessing, Progress, silent
from asymswap.utils.tensors import deep_copy
from asymswap.utils.unchanged import unchanged

FILE_SUFFIXES = (
    ".pt",
    ".pth",
    ".th",
    ".ckpt",
    ".bin",
    ".safetensors",
    ".tar",
    ".pkl",
    ".pickle",
    ".pt2",
    ".torch",
    ".json",
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user said about the model beside its reference; see the options of the same names."""

    arch: str | nn.Module | None = None
    weights: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trust_pickle: bool = False
    key: str | None = None
    trust_code: bool = False


def is_file_reference(reference: str) -> bool:
    """Whether a reference means a file: it exists and names no known network, or it looks like a path."""
    if builders.canonical(reference.partition("@")[0]) is not None or factories.names_python_file(reference):
        return False
    path = Path(reference)
    return exists(path) or path.suffix in FILE_SUFFIXES or "/" in reference or "\\" in reference


def open_reference(reference: str, request: Request) -> OpenedModel:
    """The model that a reference other than a file names, with weights; raises SourceError where it cannot be had."""
    if request.arch is not None:
        raise SourceError(f"--arch goes with a file, and {reference!r} names a network itself")
    if request.key is not None and not _is_weights_file(str(request.weights)):
        raise SourceError(f"--key goes with a file, and {reference!r} names a network; give --weights FILE with it")
    if factories.names_python_file(reference):
        return _open_factory(reference, request)
    name, _, weights_name = reference.partition("@")
    if weights_name and request.weights:
        raise SourceError(f"{reference!r} names weights and --weights {request.weights} others; give one of them")
    request = replace(request, weights=weights_name or request.weights)
    full = builders.canonical(name)
    if full is not None:
        return _open_known(full, request)
    if factories.names_code(name):
        return _open_factory(name, request)
    hint = _like(name) or "; known are torchvision's names, timm:…, cifar:…, digits-resnet, module:factory"
    raise SourceError(f"no model {reference!r}, and no such file{hint}")


def about_trust(path: Path, raw: RawFile, request: Request) -> tuple[str, ...]:
    """What `--trust-pickle` came to, for the report; nothing where it was not said."""
    if not request.trust_pickle:
        return ()
    if raw.executed:
        return (f"code in {path.name} was executed to read it (--trust-pickle)",)
    return (f"--trust-pickle was not needed: nothing in {path.name} was executed",)


def weights_in(path: Path, raw: RawFile, request: Request, arch_known: bool = False) -> Found:
    """The state dict or module in what was read of a file: the likeliest, or that under `--key`.

    A module of a class that cannot be loaded is taken as its state dict where the architecture is known otherwise.
    """
    value, notes = raw.value, raw.notes
    if raw.refusal is not None:
        arch_known = arch_known or request.arch is not None
        try:
            value, modules = states_of_modules(value) if arch_known else (value, ())
        except MalformedError as error:
            raise SourceError(f"{path} is cut off or damaged: {error}") from None
        notes += tuple(f"weights taken out of a {name}, whose code was not executed" for name in modules)
    try:
        found = find_weights(value, str(path), request.key)
    except SourceError as error:
        # Where nothing is there but what could not be loaded, the reason for that is the better message.
        raise (raw.refusal or error) from None
    return replace(found, notes=notes + found.notes)


def open_loaded(path: Path, found: Found, request: Request, progress: Progress = silent) -> OpenedModel:
    """The model of a file that has been read: a module as it is, or a state dict put into its architecture."""
    notes: tuple[str, ...] = (f"weights taken from {found.key!r} in {path.name}",) if found.key else ()
    notes += found.notes
    if request.weights is not None:
        raise SourceError(f"--weights goes with a reference; {path} brings its own weights")
    digest = fingerprint_of(path)
    if isinstance(found.value, nn.Module):
        try:
            check_numbers(found.value)
            source = describe_module(found.value, f"file {path.name}")
        except SourceError as error:
            raise SourceError(f"{path} cannot be used: {error}") from None
        except (AttributeError, TypeError) as error:
            # Unpickling sets attributes, and builds nothing: what the file lacks is missing from the module.
            raise SourceError(f"{path} is damaged: its {type(found.value).__name__} lacks parts ({error})") from error
        if request.arch is not None:
            arch = request.arch if isinstance(request.arch, str) else type(request.arch).__name__
            notes += (f"--arch {arch} was not needed: {path.name} holds the whole module",)
        source = replace(source, private=not request.trust_pickle)
        return replace(source, notes=notes + source.notes, file=path, sha256=digest)
    published = torchvision_models.published(digest)
    if isinstance(request.arch, nn.Module):
        reference, state = type(request.arch).__name__, found.value
    elif request.arch is not None:
        reference, state = _architecture(request.arch), found.value
    elif published is not None:
        reference, state = f"torchvision:{published.model}", found.value
    else:
        identified = identify(found.value, str(path), progress)
        reference, state = identified.reference, identified.view.state
        notes += identified.notes()
        # What the builder takes is left to the user, where they have said it.
        request = replace(request, arguments={**identified.arguments, **request.arguments})
    source = _fill(reference, state, request, str(path), progress, published, found.extra)
    return replace(source, notes=notes + source.notes, file=path, sha256=digest, weights=f"file {path.name}")


def fingerprint_of(path: Path) -> str:
    """The SHA-256 of a file, or of all files that an index of shards names."""
    return fingerprint(path) if sniff(path) is FileKind.SHARDS else sha256(path)


def describe_module(model: nn.Module, weights: str) -> OpenedModel:
    """An OpenedModel for a module that exists already: its structure is stored where the allowlist can read it back."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    skeleton = to_structure(model)
    if skeleton is not None:
        return OpenedModel(model, Origin(f"skeleton:{name}"), _assumed_preprocessing(model), weights, (), skeleton)
    origin = builders.origin_of_timm(model)
    if origin is not None:
        return OpenedModel(model, origin, timm_models.preprocessing(model, origin.arguments), weights)
    note = f"load the result with asymswap.load(path, model=…), for {name} is not made of allowlisted classes alone"
    known = timm_models.made_by_timm(model) is not None
    preprocessing = timm_models.preprocessing(model, {}) if known else _assumed_preprocessing(model)
    return OpenedModel(model, Origin(f"class:{name}"), preprocessing, weights, (note,))


def rebuild(origin: Origin, skeleton: bytes | None) -> nn.Module:
    """The unconverted model of an origin, with unset weights, running no code but torch's, torchvision's and ours.

    Raises SourceError for an origin that only the user's own code can build.
    """
    if skeleton is not None:
        return from_structure(skeleton)
    full = builders.canonical(origin.reference)
    if full is None:
        raise SourceError(f"it was built by {origin.reference}, which is code of yours")
    return builders.build_unset(full, origin.arguments)


def build_architecture(reference: str, arguments: Mapping[str, Any], trust_code: bool = False) -> nn.Module:
    """The network that the user named by `--arch`, unfilled; code of theirs is run, a file only with `trust_code`."""
    full = _architecture(reference)
    if builders.canonical(full) is None:
        return factories.call_factory(full, arguments, trust_code)
    return builders.build(full, arguments)


def _open_known(full: str, request: Request) -> OpenedModel:
    if request.weights not in (None, "none") and _is_weights_file(str(request.weights)):
        return _fill_from_file(full, request)
    random = request.weights == "none"
    if full == DIGITS and not random:
        if request.weights not in (None, "DEFAULT") or request.arguments:
            raise SourceError(f"{DIGITS} has one set of weights; use --weights none to change its arguments")
        source = _fill(full, load_file(networks.DIGITS_WEIGHTS, backend="pread"), request, DIGITS, silent)
        known = replace(source.preprocessing, normalization_from="weights", size_from="weights")
        return replace(source, preprocessing=known, weights="shipped, trained on scikit-learn's digits")
    if full.startswith("torchvision:") and not random:
        name = full.removeprefix("torchvision:")
        model, arguments, weights = torchvision_models.build_pretrained(
            name, request.weights or "DEFAULT", request.arguments
        )
        # With weights, torchvision builds detectors and the like otherwise than without: store what it built.
        skeleton = None if name in torchvision_models.classifiers() else to_structure(model)
        preprocessing = torchvision_models.preprocessing(name, model, weights)
        return OpenedModel(model, Origin(full, arguments), preprocessing, weights, skeleton=skeleton, private=True)
    if full.startswith(timm_models.PREFIX):
        return _open_timm(full.removeprefix(timm_models.PREFIX), request)
    if not random:
        raise SourceError(f"{full} has no published weights; use --weights FILE, or --weights none for random ones")
    model = builders.build(full, request.arguments)
    origin = Origin(full, dict(request.arguments))
    return OpenedModel(model, origin, _preprocessing(full, model), "random", private=True)


def _open_timm(name: str, request: Request) -> OpenedModel:
    """A model of timm with published weights, or with `--weights none` with random ones."""
    architecture, tag = timm_models.split(name)
    remarks: tuple[str, ...] = ()
    if request.weights == "none":
        model, weights = timm_models.build(name, request.arguments), "random"
    else:
        named = None if request.weights in (None, "DEFAULT") else request.weights
        if tag is not None and named not in (None, tag):
            raise SourceError(f"timm:{name} names weights and --weights {named} others; give one of them")
        name = ".".join(filter(None, (architecture, named or tag)))
        model, weights, remarks = timm_models.build_pretrained(name, request.arguments)
    source = _timm_source(model, name, request.arguments, weights, remarks)
    if request.weights == "none" or source.preprocessing.normalization_from != "family":
        return source
    known = replace(source.preprocessing, normalization_from="weights", size_from="weights")
    return replace(source, preprocessing=known)


def _timm_source(
    model: nn.Module, name: str, arguments: Mapping[str, Any], weights: str, notes: tuple[str, ...] = ()
) -> OpenedModel:
    # Another version of timm may no longer know the tag: what is stored is what follows from it.
    arguments = timm_models.settled(name, arguments)
    origin = Origin(timm_models.PREFIX + timm_models.split(name)[0], arguments)
    return OpenedModel(model, origin, timm_models.preprocessing(model, arguments), weights, notes)


def _open_factory(reference: str, request: Request) -> OpenedModel:
    if request.weights not in (None, "none"):
        return _fill_from_file(reference, request)
    model = factories.call_factory(reference, request.arguments, request.trust_code)
    return _describe_built(model, reference, request.arguments, f"as {reference} made them")


def _describe_built(model: nn.Module, reference: str, arguments: Mapping[str, Any], weights: str) -> OpenedModel:
    """An OpenedModel for what the user's own code has built; what timm can build again needs that code no more."""
    source = describe_module(model, weights)
    if not source.origin.reference.startswith(timm_models.PREFIX):
        source = replace(source, origin=Origin(reference, dict(arguments)))
    return replace(source, notes=(*factories.how_built(reference), *source.notes))


def _fill_from_file(reference: str, request: Request) -> OpenedModel:
    path = resolve(Path(str(request.weights)))
    with unchanged(*files_of(path)):
        raw = read_raw(path, request.trust_pickle)
        found = weights_in(path, raw, request, arch_known=True)
        if isinstance(found.value, nn.Module):
            raise SourceError(f"{path} holds a whole module; give it as MODEL instead of with --weights")
        digest = fingerprint_of(path)
        published = torchvision_models.published(digest)
        source = _fill(reference, found.value, request, str(path), silent, published, found.extra)
    notes = (*about_trust(path, raw, request), *found.notes, *source.notes)
    return replace(source, notes=notes, file=path, sha256=digest, weights=f"file {path.name}")


def _fill(
    reference: str,
    state: State,
    request: Request,
    label: str,
    progress: Progress,
    published: Published | None = None,
    extra: Mapping[str, Any] | None = None,
) -> OpenedModel:
    """The network of a reference with a state dict loaded strictly; class count and input channels follow the state.

    `published` says which of torchvision's files it comes from, where it does; `extra` is what the file holds of the
    modules' extra state.
    """
    made = deep_copy(request.arch) if isinstance(request.arch, nn.Module) else None
    full = builders.canonical(reference) if made is None else None
    if full is None or published is None or full != f"torchvision:{published.model}":
        published = None
    if full is not None:
        state = torchvision_models.with_current_keys(state)
    arguments = {**({} if published is None else published.arguments), **request.arguments}
    if full is None and made is None:
        made = factories.call_factory(reference, arguments, request.trust_code)
    model, arguments, view = _fitting(reference, state, arguments, made, label, progress)
    try:
        # The user's own code may keep what it has built or read, and views of it.
        private = full is not None and not request.trust_pickle
        load_state_(model, view.state, take=private)
        notes = view.notes() + _load_extra(model, extra or {}, view)
    except SourceError as error:
        raise SourceError(f"{label} cannot be used: {error}") from None
    if isinstance(request.arch, nn.Module):
        source = describe_module(model, label)
        return replace(source, notes=notes + source.notes)
    if full is None:
        source = _describe_built(model, reference, arguments, label)
        return replace(source, notes=notes + source.notes)
    if full.startswith(timm_models.PREFIX):
        source = _timm_source(model, full.removeprefix(timm_models.PREFIX), arguments, label, notes)
        return replace(source, private=private)
    notes += _about_inputs(full, arguments, published)
    preprocessing = _preprocessing(full, model, None if published is None else published.weights)
    return OpenedModel(model, Origin(full, arguments), preprocessing, label, notes, private=private)


def _load_extra(model: nn.Module, extra: Mapping[str, Any], view: View) -> tuple[str, ...]:
    """Give the modules, in place, the extra state of a file; what is to be said where the two are not the same keys."""
    own, found = extra_state.owners(model), {key.removeprefix(view.prefix): value for key, value in extra.items()}
    extra_state.load_(model, {key: value for key, value in found.items() if key in own})
    left_out = ", ".join(key for key in found if key not in own)
    lacking = ", ".join(key for key in own if key not in found)
    notes = (f"extra state that no module takes was left out: {left_out}",) if left_out else ()
    return notes + ((f"extra state that the file lacks stays as it was built: {lacking}",) if lacking else ())


def _fitting(
    reference: str, state: State, arguments: Mapping[str, Any], made: nn.Module | None, label: str, progress: Progress
) -> tuple[nn.Module, dict[str, Any], View]:
    """The network, the arguments that it was built with, and the state dict without what stands before its keys.

    Raises SourceError where no such view of the state dict fits.
    """
    full = builders.canonical(reference) if made is None else None
    of_timm = full is not None and full.startswith(timm_models.PREFIX)
    plain = builders.on_meta(str(full), arguments) if of_timm else None
    most, closest = -1, Difference((), (), ())
    for view in views(state):
        used = dict(arguments)
        if plain is not None:
            view = replace(view, state=timm_models.with_current_keys(view.state, plain))
        if made is not None:
            difference = compare(made, view.state)
        else:
            used, difference = builders.fit(str(full), arguments, view.state)
        if not difference:
            return made if made is not None else builders.build_unset(str(full), used), used, view
        alike = len(view.state) - len(difference.unexpected) - len(difference.shapes)
        if alike > most:
            most, closest = alike, difference
    raise SourceError(f"{label} does not fit {reference}: {closest}{_hint(state, reference, progress)}")


def _about_inputs(full: str, arguments: Mapping[str, Any], published: Published | None) -> tuple[str, ...]:
    """What the report says of the switch that torchvision's published weights turn on, and a file does not speak of."""
    if published is not None:
        set_so = ", ".join(f"{key}={value}" for key, value in published.arguments.items())
        known = f"known by its SHA-256 as torchvision's {published.weights} of {published.model}"
        return (f"{known}{', which sets ' if set_so else ''}{set_so}",)
    if torchvision_models.transforms_input(full.removeprefix("torchvision:")) and "transform_input" not in arguments:
        return ("set --arg transform_input=true for weights that descend from torchvision's; it is off here",)
    return ()


def _hint(state: State, reference: str, progress: Progress) -> str:
    likeness, best, _ = nearest(state, progress)
    if likeness == 0 or best == builders.canonical(reference):
        return "" if builders.canonical(reference) is None else f"; give {YOUR_OWN}"
    return f"; nearest known architecture: {best} ({likeness:.0%} of keys and shapes)"


def _architecture(reference: str) -> str:
    """The full form of what `--arch` says: a known network or a factory."""
    full = builders.canonical(reference)
    if full is not None:
        return full.replace("@", ".") if full.startswith(timm_models.PREFIX) else full
    if factories.names_code(reference):
        return reference
    hint = _like(reference) or "; try resnet18 or cifar:resnet20"
    raise SourceError(f"--arch {reference!r} names no known architecture{hint}")


def _like(name: str) -> str:
    """For a message: timm's model of that very name, or known references that come close to it."""
    return timm_models.exact_hint(name) or builders.near(name)


def _is_weights_file(text: str) -> bool:
    path = Path(text)
    return exists(path) or path.suffix in FILE_SUFFIXES or "/" in text


def _preprocessing(full: str, model: nn.Module, weights: str | None = None) -> Preprocessing:
    if full.startswith("torchvision:"):
        own = torchvision_models.preprocessing(full.removeprefix("torchvision:"), model, weights)
        return with_channels(own, _input_channels(model))
    own = networks.DIGITS_PREPROCESSING if full == DIGITS else networks.CIFAR_PREPROCESSING
    return with_channels(own, _input_channels(model))


def _assumed_preprocessing(model: nn.Module) -> Preprocessing:
    """Mostly 224 x 224 and ImageNet's statistics, as most networks take; it says what of it is a guess."""
    return with_channels(torchvision_models.assumed_preprocessing(model), _input_channels(model))


def _input_channels(model: nn.Module) -> int:
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
