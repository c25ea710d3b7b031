"""Open models: from a reference, a file, a module or a conversion to an `OpenedModel`; rebuild and save converted ones.

A converted model is built unconverted, its structure is swapped, and its state dict loaded strictly; a file is written
only where that works.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torchvision.ops  # also registers torch.ops.torchvision
from torch import nn

import asymswap
from asymswap.checkpoint import Header, Stored, write_checkpoint
from asymswap.errors import AsymswapError, CheckpointError, OutputError, PlanError, SourceError, reason_of
from asymswap.fileformats import extra_state
from asymswap.fileformats.detect import resolve, sha256
from asymswap.fileformats.state_dict import Difference, compare, load_state_
from asymswap.graph.surgery import swap
from asymswap.models import builders, timm_models
from asymswap.models.factories import describe_module, how_built, how_to_build, same_callable
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import PreprocessingOptions, with_size
from asymswap.models.references import Request, find_architecture, is_file_reference, open_file, open_reference, rebuild
from asymswap.planning.apply import apply_plan
from asymswap.results.records import read_history
from asymswap.types import Origin, Progress, silent
from asymswap.utils.inputs import arguments_of, placed
from asymswap.utils.tensors import WithoutMemory, meta_copy


class Converted(Protocol):
    """What a conversion, a fusion and a fine-tuned model have in common; `base` as in `OpenedModel`."""

    model: nn.Module
    header: Header
    base: nn.Module | None


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
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
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
    - `trust_pickle`: let a pickle run its code;
    - `input_size`: (channels, height, width) of one image, for a clip (channels, frames, height, width);
    - `example_inputs`: arguments of one forward pass in place of `input_size`: a tensor, a tuple, or a dict by name;
    - `preprocessing`: how images are prepared, where that is not what weights, family or file say.

    A package or a Python file that a reference names is run, which can do whatever you can; what a file names is not.
    Raises SourceError where there is no such model, CheckpointError for a damaged asymswap checkpoint.
    """
    start = time.perf_counter()
    if isinstance(arch, nn.Module) and arguments:
        raise SourceError(f"`arch=…` is a module already, so the argument {next(iter(arguments))!r} changes nothing")
    request = Request(arch=arch, weights=weights, arguments=arguments or {}, key=key, trust_pickle=trust_pickle)
    if isinstance(model, OpenedModel):
        if request != Request():
            raise SourceError(f"{model.reference} is open already; give these options where it is opened first")
        opened = model
    elif isinstance(model, nn.Module):
        network = _unwrapped(model)
        opened = replace(describe_module(network, "as given"), reference=type(network).__name__)
    elif not isinstance(model, str | Path):
        # A conversion, a fusion or a fine-tuned model, which stays the caller's.
        header = getattr(model, "header", None)
        if not isinstance(header, Header):
            raise SourceError(f"a {type(model).__name__} is no model; give a reference, a file or an nn.Module")
        base = model.base if arch is None else _build_named(header.origin, request)
        opened = _describe_converted(model.model, header, base, "as given")
        named = read_history(header.provenance, "the conversion").report.model.reference
        opened = replace(opened, reference=named or header.origin.reference)
    else:
        reference = str(model)
        if not is_file_reference(reference):
            opened = open_reference(reference, request)
        elif weights is None:
            opened = open_file(Path(reference), request, progress, _open_converted)
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
    opened = replace(opened, preprocessing=prepared, example_inputs=example)
    return replace(opened, seconds=opened.seconds + time.perf_counter() - start)


def open_for_verb(
    model: Model,
    progress: Progress = silent,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Any = None,
    preprocessing: PreprocessingOptions | None = None,
) -> OpenedModel:
    """Return the model as a verb takes it; one that was opened here is the verb's alone."""
    if isinstance(model, OpenedModel) and input_size is None and preprocessing is None and example_inputs is None:
        return model
    opened = open_model(
        model,
        input_size=input_size,
        example_inputs=example_inputs,
        preprocessing=preprocessing,
        progress=progress,
    )
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
        raise CheckpointError(f"{opened.reference} cannot be rebuilt: {error}; {how_to_build(opened.origin)}") from None


def base_of(opened: OpenedModel) -> nn.Module | None:
    """Return the unconverted model where no later verb could build it again; None where one can."""
    if opened.base is not None or opened.plans or opened.skeleton is not None:
        return opened.base
    return None if builders.canonical(opened.origin.reference) else opened.model


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
    same = builders.canonical(arch) == origin.reference or same_callable(arch, origin.reference)
    stored = origin.arguments if same else {}
    family, full = find_architecture(arch)
    return family.build(full, {**stored, **request.arguments})


def versions(origin: Origin) -> dict[str, str]:
    """Return the versions of all that a checkpoint of this origin was made with, for its provenance."""
    found = {"asymswap": asymswap.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    if origin.reference.startswith(timm_models.PREFIX):
        found["timm"] = str(timm_models.timm().__version__)
    return found


def restore(stored: Stored, label: str, model: nn.Module | None = None) -> nn.Module:
    """Return the converted model with its weights, in eval mode and trainable.

    `model` is the unconverted model, of any weights, where only the user can build it; it is not changed. Raises
    CheckpointError where the parts do not fit each other.
    """
    header = stored.header
    try:
        difference = _try_without_memory(stored, model)
        if not difference:
            base = rebuild(header.origin, header.skeleton) if model is None else model
            for plan in header.plans:
                base = apply_plan(base, plan, share=base is not model, weights="unset")
            base = swap(base, {}) if base is model else base
            difference = compare(base, stored.state)
    except AsymswapError as error:
        how = how_to_build(header.origin) if model is None else "the model given is not the one that was converted"
        raise CheckpointError(f"{label} cannot be rebuilt: {error}; {how}") from None
    if difference:
        raise CheckpointError(f"{label} does not fit {header.origin.reference}: {difference}")
    unlike = sorted(extra_state.owners(base).keys() ^ stored.extra.keys())
    if unlike:
        lacks = "lacks" if unlike[0] not in stored.extra else f"is not of {header.origin.reference}: it has"
        raise CheckpointError(f"{label} {lacks} the extra state {unlike[0]!r}")
    try:
        load_state_(base, stored.state, take=model is None)
        extra_state.load_(base, stored.extra)
    except SourceError as error:
        raise CheckpointError(f"{label} cannot be used: {error}") from None
    return base.eval()


def _try_without_memory(stored: Stored, model: nn.Module | None) -> Difference | None:
    """Compare the state dict with the header's model, without memory for that model; None where that cannot be done."""
    try:
        # Sizes computed with tensors, as RegNet's are, stay real.
        with WithoutMemory(torch.empty, torch.empty_like):
            base = rebuild(stored.header.origin, stored.header.skeleton) if model is None else meta_copy(model)
    except Exception:
        # Some networks run themselves while they are built; what else may be wrong shows when it is done for real.
        return None
    try:
        with WithoutMemory(torch.empty, torch.empty_like, torch.zeros, torch.ones, torch.full, torch.tensor):
            for plan in stored.header.plans:
                base = apply_plan(base, plan, weights="unset")
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"its plan asks for what cannot be built ({reason_of(error)})") from None
    return compare(base, stored.state)


def save_checkpoint(path: Path, model: nn.Module, header: Header) -> None:
    """Write a converted model; raise OutputError where the file cannot be written, or would not load again."""

    def check(stored: Stored) -> None:
        try:
            difference = _try_without_memory(stored, None)
        except AsymswapError:
            # Only the user can build it again: it must be what was converted.
            difference = compare(model, stored.state)
        lacking = sorted(extra_state.owners(model).keys() ^ stored.extra.keys())
        if difference or lacking:
            about = str(difference) if difference else f"it lacks {lacking[0]}"
            raise OutputError(f"{path} would not load again, so it is not written: {about}")

    write_checkpoint(path, model, header, check)
