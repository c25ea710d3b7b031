"""Open models: from a reference, a file, a module or a conversion to an `OpenedModel`; docs/guide/models.md has all."""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from asymswap.checkpoint import Header, stored_in
from asymswap.errors import AsymswapError, SourceError, listed, reason_of
from asymswap.fileformats import extra_state
from asymswap.fileformats.detect import is_file_name, resolve, sha256
from asymswap.fileformats.model_file import files_of, fingerprint, read_raw, states_of_modules
from asymswap.fileformats.state_dict import Found, check_numbers, find_weights, load_state_
from asymswap.fileformats.torch_files import RawFile, refusal
from asymswap.models import builders, timm_models, torchvision_models, transformers_models, ultralytics_models
from asymswap.models.builders import TWINS, YOUR_OWN, identify, nearest, views
from asymswap.models.converted import restore
from asymswap.models.factories import UserCode, describe_module, how_built, names_code, names_python_file, same_callable
from asymswap.models.family import Family, Fit, package
from asymswap.models.fingerprints import near
from asymswap.models.opened import GIVEN, OpenedModel
from asymswap.models.preprocessing import PreprocessingOptions, with_size
from asymswap.results.records import read_provenance
from asymswap.types import Origin, Progress, Shown, silent
from asymswap.utils.files import fail_if_modified
from asymswap.utils.inputs import arguments_of, placed
from asymswap.utils.tensors import find_device, meta_copy


@dataclass
class Made(Shown):
    """A model that a verb made, its report, and what a file of it says; `base` as in `OpenedModel`."""

    model: nn.Module
    report: Any
    header: Header
    base: nn.Module | None = None


@dataclass(frozen=True)
class Unopened:
    """A model that is opened by the verb that gets it, once that has checked everything else."""

    open: Callable[[], OpenedModel]


Model = str | Path | nn.Module | OpenedModel | Made | Unopened
"""What every verb takes: a reference, a file, a module that exists already, an opened model, or a verb's result."""


@dataclass(frozen=True)
class _Request:
    """What the user said about the model beside its reference; see `open_model`."""

    arch: str | nn.Module | None = None
    weights: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trust_pickle: bool = False
    key: str | None = None
    progress: Progress = field(default=silent, compare=False)


def open_model(
    model: Model,
    *,
    arch: str | nn.Module | None = None,
    weights: str | None = None,
    key: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    preprocessing: PreprocessingOptions | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> OpenedModel:
    """Open a model once, for any number of verbs; what is read or built is in eval mode, a module stays as it is.

    - `model`: a reference (`"resnet18"`, `"timm:…"`, `"pkg.mod:factory"`, `"net.py:Net"`), a file of any kind, an
      `nn.Module`, or what `convert`, `fuse` or `finetune` returned;
    - `arch`: the architecture of a state-dict file, or the unconverted network of a checkpoint that only your code
      builds: a reference, or a module with any weights, which is not changed;
    - `weights`: name of published weights, `"none"` for random ones, or a state-dict file, for a reference;
    - `key`: which state dict of the file, as a dotted path;
    - `arguments`: for the architecture's builder;
    - `trust_pickle`: let a pickle run its code;
    - `input_size`: (channels, height, width) of one image, for a clip (channels, frames, height, width);
    - `example_inputs`: arguments of one forward pass in place of `input_size`: a tensor, a tuple, or a dict by name;
    - `preprocessing`: how images are prepared, where that is not what weights, family or file say;
    - `device`: where verbs let it run, as `cpu`, `cuda` or `cuda:1`. By default images run on a GPU if there is one,
      and all else where the module is.

    A package or a Python file that a reference names is run, which can do whatever you can; what a file names is not.
    Raises SourceError where there is no such model, CheckpointError for a damaged asymswap checkpoint.
    """
    start, place = time.perf_counter(), None if device is None else find_device(device)
    if isinstance(arch, nn.Module) and arguments:
        raise SourceError(f"`arch=…` is a module already, so the argument {next(iter(arguments))!r} changes nothing")
    request = _Request(arch, weights, arguments or {}, trust_pickle, key, progress)
    if isinstance(model, OpenedModel):
        if request != _Request():
            raise SourceError(f"{model.reference} is open already; give these options where it is opened first")
        opened = model
    elif isinstance(model, nn.Module):
        network = _unwrapped(ultralytics_models.network_of(model))
        header = ultralytics_models.header_in(network)
        if header is None:
            opened = describe_module(network, GIVEN)
        else:
            opened = _describe_converted(network, header, None, GIVEN)
        opened = replace(opened, reference=type(network).__name__)
    elif isinstance(model, Made):
        # It stays the caller's.
        base = model.base if arch is None else _build_named(model.header.origin, request)
        opened = _describe_converted(model.model, model.header, base, GIVEN)
        named = read_provenance(model.header.provenance, "the conversion").report.model.reference
        opened = replace(opened, reference=named or model.header.origin.reference)
    elif not isinstance(model, str | Path):
        raise SourceError(f"a {type(model).__name__} is no model; give a reference, a file or an nn.Module")
    else:
        reference = str(model)
        if not is_file_reference(reference):
            opened = _open_reference(reference, request)
        elif weights is None:
            opened = _open_file(Path(reference), request)
        else:
            raise SourceError(f"`weights=…` goes with a reference; {resolve(Path(reference))} brings its own weights")
        opened = replace(opened, reference=reference)
        opened.model.eval()
    prepared, example = opened.preprocessing, opened.example_inputs
    if example_inputs is not None:
        if input_size is not None:
            raise AsymswapError("`input_size=…` and `example_inputs=…` say the same: give one of them")
        example = placed(opened.model, arguments_of(opened.model, example_inputs, lambda given: given))
    if input_size is not None:
        prepared = with_size(prepared, input_size)
    if preprocessing is not None:
        prepared = preprocessing.apply(prepared)
    opened = replace(opened, preprocessing=prepared, example_inputs=example, device=place or opened.device)
    return replace(opened, seconds=opened.seconds + time.perf_counter() - start)


def open_for_verb(
    model: Model,
    progress: Progress = silent,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    preprocessing: PreprocessingOptions | None = None,
) -> OpenedModel:
    """Return the model as a verb takes it; one that was opened here is the verb's alone."""
    if isinstance(model, Unopened):
        return model.open()
    if isinstance(model, OpenedModel) and input_size is None and preprocessing is None and example_inputs is None:
        return model
    options: dict[str, Any] = {"input_size": input_size, "example_inputs": example_inputs}
    opened = open_model(model, **options, preprocessing=preprocessing, progress=progress)
    return opened if isinstance(model, OpenedModel) else replace(opened, handed_over=True)


def open_models(
    models: Sequence[Model], *, arch: str | None = None, weights: str | None = None, key: str | None = None, **more: Any
) -> list[OpenedModel]:
    """Open several models by one set of options: `arch` and `key` are the files', `weights` the references'."""
    named = [model for model in models if isinstance(model, str | Path)]
    files = [model for model in named if is_file_reference(str(model))]
    if arch is not None and not files:
        raise AsymswapError(f'`arch="{arch}"` goes with a file, and none of the models is one')
    if weights is not None and len(files) == len(named):
        raise AsymswapError(f'`weights="{weights}"` goes with a reference, and all models are files with their own')
    for_files, for_others = more | {"arch": arch, "key": key}, more | {"weights": weights}
    return [open_model(one, **(for_files if one in files else for_others)) for one in models]


def is_file_reference(reference: str) -> bool:
    """True for a reference to a file: it exists and names no known network, or it looks like a path."""
    if builders.canonical(reference.partition("@")[0]) is not None or names_python_file(reference):
        return False
    return is_file_name(reference) or "\\" in reference


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside of torch.compile or DataParallel; raise SourceError where it cannot be copied."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inside: Any = model
    while isinstance(inside, nn.Module):
        model = inside
        inside = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
    try:
        meta_copy(model)
    except TypeError as error:
        raise SourceError(
            f"the {type(model).__name__} cannot be copied ({reason_of(error, 120)}); "
            "take out what it holds beside layers and data, such as a lock or an open file"
        ) from None
    return model


def _open_reference(reference: str, request: _Request) -> OpenedModel:
    """Return the model that a reference other than a file names, with weights."""
    if request.arch is not None:
        raise SourceError(f"`arch=…` goes with a file, and {reference!r} names a network itself")
    if request.key is not None and not is_file_name(str(request.weights)):
        raise SourceError(f'`key=…` goes with a file, and {reference!r} names a network; give `weights="FILE"` with it')
    name, weights = reference, request.weights
    if not names_python_file(reference):
        name, _, weights_name = reference.partition("@")
        if weights_name and weights:
            raise SourceError(f'{reference!r} names weights and `weights="{weights}"` others; give one of them')
        weights = weights_name or weights
    family, full = _find_network(name, f"no model {reference!r}, and no such file")
    own_code = isinstance(family, UserCode)
    if weights not in (None, "none") and (own_code or is_file_name(str(weights))):
        return _open_file(Path(str(weights)), replace(request, arch=full, weights=weights))
    if weights == "none" and not own_code:
        return family.describe(family.build(full, request.arguments), full, request.arguments, "random")
    return family.weights(full, weights, request.arguments)


def _find_network(named: str | nn.Module, unknown: str = "") -> tuple[Family, str]:
    """Return family and full form of a reference or a given module; raise SourceError, with `unknown`, for others."""
    if isinstance(named, nn.Module):
        return UserCode(named), type(named).__name__
    full = builders.canonical(named)
    if full is not None:
        return builders.family_of(full), full
    if names_code(named):
        return UserCode(), named
    hint, architecture = near(named), named.partition(".")[0]
    # To a mistyped name timm, which takes seconds to load, has nothing to say unless it is there.
    if architecture and importlib.util.find_spec("timm") and package("timm").is_model(architecture):
        hint = f"; timm has one: {timm_models.PREFIX}{named}"
    raise SourceError((unknown or f'`arch="{named}"` names no known architecture') + hint)


def _open_file(given: Path, request: _Request) -> OpenedModel:
    path = resolve(given)
    with fail_if_modified(*files_of(path)):
        raw = read_raw(path, request.trust_pickle)
        notes: tuple[str, ...] = ()
        if raw.executed:
            notes = (f"code in {path.name} was executed to read it (`trust_pickle=True`)",)
        elif request.trust_pickle:
            notes = (f"`trust_pickle=True` was not needed: nothing in {path.name} was executed",)
        try:
            stored = stored_in(raw, str(path)) if request.weights is None else None
            if stored is None and request.arch is None:
                named = transformers_models.named_in(given) or ultralytics_models.named_in(raw.value)
                if named is not None:
                    reference, arguments = named
                    request = replace(request, arch=reference, arguments={**arguments, **request.arguments})
            if stored is None:
                opened = _open_loaded(path, raw, request)
            elif request.key is not None:
                what = f"{path} was converted before and holds one model"
                raise SourceError(f"`key=…` goes with training checkpoints; {what}")
            else:
                base = _build_named(stored.header.origin, request)
                model = restore(stored, str(path), base)
                opened = _describe_converted(model, stored.header, base, f"file {path.name}")
                times = {1: "once", 2: "twice"}.get(len(opened.plans), f"{len(opened.plans)} times")
                built = how_built(request.arch) if isinstance(request.arch, str) else ()
                told = (f"converted before, {times}", *built)
                opened = replace(opened, notes=told, sha256=sha256(path), private=True)
        except AsymswapError as error:
            if not raw.executed:
                raise
            # Code ran, whatever the result.
            raise SourceError(f"{error}; {notes[0]}") from error
    return replace(opened, notes=notes + opened.notes, file=path)


def _build_named(origin: Origin, request: _Request) -> nn.Module | None:
    """Build the unconverted model of a checkpoint that `arch` names; the same network as it was built then."""
    arch = request.arch
    if arch is None or isinstance(arch, nn.Module):
        return arch
    same = builders.canonical(arch) == origin.reference or same_callable(arch, origin.reference)
    family, full = _find_network(arch)
    return family.build(full, {**(origin.arguments if same else {}), **request.arguments})


def _describe_converted(model: nn.Module, header: Header, base: nn.Module | None, weights: str) -> OpenedModel:
    """Describe a converted model; what was a guess of its preprocessing when it was written stays one."""
    sources = ("normalization_from", "size_from")
    told = [source for source in sources if getattr(header.preprocessing, source) not in ("family", "assumed")]
    preprocessing = replace(header.preprocessing, **cast(Any, dict.fromkeys(told, "file")))
    opened = OpenedModel(model, header.origin, preprocessing, weights, skeleton=header.skeleton, base=base)
    return replace(opened, plans=header.plans, provenance=header.provenance)


def _open_loaded(path: Path, raw: RawFile, request: _Request) -> OpenedModel:
    """Return the model of a file that has been read: a module as it is, or a state dict put into its architecture."""
    value, notes = raw.value, raw.notes
    if raw.unread:
        notes += (f"left unread, being outside of the allowlist: {listed(raw.unread, 3)}",)
        # Where the architecture is known, the state dict of a module that cannot be loaded will do.
        value, modules = states_of_modules(value, str(path)) if request.arch is not None else (value, ())
        notes += tuple(f"weights taken out of a {name}, whose code was not executed" for name in modules)
    try:
        found = find_weights(value, str(path), request.key)
    except SourceError as error:
        # Where nothing is there but what could not be loaded, the reason for that is the better message.
        raise (refusal(raw.unread, str(path)) if raw.unread else error) from None
    taken = (f"weights taken from {found.key!r} in {path.name}",) if found.key else ()
    notes, digest = (*taken, *notes, *found.notes), fingerprint(path)
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
        opened = _open_state(path, found, digest, request)
    return replace(opened, notes=notes + opened.notes, sha256=digest, weights=f"file {path.name}")


def _open_state(path: Path, found: Found, digest: str, request: _Request) -> OpenedModel:
    """Load a state dict strictly into its network; class count and input channels follow the state."""
    assert not isinstance(found.value, nn.Module)
    state, arguments = found.value, request.arguments
    notes: tuple[str, ...] = ()
    published, named = torchvision_models.published(digest)
    if request.arch is not None:
        family, reference = _find_network(request.arch)
    elif published is not None:
        family, reference = builders.family_of(published.reference), published.reference
    else:
        match, view = identify(state, str(path), request.progress)
        family, reference, state = builders.family_of(match.reference), match.reference, view.state
        note = (
            f"architecture taken from keys and shapes: {reference} (`arch=…` names another); a variant that "
            f"computes differently can have the same{TWINS.get(reference, '')}"
        )
        notes = (*view.notes(), note)
    if published is not None and published.reference == reference:
        arguments = {**published.arguments, **arguments}
    else:
        published = None
    fits = []
    for view in views(state):
        fit = family.fit(reference, arguments, view.state)
        if not fit.difference:
            break
        fits.append(fit)
    else:
        closest = max(fits, key=Fit.alike).difference
        likeness, best, _ = nearest(state, request.progress)
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
    if left_out := [key for key in extra if key not in own]:
        notes += (f"extra state that no module takes was left out: {', '.join(left_out)}",)
    if lacking := [key for key in own if key not in extra]:
        notes += (f"extra state that the file lacks stays as it was built: {', '.join(lacking)}",)
    opened = family.describe(model, reference, fit.arguments, str(path))
    if published is not None:
        opened = torchvision_models.as_published(opened, published, named)
    return replace(opened, notes=notes + opened.notes, private=private)
