"""`open_model`: from a reference, a file, a module or a conversion to an `OpenedModel`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torchvision.ops  # noqa: F401  (registers torch.ops.torchvision)
from torch import nn

from asymswap.checkpoint import Header, Stored, stored_in
from asymswap.errors import AsymswapError, CheckpointError, SourceError, reason_of
from asymswap.fileformats.detect import resolve, sha256
from asymswap.fileformats.model_file import files_of, read_raw
from asymswap.models.builders import canonical
from asymswap.models.converted import HOW_TO_BUILD, restore
from asymswap.models.factories import describe_module, how_built, same_callable
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import PreprocessingOptions, with_size
from asymswap.models.references import (
    Request,
    about_trust,
    find_architecture,
    is_file_reference,
    open_loaded,
    open_reference,
    rebuild,
)
from asymswap.results.records import read_history
from asymswap.types import Origin, Progress, silent
from asymswap.utils.files import fail_if_modified
from asymswap.utils.tensors import meta_copy


class Converted(Protocol):
    """What a conversion, a fusion and a fine-tuned model have in common."""

    model: nn.Module
    header: Header


Model = str | Path | nn.Module | OpenedModel | Converted
"""What every verb takes: a reference, a file, a module that exists already, an opened model, or a verb's result."""


def open_model(
    model: Model,
    *,
    arch: str | nn.Module | None = None,
    weights: str | None = None,
    key: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    trust_code: bool = False,
    input_size: tuple[int, ...] | None = None,
    preprocessing: PreprocessingOptions | None = None,
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
    - `trust_pickle`, `trust_code`: let a pickle, or a Python file named in a reference, run its code;
    - `input_size`: (channels, height, width) of one image, for a clip (channels, frames, height, width);
    - `preprocessing`: how images are prepared, where that is not what weights, family or file say.

    Raises SourceError where there is no such model, CheckpointError for a damaged asymswap checkpoint.
    """
    start = time.perf_counter()
    if isinstance(arch, nn.Module) and arguments:
        raise SourceError(f"`arch=…` is a module already, so the argument {next(iter(arguments))!r} changes nothing")
    request = Request(
        arch=arch, weights=weights, arguments=arguments or {}, key=key, trust_pickle=trust_pickle, trust_code=trust_code
    )
    if isinstance(model, OpenedModel):
        if request != Request():
            raise SourceError(f"{model.reference} is open already; give these options where it is opened first")
        opened = model
    elif isinstance(model, nn.Module):
        network = _unwrapped(model)
        opened = replace(describe_module(network, "as given"), reference=type(network).__name__)
    elif not isinstance(model, str | Path):
        opened = _from_result(model, request)
    else:
        reference = str(model)
        is_file = is_file_reference(reference)
        opened = _open_file(Path(reference), request, progress) if is_file else open_reference(reference, request)
        opened = replace(opened, reference=reference)
        opened.model.eval()
    prepared = opened.preprocessing
    if input_size is not None:
        prepared = with_size(prepared, input_size)
    if preprocessing is not None:
        prepared = preprocessing.apply(prepared)
    return replace(opened, preprocessing=prepared, seconds=opened.seconds + time.perf_counter() - start)


def open_for_verb(
    model: Model,
    progress: Progress = silent,
    input_size: tuple[int, ...] | None = None,
    preprocessing: PreprocessingOptions | None = None,
) -> OpenedModel:
    """Return the model as a verb takes it; one that was opened here is the verb's alone."""
    if isinstance(model, OpenedModel) and input_size is None and preprocessing is None:
        return model
    opened = open_model(model, input_size=input_size, preprocessing=preprocessing, progress=progress)
    return opened if isinstance(model, OpenedModel) else opened.hand_over()


def open_models(
    models: Sequence[Model],
    *,
    arch: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    **options: Any,
) -> list[OpenedModel]:
    """Open several models by one set of options: `arch` and `key` are the files', `weights` the references'.

    `options` are the further ones of `open_model`. Raises AsymswapError for an option that suits none of the models.
    """
    names = [str(model) for model in models if isinstance(model, str | Path)]
    files = [name for name in names if is_file_reference(name)]
    if arch is not None and not files:
        raise AsymswapError(f'`arch="{arch}"` goes with a file, and none of the models is one')
    if weights is not None and len(files) == len(names):
        raise AsymswapError(f'`weights="{weights}"` goes with a reference, and all models are files with their own')
    opened = []
    for model in models:
        is_file = isinstance(model, str | Path) and str(model) in files
        own: dict[str, Any] = {"arch": arch, "key": key} if is_file else {"weights": weights}
        opened.append(open_model(model, **own, **options))
    return opened


def original_of(opened: OpenedModel) -> nn.Module:
    """Return the unconverted model, of a checkpoint with unset weights; raise CheckpointError if it needs user code."""
    if not opened.plans:
        return opened.model
    if opened.base is not None:
        return opened.base
    try:
        return rebuild(opened.origin, opened.skeleton)
    except AsymswapError as error:
        raise CheckpointError(f"{opened.reference} cannot be rebuilt: {error}; {HOW_TO_BUILD}") from None


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


def _from_result(result: Converted, request: Request) -> OpenedModel:
    """Describe a conversion, a fusion or a fine-tuned model, which stays the caller's."""
    header = getattr(result, "header", None)
    if not isinstance(header, Header):
        raise SourceError(f"a {type(result).__name__} is no model; give a reference, a file or an nn.Module")
    reference = read_history(header.provenance, "the conversion").report.model.reference or header.origin.reference
    opened = _describe_converted(result.model, header, _build_named(header.origin, request), "as given")
    return replace(opened, reference=reference)


def _open_file(path: Path, request: Request, progress: Progress) -> OpenedModel:
    path = resolve(path)
    if request.weights is not None:
        raise SourceError(f"`weights=…` goes with a reference; {path} brings its own weights")
    with fail_if_modified(*files_of(path)):
        raw = read_raw(path, request.trust_pickle)
        notes = about_trust(path, raw, request)
        try:
            stored = stored_in(raw, str(path))
            if stored is not None:
                opened = _open_converted(path, stored, request)
            else:
                opened = open_loaded(path, raw, request, progress)
        except AsymswapError as error:
            if not raw.executed:
                raise
            # Code ran, whatever the result.
            raise SourceError(f"{error}; {notes[0]}") from error
    return replace(opened, notes=(*notes, *opened.notes))


def _open_converted(path: Path, stored: Stored, request: Request) -> OpenedModel:
    if request.key is not None:
        raise SourceError(f"`key=…` goes with training checkpoints; {path} was converted before and holds one model")
    base = _build_named(stored.header.origin, request)
    opened = _describe_converted(restore(stored, str(path), base), stored.header, base, f"file {path.name}")
    times = {1: "once", 2: "twice"}.get(len(opened.plans), f"{len(opened.plans)} times")
    built = how_built(request.arch) if isinstance(request.arch, str) else ()
    return replace(opened, notes=(f"converted before, {times}", *built), file=path, sha256=sha256(path), private=True)


def _describe_converted(model: nn.Module, header: Header, base: nn.Module | None, weights: str) -> OpenedModel:
    """Describe a converted model; what was a guess of its preprocessing when it was written stays one."""
    known, guesses = header.preprocessing, ("family", "assumed")
    preprocessing = replace(
        known,
        normalization_from=known.normalization_from if known.normalization_from in guesses else "file",
        size_from=known.size_from if known.size_from in guesses else "file",
    )
    opened = OpenedModel(model, header.origin, preprocessing, weights, skeleton=header.skeleton, base=base)
    return replace(opened, plans=header.plans, provenance=header.provenance)


def _build_named(origin: Origin, request: Request) -> nn.Module | None:
    """Build the unconverted model of a checkpoint that `arch` names; the same network as it was built then."""
    arch = request.arch
    if arch is None or isinstance(arch, nn.Module):
        return arch
    same = canonical(arch) == origin.reference or same_callable(arch, origin.reference)
    stored = origin.arguments if same else {}
    family, full = find_architecture(arch, request.trust_code)
    return family.build(full, {**stored, **request.arguments})
