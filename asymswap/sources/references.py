"""Model references: text that names a model, and how it becomes a module with weights.

| reference | what |
| --- | --- |
| `resnet18`, `torchvision:resnet18`, `torchvision:resnet18@IMAGENET1K_V1` | a torchvision builder, and its weights |
| `cifar:resnet20` | a network of CIFAR size from `asymswap.sources.networks` |
| `digits-resnet` | the trained network that ships with asymswap |
| `timm:resnet50`, `timm:resnet50@a1_in1k` | a model of timm, where that is installed, and its weights |
| `package.module:factory` | a callable of the user's own that returns a module; it is imported and called |
| `path/to/net.py:Net` | the same in a Python file, which is run; see asymswap.sources.factories |
| a file | a state dict or training checkpoint (with `--arch`), or a pickled module |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import nn

from asymswap.errors import SourceError
from asymswap.sources import builders, factories, networks, timm_models, torchvision_models
from asymswap.sources.builders import DIGITS
from asymswap.sources.files import FileKind, exists, sha256, sniff
from asymswap.sources.skeleton import from_skeleton, to_skeleton
from asymswap.sources.state import Found, State, compare, find_weights, load_state_
from asymswap.sources.unpickle import load_object
from asymswap.spec import Origin, Preprocessing, Progress, silent

FILE_SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors", ".tar", ".pkl", ".pickle", ".pt2", ".torch")


@dataclass(frozen=True)
class Request:
    """What the user said about the model beside its reference; see the options of the same names."""

    arch: str | None = None
    weights: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trust_pickle: bool = False
    trust_code: bool = False


@dataclass(frozen=True)
class Source:
    """A model with its weights, and all that is known about where it came from."""

    model: nn.Module
    origin: Origin
    preprocessing: Preprocessing
    weights: str
    notes: tuple[str, ...] = ()
    skeleton: bytes | None = None
    file: Path | None = None
    sha256: str | None = None


def is_file_reference(reference: str) -> bool:
    """Whether a reference means a file: it exists and names no known network, or it looks like a path."""
    if builders.canonical(reference.partition("@")[0]) is not None or factories.names_python_file(reference):
        return False
    path = Path(reference)
    return exists(path) or path.suffix in FILE_SUFFIXES or "/" in reference or "\\" in reference


def open_reference(reference: str, request: Request) -> Source:
    """The model that a reference other than a file names, with weights; raises SourceError where it cannot be had."""
    if request.arch is not None:
        raise SourceError(f"--arch goes with a file, and {reference!r} names a network itself")
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


@dataclass(frozen=True)
class RawFile:
    """What a model file holds, before anything is made of it; `metadata` is that of a safetensors file."""

    value: Any
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_raw(path: Path, trust_pickle: bool) -> RawFile:
    """Read a model file; raises SourceError where it is none, is damaged, or would have to run code to be read."""
    kind = sniff(path)
    if kind is not FileKind.SAFETENSORS:
        return RawFile(load_object(path, kind, trust_pickle, str(path)))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return RawFile({key: file.get_tensor(key) for key in file.keys()}, metadata)  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{path} is cut off or damaged: {error}") from None


def read_weights(path: Path, trust_pickle: bool) -> Found:
    """The state dict or module in a model file."""
    return find_weights(read_raw(path, trust_pickle).value, str(path))


def open_loaded(path: Path, found: Found, request: Request, progress: Progress = silent) -> Source:
    """The model of a file that has been read: a module as it is, or a state dict put into its architecture."""
    notes: tuple[str, ...] = (f"weights taken from {found.key!r} in {path.name}",) if found.key else ()
    if request.weights is not None:
        raise SourceError(f"--weights goes with a reference; {path} brings its own weights")
    if isinstance(found.value, nn.Module):
        try:
            source = describe_module(found.value, f"file {path.name}")
        except (AttributeError, TypeError) as error:
            # Unpickling sets attributes, and builds nothing: what the file lacks is missing from the module.
            raise SourceError(f"{path} is damaged: its {type(found.value).__name__} lacks parts ({error})") from error
        if request.arch is not None:
            notes += (f"--arch {request.arch} was not needed: {path.name} holds the whole module",)
        return replace(source, notes=notes + source.notes, file=path, sha256=sha256(path))
    arch = request.arch
    if arch is None:
        arch = _identify(path, found.value, progress)
        notes += (f"architecture taken from keys and shapes: {arch} (--arch names another)",)
    source = _fill(_architecture(arch), found.value, request, str(path), progress)
    return replace(source, notes=notes + source.notes, file=path, sha256=sha256(path), weights=f"file {path.name}")


def describe_module(model: nn.Module, weights: str) -> Source:
    """A Source for a module that exists already: its structure is stored where the allowlist can read it back."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    skeleton = to_skeleton(model)
    if skeleton is not None:
        return Source(model, Origin(f"skeleton:{name}"), _assumed_preprocessing(model), weights, (), skeleton)
    origin = builders.origin_of_timm(model)
    if origin is not None:
        return Source(model, origin, timm_models.preprocessing(model, origin.arguments), weights)
    note = f"load the result with asymswap.load(path, model=…), for {name} is not made of allowlisted classes alone"
    known = timm_models.made_by_timm(model) is not None
    preprocessing = timm_models.preprocessing(model, {}) if known else _assumed_preprocessing(model)
    return Source(model, Origin(f"class:{name}"), preprocessing, weights, (note,))


def rebuild(origin: Origin, skeleton: bytes | None) -> nn.Module:
    """The unconverted model of an origin, with unset weights, running no code but torch's, torchvision's and ours.

    Raises SourceError for an origin that only the user's own code can build.
    """
    if skeleton is not None:
        return from_skeleton(skeleton)
    full = builders.canonical(origin.reference)
    if full is None:
        raise SourceError(f"it was built by {origin.reference}, which is code of yours")
    return builders.build(full, origin.arguments)


def build_architecture(reference: str, arguments: Mapping[str, Any], trust_code: bool = False) -> nn.Module:
    """The network that the user named by `--arch`, unfilled; code of theirs is run, a file only with `trust_code`."""
    full = _architecture(reference)
    if builders.canonical(full) is None:
        return factories.call_factory(full, arguments, trust_code)
    return builders.build(full, arguments)


def _open_known(full: str, request: Request) -> Source:
    if request.weights not in (None, "none") and _is_weights_file(str(request.weights)):
        return _fill_from_file(full, request)
    random = request.weights == "none"
    if full == DIGITS and not random:
        if request.weights not in (None, "DEFAULT") or request.arguments:
            raise SourceError(f"{DIGITS} has one set of weights; use --weights none to change its arguments")
        source = _fill(full, load_file(networks.DIGITS_WEIGHTS), request, DIGITS, silent)
        return replace(source, weights="shipped, trained on scikit-learn's digits")
    if full.startswith("torchvision:") and not random:
        name = full.removeprefix("torchvision:")
        model, arguments, weights = torchvision_models.build_pretrained(
            name, request.weights or "DEFAULT", request.arguments
        )
        # With weights, torchvision builds detectors and the like otherwise than without: store what it built.
        skeleton = None if name in torchvision_models.classifiers() else to_skeleton(model)
        preprocessing = torchvision_models.preprocessing(name, model, weights)
        return Source(model, Origin(full, arguments), preprocessing, weights, skeleton=skeleton)
    if full.startswith(timm_models.PREFIX):
        return _open_timm(full.removeprefix(timm_models.PREFIX), request)
    if not random:
        raise SourceError(f"{full} has no published weights; use --weights FILE, or --weights none for random ones")
    model = builders.build(full, request.arguments)
    return Source(model, Origin(full, dict(request.arguments)), _preprocessing(full, model), "random")


def _open_timm(name: str, request: Request) -> Source:
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
    return _timm_source(model, name, request.arguments, weights, remarks)


def _timm_source(
    model: nn.Module, name: str, arguments: Mapping[str, Any], weights: str, notes: tuple[str, ...] = ()
) -> Source:
    # Another version of timm may no longer know the tag: what is stored is what follows from it.
    arguments = timm_models.settled(name, arguments)
    origin = Origin(timm_models.PREFIX + timm_models.split(name)[0], arguments)
    return Source(model, origin, timm_models.preprocessing(model, arguments), weights, notes)


def _open_factory(reference: str, request: Request) -> Source:
    if request.weights not in (None, "none"):
        return _fill_from_file(reference, request)
    model = factories.call_factory(reference, request.arguments, request.trust_code)
    return _describe_built(model, reference, request.arguments, f"as {reference} made them")


def _describe_built(model: nn.Module, reference: str, arguments: Mapping[str, Any], weights: str) -> Source:
    """A Source for what the user's own code has built; what timm can build again needs that code no more."""
    source = describe_module(model, weights)
    if not source.origin.reference.startswith(timm_models.PREFIX):
        source = replace(source, origin=Origin(reference, dict(arguments)))
    return replace(source, notes=(*factories.how_built(reference), *source.notes))


def _fill_from_file(reference: str, request: Request) -> Source:
    path = Path(str(request.weights))
    found = read_weights(path, request.trust_pickle)
    if isinstance(found.value, nn.Module):
        raise SourceError(f"{path} holds a whole module; give it as MODEL instead of with --weights")
    source = _fill(reference, found.value, request, str(path), silent)
    return replace(source, file=path, sha256=sha256(path), weights=f"file {path.name}")


def _fill(reference: str, state: State, request: Request, label: str, progress: Progress) -> Source:
    """The network of a reference with a state dict loaded strictly; class count and input channels follow the state."""
    full = builders.canonical(reference)
    if full is None:
        arguments = dict(request.arguments)
        model = factories.call_factory(reference, arguments, request.trust_code)
    else:
        state = torchvision_models.with_current_keys(state)
        model, arguments = builders.build_to_fit(full, request.arguments, state)
        if full.startswith(timm_models.PREFIX):
            state = timm_models.with_current_keys(state, model)
    difference = compare(model, state)
    if difference:
        raise SourceError(f"{label} does not fit {reference}: {difference}{_hint(state, reference, progress)}")
    try:
        load_state_(model, state)
    except SourceError as error:
        raise SourceError(f"{label} cannot be used: {error}") from None
    if full is None:
        return _describe_built(model, reference, arguments, label)
    if full.startswith(timm_models.PREFIX):
        return _timm_source(model, full.removeprefix(timm_models.PREFIX), arguments, label)
    return Source(model, Origin(full, arguments), _preprocessing(full, model), label)


def _hint(state: State, reference: str, progress: Progress) -> str:
    likeness, best = builders.nearest(state, lambda done, total: progress("looking for the architecture", done, total))[
        0
    ]
    if likeness == 0 or best == builders.canonical(reference):
        return ""
    return f"; nearest known architecture: {best} ({likeness:.0%} of keys and shapes)"


def _identify(path: Path, state: State, progress: Progress) -> str:
    """The one known architecture that a state dict fits; raises SourceError where there is none or more than one."""
    state = torchvision_models.with_current_keys(state)
    ranked = builders.nearest(state, lambda done, total: progress("looking for the architecture", done, total))
    fitting = []
    for likeness, reference in ranked[:6]:
        if likeness < 0.5:
            break
        model, arguments = builders.build_to_fit(reference, {}, state)
        if not compare(model, state):
            # Another class count is a worse fit than the very same shapes.
            fitting.append((bool(arguments), reference))
    best = [reference for other_size, reference in fitting if other_size == min(fitting)[0]]
    if len(best) == 1:
        return best[0]
    if best:
        raise SourceError(f"{path} holds a state_dict that fits {', '.join(best)}; choose with --arch")
    likeness, reference = ranked[0]
    difference = compare(builders.build(reference, {}), state)
    raise SourceError(
        f"{path} holds a state_dict of an unknown architecture; name it with --arch; nearest known: {reference} "
        f"({likeness:.0%} of keys and shapes; {difference})"
    )


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


def _preprocessing(full: str, model: nn.Module) -> Preprocessing:
    if full.startswith("torchvision:"):
        return torchvision_models.preprocessing(full.removeprefix("torchvision:"), model, None)
    own = networks.DIGITS_PREPROCESSING if full == DIGITS else networks.CIFAR_PREPROCESSING
    return _with_channels(own, _input_channels(model))


def _assumed_preprocessing(model: nn.Module) -> Preprocessing:
    """224 x 224 and ImageNet's statistics, as most networks take; `--input` says otherwise."""
    image_size = getattr(model, "image_size", None)
    side = image_size if isinstance(image_size, int) else 224
    imagenet = Preprocessing(3, (side, side), torchvision_models.IMAGENET_MEAN, torchvision_models.IMAGENET_STD)
    return _with_channels(imagenet, _input_channels(model))


def _with_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    if preprocessing.channels == channels:
        return preprocessing
    return replace(preprocessing, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)


def _input_channels(model: nn.Module) -> int:
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
