"""From whatever names a model (a reference, a file, an asymswap checkpoint, a module) to one that can be worked on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torchvision.ops  # noqa: F401  (registers torch.ops.torchvision)
from torch import nn

from asymswap.checkpoint import Header, Stored, stored_in
from asymswap.errors import AsymswapError, SourceError, TraceError
from asymswap.fileformats.detect import resolve, sha256
from asymswap.fileformats.model_file import RawFile, read_raw
from asymswap.fileformats.shards import files_of
from asymswap.measure.macs import Costs, count_costs
from asymswap.models.builders import canonical
from asymswap.models.converted import restore
from asymswap.models.factories import how_built, same_callable
from asymswap.models.preprocessing import PreprocessingOptions, size_warning, with_size
from asymswap.models.references import (
    Request,
    Source,
    about_trust,
    build_architecture,
    describe_module,
    is_file_reference,
    open_loaded,
    open_reference,
    weights_in,
)
from asymswap.types import Origin, Plan, Preprocessing, Progress, silent
from asymswap.utils.files import fail_if_modified
from asymswap.utils.inputs import Inputs, describe
from asymswap.utils.inputs import example as make_example
from asymswap.utils.tensors import meta_copy

Model = str | Path | nn.Module
"""A reference, a file, or a module that exists already."""


@dataclass(frozen=True)
class OpenedModel:
    """A model with its origin, the conversions that it has been through already, and what it takes as input.

    `provenance` is what an asymswap checkpoint tells of itself.
    """

    source: Source
    plans: tuple[Plan, ...]
    reference: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The module itself."""
        return self.source.model

    def example(self) -> Inputs:
        """One input of the right size and dtype, on the meta device: enough to trace and to count."""
        return make_example(self.source.preprocessing, self.dtype())

    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of the input."""
        return model_dtype(self.model)


def open_together(
    models: Sequence[Model],
    request: Request,
    input_size: tuple[int, ...] | None = None,
    progress: Progress = silent,
    prepare: PreprocessingOptions | None = None,
) -> list[OpenedModel]:
    """Open several models by one request: its `arch` and `key` are the files' among them, its `weights` the others'.

    Raises AsymswapError where one of these suits none of the models, and where one of them cannot be had.
    """
    names = [str(model) for model in models if not isinstance(model, nn.Module)]
    files = [name for name in names if is_file_reference(name)]
    if request.arch is not None and not files:
        raise AsymswapError(f"--arch {request.arch} goes with a file, and none of the models is one")
    if request.weights is not None and len(files) == len(names):
        raise AsymswapError(
            f"--weights {request.weights} goes with a reference, and all models are files with their own"
        )
    opened = []
    for model in models:
        file = not isinstance(model, nn.Module) and is_file_reference(str(model))
        own = replace(request, weights=None) if file else replace(request, arch=None, key=None)
        opened.append(open_model(model, own, input_size, progress, prepare))
    return opened


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def open_model(
    model: Model,
    request: Request,
    input_size: tuple[int, ...] | None = None,
    progress: Progress = silent,
    prepare: PreprocessingOptions | None = None,
) -> OpenedModel:
    """Open any model, one that is read or built in eval mode; `input_size` is (channels, height, width).

    For clips, `input_size` has the frames behind the channels; `prepare` is what else the user says of the input.
    Raises SourceError where the model cannot be had.
    """
    header: Header | None = None
    if isinstance(model, nn.Module):
        model = _unwrapped(model)
        source, reference = describe_module(model, "as given"), type(model).__name__
    else:
        reference = str(model)
        if is_file_reference(reference):
            source, header = _open_file(Path(reference), request, progress)
        else:
            source = open_reference(reference, request)
        source.model.eval()
    source = replace(source, preprocessing=prepared(source.preprocessing, input_size, prepare))
    if header is None:
        return OpenedModel(source, (), reference)
    return OpenedModel(source, header.plans, reference, header.provenance)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of what torch.compile or DataParallel put around it; raises SourceError for one without copy.

    A conversion works on a copy, which a lock or an open file in a module prevents.
    """
    while True:
        inside = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = model.module
        if not isinstance(inside, nn.Module):
            break
        model = inside
    try:
        meta_copy(model)
    except TypeError as error:
        raise SourceError(
            f"the {type(model).__name__} cannot be copied ({' '.join(str(error).split())[:120]}); "
            "take out what it holds beside layers and data, such as a lock or an open file"
        ) from None
    return model


def prepared(
    known: Preprocessing, input_size: tuple[int, ...] | None, prepare: PreprocessingOptions | None
) -> Preprocessing:
    """How images are prepared: as it is known, but for what the user says."""
    sized = known if input_size is None else with_size(known, input_size)
    return sized if prepare is None else prepare.apply(sized)


def sizes_assumed(opened: Iterable[OpenedModel]) -> tuple[str, ...]:
    """What to say first where nobody gave the size of a model's input."""
    warnings = [f"{one.reference}: {line}" for one in opened for line in size_warning(one.source.preprocessing)]
    return tuple(dict.fromkeys(warnings))


def stored_preprocessing(header: Header) -> Preprocessing:
    """The preprocessing in a converted file; what was only taken for granted when it was written stays so."""
    preprocessing = header.preprocessing
    guesses = ("family", "assumed")
    origins = [
        origin if origin in guesses else "file"
        for origin in (preprocessing.normalization_from, preprocessing.size_from)
    ]
    return replace(preprocessing, normalization_from=origins[0], size_from=origins[1])


def _open_file(path: Path, request: Request, progress: Progress) -> tuple[Source, Header | None]:
    path = resolve(path)
    with fail_if_modified(*files_of(path)):
        raw = read_raw(path, request.trust_pickle)
        told = about_trust(path, raw, request)
        try:
            source, header = _open_raw(path, raw, request, progress)
        except AsymswapError as error:
            if not raw.executed:
                raise
            # What was run was run, whatever came of it.
            raise SourceError(f"{error}; {told[0]}") from error
    return replace(source, notes=(*told, *source.notes)), header


def _open_raw(path: Path, raw: RawFile, request: Request, progress: Progress) -> tuple[Source, Header | None]:
    stored = stored_in(raw, str(path))
    if stored is not None:
        return _open_converted(path, stored, request), stored.header
    return open_loaded(path, weights_in(path, raw, request), request, progress), None


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _open_converted(path: Path, stored: Stored, request: Request) -> Source:
    if request.weights is not None:
        raise SourceError(f"--weights goes with a reference; {path} brings its own weights")
    if request.key is not None:
        raise SourceError(f"--key goes with training checkpoints; {path} was converted before and holds one model")
    header = stored.header
    return Source(
        model=restore(stored, str(path), build_named(header.origin, request)),
        origin=header.origin,
        preprocessing=stored_preprocessing(header),
        weights=f"file {path.name}",
        notes=(f"converted before, {_times(len(header.plans))}", *how_built(request.arch or "")),
        skeleton=header.skeleton,
        file=path,
        sha256=sha256(path),
        private=True,
    )


def build_named(origin: Origin, request: Request) -> nn.Module | None:
    """The unconverted model of a checkpoint as `--arch` names it, if it does.

    The same network or callable named again is built as it was when the checkpoint was made.
    """
    if request.arch is None:
        return None
    same = canonical(request.arch) == origin.reference or same_callable(request.arch, origin.reference)
    stored = origin.arguments if same else {}
    return build_architecture(request.arch, {**stored, **request.arguments}, request.trust_code)


def costs_of(opened: OpenedModel, names: Iterable[str] = ()) -> Costs:
    """The cost of an opened model, and of the named modules in it.

    Raises TraceError where it does not run on an input of its size, or runs without a single multiplication.
    """
    try:
        costs = count_costs(opened.model, opened.example(), names)
    except Exception as error:
        # What a network says about an input that it does not take is its own.
        about, reason = describe(opened.example()), " ".join(str(error).split())[:200]
        raise TraceError(
            f"{opened.reference} does not run on {about}: {reason or type(error).__name__}; give another --input"
        ) from error
    if costs.total.macs == 0:
        raise TraceError(
            f"{opened.reference} costs 0 MACs on {describe(opened.example())}: no convolution, linear layer or matrix "
            "product was seen to run; give the network itself if this is a wrapper around it"
        )
    return costs
