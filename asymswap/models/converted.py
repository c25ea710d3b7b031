"""Converted models and their files: construct, swap the structure, load strictly; write only where that works."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn

import asymswap
from asymswap.checkpoint import Header, Stored, write_checkpoint
from asymswap.errors import AsymswapError, CheckpointError, OutputError, PlanError, SourceError, reason_of
from asymswap.fileformats import extra_state
from asymswap.fileformats.state_dict import Difference, compare, load_state_
from asymswap.graph.surgery import swap
from asymswap.models import builders
from asymswap.models.references import rebuild
from asymswap.planning.apply import apply_structure
from asymswap.types import Origin
from asymswap.utils.tensors import WithoutMemory, meta_copy

HOW_TO_BUILD = "load it with asymswap.load(path, model=…) or give `arch=…`"


def versions(origin: Origin) -> dict[str, str]:
    """Return the versions of all that a checkpoint of this origin was made with, for its provenance."""
    own = {"asymswap": asymswap.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    return own | builders.versions(origin)


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
                base = apply_structure(base, plan, share=base is not model)
            base = swap(base, {}) if base is model else base
            difference = compare(base, stored.state)
    except AsymswapError as error:
        how = HOW_TO_BUILD if model is None else "the model given is not the one that was converted"
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
                base = apply_structure(base, plan)
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
