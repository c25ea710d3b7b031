"""Converted models: built unconverted, swapped, filled strictly with their weights; saved only where that works."""

from pathlib import Path

import torch
import torchvision.ops  # also registers torch.ops.torchvision
from torch import nn

import asymswap
from asymswap.checkpoint import Header, Stored, read_checkpoint, write_checkpoint
from asymswap.errors import AsymswapError, CheckpointError, OutputError, PlanError, SourceError, reason_of
from asymswap.fileformats import extra_state
from asymswap.fileformats.state_dict import Difference, compare, load_state_
from asymswap.fileformats.torch_files import from_structure
from asymswap.graph.surgery import swap
from asymswap.models import builders, timm_models
from asymswap.models.factories import how_to_build
from asymswap.models.family import package
from asymswap.models.opened import GIVEN, OpenedModel
from asymswap.planning.apply import apply_plan
from asymswap.types import Origin
from asymswap.utils.tensors import WithoutMemory, meta_copy


def rebuild(origin: Origin, skeleton: bytes | None) -> nn.Module:
    """Build the unconverted model of an origin, with unset weights; raise SourceError if that takes the user's code."""
    if skeleton is not None:
        return from_structure(skeleton)
    full = builders.canonical(origin.reference, origin.arguments)
    if full is None:
        raise SourceError(f"it was built by {origin.reference}, which is code or a file of yours")
    return builders.family_of(full).build_unset(full, origin.arguments)


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
    """Return the unconverted model where no later verb could have it again, or its weights; None where one can."""
    if opened.base is not None or opened.plans:
        return opened.base
    named = opened.skeleton is not None or builders.canonical(opened.origin.reference) is not None
    return None if named and opened.weights != GIVEN else opened.model


def versions(origin: Origin) -> dict[str, str]:
    """Return the versions of all that a checkpoint of this origin was made with, for its provenance."""
    found = {"asymswap": asymswap.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    if origin.reference.startswith(timm_models.PREFIX):
        found["timm"] = str(package("timm").__version__)
    return found


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a converted model: a plain trainable `nn.Module` of the original class with the swaps in it, in eval mode.

    `model` is the unconverted model, with any weights, where its class is known only to you; it is not changed.
    Nothing in the file is executed.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise AsymswapError(f"model= takes a module, such as Net(), not {model!r}")
    return restore(read_checkpoint(Path(path)), str(path), model)


def restore(stored: Stored, label: str, model: nn.Module | None = None) -> nn.Module:
    """Return the converted model with its weights, in eval mode and trainable; raise CheckpointError for a misfit.

    `model` is the unconverted model, of any weights, where only the user can build it; it is not changed.
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
            about = difference or f"it lacks {lacking[0]}"
            raise OutputError(f"{path} would not load again, so it is not written: {about}")

    write_checkpoint(path, model, header, check)
